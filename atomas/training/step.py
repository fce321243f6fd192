"""The gradient of one contrastive batch: in one pass, or micro-batch by micro-batch."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from atomas.config import Config
from atomas.data.batching import PairBatch
from atomas.errors import AtomasError
from atomas.model.global_batch import GlobalBatch
from atomas.model.gradient_cache import GradientCache
from atomas.model.momentum import MomentumTargets
from atomas.model.momentum_encoder import Momentum
from atomas.model.row_store import StorePlace
from atomas.phases import phase

Context = Callable[[], contextlib.AbstractContextManager[Any]]


def micro_batches_of(config: Config, world_size: int) -> int:
    """Micro-batches into which each rank's B / W pairs are cut; 1 where no gradient is cached.

    Raises:
        AtomasError: `training.micro_batch_size` does not divide B / W.
    """
    pairs, size = config.data.batch_size // world_size, config.training.micro_batch_size
    if not size or size >= pairs:
        return 1
    if pairs % size:
        legal = [n for n in range(1, pairs + 1) if pairs % n == 0]
        raise AtomasError(
            f"training.micro_batch_size = {size} does not divide the {pairs} pairs of a rank "
            f"(data.batch_size / {world_size}); use {', '.join(map(str, legal))}"
        )
    return pairs // size


def contrastive_step(
    engine: Any,
    momentum: Momentum | None,
    batch: PairBatch,
    *,
    micro_batches: int = 1,
    cache: StorePlace = "device",
    autocast: Context = contextlib.nullcontext,
) -> dict[str, Tensor]:
    """Leave the gradient of one global batch in `engine`, and its pairs in the momentum queue. Collective.

    With several micro-batches `engine` accumulates over them: it must divide each backward pass by their number, as
    DeepSpeed does by its `gradient_accumulation_steps`, and `engine.step` is called between them, not after the last.

    Args:
        engine: wraps an `AtomasModel`, as DeepSpeed's engine does: call, `backward`, `step`, `module`.
        momentum: None contrasts with the batch's own features.
        batch: this rank's b pairs.
        micro_batches: passes into which these are cut; every rank must say the same.
        cache: where the features of several micro-batches wait.
        autocast: context of every forward pass.

    Returns:
        What `AtomasModel.forward` returns for the batch, detached.
    """
    if len(batch) < micro_batches:
        raise AtomasError(f"{len(batch)} pairs of a rank are too few for {micro_batches} micro-batches")
    targets = None
    if momentum is not None:
        with autocast():
            targets = momentum.targets(batch, micro_batches=micro_batches)
    if micro_batches == 1:
        with autocast():
            losses: dict[str, Tensor] = engine(batch, targets)
        with phase("backward"):
            engine.backward(_finite_or_nowhere(losses["loss"]))
    else:
        losses = _cached_step(engine, targets, batch, micro_batches, cache, autocast)
    if momentum is not None and targets is not None:
        momentum.enqueue(targets)
    return {name: value.detach() for name, value in losses.items()}


def _cached_step(
    engine: Any,
    targets: MomentumTargets | None,
    batch: PairBatch,
    count: int,
    place: StorePlace,
    autocast: Context,
) -> dict[str, Tensor]:
    """Gradient caching; dropout draws the same masks in both passes over a micro-batch."""
    model = engine.module
    everyone = GlobalBatch.of(batch) if targets is None else targets.everyone
    micro_batches = batch.split(count)
    device = batch.sample_id.device
    cache = GradientCache(model, everyone, targets, micro_batches=count, place=place)
    seeds = torch.randint(2**62, (count,)).tolist()
    for seed, micro_batch in zip(seeds, micro_batches, strict=True):
        with torch.no_grad(), seeded(seed, device), autocast():
            cache.add(model.represent(micro_batch))
    parts = cache.close()
    for number, (seed, micro_batch) in enumerate(zip(seeds, micro_batches, strict=True)):
        if number:
            engine.step()
        with seeded(seed, device), autocast():
            losses = engine(micro_batch, None, cache[number])
        with phase("backward"):
            engine.backward(_finite_or_nowhere(losses.pop("loss")) * count)
        for name, value in losses.items():
            parts[name] = parts.get(name, 0) + value.detach()
    return {"loss": model.total(parts)} | parts


def _finite_or_nowhere(loss: Tensor) -> Tensor:
    """The loss; one that is not finite gets a gradient that is finite nowhere, so that no rank steps on it."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, float("nan"))


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """The block draws its random numbers from `seed`; what comes after it draws as if the block had not been."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
