"""Files of the authors' implementation become checkpoints that give its numbers."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from atomas.cli import main
from atomas.data.batching import PairBatch, RaggedTokens
from atomas.data.tokenizer import AtomasTokenizer
from atomas.model.atomas import AtomasModel
from atomas.model.backbone import t5_from_config
from atomas.model.momentum_encoder import Momentum
from atomas.training.authors_checkpoint import ImportedModel, interpret, read_state
from atomas.training.model_files import build_model, load_weights, read_model

LOSSES = ("loss/global", "loss/lm", "loss/hierarchical", "loss")


@pytest.fixture(scope="module")
def training(golden: Path) -> dict[str, Tensor]:
    return load_file(golden / "training.safetensors")


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    AtomasTokenizer.train(["C1=CC=CC=C1O", "A benzene ring with a hydroxy group."] * 4, 380).save(folder)
    return folder


def authors_state(training: dict[str, Tensor], task: str) -> dict[str, Tensor]:
    prefix = f"{task}.init."
    return {name.removeprefix(prefix): t.clone() for name, t in training.items() if name.startswith(prefix)}


def golden_batch(training: dict[str, Tensor]) -> PairBatch:
    text, smiles = training["text_ids"], training["smiles_ids"]
    numbers = torch.arange(len(text))

    def tokens(ids: Tensor) -> RaggedTokens:
        return RaggedTokens(ids=ids.flatten(), lengths=torch.full((len(ids),), ids.shape[1]))

    return PairBatch(
        text=tokens(text), smiles=tokens(smiles), molecule_id=numbers, text_id=numbers, sample_id=numbers
    )


def first_losses(model: AtomasModel, momentum: Momentum, batch: PairBatch) -> dict[str, Tensor]:
    """Losses of the first step: the momentum copy is updated before its features are computed."""
    momentum.update([dict(model.named_parameters(remove_duplicate=False))])
    return model(batch, momentum.targets(batch))


def assemble(imported: ImportedModel) -> tuple[AtomasModel, Momentum]:
    tied = "encoder.backbone.t5.lm_head.weight" not in imported.weights
    t5 = t5_from_config(imported.t5_config, decoder=True, tied=tied)
    model = build_model(imported.config, imported.t5_config.vocab_size, t5=t5).eval()
    load_weights(model, imported.weights, source="test")
    momentum = Momentum(model.encoder, imported.config.momentum)
    assert imported.momentum is not None
    assert imported.queue is not None
    load_weights(momentum, imported.momentum, source="test")
    momentum.queue = imported.queue
    return model, momentum


@pytest.mark.parametrize("task", ["genmol", "gentext"])
@pytest.mark.parametrize("form", ["lightning", "safetensors"])
def test_golden_losses(training: dict[str, Tensor], tmp_path: Path, task: Any, form: str) -> None:
    state = authors_state(training, task)
    file = tmp_path / f"released.{'ckpt' if form == 'lightning' else form}"
    if form == "lightning":
        arguments = argparse.Namespace(lr=1e-4)
        torch.save({"state_dict": state, "global_step": 7, "hyper_parameters": {"args": arguments}}, file)
    else:
        save_file(state, file)
    read, step = read_state(file)
    assert step == (7 if form == "lightning" else 0)
    imported = interpret(read, task=task, source="test")
    assert imported.report == []
    losses = first_losses(*assemble(imported), golden_batch(training))
    assert_close(
        torch.stack([losses[name] for name in LOSSES]),
        training[f"{task}.losses"][0].float(),
        rtol=2e-5,
        atol=2e-5,
    )


def test_sizes_are_those_of_the_golden_t5(training: dict[str, Tensor], golden: Path) -> None:
    import json

    imported = interpret(authors_state(training, "genmol"), task="genmol", source="test")
    expected = json.loads((golden / "t5_config.json").read_text())
    found = json.loads(imported.t5_config.to_json_string(use_diff=False))
    for key in expected.keys() - {"dropout_rate", "transformers_version", "return_dict"}:
        assert found.get(key) == expected[key], key


def test_command_makes_a_checkpoint_with_the_golden_losses(
    training: dict[str, Tensor], tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": authors_state(training, "genmol")}, tmp_path / "released.ckpt")
    out = tmp_path / "imported"
    main(
        [
            "import-checkpoint",
            str(tmp_path / "released.ckpt"),
            "--tokenizer",
            str(tokenizer_folder),
            "--out",
            str(out),
        ]
    )
    assert capsys.readouterr().out == f"checkpoint: {out}\n"
    model, tokenizer, config = read_model(out)
    # the tokenizer has more pieces than the golden model rows: those of the new ones are copies of <unk>'s
    shared = model.encoder.backbone.t5.shared.weight
    assert shared.shape[0] == tokenizer.vocab_size > 160
    assert torch.equal(shared[160:], shared[2].expand(len(shared) - 160, -1))
    with torch.no_grad():
        shared.set_(shared[:160].clone())
        model.encoder.backbone.t5.lm_head.weight.set_(shared)
    momentum = Momentum(model.encoder, config.momentum)
    slow = load_file(out / "model" / "momentum.safetensors")
    slow["encoder.backbone.t5.shared.weight"] = slow["encoder.backbone.t5.shared.weight"][:160]
    load_weights(momentum, slow, source="test")
    for name, value in load_file(out / "queue.safetensors").items():
        getattr(momentum.queue, name).copy_(value)
    momentum.queue.filled = len(momentum.queue.text)
    losses = first_losses(model, momentum, golden_batch(training))
    assert_close(
        torch.stack([losses[n] for n in LOSSES]), training["genmol.losses"][0].float(), rtol=2e-5, atol=2e-5
    )


def without(state: dict[str, Tensor], *groups: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.startswith(groups)}


@pytest.mark.parametrize(
    ("groups", "line"),
    [
        (
            ("molt5_m.", "text_linear_m"),
            "missing: molt5_m, text_linear_m: imported without the momentum copy",
        ),
        (("text_queue",), "missing: text_queue: imported with an empty queue"),
        (("text_linear", "smiles_linear"), "missing: text_linear, smiles_linear: no global alignment"),
        (
            ("text_weight_fc", "smiles_weight_fc"),
            "missing: text_weight_fc_*: imported without the hierarchical",
        ),
    ],
)
def test_parts_that_are_absent_as_a_whole_get_a_line(
    training: dict[str, Tensor], groups: tuple[str, ...], line: str
) -> None:
    imported = interpret(without(authors_state(training, "genmol"), *groups), task="genmol", source="test")
    assert imported.report[0].startswith(line)


def test_what_is_unexpected_gets_a_line(training: dict[str, Tensor]) -> None:
    state = authors_state(training, "genmol") | {"mystery.a": torch.ones(1), "mystery.b": torch.ones(1)}
    state["molt5.decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.ones(32, 4)
    report = interpret(state, task="genmol", source="test").report
    assert report == [
        "unexpected: mystery (2 tensors), left out",
        "unexpected: encoder.backbone.t5 (1 tensors), left out",
    ]


class Malice:
    def __reduce__(self) -> Any:
        return (print, ("code was run",))


def test_mistakes_are_one_line(
    training: dict[str, Tensor], tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = authors_state(training, "genmol")
    files: dict[str, Any] = {
        "objects.ckpt": {"state_dict": state, "callback": Malice()},
        "other.pt": {"weight": torch.ones(2)},
        "nothing.pt": {"epoch": 3},
        "half.pt": without(state, "s_block2"),
        "cut.pt": without(
            state, "molt5.shared", "molt5.encoder.embed", "molt5.decoder.embed", "molt5.lm_head"
        ),
        "good.pt": state,
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "text.pt").write_text("no checkpoint")
    (tmp_path / "hello.ckpt").write_text("hello\n")  # instructions without sense to the unpickler
    (tmp_path / "empty.ckpt").touch()
    (tmp_path / "text.safetensors").write_text("no checkpoint")
    tokenizer = ["--tokenizer", tokenizer_folder]
    for name, options, message in (
        ("objects.ckpt", tokenizer, "print"),
        ("other.pt", tokenizer, "no tensors of `molt5`"),
        ("nothing.pt", tokenizer, "no tensors under their names"),
        ("half.pt", tokenizer, "lacks alignment.smiles.polymerizations (8 tensors)"),
        ("cut.pt", tokenizer, "shared.weight"),
        ("text.pt", tokenizer, "text.pt"),
        ("hello.ckpt", tokenizer, "hello.ckpt is no checkpoint"),
        ("empty.ckpt", tokenizer, "empty.ckpt is no checkpoint"),
        ("text.safetensors", tokenizer, "cannot be read"),
        ("none.pt", tokenizer, "does not exist"),
        ("good.pt", [], "--tokenizer"),
        ("good.pt", ["--tokenizer", tmp_path], "no tokenizer"),
    ):
        arguments = ["import-checkpoint", tmp_path / name, "--out", tmp_path / "out", *options]
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        assert stopped.value.code == 2, name
        captured = capsys.readouterr()
        (line,) = captured.err.splitlines()
        assert line.startswith("atomas: error: ")
        assert message in line, name
        assert "code was run" not in captured.out
        assert not (tmp_path / "out").exists()
