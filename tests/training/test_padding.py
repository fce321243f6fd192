"""Padding is counted where it is computed on, and stays under a twentieth."""

import numpy as np
import pytest
import torch

from atomas.config import Config, DataConfig, LossConfig
from atomas.training.padding import count_slots

CPU, ACCELERATOR = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("task", ["genmol", "gentext", "both"])
@pytest.mark.parametrize("budget", [512, 4096, 16384])
def test_little_is_padded_at_any_budget(task: str, budget: int) -> None:
    config = Config(data=DataConfig(token_budget=budget), loss=LossConfig(task=task, lm_weight=1.0))  # type: ignore[arg-type]
    generator = np.random.default_rng(0)
    for size in (8, 64, 512):
        # As captions and SMILES are: few long ones among many short ones.
        text, smiles = (
            np.clip(generator.lognormal(mean, 0.6, size), 3, 512).astype(int).tolist() for mean in (4.2, 3.7)
        )
        batch = torch.tensor(text), torch.tensor(smiles)
        tokens, slots = count_slots(*batch, config, CPU)
        assert tokens == slots
        attentions = {"genmol": 1, "gentext": 1, "both": 2}[task]
        written = {"genmol": sum(smiles), "gentext": sum(text), "both": sum(smiles) + sum(text)}[task]
        assert tokens == 2 * sum(text + smiles) + 2 * written + attentions * sum(text + smiles)
        same, slots = count_slots(*batch, config, ACCELERATOR)
        assert same == tokens <= slots <= tokens / 0.95


def test_without_a_decoder_only_the_encoder_counts() -> None:
    config = Config(loss=LossConfig(lm_weight=0.0))
    assert count_slots(torch.tensor([5, 7]), torch.tensor([3, 2]), config, CPU) == (34, 34)
