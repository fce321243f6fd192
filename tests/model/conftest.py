"""Small models and random ragged batches for the tests of the model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from atomas.config import LossConfig, ModelConfig
from atomas.data.batching import PairBatch, RaggedTokens
from atomas.model.atomas import AtomasModel

VOCABULARY = 40

MakeModel = Callable[..., AtomasModel]
MakeTokens = Callable[..., RaggedTokens]
MakeBatch = Callable[..., PairBatch]


def _make_model(**keys: Any) -> AtomasModel:
    sizes: dict[str, Any] = {
        "d_model": 16,
        "d_kv": 4,
        "d_ff": 24,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
    }
    model_keys = {name: keys.pop(name) for name in list(keys) if name in ModelConfig.__dataclass_fields__}
    token_budget = keys.pop("token_budget", 64)
    torch.manual_seed(keys.pop("seed", 0))
    return AtomasModel(
        ModelConfig(**{**sizes, **model_keys}),
        LossConfig(**keys),
        vocab_size=VOCABULARY,
        token_budget=token_budget,
        max_text_tokens=32,
        max_smiles_tokens=32,
    )


def _make_tokens(lengths: list[int], *, seed: int = 0) -> RaggedTokens:
    generator = torch.Generator().manual_seed(seed)
    ids = [[*torch.randint(3, VOCABULARY, (n - 1,), generator=generator).tolist(), 1] for n in lengths]
    return RaggedTokens.from_lists(ids)


def _make_batch(text_lengths: list[int], smiles_lengths: list[int], *, seed: int = 0) -> PairBatch:
    numbers = torch.arange(len(text_lengths))
    return PairBatch(
        text=_make_tokens(text_lengths, seed=2 * seed),
        smiles=_make_tokens(smiles_lengths, seed=2 * seed + 1),
        molecule_id=numbers,
        text_id=numbers,
        sample_id=numbers,
    )


@pytest.fixture(scope="session")
def make_model() -> MakeModel:
    """AtomasModel of width 16 from keys of ModelConfig and LossConfig, `token_budget` and `seed`."""
    return _make_model


@pytest.fixture(scope="session")
def make_tokens() -> MakeTokens:
    """Random RaggedTokens of the given lengths."""
    return _make_tokens


@pytest.fixture(scope="session")
def make_batch() -> MakeBatch:
    """Random PairBatch of the given lengths, all pairs different."""
    return _make_batch
