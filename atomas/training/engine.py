"""DeepSpeed: its JSON generated from our configuration, and its engine."""

import contextlib
import math
from typing import Any

import torch

from atomas.config import REDUCE_BUCKET, Config
from atomas.errors import AtomasError
from atomas.model.atomas import AtomasModel
from atomas.training.allocator import bound_kernel_caches, keep_freed_memory
from atomas.training.nvme import NvmeOffload
from atomas.training.step import micro_batches_of
from atomas.training.telemetry import logger


def check_batch(config: Config, world_size: int) -> None:
    """AtomasError where the world size does not divide B, or the micro-batch does not divide a rank's share."""
    if config.data.batch_size % world_size:
        legal = [w for w in range(1, config.data.batch_size + 1) if config.data.batch_size % w == 0]
        raise AtomasError(
            f"data.batch_size = {config.data.batch_size} pairs cannot be shared by {world_size} ranks; "
            f"use a world size of {', '.join(map(str, legal))}, or another batch size"
        )
    micro_batches_of(config, world_size)


def deepspeed_json(
    config: Config, world_size: int, parameters: int, nvme: NvmeOffload | None = None
) -> dict[str, Any]:
    """The whole DeepSpeed configuration of a model with so many `parameters`, defaults that matter written out."""
    stage = config.deepspeed.zero_stage
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": stage > 0 and torch.cuda.is_available(),  # on the CPU DeepSpeed waits for each bucket
        "reduce_bucket_size": min(REDUCE_BUCKET, parameters),
        # every parameter of a small model would otherwise stay gathered on all ranks
        "stage3_param_persistence_threshold": 10_000,
    }
    if config.deepspeed.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    micro_batches = micro_batches_of(config, world_size)
    accumulation = config.training.gradient_accumulation_steps
    generated: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.data.batch_size // world_size // micro_batches,
        "gradient_accumulation_steps": accumulation * micro_batches,
        "train_batch_size": config.data.batch_size * accumulation,
        "gradient_clipping": config.optimizer.gradient_clipping,  # DeepSpeed clips at 1.0 where this is absent
        "bf16": {"enabled": config.training.precision == "bf16", "check_grad_overflow": True},
        "fp16": {"enabled": config.training.precision == "fp16"},
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if config.training.precision in ("bf16", "fp16") and stage >= 2 and accumulation * micro_batches > 1:
        # In 16 bits a sum of many gradients is rounded after each of them.
        generated["data_types"] = {"grad_accum_dtype": "fp32"}
    if nvme is not None:
        _merge(generated, nvme.settings())
    _merge(generated, config.deepspeed.extra)
    return generated


def build_engine(config: Config, model: AtomasModel, world_size: int) -> Any:
    """The DeepSpeed engine around `model`, with AdamW that decays matrices only."""
    import deepspeed

    # A just-in-time compiled shared-memory all-reduce: a minute of compilation at the first start, for one host only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if config.training.precision == "fp16":
        logger.warning(
            "training.precision = fp16: T5's feed-forward layers overflow in it; bf16 is the safe choice"
        )
    if next(model.parameters()).device.type == "cpu":
        keep_freed_memory()
        bound_kernel_caches()
    model.encoder.backbone.in_step = config.deepspeed.zero_stage == 3
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": config.optimizer.weight_decay},
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.optimizer.learning_rate,
        betas=(config.optimizer.beta1, config.optimizer.beta2),
        eps=config.optimizer.epsilon,
        fused=config.deepspeed.offload == "none",
    )
    nvme = None
    if config.deepspeed.offload == "nvme":
        nvme = NvmeOffload(config, optimizer.param_groups, world_size)
    settings = deepspeed_json(config, world_size, sum(p.numel() for _, p in named), nvme)
    try:
        with contextlib.nullcontext() if nvme is None else nvme.building(model, settings):
            engine, _, _, _ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=settings, dist_init_required=False
            )
    except ValueError as error:  # a dtype that the device lacks, a value in deepspeed.extra
        raise AtomasError(f"DeepSpeed refuses the configuration: {error}") from error
    except OSError as error:  # the disk has filled since it was looked at
        if nvme is None:
            raise
        raise AtomasError(
            f"deepspeed.nvme_path = {config.deepspeed.nvme_path!r}: {error.strerror}"
        ) from error
    if nvme is not None:
        nvme.keep_for(engine)
    if world_size == 1 and config.deepspeed.zero_stage == 0:
        # Else every gradient is copied into one flat buffer and back, to be averaged over a single rank.
        engine.enable_backward_allreduce = False
    if config.deepspeed.zero_stage == 3:
        # Small parameters are whole on every rank after each step: let them be so before the first one too. Gradient
        # caching reads the temperatures outside of their modules.
        small = engine.optimizer.persistent_parameters
        if small:
            small[0].all_gather(small)
    return engine


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """Set the rate of the next step in every group."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


class OptimizerStep:
    """One optimizer step over accumulated gradients, left out on all ranks where a gradient of any is not finite.

    The averaged gradients, and so their norm, hold what is not finite on any rank. Under ZeRO, and where weights have
    16 bits, DeepSpeed looks at the norm and leaves the step out; for plain fp32 gradients it does not.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._plain: float | None = None

    def take(self) -> None:
        """Call after each backward pass; the optimizer steps at the last one of the accumulation."""
        engine = self._engine
        if (
            engine.is_gradient_accumulation_boundary()
            and not engine.zero_optimization_stage()
            and engine.get_data_types()[0] is torch.float32
        ):
            grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
            self._plain = float(torch.nn.utils.get_total_norm(grads))
            if not math.isfinite(self._plain):
                groups, engine.optimizer.param_groups = engine.optimizer.param_groups, []  # nothing to step
                engine.step()  # counts, and clears the gradients
                engine.optimizer.param_groups = groups
                return
        engine.step()

    @property
    def norm(self) -> float:
        """Global norm of the averaged gradients before clipping; not finite where the step was left out."""
        return float(self._engine.get_global_grad_norm() if self._plain is None else self._plain)

    @property
    def left_out(self) -> bool:
        """Nothing was changed. The same on all ranks."""
        return not self._engine.was_step_applied() or not math.isfinite(self.norm)


def _merge(base: dict[str, Any], extra: dict[str, Any]) -> None:
    for key, value in extra.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value
