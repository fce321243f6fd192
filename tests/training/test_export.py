"""Checkpoints for plain transformers, and back."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoTokenizer, GenerationConfig, T5Config, T5ForConditionalGeneration

from atomas.cli import main
from atomas.data.tokenizer import EOS_ID, UNK_ID, AtomasTokenizer
from atomas.model.backbone import t5_from_config
from atomas.tasks.decoding import DecodingSettings, Writer
from atomas.training.model_files import read_model
from tests.small_checkpoint import SENTENCES, write_small
from tests.training.conftest import SMALL


def atomas(*arguments: object) -> int:
    """Exit code of the command, run in this process: starting one costs seconds."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as exit:
        return int(exit.code or 0)
    return 0


def assert_generates_alike(checkpoint: Path, exported: Path, *, momentum: bool = False) -> None:
    """Plain transformers and our own model write the same ids, and decode them to the same text."""
    model, tokenizer, _ = read_model(checkpoint, momentum=momentum)
    theirs: Any = T5ForConditionalGeneration.from_pretrained(exported)
    pieces = AutoTokenizer.from_pretrained(exported)
    batch = pieces(SENTENCES, padding=True, return_tensors="pt")
    for row, sentence in zip(batch.input_ids, SENTENCES, strict=True):
        assert [number for number in row.tolist() if number] == tokenizer.encode_batch([sentence])[0]
    for options in ({}, {"num_beams": 1, "do_sample": True, "temperature": 3.0}):
        written = []
        for t5 in (model.encoder.backbone.t5, theirs):
            torch.manual_seed(0)
            rules = GenerationConfig.from_pretrained(exported, max_new_tokens=20, **options)
            written.append(t5.generate(**batch, generation_config=rules))
        assert torch.equal(*written)
        assert written[0].shape[1] > 2
        for row in written[1]:
            assert tokenizer.decode(row.tolist()) == pieces.decode(row, skip_special_tokens=True)
    assert theirs.generation_config.num_beams == 5
    assert theirs.generation_config.suppress_tokens[0] == UNK_ID
    settings = DecodingSettings(max_tokens=20)
    writer = Writer(model, tokenizer, settings, task="generation", device=torch.device("cpu"))
    rows = theirs.generate(**batch, max_new_tokens=20)
    assert writer.write(SENTENCES) == [[pieces.decode(row, skip_special_tokens=True)] for row in rows]


def test_molt5_trains_a_step_and_goes_out_again(corpus: Path, shared_data: Path, tmp_path: Path) -> None:
    """A directory like MolT5's: T5 v1.0, 32,128 rows for 32,100 tokens, and T5's own tokenizer."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=32128, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "molt5")
    pieces = AtomasTokenizer.load(shared_data / "tokenizers" / "t5")
    assert pieces.vocab_size > 32128  # characters that T5 lacks become rows of their own
    code = atomas(
        "train", *SMALL, f"--data.corpus={corpus}", f"--run.output_dir={tmp_path}", "--run.name=run",
        f"--tokenizer.source={shared_data / 'tokenizers' / 't5'}", f"--model.pretrained={tmp_path / 'molt5'}",
        "--model.polymerization_heads=2", "--training.max_steps=1", "--momentum.coefficient=0.5",
        "--optimizer.learning_rate=0.1", "--schedule.warmup_steps=0", "--schedule.name=constant",
    )  # fmt: skip
    assert code == 0
    (checkpoint,) = (tmp_path / "run" / "checkpoints").glob("step_*")
    before, after = (
        load_file(file)[name]
        for file, name in (
            (tmp_path / "molt5" / "model.safetensors", "encoder.final_layer_norm.weight"),
            (
                checkpoint / "model" / "model.safetensors",
                "encoder.backbone.t5.encoder.final_layer_norm.weight",
            ),
        )
    )
    assert not torch.equal(before, after)

    for name, options in (("online", ()), ("momentum", ("--momentum",))):
        exported = tmp_path / name
        assert atomas("export", tmp_path / "run", "--out", exported, *options) == 0
        assert_generates_alike(checkpoint, exported, momentum=bool(options))
        assert json.loads((exported / "config.json").read_text())["vocab_size"] == pieces.vocab_size
    online, momentum = (load_file(tmp_path / name / "model.safetensors") for name in ("online", "momentum"))
    assert not torch.equal(online["shared.weight"], momentum["shared.weight"])

    assert atomas("import-checkpoint", tmp_path / "online", "--out", tmp_path / "again") == 0
    assert_same_model(checkpoint, tmp_path / "again")


def assert_same_model(checkpoint: Path, other: Path) -> None:
    (one, pieces, config), (two, same_pieces, same_config) = read_model(checkpoint), read_model(other)
    assert config == same_config
    assert pieces.fingerprint == same_pieces.fingerprint
    ours, theirs = (model.encoder.backbone.t5.config.to_dict() for model in (one, two))
    for key in ours.keys() - {
        "architectures",
        "dtype",
        "_name_or_path",
    }:  # what a file is called, and stored as
        assert ours[key] == theirs[key], key
    weights = dict(two.named_parameters())
    for name, weight in one.named_parameters():
        assert torch.equal(weight, weights.pop(name)), name
    assert not weights


@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
@pytest.mark.parametrize("tied", [True, False])
def test_scaling_and_ties_survive(tmp_path: Path, tied: bool, feed_forward: str) -> None:
    checkpoint, exported = tmp_path / "checkpoint", tmp_path / "exported"
    write_small(checkpoint, tied=tied, feed_forward=feed_forward)
    assert atomas("export", checkpoint, "--out", exported) == 0
    assert_generates_alike(checkpoint, exported)
    # as transformers 4 reads it: one flag for the tie and for the scale
    assert json.loads((exported / "config.json").read_text())["tie_word_embeddings"] == tied
    assert ("lm_head.weight" in load_file(exported / "model.safetensors")) == (not tied)
    assert atomas("import-checkpoint", exported, "--out", tmp_path / "again") == 0
    assert_same_model(checkpoint, tmp_path / "again")


def test_an_encoder_alone_goes_out_as_one(tmp_path: Path) -> None:
    from transformers import T5EncoderModel

    write_small(tmp_path / "checkpoint", lm_weight=0.0)
    assert atomas("export", tmp_path / "checkpoint", "--out", tmp_path / "exported") == 0
    model, tokenizer, _ = read_model(tmp_path / "checkpoint")
    theirs = T5EncoderModel.from_pretrained(tmp_path / "exported")
    ids = torch.tensor(tokenizer.encode_batch(SENTENCES[:1]))
    with torch.no_grad():
        ours = model.encoder.backbone.t5(input_ids=ids).last_hidden_state
        assert_close(theirs(input_ids=ids).last_hidden_state, ours)
    assert not (tmp_path / "exported" / "generation_config.json").exists()


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_small(tmp_path / "checkpoint")
    full = tmp_path / "full"
    full.mkdir()
    (full / "something").touch()
    t5_from_config(
        T5Config(vocab_size=400, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=2),
        decoder=True,
        tied=True,
    ).save_pretrained(tmp_path / "plain")
    capsys.readouterr()
    for arguments, message in (
        (["export", tmp_path / "none", "--out", tmp_path / "x"], "does not exist"),
        (["export", tmp_path / "checkpoint", "--out", full], "not an empty folder"),
        (["export", tmp_path / "checkpoint", "--momentum", "--out", tmp_path / "x"], "no momentum weights"),
        (["import-checkpoint", tmp_path / "plain", "--out", tmp_path / "x"], "--model.pretrained"),
    ):
        assert atomas(*arguments) == 2, arguments
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("atomas: error: ")
        assert message in line
        assert not (tmp_path / "x").exists()
    with contextlib.suppress(FileNotFoundError):
        assert not list(tmp_path.glob(".*partial"))


def test_an_export_of_both_says_how_captions_begin(tmp_path: Path) -> None:
    for task in ("genmol", "both"):
        write_small(tmp_path / task, task=task)
        assert atomas("export", tmp_path / task, "--out", tmp_path / f"{task}-out") == 0
        rules = GenerationConfig.from_pretrained(tmp_path / f"{task}-out")
        assert rules.decoder_start_token_id == 0
    captions = "generation_config_captions.json"
    assert not (tmp_path / "genmol-out" / captions).exists()
    rules = GenerationConfig.from_pretrained(tmp_path / "both-out", captions)
    assert rules.decoder_start_token_id == EOS_ID
    assert rules.suppress_tokens[0] == UNK_ID
