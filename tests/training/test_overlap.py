"""Gradients are on their way to the other ranks while the backward pass goes on: real DeepSpeed on gloo ranks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from atomas.config import REDUCE_BUCKET, DeepSpeedConfig, ModelConfig
from atomas.planning.sizes import T5Sizes, count_parameters
from atomas.training.step import contrastive_step
from tests.ranks import run_ranks
from tests.training.test_shards import _batch, _config, _prepare, _start

BUCKET = 2000
"""Elements; the model has ten times as many"""
SENDS = {
    "all_reduce": (0, "tensor"),
    "reduce": (0, "tensor"),
    "reduce_scatter_tensor": (1, "input_tensor"),
    "reduce_scatter": (1, "input_list"),
    "all_to_all_single": (1, "input"),
}
"""Where the tensor that is sent stands among each one's arguments, and what it is called"""


@contextmanager
def _recorded(elements: list[int]) -> Iterator[None]:
    """Note how many elements every collective of DeepSpeed sends that sums over ranks."""
    from deepspeed.comm import comm

    backend = comm.cdb
    plain = {name: getattr(backend, name) for name in SENDS}

    def recording(name: str) -> Any:
        place, argument = SENDS[name]

        def call(*arguments: Any, **named: Any) -> Any:
            sent = named[argument] if argument in named else arguments[place]
            elements.append(sum(tensor.numel() for tensor in (sent if isinstance(sent, list) else [sent])))
            return plain[name](*arguments, **named)

        return call

    for name in SENDS:
        setattr(backend, name, recording(name))
    try:
        yield
    finally:
        for name, function in plain.items():
            setattr(backend, name, function)


def _sends_while_it_goes_back(rank: int, folder: str, stages: Sequence[int]) -> None:
    _prepare(rank, folder)
    for stage in stages:
        zero = {"reduce_bucket_size": BUCKET, "overlap_comm": True}
        config = replace(
            _config("fp32", stage, "replica"),
            deepspeed=DeepSpeedConfig(zero_stage=stage, extra={"zero_optimization": zero}),  # type: ignore[arg-type]
        )
        engine, _, momentum = _start(config)
        total = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
        assert total > 4 * BUCKET
        sent: list[int] = []
        before: list[int] = []
        # The encoder's first block is the last but for the embedding to have its gradient.
        first = engine.module.encoder.backbone.t5.encoder.block[0].layer[0].SelfAttention.q
        first.register_full_backward_hook(lambda *_, sent=sent, before=before: before.append(len(sent)))
        forward: list[int] = []
        engine.module.register_forward_hook(lambda *_, sent=sent, forward=forward: forward.append(len(sent)))
        with _recorded(sent):
            contrastive_step(engine, momentum, _batch(rank, 0))
            engine.step()
        early = sum(size for size in sent[forward[-1] : before[0]] if size > 100)
        assert early > 0.4 * total, (stage, total, forward, before, sent)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "stages", [(2,), pytest.param((1, 2, 3), marks=pytest.mark.slow)], ids=["few", "all"]
)
def test_gradients_are_sent_while_the_backward_pass_goes_on(tmp_path: Path, stages: Sequence[int]) -> None:
    run_ranks(_sends_while_it_goes_back, 2, str(tmp_path), stages)


def test_the_gradient_of_a_base_model_fills_several_buckets() -> None:
    base = ModelConfig(d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_decoder_layers=12, num_heads=12)
    config = replace(_config("bf16", 2, "replica"), model=base)
    assert count_parameters(config, T5Sizes.of_model(base, 32_128)).total > 8 * REDUCE_BUCKET
