"""Which batches of the stream an optimizer step takes, where some of the data is left out."""

from collections.abc import Iterable, Sequence
from typing import overload

Range = tuple[int, int]
"""First step's worth of data, and one behind the last, counted from 0 over the whole stream."""


class DataPosition:
    """Steps of a run, and the data they take: the same as long as nothing is left out.

    What is left out is known by its place in the stream, so that a checkpoint from before and one from after it lead
    to the same data.
    """

    def __init__(self, left_out: Iterable[Range] = ()) -> None:
        self.left_out: list[Range] = []
        """In order, none touching another but at its ends"""
        for first, stop in sorted((int(first), int(stop)) for first, stop in left_out):
            if self.left_out and first < self.left_out[-1][1]:
                first, before = self.left_out.pop()
                stop = max(stop, before)
            self.left_out.append((first, stop))

    def of_step(self, step: int) -> int:
        """Which data step number `step`, counted from 0, takes."""
        position = step
        for first, stop in self.left_out:
            if position >= first:
                position += stop - first
        return position

    def without(self, first_step: int, stop_step: int) -> "DataPosition":
        """What it is when nobody takes the data again that the steps from `first_step` to before `stop_step` took."""
        return DataPosition([*self.left_out, (self.of_step(first_step), self.of_step(stop_step - 1) + 1)])


class BatchNumbers(Sequence[int]):
    """Numbers of the batches that the steps from `start` to before `stop` take, `per_step` each."""

    def __init__(self, position: DataPosition, start: int, stop: int, per_step: int) -> None:
        self._position, self._start, self._stop, self._per_step = position, start, stop, per_step

    def __len__(self) -> int:
        return max(0, self._stop - self._start) * self._per_step

    @overload
    def __getitem__(self, number: int) -> int: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[int]: ...
    def __getitem__(self, number: int | slice) -> int | Sequence[int]:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        if not 0 <= number < len(self):
            raise IndexError(number)
        step, micro = divmod(number, self._per_step)
        return self._position.of_step(self._start + step) * self._per_step + micro
