"""Reports over seeds: mean and deviation, nulls, and what must not be merged."""

from typing import Any

import pytest

from atomas.errors import AtomasError
from atomas.metrics.merging import merge_reports, merged_rows


def report(**changes: Any) -> dict[str, Any]:
    return {
        "task": "caption",
        "rows": 10,
        "references_sha256": "abc",
        "tokenizer": {"name": "SciBERT"},
        "decoding": {"beams": 5, "seed": 0},
        "metrics": {"n": 10, "bleu2": 0.5, "meteor": 0.25},
        "training": {"loss": {"lm_weight": 0.0}},
        "command": "atomas evaluate ...",
    } | changes


def test_mean_and_sample_deviation() -> None:
    merged = merge_reports(
        {
            "a.json": report(seed=0),
            "b.json": report(seed=1, metrics={"n": 10, "bleu2": 0.7, "meteor": 0.25}),
            "c.json": report(seed=2, metrics={"n": 10, "bleu2": 0.6, "meteor": 0.25}),
        }
    )
    assert merged["metrics"]["bleu2"] == {
        "mean": pytest.approx(0.6),
        "std": pytest.approx(0.1),
        "values": [0.5, 0.7, 0.6],
    }
    assert merged["metrics"]["meteor"]["std"] == 0.0
    assert "n" not in merged["metrics"]
    assert merged["evaluation"]["rows"] == 10
    assert [entry["seed"] for entry in merged["reports"]] == [0, 1, 2]


def test_a_null_stays_null_and_says_where() -> None:
    merged = merge_reports({"a": report(), "b": report(metrics={"n": 10, "bleu2": 0.7, "meteor": None})})
    assert merged["metrics"]["meteor"]["mean"] is None
    assert merged["metrics"]["meteor"]["reason"] == "null in b"


def test_reports_of_retrieval() -> None:
    def retrieval(recall: float) -> dict[str, Any]:
        directions = {"text_to_molecule": {"recall_at_1": recall, "tied_queries": 0}}
        return {"task": "retrieval", "pairs": 500, "metrics": {"global": directions}}

    merged = merge_reports({"a": retrieval(0.25), "b": retrieval(0.75)})
    assert merged["metrics"]["global"]["text_to_molecule"]["recall_at_1"]["mean"] == 0.5
    assert [name for name, _ in merged_rows(merged["metrics"])] == [
        "global text_to_molecule recall_at_1",
        "global text_to_molecule tied_queries",
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": 11}, "rows is 11 and 10"),
        ({"references_sha256": "other"}, "references_sha256 is 'other' and 'abc'"),
        ({"tokenizer": {"name": "T5"}}, "tokenizer.name is 'T5' and 'SciBERT'"),
        ({"tokenizer": None}, "tokenizer.name is None"),
        ({"decoding": {"beams": 1, "seed": 0}}, "decoding.beams is 1 and 5"),
        ({"training": {"loss": {"lm_weight": 1.0}}}, "training.loss.lm_weight is 1.0 and 0.0"),
        ({"metrics": {"n": 10, "bleu2": 0.5}}, "meteor is in one only"),
        ({"metrics": {}}, "holds no metrics"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AtomasError, match=message):
        merge_reports({"a": report(), "b": report(**changes)})


def test_another_seed_of_sampling_is_what_is_wanted() -> None:
    merge_reports({"a": report(), "b": report(decoding={"beams": 5, "seed": 1})})


def test_one_report_or_the_same_predictions_twice() -> None:
    with pytest.raises(AtomasError, match="at least two"):
        merge_reports({"a": report()})
    same = {"file": {"sha256": "123"}}
    with pytest.raises(AtomasError, match="of the same predictions"):
        merge_reports({"a": report(**same), "b": report(**same)})
    made = {"checkpoint": "runs/mine", "step": 5, "seed": 0, "weights_sha256": "f00"}
    with pytest.raises(AtomasError, match="of the same predictions"):
        merge_reports({"a": report(**made), "b": report(**made)})
    merge_reports({"a": report(**made), "b": report(**made | {"weights_sha256": "ba4", "seed": 1})})
