"""Several reports of the same evaluation, over seeds, into mean and standard deviation."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from atomas.errors import AtomasError

SAME = (
    "task", "rows", "pairs", "references_sha256", "corpus.fingerprint", "corpus.split", "tokenizer.name",
    "tokenizer.fingerprint", "weights", "decoding", "training",
)  # fmt: skip
"""What reports must agree in, where they have it: otherwise a mean would be of different things."""
ORIGIN = ("file.sha256", "weights_sha256", "checkpoint", "step", "seed", "decoding.seed")
"""What two reports of the same numbers have in common; seeds differ in one of these at least."""


def merge_reports(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and sample standard deviation of every metric of `reports` (name -> parsed JSON).

    A metric that is null in one report is null in the result, with the reason: a mean over the others would be of
    fewer seeds than it says.

    Raises:
        AtomasError: fewer than two reports, one without metrics, or they are not of the same evaluation.
    """
    if len(reports) < 2:
        raise AtomasError("a mean over seeds needs at least two reports")
    flat = {name: dict(_leaves(report.get("metrics", {}))) for name, report in reports.items()}
    for name, metrics in flat.items():
        if not metrics:
            raise AtomasError(f"{name} holds no metrics: it is no report of `atomas evaluate`")
    _check_same(reports, flat)
    first, first_report = next(iter(flat.values())), next(iter(reports.values()))
    merged = {path: [metrics[path] for metrics in flat.values()] for path in first if path != ("n",)}
    return {
        "task": first_report.get("task"),
        "evaluation": {key: value for key in SAME if (value := _value(first_report, key)) is not None},
        "reports": [
            {"file": name, **{key: report.get(key) for key in ("checkpoint", "step", "seed")}}
            for name, report in reports.items()
        ],
        "metrics": _nested({path: _summary(values, list(flat)) for path, values in merged.items()}),
    }


def merged_rows(metrics: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The summaries of a merged report by the joined names of their metrics."""
    for name, value in metrics.items():
        if "values" in value:
            yield name, value
        else:
            yield from ((f"{name} {inner}", summary) for inner, summary in merged_rows(value))


def _summary(values: Sequence[float | None], names: Sequence[str]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        where = ", ".join(name for name, value in zip(names, values, strict=True) if value is None)
        return {"mean": None, "std": None, "values": list(values), "reason": f"null in {where}"}
    return {"mean": statistics.fmean(known), "std": statistics.stdev(known), "values": known}


def _check_same(
    reports: Mapping[str, Mapping[str, Any]], flat: Mapping[str, Mapping[tuple[str, ...], float | None]]
) -> None:
    names = list(reports)
    for key in SAME:
        values = {name: _value(report, key) for name, report in reports.items()}
        for name in names[1:]:
            if values[name] != values[names[0]]:
                raise AtomasError(
                    f"{name} and {names[0]} are not of the same evaluation: "
                    + _difference(key, values[name], values[names[0]])
                )
    origins = {name: [_value(report, key) for key in ORIGIN] for name, report in reports.items()}
    for number, name in enumerate(names):
        for other in names[:number]:
            known = any(value is not None for value in origins[name][:3])
            if known and origins[name] == origins[other]:
                raise AtomasError(
                    f"{name} and {other} are of the same predictions: one seed would count as two"
                )
    for name in names[1:]:
        if different := set(flat[name]) ^ set(flat[names[0]]):
            raise AtomasError(
                f"{name} and {names[0]} do not have the same metrics: {' '.join(min(different))} is in one only"
            )


def _difference(key: str, one: Any, other: Any) -> str:
    """As in "decoding.beams is 1 and 5": of two mappings the first part that differs."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        name = next(name for name in (*one, *other) if one.get(name) != other.get(name))
        return _difference(f"{key}.{name}", one.get(name), other.get(name))
    return f"{key} is {one!r} and {other!r}"


def _value(report: Mapping[str, Any], key: str) -> Any:
    """What a report says under a dotted key, or None; a seed of sampling is no setting."""
    value: Any = report
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return {name: value[name] for name in value if name != "seed"} if key == "decoding" and value else value


def _leaves(
    values: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], float | None]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, name))
        elif value is None or isinstance(value, int | float):
            yield (*path, name), value


def _nested(flat: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        inner = nested
        for name in path[:-1]:
            inner = inner.setdefault(name, {})
        inner[path[-1]] = value
    return nested
