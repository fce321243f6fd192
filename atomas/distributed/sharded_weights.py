"""Weights spread over the ranks for a model that is only read: ZeRO stage 3 without an optimizer."""

from typing import Any

import torch
from torch import nn


def shard_weights(model: nn.Module, *, kept_whole: int = 10_000) -> Any:
    """Keep 1/W of every weight on each of W ranks and gather a layer while it runs; returns DeepSpeed's engine.

    Collective. From here on every forward pass of any part of `model` is collective too. Parameters of up to
    `kept_whole` elements stay on every rank.
    """
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": 1,  # nothing is trained, but DeepSpeed asks
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": kept_whole},
        "bf16": {"enabled": next(model.parameters()).dtype == torch.bfloat16},
        "steps_per_print": 10**9,
    }
    return deepspeed.initialize(model=model, config=settings)[0]
