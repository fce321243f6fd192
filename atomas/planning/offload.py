"""What ZeRO stage 3 with `deepspeed.offload: nvme` puts into files, and the buffers through which it comes and goes."""

from collections.abc import Sequence
from dataclasses import dataclass

SUB_GROUP = 16 * 2**20
"""Elements of a sub-group, whose masters and moments come into memory together; a larger parameter is one of its own,
and the parameter that completes a sub-group makes it larger."""
SMALLEST = 2**20
"""Bytes of the smallest tensor that DeepSpeed puts into a file"""
PARAMETER_BUFFERS, STATE_BUFFERS = 5, 3
"""Weights that may be in memory at once; masters and both moments of a sub-group"""
UNIT = 4096
"""Bytes, of which buffers are multiples"""


@dataclass(frozen=True)
class Swapped:
    """Elements of one rank."""

    parameters: int
    """in files"""
    largest_parameter: int
    states: int
    """whose masters and moments are in files"""
    largest_sub_group: int

    @classmethod
    def of(cls, groups: Sequence[Sequence[int]], ranks: int, weight_bytes: int, sub_group: int) -> "Swapped":
        """Of parameters that have so many elements, by groups of the optimizer, cut by `ranks`."""
        shares = [[-(-size // ranks) for size in group] for group in groups]
        parameters = [n for group in shares for n in group if n * weight_bytes >= SMALLEST]
        sub_groups = [n for group in shares for n in _sub_groups(group, sub_group)]
        states = [n for n in sub_groups if 4 * n >= SMALLEST]
        return cls(
            parameters=sum(parameters),
            largest_parameter=max(parameters, default=0),
            states=sum(states),
            largest_sub_group=max(sub_groups, default=0),
        )

    @classmethod
    def nothing(cls) -> "Swapped":
        """Without such an offload."""
        return cls(parameters=0, largest_parameter=0, states=0, largest_sub_group=0)

    def on_disk(self, weight_bytes: int) -> int:
        """Bytes in files."""
        return weight_bytes * self.parameters + 12 * self.states

    def buffers(self, weight_bytes: int) -> int:
        """Bytes of page-locked host memory."""
        weights = PARAMETER_BUFFERS * self.largest_parameter + self.largest_sub_group * bool(self.parameters)
        return weight_bytes * weights + 4 * STATE_BUFFERS * self.largest_sub_group


def _sub_groups(sizes: Sequence[int], limit: int) -> list[int]:
    """As DeepSpeed makes them."""
    if sum(sizes) <= limit:
        return [sum(sizes)] if sizes else []
    made, open_one = [], 0
    for size in sizes:
        open_one += size
        if open_one >= limit:
            made.append(open_one)
            open_one = 0
    return [*made, open_one] if open_one else made
