"""A tiny untrained checkpoint: what commands do with it is the same, only the outputs are nonsense."""

from pathlib import Path

import pytest
import torch

from atomas.config_file import load_config
from atomas.data.demo import build_demo_corpus
from atomas.data.shards import Corpus
from atomas.data.tokenizer import resolve_tokenizer
from atomas.training.checkpoint import publish
from atomas.training.model_files import build_model, write_model

TINY = (
    "--tokenizer.vocab_size=400", "--model.d_model=32", "--model.d_kv=8", "--model.d_ff=32", "--model.num_layers=1",
    "--model.num_decoder_layers=1", "--model.num_heads=2", "--model.polymerization_heads=2", "--loss.lm_weight=1",
    "--loss.task=both",
)  # fmt: skip


@pytest.fixture(scope="session")
def demo_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks") / "corpus"
    build_demo_corpus(folder, pairs=120, seed=5, workers=1)
    return folder


@pytest.fixture(scope="session")
def checkpoint(demo_corpus: Path) -> Path:
    """A published checkpoint of step 0."""
    config = load_config(None, TINY)
    folder = demo_corpus.parent / "step_00000000"
    partial = folder.with_suffix(".partial")
    partial.mkdir()
    tokenizer = resolve_tokenizer(config.tokenizer, Corpus.open(demo_corpus), demo_corpus.parent)
    torch.manual_seed(0)
    model = build_model(config, tokenizer.vocab_size)
    weights = dict(model.named_parameters())
    write_model(partial / "model", config, model.encoder.backbone.t5.config, weights, None, tokenizer)
    publish(partial, folder, 0)
    return folder
