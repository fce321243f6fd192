"""The ragged T5 against transformers' own padded one."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import BertConfig, T5Config, T5ForConditionalGeneration

from atomas.config import ModelConfig
from atomas.data.batching import RaggedTokens
from atomas.errors import AtomasError
from atomas.model.backbone import Backbone, build_t5, t5_from_config

TEXT, TARGET = [5, 2, 9, 1, 9], [3, 8, 1, 4, 6]


def _model_config(**keys: Any) -> ModelConfig:
    sizes: dict[str, Any] = {
        "d_model": 16,
        "d_kv": 4,
        "d_ff": 24,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
    }
    return ModelConfig(**{**sizes, **keys})


@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("token_budget", [1, 20, 1000])
def test_states_and_loss_are_those_of_each_sequence_alone(
    make_tokens: Any, feed_forward: Any, tied: bool, token_budget: int
) -> None:
    torch.manual_seed(0)
    config = _model_config(feed_forward=feed_forward, tie_word_embeddings=tied)
    t5 = build_t5(config, 40, decoder=True).double().eval()
    assert (t5.lm_head.weight is t5.shared.weight) == tied
    backbone = Backbone(t5, token_budget=token_budget)
    source, target = make_tokens(TEXT), make_tokens(TARGET, seed=1)

    states = backbone.encode(source)
    loss = backbone.language_model_loss(states, source.lengths, target)

    rows = zip(source.ids.split(TEXT), target.ids.split(TARGET), strict=True)
    expected_states, logits = [], []
    for text, written in rows:
        start = torch.cat([torch.zeros(1, dtype=torch.int64), written[:-1]])
        output = t5(input_ids=text[None], decoder_input_ids=start[None])
        expected_states.append(output.encoder_last_hidden_state[0])
        logits.append(output.logits[0])
    assert_close(states, torch.cat(expected_states), rtol=1e-10, atol=1e-12)
    expected = torch.nn.functional.cross_entropy(torch.cat(logits), target.ids)
    assert_close(loss, expected, rtol=1e-10, atol=1e-12)


def test_logits_for_generation_stay(make_tokens: Any) -> None:
    backbone = Backbone(build_t5(_model_config(), 40, decoder=True).eval(), token_budget=64)
    written = backbone.t5.generate(input_ids=make_tokens([4]).ids[None], max_new_tokens=5, num_beams=2)
    assert written.shape[0] == 1


def test_activation_checkpointing_changes_no_gradient(make_tokens: Any) -> None:
    source, target = make_tokens(TEXT), make_tokens(TARGET, seed=1)
    gradients, runs = [], []
    for recompute in (False, True):
        torch.manual_seed(0)
        t5 = build_t5(_model_config(dropout_rate=0.1), 40, decoder=True)
        backbone = Backbone(t5, token_budget=64, activation_checkpointing=recompute).train()
        layers = [stack.block[1].layer[-1] for stack in (t5.encoder, t5.decoder)]
        runs.append(_count_runs(layers))
        backbone.language_model_loss(backbone.encode(source), source.lengths, target).backward()
        gradients.append([parameter.grad for parameter in backbone.parameters()])
    assert [len(calls) for calls in runs] == [2, 4]
    for plain, recomputed in zip(*gradients, strict=True):
        assert_close(recomputed, plain)


def _compiled_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(
    ("backend", "recompute"),
    [
        ("eager", False),
        pytest.param("eager", True, marks=pytest.mark.slow),
        pytest.param("inductor", False, marks=pytest.mark.slow),
        pytest.param("inductor", True, marks=pytest.mark.slow),
    ],
)
def test_compiled_blocks_do_not_recompile_with_lengths(
    make_tokens: Any, backend: str, recompute: bool
) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    t5 = build_t5(_model_config(), 40, decoder=True)
    plain = Backbone(t5, token_budget=30).train()
    compiled = Backbone(copy.deepcopy(t5), token_budget=30, activation_checkpointing=recompute).train()
    compiled.compile_blocks(backend)
    lengths = torch.randint(1, 14, (6, 2, 4), generator=torch.Generator().manual_seed(0)).tolist()
    graphs = []
    for number, (source_lengths, target_lengths) in enumerate(lengths):
        source = make_tokens(source_lengths, seed=2 * number)
        target = make_tokens(target_lengths, seed=2 * number + 1)
        losses = []
        for backbone in (plain, compiled):
            loss = backbone.language_model_loss(backbone.encode(source), source.lengths, target)
            loss.backward()
            with torch.no_grad():
                losses += [loss.detach(), backbone.eval().encode(source).sum()]
            backbone.train()
        assert_close(losses[2:], losses[:2], rtol=1e-5, atol=1e-4)
        graphs.append(_compiled_graphs())
    # Projection of one, two and three products, addition and feed-forward; with and without gradient.
    assert 5 <= graphs[1] <= 12
    assert set(graphs[1:]) == {graphs[1]}
    for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("passes", [4, len(TEXT) + 3])
def test_ranks_run_equally_many_passes(
    make_tokens: Any, monkeypatch: pytest.MonkeyPatch, passes: int
) -> None:
    """Also where another rank has more of them than there are sequences here."""
    t5 = build_t5(_model_config(), 40, decoder=True).eval()
    backbone = Backbone(t5, token_budget=sum(TEXT + TARGET))
    source, target = make_tokens(TEXT), make_tokens(TARGET, seed=1)
    encoder_runs, decoder_runs = (_count_runs([x.final_layer_norm]) for x in (t5.encoder, t5.decoder))
    loss = backbone.language_model_loss(backbone.encode(source), source.lengths, target)
    assert (len(encoder_runs), len(decoder_runs)) == (1, 1)

    backbone.in_step = True
    monkeypatch.setattr("atomas.model.backbone.all_gather_sizes", lambda count, device, what: [count, passes])
    split = backbone.language_model_loss(backbone.encode(source), source.lengths, target)
    assert (len(encoder_runs), len(decoder_runs)) == (1 + passes, 1 + passes)
    assert_close(split, loss)
    wanted = torch.autograd.grad(loss, list(t5.parameters()))
    for ours, theirs in zip(torch.autograd.grad(split, list(t5.parameters())), wanted, strict=True):
        assert_close(ours, theirs)


def test_a_sequence_does_not_depend_on_the_batch_around_it(make_tokens: Any) -> None:
    backbone = Backbone(build_t5(_model_config(), 40, decoder=False).eval(), token_budget=64)
    tokens = make_tokens(TEXT)
    together = backbone.encode(tokens).split(TEXT)
    order = [3, 0, 4, 2, 1]
    moved = RaggedTokens.from_lists([tokens.ids.split(TEXT)[row].tolist() for row in order])
    for row, states in zip(order, backbone.encode(moved).split([TEXT[row] for row in order]), strict=True):
        assert_close(states, together[row])


def test_attention_weights_are_dropped(make_tokens: Any) -> None:
    backbone = Backbone(build_t5(_model_config(), 40, decoder=False), token_budget=64).train()
    tokens = make_tokens(TEXT)
    assert torch.equal(backbone.encode(tokens), backbone.encode(tokens))
    for block in backbone.t5.encoder.block:
        block.layer[0].SelfAttention.dropout = 0.5
    assert not torch.equal(backbone.encode(tokens), backbone.encode(tokens))
    backbone.eval()
    assert torch.equal(backbone.encode(tokens), backbone.encode(tokens))


def _count_runs(modules: list[Any]) -> list[None]:
    """Grows by one with every run of one of the modules."""
    runs: list[None] = []
    for module in modules:
        module.register_forward_pre_hook(lambda *_: runs.append(None))
    return runs


@pytest.mark.parametrize("decoder", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_pretrained_with_new_pieces(tmp_path: Path, decoder: bool, tied: bool) -> None:
    torch.manual_seed(0)
    saved = build_t5(_model_config(tie_word_embeddings=tied), 40, decoder=True)
    saved.save_pretrained(tmp_path)
    loaded = build_t5(ModelConfig(pretrained=str(tmp_path), dropout_rate=0.25), 43, decoder=decoder)

    assert loaded.config.dropout_rate == 0.25
    assert hasattr(loaded, "lm_head") == decoder
    assert loaded.config.scale_decoder_outputs == tied
    weights = [(saved.shared.weight, loaded.encoder.embed_tokens.weight)]
    if decoder:
        weights.append((saved.lm_head.weight, loaded.lm_head.weight))
    for old, new in weights:
        assert new.shape == (43, 16)
        assert_close(new[:40], old)
        assert_close(new[40:], old[2].expand(3, -1))


def test_smaller_vocabulary_than_the_checkpoint_keeps_its_rows(tmp_path: Path) -> None:
    build_t5(_model_config(), 40, decoder=True).save_pretrained(tmp_path)
    assert build_t5(ModelConfig(pretrained=str(tmp_path)), 30, decoder=True).shared.weight.shape[0] == 40


def test_what_is_no_t5_checkpoint_is_said(tmp_path: Path) -> None:
    with pytest.raises(AtomasError, match=r"model\.pretrained = .*no T5 checkpoint"):
        build_t5(ModelConfig(pretrained=str(tmp_path)), 40, decoder=True)
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(AtomasError, match="'bert' model"):
        build_t5(ModelConfig(pretrained=str(tmp_path)), 40, decoder=True)


def test_an_untied_t5_of_older_versions_is_not_scaled() -> None:
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 1, "num_heads": 4}
    for keys, scaled in (
        ({"tie_word_embeddings": False}, False),
        ({}, True),
        ({"scale_decoder_outputs": False}, False),
    ):
        t5 = t5_from_config(T5Config(**sizes, **keys), decoder=True, tied=True)
        assert isinstance(t5, T5ForConditionalGeneration)
        assert t5.config.scale_decoder_outputs == scaled
