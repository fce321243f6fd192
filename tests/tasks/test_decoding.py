"""What a model writes, against a search written out plainly."""

import math
from pathlib import Path

import pytest
import torch

from atomas.data.batching import RaggedTokens
from atomas.data.tokenizer import EOS_ID, UNK_ID, AtomasTokenizer
from atomas.errors import AtomasError
from atomas.model.atomas import AtomasModel
from atomas.tasks.decoding import DecodingSettings, Task, Writer, warn_of_other_task
from atomas.training.model_files import read_model

TEXTS = ["The molecule is an alcohol.", "It has a benzene ring and a carboxylic acid, and it is a base.", "a"]


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> tuple[AtomasModel, AtomasTokenizer]:
    return read_model(checkpoint)[:2]


def _writer(model: tuple[AtomasModel, AtomasTokenizer], **settings: object) -> Writer:
    decoding = DecodingSettings(max_tokens=12, **settings)  # type: ignore[arg-type]
    return Writer(*model, decoding, task="generation", device=torch.device("cpu"))


@torch.no_grad()
def _greedy(model: AtomasModel, tokenizer: AtomasTokenizer, text: str, steps: int) -> str:
    """One token after another, the whole decoder each time."""
    t5 = model.encoder.backbone.t5
    ids = torch.tensor([tokenizer.encode_batch([text])[0]])
    states = t5.encoder(input_ids=ids).last_hidden_state
    written = [0]
    for _ in range(steps):
        hidden = t5.decoder(input_ids=torch.tensor([written]), encoder_hidden_states=states).last_hidden_state
        scale = t5.config.d_model**-0.5 if t5.config.scale_decoder_outputs else 1.0
        logits = t5.lm_head(hidden[0, -1] * scale)
        logits[UNK_ID] = -torch.inf
        logits[tokenizer.vocab_size :] = -torch.inf
        written.append(int(logits.argmax()))
        if written[-1] == EOS_ID:
            break
    return tokenizer.decode([number for number in written[1:] if number != EOS_ID])


def test_greedy_is_the_most_probable_token_each_time(model: tuple[AtomasModel, AtomasTokenizer]) -> None:
    written = _writer(model, beams=1).write(TEXTS)
    assert written == [[_greedy(*model, text, steps=12)] for text in TEXTS]


def test_outputs_do_not_depend_on_the_batch(model: tuple[AtomasModel, AtomasTokenizer]) -> None:
    writer = _writer(model, beams=3, num_return_sequences=2)
    together = writer.write(TEXTS)
    assert [len(outputs) for outputs in together] == [2, 2, 2]
    assert together == [writer.write([text])[0] for text in TEXTS]
    assert together == writer.write(TEXTS[::-1])[::-1]


def test_samples_follow_the_seed(model: tuple[AtomasModel, AtomasTokenizer]) -> None:
    writer = _writer(model, sample=True, num_return_sequences=4)
    assert writer.write(TEXTS, seed=1) == writer.write(TEXTS, seed=1)
    assert writer.write(TEXTS, seed=1) != writer.write(TEXTS, seed=2)


def test_nothing_is_written_for_nothing(model: tuple[AtomasModel, AtomasTokenizer]) -> None:
    assert _writer(model).write([]) == []


@pytest.mark.parametrize(("task", "start"), [("generation", 0), ("captioning", EOS_ID)])
def test_a_model_of_both_is_told_what_to_write_by_the_first_input(
    model: tuple[AtomasModel, AtomasTokenizer], task: Task, start: int
) -> None:
    read: list[list[int]] = []
    embedding = model[0].encoder.backbone.t5.decoder.embed_tokens
    hook = embedding.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].flatten().tolist()))
    Writer(*model, DecodingSettings(max_tokens=2, beams=1), task=task, device=torch.device("cpu")).write(
        ["CO"]
    )
    hook.remove()
    assert next(ids for ids in read if len(ids) == 1) == [start]  # the encoder reads more tokens


def test_a_vocabulary_with_spare_rows_writes_only_what_can_be_read() -> None:
    generation = DecodingSettings().for_transformers(start_id=0, vocab_size=95, rows=100)
    assert generation.suppress_tokens == [UNK_ID, *range(95, 100)]


def test_a_model_without_decoder_cannot_write(model: tuple[AtomasModel, AtomasTokenizer]) -> None:
    t5 = model[0].encoder.backbone.t5
    head = t5.lm_head
    del t5.lm_head
    try:
        with pytest.raises(AtomasError, match=r"loss\.lm_weight = 0"):
            _writer(model)
    finally:
        t5.lm_head = head


@pytest.mark.parametrize(
    "settings",
    [{"beams": 0}, {"max_tokens": 0}, {"num_return_sequences": 6}, {"sample": True, "temperature": 0.0},
     {"sample": True, "top_p": 0.0}, {"sample": True, "temperature": math.nan}, {"length_penalty": math.nan},
     {"temperature": 0.5}, {"top_k": 5}],
)  # fmt: skip
def test_settings_that_make_no_sense(settings: dict[str, float]) -> None:
    with pytest.raises(AtomasError, match=next(reversed(settings))):
        DecodingSettings(**settings)  # type: ignore[arg-type]


def test_longest_output(model: tuple[AtomasModel, AtomasTokenizer]) -> None:
    model_, tokenizer = model
    settings = DecodingSettings(max_tokens=3, beams=1)
    writer = Writer(model_, tokenizer, settings, task="generation", device=torch.device("cpu"))
    (output,) = writer.write(["x"])[0]
    ids = RaggedTokens.from_lists(tokenizer.encode_batch([output])).ids
    assert len(ids) <= 4  # three tokens and an end


@pytest.mark.parametrize(
    ("task", "loss_task", "warned"),
    [("captioning", "genmol", True), ("generation", "genmol", False), ("generation", "gentext", True),
     ("generation", "both", False), ("captioning", "both", False)],
)  # fmt: skip
def test_a_checkpoint_of_another_task_is_told(
    task: Task, loss_task: str, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    warn_of_other_task(task, loss_task, Path("runs/mine"))
    assert (f"runs/mine was trained with loss.task = {loss_task!r}" in capsys.readouterr().err) == warned
