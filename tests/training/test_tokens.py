"""A run on tokens is the run on texts: real runs with DeepSpeed."""

import shutil
from pathlib import Path

import pytest

from atomas.cli import main
from tests.training.conftest import Trainer, losses


@pytest.mark.slow
def test_a_run_on_tokens_has_the_losses_of_a_run_on_texts(
    train: Trainer, corpus: Path, tmp_path: Path
) -> None:
    tokenized = tmp_path / "tokenized"
    shutil.copytree(corpus, tokenized)
    main(["data", "tokenize", str(tokenized), "--tokenizer", "corpus", "--vocab-size", "400"])
    here = f"--data.corpus={tokenized}"
    steps = ("--training.max_steps=6", "--evaluation.every=6")
    train("texts", *steps, ranks=2)
    train("tokens", *steps, here, "--data.num_workers=1", ranks=2)
    assert len(losses(tmp_path / "runs/texts")) == 6
    assert losses(tmp_path / "runs/tokens") == losses(tmp_path / "runs/texts")
    assert not list((tmp_path / "runs/tokens").glob("lengths-*")), "nothing was measured"
    refused = train("other", *steps, here, "--tokenizer.vocab_size=420", code=None)
    assert refused.returncode != 0
    assert "atomas data tokenize" in refused.stderr
    train("ignored", *steps, here, "--tokenizer.vocab_size=420", "--data.tokens=ignore")
