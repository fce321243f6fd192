"""Configurations of a kernel: the static choice of its module's table, or the fastest one measured."""

import os
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import triton.testing

C = TypeVar("C")

_fastest: dict[Hashable, Any] = {}


def choose(key: Hashable, candidates: Sequence[C], run: Callable[[C], object]) -> C:
    """The first of `candidates`, or with ATOMAS_AUTOTUNE=1 the one with which `run` is fastest on the GPU.

    It is timed once per process for each `key`, which says all that the choice may depend on. Two processes may
    choose differently and then round differently, so the static table stays the default.
    """
    if os.environ.get("ATOMAS_AUTOTUNE") != "1" or len(candidates) == 1:
        return candidates[0]
    if key not in _fastest:
        _fastest[key] = min(candidates, key=lambda c: triton.testing.do_bench(lambda: run(c)))
    chosen: C = _fastest[key]
    return chosen
