"""DeepSpeed's offload to NVMe (ZeRO-Infinity): its settings, its operator, and what we change of it.

Under ZeRO stage 3 the fp32 masters and AdamW's moments lie in files, a sub-group at a time comes into memory while the
optimizer steps; so do the weights, a parameter at a time, while a layer runs. Gradients stay in host memory: DeepSpeed
keeps all of them there in any case, and writes and reads them once more in vain.
"""

import contextlib
import os
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from atomas.config import Config
from atomas.distributed.agreement import from_all_ranks, together
from atomas.errors import AtomasError
from atomas.planning.offload import PARAMETER_BUFFERS, STATE_BUFFERS, SUB_GROUP, UNIT, Swapped
from atomas.training.swap_files import SwapFolder, reserve
from atomas.training.telemetry import logger

_OPERATOR = "async_io"


class NvmeOffload:
    """One rank's files, open for one engine."""

    def __init__(self, config: Config, groups: list[dict[str, Any]], world_size: int) -> None:
        """Look whether all is there that the offload needs. Collective.

        Args:
            config: of the run.
            groups: parameter groups of the optimizer.
            world_size: ranks that share every parameter.

        Raises:
            AtomasError: the operator, the folder, the room in it or the page-locked memory is missing.
        """
        self._weights = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
        self._weights = torch.float16 if config.training.precision == "fp16" else self._weights
        size = self._weights.itemsize
        zero = config.deepspeed.extra.get("zero_optimization", {})
        self._sub_group = int(zero.get("sub_group_size", SUB_GROUP))
        sizes = [[p.numel() for p in group["params"]] for group in groups]
        self.swapped = Swapped.of(sizes, world_size, size, self._sub_group)
        with together("opening deepspeed.nvme_path"):
            operator = load_operator()
            self.folder = SwapFolder(Path(config.deepspeed.nvme_path))
            self.folder.check_operator(operator)
            _check_locked_memory(self.swapped.buffers(size))
        disk = (socket.gethostname(), os.stat(self.folder.path).st_dev)
        same = [
            needed for other, needed in from_all_ranks((disk, self.swapped.on_disk(size))) if other == disk
        ]
        with together("opening deepspeed.nvme_path"):
            self.folder.check_space(sum(same))

    def settings(self) -> dict[str, Any]:
        """What the generated DeepSpeed JSON has to say of it."""
        common = {
            "device": "nvme",
            "nvme_path": str(self.folder.path),
            "pin_memory": torch.cuda.is_available(),
        }
        alignment = UNIT // self._weights.itemsize
        return {
            "zero_optimization": {
                "sub_group_size": self._sub_group,
                # A weight that was read ahead, or is kept for later, would keep its buffer; one that was read ahead
                # and not used before the optimizer steps would lose the step.
                "stage3_prefetch_bucket_size": 0,
                "stage3_max_reuse_distance": 0,
                "offload_optimizer": {**common, "buffer_count": STATE_BUFFERS},
                "offload_param": {
                    **common,
                    "buffer_count": PARAMETER_BUFFERS,
                    "buffer_size": -(-max(self.swapped.largest_parameter, 1) // alignment) * alignment,
                    "max_in_cpu": 0,
                },
            },
            "aio": {
                "block_size": 2**20, "queue_depth": 32, "intra_op_parallelism": 1, "single_submit": False,
                "overlap_events": True,
            },
        }  # fmt: skip

    @contextlib.contextmanager
    def building(self, model: nn.Module, settings: dict[str, Any]) -> Iterator[None]:
        """In the block, which builds the engine, DeepSpeed takes our swappers; `model` is cut before. Collective."""
        import deepspeed
        from deepspeed.runtime.swap_tensor.partitioned_optimizer_swapper import PartitionedOptimizerSwapper
        from deepspeed.runtime.swap_tensor.partitioned_param_swapper import AsyncPartitionedParameterSwapper
        from deepspeed.runtime.zero import partition_parameters, stage3

        # class statements here, as the import of DeepSpeed takes seconds
        class StateSwapper(_Reserving, _GradientsInMemory, _MastersAlone, PartitionedOptimizerSwapper):
            pass

        class ParameterSwapper(_RoomForEverySubGroup, AsyncPartitionedParameterSwapper):
            pass

        with (
            mock.patch.object(stage3, "PartitionedOptimizerSwapper", StateSwapper),
            mock.patch.object(partition_parameters, "AsyncPartitionedParameterSwapper", ParameterSwapper),
        ):
            deepspeed.init_distributed(dist_init_required=False)
            # The engine would do it too, but on the CPU with weights of 16 bits, whatever they are.
            model.to(self._weights)
            deepspeed.zero.Init(module=model, config_dict_or_path=settings, remote_device="nvme")
            yield

    def keep_for(self, engine: Any) -> None:
        """Tie files and gradients to the engine that was built."""
        engine.swap_folder = self.folder
        optimizer, start = engine.optimizer, 0
        for master, size in zip(
            optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat_numel, strict=True
        ):
            gradient = optimizer.grad_partitions_flat_buffer.narrow(0, start, size)
            optimizer.optimizer_swapper.gradients[master.ds_id] = gradient
            start += size


def swap_buffer_bytes(engine: Any) -> int:
    """Page-locked memory through which an engine swaps."""
    optimizer = engine.optimizer
    weights = optimizer.fp16_groups[0][0].nvme_swapper
    tensors = [*optimizer.optimizer_swapper.swap_buffer_manager.all_buffers, weights.buffers]
    if weights.partitioned_swap_buffer is not None:
        tensors.append(weights.partitioned_swap_buffer)
    return sum(tensor.nbytes for tensor in tensors)


def load_operator() -> Any:
    """DeepSpeed's asynchronous I/O, compiled at its first use on a machine.

    Raises:
        AtomasError: it cannot be compiled here.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder

    builder = AsyncIOBuilder()
    begun = time.monotonic()
    built = operator_file().exists()
    if not built:
        logger.info(
            "compiling DeepSpeed's %s operator for deepspeed.offload = 'nvme', once on this machine: minutes, on a "
            "busy one an hour; it goes to %s", _OPERATOR, operator_file().parent,
        )  # fmt: skip
    lock = operator_file().with_name("lock")
    if lock.exists():
        logger.warning(
            "waiting for who compiles it; if nobody does, a killed process has left %s: remove it", lock
        )
    try:
        operator = builder.load(verbose=False)
    except Exception as error:  # of the compiler, of ninja, of the loader
        reason = " ".join(str(error).split())[:300]
        raise AtomasError(
            "deepspeed.offload = 'nvme' needs DeepSpeed's async_io operator, which cannot be built here: install "
            f"libaio with its headers (libaio-dev, libaio-devel), ninja and a C++ compiler ({reason})"
        ) from error
    if not built:
        logger.info("compiled in %.0f s", time.monotonic() - begun)
    return operator


def operator_file() -> Path:
    """Where torch keeps the compiled operator."""
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(_OPERATOR, False)) / f"{_OPERATOR}.so"


class _Reserving:
    """Takes the room of all files at the start, so that the disk cannot be full in the midst of a step."""

    def _create_param_swap_info(self: Any, parameter: Any, numel: int) -> Any:
        info = super()._create_param_swap_info(parameter=parameter, numel=numel)  # type: ignore[misc]
        for prefix in ("", "exp_avg-", "exp_avg_sq-"):
            path = os.path.join(self.swap_folder, f"{prefix}{info.param_id}.tensor.swp")
            reserve(path, self._io_aligned_numel(numel) * self.swap_element_size)
        return info


class _GradientsInMemory:
    """The gradient of a sub-group is what `gradients` holds of it.

    DeepSpeed would write them to files and read them back. Where one begins at an odd place that fails unnoticed,
    as direct access wants multiples of 512 bytes; and those without a gradient would get what the buffer held before.
    """

    def __init__(self: Any, *args: Any, **keys: Any) -> None:
        self.gradients: dict[str, Tensor] = {}
        super().__init__(*args, **keys)

    def swap_out_gradients(self, parameter: Any, gradient_offsets: Any, gradient_tensors: Any) -> None:
        """They are there already."""

    def swap_in_optimizer_state(self: Any, parameter: Any, async_parameter: Any = None) -> None:
        """Masters, moments and the gradient of a sub-group."""
        super().swap_in_optimizer_state(parameter, async_parameter)  # type: ignore[misc]
        if parameter.ds_id in self.gradients:
            parameter.grad = self.gradients[parameter.ds_id].to(parameter.dtype)


class _MastersAlone:
    """Reads the masters of a sub-group without the moments, for those who only look at them."""

    def swap_in_master(self: Any, parameter: Any) -> None:
        """`release_swap_buffers` ends it."""
        info = self._get_param_swap_info(parameter)
        size = self._io_aligned_numel(info.numel())
        info.swap_buffers = self.swap_buffer_manager.allocate(num_elems=size, count=1, dtype=parameter.dtype)
        self.aio_handle.sync_pread(info.swap_buffers[0], info.get_swap_paths()[0], 0)
        parameter.data = info.swap_buffers[0].narrow(0, 0, info.numel())


class _RoomForEverySubGroup:
    """DeepSpeed makes room for the weights of the largest sub-group; a smaller one of more pieces may need more."""

    def get_buffer(self: Any, param: Any, numel: int) -> Tensor:
        buffer: Tensor = super().get_buffer(param, numel)  # type: ignore[misc]
        reserve(self.get_path(param), self._io_aligned_numel(numel) * self.swap_element_size)
        return buffer

    def reserve_partitioned_swap_space(self: Any, partition_num_elems: list[int]) -> None:
        padding = [self.numel_alignment] * len(self.id_to_path)
        super().reserve_partitioned_swap_space([*partition_num_elems, *padding])  # type: ignore[misc]


def _check_locked_memory(needed: int) -> None:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit != resource.RLIM_INFINITY and needed > limit and os.geteuid():
        raise AtomasError(
            f"deepspeed.offload = 'nvme' needs {needed / 2**20:.0f} MiB of page-locked memory for its buffers, this "
            f"process may have {limit / 2**20:.0f} MiB: raise `ulimit -l`, or lower "
            "deepspeed.extra.zero_optimization.sub_group_size"
        )
