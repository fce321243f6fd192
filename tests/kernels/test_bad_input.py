"""Bad input of every operator: an error that names the argument, or correct work; never a crash.

The whole sweep also runs in a process of its own, so that a crash is seen as one.
"""

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import atomas_kernels as ak
from atomas_kernels.layout import pad

Arguments = dict[str, Any]

LENGTHS, OTHERS = torch.tensor([5, 0, 3]), torch.tensor([2, 4, 1])
LABELS = torch.tensor([1, 0, 0, 1, 2, 1, 0, 1])
COUNTS = torch.tensor([3, 0, 2])


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _momentum_update(**arguments: Any) -> list[Tensor]:
    targets = arguments["targets"]
    if targets is CALLS["momentum_update"][1]["targets"]:
        targets = [target.clone() for target in targets]
    ak.momentum_update(**arguments | {"targets": targets})
    return targets


CALLS: dict[str, tuple[Callable[..., Any], Arguments]] = {
    "segment_softmax": (ak.segment_softmax, {"logits": _random(8), "lengths": LENGTHS}),
    "dpc_knn": (ak.dpc_knn, {"tokens": _random(8, 6), "lengths": LENGTHS, "ratio": 0.5, "k": 3}),
    "cluster_merge": (
        ak.cluster_merge,
        {
            "tokens": _random(8, 6),
            "weight": _random(8).exp(),
            "assignment": LABELS,
            "lengths": LENGTHS,
            "cluster_lengths": COUNTS,
        },
    ),
    "token_interaction": (
        ak.token_interaction,
        {
            "text": _random(8, 6),
            "smiles": _random(7, 6),
            "text_weight": _random(8),
            "smiles_weight": _random(7),
            "text_lengths": LENGTHS,
            "smiles_lengths": OTHERS,
        },
    ),
    "packed_attention": (
        ak.packed_attention,
        {
            "query": _random(8, 2, 4),
            "key": _random(7, 2, 4),
            "value": _random(7, 2, 4) + 1,
            "query_lengths": LENGTHS,
            "key_lengths": OTHERS,
            "distance_bias": _random(2, 5),
            "dropout": 0.0,
        },
    ),
    "info_nce": (
        ak.info_nce,
        {"scores": _random(4, 4), "scale": torch.ones(1), "negative_mask": _random(4, 4) > 0},
    ),
    "contrastive_cross_entropy": (
        ak.contrastive_cross_entropy,
        {
            "query": _random(3, 6),
            "momentum_query": _random(3, 6) + 1,
            "keys": _random(5, 6),
            "positive": torch.tensor([4, 0, 1]),
            "temperature": torch.tensor([0.5]),
            "alpha": 0.4,
            "queue": _random(7, 6),
            "ignore": _random(3, 12) > 1,
        },
    ),
    "lm_cross_entropy": (
        ak.lm_cross_entropy,
        {
            "hidden": _random(5, 6),
            "weight": _random(9, 6),
            "labels": torch.tensor([8, -100, 0, 3, -100]),
            "ignore_index": -100,
        },
    ),
    "momentum_update": (
        _momentum_update,
        {"targets": [_random(3), _random(2, 2)], "sources": [_random(3) + 1, _random(2, 2) + 1], "momentum": 0.9},
    ),
}  # fmt: skip

PER_TOKEN = {
    "segment_softmax": {"logits": LENGTHS},
    "dpc_knn": {"tokens": LENGTHS},
    "cluster_merge": {"tokens": LENGTHS, "weight": LENGTHS, "assignment": LENGTHS},
    "token_interaction": {
        "text": LENGTHS,
        "text_weight": LENGTHS,
        "smiles": OTHERS,
        "smiles_weight": OTHERS,
    },
    "packed_attention": {"query": LENGTHS, "key": OTHERS, "value": OTHERS},
}
CALLS |= {
    f"{operator} of padded rows": (
        CALLS[operator][0],
        CALLS[operator][1] | {name: pad(CALLS[operator][1][name], n) for name, n in lengths.items()},
    )
    for operator, lengths in PER_TOKEN.items()
}

BAD_TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "a list": Tensor.tolist,
    "nothing but None": lambda x: None,
    "complex": lambda x: x.to(torch.complex64),
    "int32": lambda x: x.to(torch.int32),
    "uint8": lambda x: x.to(torch.uint8),
    "on meta": lambda x: x.to("meta"),
    "sparse": Tensor.to_sparse,
    "one dimension too many": lambda x: x[..., None],
    "two dimensions too many": lambda x: x[..., None, None],
    "a scalar": lambda x: x.flatten()[0],
    "one short": lambda x: x[:-1],
    "one short in the last dimension": lambda x: x[..., :-1] if x.dim() > 1 else x[:-1],
    "twice": lambda x: torch.cat([x, x]),
    "emptied": lambda x: x[:0],
}
SQUARE = {"scores", "negative_mask", "ignore"}
OPTIONAL = {"negative_mask", "queue", "ignore", "distance_bias"}

BAD_LENGTHS: dict[str, list[int]] = {
    "negative": [-1, 5, 4],
    "negative and summing up": [9, -4, 3],
    "too many tokens": [5, 4, 3],
    "too few tokens": [1, 1, 1],
    "so many that they wrap around": [2**63 - 1, 2**63 - 1, 10],
    "huge": [2**62, 0, 0],
}
BAD_INDICES: dict[str, int] = {"negative": -1, "beyond": 1000, "huge": 2**40, "smallest": -(2**63)}
INDICES = {"assignment", "positive", "labels"}
BAD_NUMBERS: list[Any] = [-1, -0.1, 2.5, math.nan, math.inf, "0.5", None, True, torch.tensor(0.5), 2**70]
NUMBERS = {"ratio", "k", "alpha", "dropout", "momentum"}


def _bad_arguments(arguments: Arguments) -> Iterator[tuple[str, Arguments]]:
    """Every argument made bad in every way, one at a time."""
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            for how, change in BAD_TENSORS.items():
                if how != "nothing but None" or name not in OPTIONAL:
                    yield f"{name} {how}", {name: change(value)}
        if isinstance(value, list):
            changes = [value[:1], [*value[1:], value[0]], [value[0].tolist(), value[1]], None, value[0]]
            changes += [
                [change(value[0]), value[1]] for how, change in BAD_TENSORS.items() if how != "sparse"
            ]
            yield from ((f"{name} bad in way {i}", {name: change}) for i, change in enumerate(changes))
        if "lengths" in name:
            for how, lengths in BAD_LENGTHS.items():
                yield f"{name} {how}", {name: torch.tensor(lengths)}
        if name in INDICES:
            for how, index in BAD_INDICES.items():
                yield f"{name} {how}", {name: value.index_fill(0, torch.tensor([0]), index)}
        if name in NUMBERS:
            for number in BAD_NUMBERS:
                yield f"{name} = {number!r}", {name: number}


def _complaint(operator: str, changed: Arguments) -> str:
    """What an operator says to changed arguments; empty where it works."""
    call, arguments = CALLS[operator]
    try:
        call(**arguments | changed)
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


def _sweep(operator: str) -> Iterator[tuple[str, str]]:
    for what, changed in _bad_arguments(CALLS[operator][1]):
        yield what, _complaint(operator, changed)


WIDTH = "one short in the last dimension"
HARMLESS: dict[str, set[str]] = {
    "dpc_knn": {f"tokens {WIDTH}"},
    # Clusters may be without members.
    "cluster_merge": {f"tokens {WIDTH}", "cluster_lengths too many tokens"},
    "lm_cross_entropy": {"weight twice"},
    # Other lengths are other tokens of the same rows.
    "segment_softmax of padded rows": {"lengths too many tokens", "lengths too few tokens"},
    "dpc_knn of padded rows": {f"tokens {WIDTH}", "lengths too many tokens", "lengths too few tokens"},
    "cluster_merge of padded rows": {f"tokens {WIDTH}", "cluster_lengths too many tokens"},
    "token_interaction of padded rows": {
        "text_lengths too many tokens",
        "text_lengths too few tokens",
        "smiles_lengths too few tokens",
    },
    "packed_attention of padded rows": {
        "query_lengths too many tokens",
        "query_lengths too few tokens",
        "key_lengths too few tokens",
    },
}


@pytest.mark.parametrize("operator", CALLS)
def test_every_bad_argument_is_named(each_backend: str, operator: str) -> None:
    names = tuple(f"{name}: " for name in CALLS[operator][1])
    complaints = dict(_sweep(operator))
    assert {what for what, said in complaints.items() if not said} == HARMLESS.get(operator, set())
    assert [said for said in complaints.values() if said and not said.startswith(names)] == []


@pytest.mark.slow
def test_no_bad_argument_ends_the_process() -> None:
    pytest.importorskip("atomas_kernels._native", reason="the native module is not built")
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 300


@pytest.mark.parametrize("operator", CALLS)
def test_memory_may_be_laid_out_in_any_way(each_backend: str, operator: str) -> None:
    call, arguments = CALLS[operator]
    expected = call(**arguments)
    for name, value in arguments.items():
        for spread in (_every_other, _behind_others):
            if isinstance(value, list):
                got = call(**arguments | {name: [spread(x) for x in value]})
            elif isinstance(value, Tensor):
                got = call(**arguments | {name: spread(value)})
            else:
                continue
            assert_close(got, expected, msg=lambda text, name=name: f"{name}: {text}")


def _every_other(values: Tensor) -> Tensor:
    """The same values, but none beside its neighbour."""
    return torch.stack([values, torch.full_like(values, 77)], dim=-1)[..., 0]


def _behind_others(values: Tensor) -> Tensor:
    """The same values, the first dimension running fastest, not at the start of their memory."""
    rows = torch.cat([torch.full_like(values[:1], 77), values])
    return rows.movedim(0, -1).contiguous().movedim(-1, 0)[1:]


@pytest.mark.parametrize("operator", CALLS)
def test_nothing_at_all(each_backend: str, operator: str) -> None:
    """No sequences, no rows, no tensors."""
    call, arguments = CALLS[operator]
    kept = (
        {"distance_bias", "scale", "temperature", "weight"}
        if not operator.startswith("cluster_merge")
        else set()
    )
    empty = {
        name: value[:0, :0] if name in SQUARE else value[:0]
        for name, value in arguments.items()
        if isinstance(value, (Tensor, list)) and name not in kept
    }
    result = call(**arguments | empty)
    for part in result if isinstance(result, (tuple, list)) else [result]:
        assert part.numel() == 0 or part == 0


if __name__ == "__main__":
    ak.set_backend("native")
    print(sum(1 for operator in CALLS for _ in _sweep(operator)))
