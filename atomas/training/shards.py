"""What this rank's optimizer holds: its fragments of the fp32 masters and of AdamW's moments, by parameter name.

DeepSpeed keeps them differently for every ZeRO stage and precision; here they look alike, as views that can be read
and written in place. What is offloaded to NVMe has to be read from there first: `OptimizerShard.parts`. Nothing in this
file is collective, but for `OptimizerShard.give_weights`.
"""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from atomas.distributed.collectives import rank, world_size
from atomas.distributed.fragments import Fragment

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names that torch gives to AdamW's two moments."""


@dataclass(frozen=True)
class _Place:
    """Where a fragment lies in a tensor that the optimizer steps, and under which it keeps its state."""

    stepped: Tensor
    offset: int
    fragment: Fragment


@dataclass(frozen=True)
class _Part:
    """Fragments that come into memory together."""

    sub_groups: list[int]
    """Numbers of the tensors of ZeRO stage 3 in which they lie: one, where that is swapped"""
    swapped: bool
    """It lies on NVMe between steps"""
    names: list[str] = field(default_factory=list)


class OptimizerShard:
    """The fragments of one rank.

    Their views stay valid as long as the engine lives; those of a part that lies on NVMe only while `parts` is there.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._places = dict(_places(engine))
        self.fragments = {name: place.fragment for name, place in self._places.items()}
        """of every trainable parameter of which this rank holds a part"""
        self._parts = _parts(engine.optimizer, self._places)
        here = (name for part in self._parts if not part.swapped for name in part.names)
        self._masters = {name: self._master(name) for name in here}
        self.swapped = any(part.swapped for part in self._parts)
        """Some of it lies on NVMe between steps."""
        self.replicated = engine.zero_optimization_stage() == 0
        """Every rank holds all of it, instead of a part of its own."""

    def parts(self, *, change: bool = False) -> Iterator[list[str]]:
        """Names of fragments, all at once; with NVMe a sub-group at a time, which is in memory until the next one is.

        With `change` what was written there is kept. Go through all of them: not collective, but nothing else may
        use the optimizer meanwhile.
        """
        for part in self._parts:
            with self._in_memory(part, change=change):
                yield part.names

    def masters_by_part(self) -> Iterator[Mapping[str, Tensor]]:
        """The masters [n] by name, a part at a time."""
        for part in self._parts:
            with self._masters_in_memory(part):
                yield {name: self.master(name) for name in part.names}

    @property
    def masters(self) -> dict[str, Tensor]:
        """All masters [n] by name. Not with NVMe."""
        return {name: self.master(name) for name in self._places}

    def master(self, name: str) -> Tensor:
        """The fp32 master [n] of a fragment, a view of what the optimizer updates."""
        return self._masters[name] if name in self._masters else self._master(name)

    def _master(self, name: str) -> Tensor:
        place = self._places[name]
        return place.stepped.detach().view(-1)[place.offset : place.offset + place.fragment.size]

    def moments(self, name: str) -> dict[str, Tensor]:
        """Both moments [n] of a fragment; empty before its first optimizer step."""
        place = self._places[name]
        state = self._state(place)
        stop = place.offset + place.fragment.size
        return {key: state[key].view(-1)[place.offset : stop] for key in MOMENTS if key in state}

    def steps(self, name: str) -> int:
        """Optimizer steps that a fragment has seen, which AdamW's bias correction depends on."""
        return int(self._state(self._places[name]).get("step", 0))

    def begin_at(self, name: str, steps: int) -> None:
        """Make moments of a fragment where there are none yet, and let it have seen `steps` optimizer steps."""
        place = self._places[name]
        state = self._state(place)
        if not state:
            for key in MOMENTS:
                state[key] = torch.zeros_like(place.stepped, requires_grad=False)
        fused = self._engine.basic_optimizer.defaults["fused"]
        # under ZeRO fragments share it: one of a parameter that had no gradient until now takes part from here on
        steps = max(steps, int(state.get("step", 0)))
        state["step"] = torch.tensor(float(steps), device=place.stepped.device if fused else "cpu")

    @torch.no_grad()
    def reset(self, name: str) -> None:
        """Let the optimizer have seen nothing of a fragment, and of those that share its state; the master stays."""
        for value in self._state(self._places[name]).values():
            value.zero_()

    def written_part(self, name: str) -> slice:
        """Elements of this rank's fragment that it writes to a checkpoint: those that no other rank writes."""
        count = self.fragments[name].size
        if not self.replicated:
            return slice(0, count)
        return slice(count * rank() // world_size(), count * (rank() + 1) // world_size())

    @torch.no_grad()
    def give_weights(self) -> None:
        """Set the module's weights to the masters, rounded as the precision says. Collective."""
        optimizer, named = self._engine.optimizer, dict(self._engine.module.named_parameters())
        if hasattr(optimizer, "update_lp_params"):  # ZeRO 1 and 2
            optimizer.update_lp_params()
            return
        for part in self._parts:
            with self._masters_in_memory(part):
                for sub_group in part.sub_groups:  # ZeRO 3, whose weights may lie on NVMe too
                    optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
                for name in [] if part.sub_groups else part.names:
                    named[name].data.view(-1).copy_(self.master(name))
        kept_whole = getattr(optimizer, "persistent_parameters", [])
        if kept_whole:  # ZeRO 3 keeps small parameters gathered
            kept_whole[0].partition(kept_whole)
            kept_whole[0].all_gather(kept_whole)

    def scale(self) -> dict[str, float]:
        """State of the fp16 loss scale; empty in other precisions."""
        scaler = self._scaler()
        return {} if scaler is None else {key: getattr(scaler, key) for key in _SCALE if hasattr(scaler, key)}

    def set_scale(self, saved: dict[str, float]) -> None:
        """Counterpart of `scale`."""
        scaler = self._scaler()
        for key, value in saved.items():
            if scaler is not None and hasattr(scaler, key):
                setattr(scaler, key, value)

    @contextlib.contextmanager
    def _in_memory(self, part: _Part, *, change: bool) -> Iterator[None]:
        if not part.swapped:
            yield
            return
        optimizer = self._engine.optimizer
        optimizer._optimizer_states_and_gradient_swap_in(*part.sub_groups)
        try:
            yield
        finally:
            if change:
                optimizer._optimizer_states_and_gradient_swap_out(*part.sub_groups)
            else:
                optimizer._release_swap_buffers(*part.sub_groups)

    @contextlib.contextmanager
    def _masters_in_memory(self, part: _Part) -> Iterator[None]:
        if not part.swapped:
            yield
            return
        optimizer = self._engine.optimizer
        (sub_group,) = part.sub_groups
        optimizer.optimizer_swapper.swap_in_master(optimizer.fp32_partitioned_groups_flat[sub_group])
        try:
            yield
        finally:
            optimizer._release_swap_buffers(sub_group)

    def _state(self, place: _Place) -> dict[str, Any]:
        state: dict[str, Any] = self._engine.basic_optimizer.state[place.stepped]
        return state

    def _scaler(self) -> Any:
        if not self._engine.fp16_enabled():
            return None
        return self._engine.optimizer.loss_scaler


_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def _places(engine: Any) -> Iterator[tuple[str, _Place]]:
    optimizer = engine.optimizer
    unsharded = _unsharded(optimizer)
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_tensor"):
            place = _zero_3(optimizer, parameter)
        elif hasattr(parameter, "_hp_mapping"):
            place = _zero_1_and_2(optimizer, parameter)
        else:
            stepped = unsharded[parameter]
            place = _place(stepped, 0, tuple(parameter.shape), 0, parameter.numel())
        if place is not None:
            yield name, place


def _parts(optimizer: Any, places: Mapping[str, _Place]) -> list[_Part]:
    sub_groups = getattr(optimizer, "fp32_partitioned_groups_flat", [])  # of ZeRO 3
    number = {id(flat): i for i, flat in enumerate(sub_groups)}
    swapped = [i for i in range(len(sub_groups)) if optimizer._swappable_optimizer_subgroup(i)]
    here = [i for i in range(len(sub_groups)) if i not in swapped]
    parts = [_Part(sub_groups=here, swapped=False), *(_Part(sub_groups=[i], swapped=True) for i in swapped)]
    of_group = {part.sub_groups[0]: part for part in parts[1:]}
    for name, place in places.items():
        of_group.get(number.get(id(place.stepped), -1), parts[0]).names.append(name)
    return parts


def _place(stepped: Tensor, offset: int, shape: tuple[int, ...], start: int, length: int) -> _Place | None:
    if length <= 0:
        return None
    return _Place(stepped, offset, Fragment(shape=shape, start=start, size=length))


def _unsharded(optimizer: Any) -> dict[Tensor, Tensor]:
    """Parameter -> what the optimizer steps: itself in fp32, an fp32 copy of it otherwise."""
    if not hasattr(optimizer, "fp16_groups"):
        return {p: p for group in optimizer.param_groups for p in group["params"]}
    if not hasattr(optimizer, "fp32_groups"):
        return {}
    groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    return {p: master for rounded, masters in groups for p, master in zip(rounded, masters, strict=True)}


def _zero_1_and_2(optimizer: Any, parameter: Any) -> _Place | None:
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    flats = (
        optimizer.fp32_groups_flat_partition
        if hasattr(optimizer, "fp32_groups_flat_partition")
        else optimizer.single_partition_of_fp32_groups
    )
    own, whole = mapping.hp_fragment_address, mapping.lp_fragment_address
    flat = flats[mapping.param_group_index]
    return _place(flat, own.start, tuple(parameter.shape), whole.start, own.numel)


def _zero_3(optimizer: Any, parameter: Any) -> _Place | None:
    group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
    size = parameter.partition_numel()
    start = rank() * size
    length = min(size, parameter.ds_numel - start)  # the last ranks' partitions are padded
    flat = optimizer.fp32_partitioned_groups_flat[group]
    return _place(flat, offset, tuple(parameter.ds_shape), start, length)
