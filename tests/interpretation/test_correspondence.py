"""Clusters of a pair: the model's own, whatever else is in the batch, and carried to the tokens."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from atomas.errors import AtomasError
from atomas.interpretation.correspondence import (
    LevelCorrespondence,
    PairCorrespondence,
    SequenceClusters,
    correspondences,
)
from atomas.interpretation.matches import strongest_matches
from atomas.training.model_files import read_model
from tests.small_checkpoint import write_small

PAIRS = [
    ("A benzene ring with a hydroxy group.", "Oc1ccccc1"),
    ("Sodium chloride.", "[Na+].[Cl-]"),
    ("The molecule is a chlorobenzene with a methyl group on its ring.", "Cc1ccc(Cl)cc1"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "checkpoint"
    write_small(folder)
    return folder


def test_clusters_do_not_depend_on_the_batch(checkpoint: Path) -> None:
    model, tokenizer, _ = read_model(checkpoint)
    together = correspondences(model, tokenizer, PAIRS, max_text_tokens=64)
    for pair, one in zip(PAIRS, together, strict=True):
        (alone,) = correspondences(model, tokenizer, [pair], max_text_tokens=64)
        assert (one.text, one.smiles) == pair
        assert [level.number for level in one.levels] == [0, 1, 2]
        for level, same in zip(one.levels, alone.levels, strict=True):
            np.testing.assert_array_equal(level.text.cluster, same.text.cluster)
            np.testing.assert_array_equal(level.smiles.cluster, same.smiles.cluster)
            np.testing.assert_allclose(level.similarity, same.similarity, atol=1e-5)


def test_levels_nest_and_shrink(checkpoint: Path) -> None:
    model, tokenizer, _ = read_model(checkpoint)
    for pair in correspondences(model, tokenizer, PAIRS, max_text_tokens=64):
        for side in ("text", "smiles"):
            levels = [getattr(level, side) for level in pair.levels]
            offsets = getattr(pair, f"{side}_offsets")
            np.testing.assert_array_equal(levels[0].cluster, np.arange(len(offsets)))
            for level in levels:
                assert len(level.cluster) == len(offsets)
                assert set(level.cluster) == set(range(len(level.weight)))  # no cluster is empty
                assert level.weight.sum() == pytest.approx(1, abs=1e-5)
            for below, above in pairwise(levels):
                assert len(above.weight) <= len(below.weight)
                joined = {(int(b), int(a)) for b, a in zip(below.cluster, above.cluster, strict=True)}
                assert len(joined) == len(below.weight)  # a cluster goes into one cluster above it


def test_long_texts_are_cut_and_a_model_without_levels_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    model, tokenizer, _ = read_model(checkpoint)
    (pair,) = correspondences(model, tokenizer, [("hydroxy " * 50, "CO")], max_text_tokens=12)
    assert len(pair.text_offsets) == 12
    start, end = pair.text_offsets[-1]
    assert start == end == pair.text_offsets[-2][1]
    write_small(tmp_path / "flat", hierarchical_weight=0.0)
    model, tokenizer, _ = read_model(tmp_path / "flat")
    with pytest.raises(AtomasError, match="no hierarchy"):
        correspondences(model, tokenizer, PAIRS, max_text_tokens=64)


def made_up(text_features: list[list[float]], smiles_features: list[list[float]]) -> PairCorrespondence:
    """Words `red`, `ring`, `</s>`; SMILES tokens `C`, `(`, `Cl)`, `c1ccccc1`, `.`, `O`, `</s>`."""
    words = [(0, 3), (4, 8), (8, 8)]
    tokens = [(0, 1), (1, 2), (2, 5), (5, 13), (13, 14), (14, 15), (15, 15)]

    def side(features: list[list[float]]) -> SequenceClusters:
        array = np.array(features, dtype=np.float32)
        return SequenceClusters(
            cluster=np.arange(len(array)),
            weight=np.full(len(array), 1 / len(array), np.float32),
            features=array,
        )

    level = LevelCorrespondence(number=0, text=side(text_features), smiles=side(smiles_features))
    return PairCorrespondence(
        text="red ring", smiles="C(Cl)c1ccccc1.O", text_offsets=words, smiles_offsets=tokens, levels=[level]
    )


RED, RING, END = [1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]


def test_matches_are_those_of_the_highest_cosine() -> None:
    pair = made_up([RED, RING, END], [RED, RING, [0.6, 0.8, 0], RING, END, RED, END])
    (level,) = strongest_matches(pair).levels
    red, ring = level.shown
    assert (red.number, red.text, red.smiles) == (1, [(0, 3)], [(0, 1), (14, 15)])
    assert (ring.number, ring.text, ring.smiles) == (2, [(4, 8)], [(1, 13)])  # neighbours are joined
    assert red.atoms == {0, 8}
    assert ring.atoms == {1, 2, 3, 4, 5, 6, 7}
    assert red.similarity == pytest.approx(1.0)
    assert level.hidden == 0


def test_the_end_of_the_sequence_is_no_match_and_weak_ones_are_hidden() -> None:
    pair = made_up([RED, RING, END], [END, RING, RING, RING, END, [0.9, 0, 0.1], END])
    (level,) = strongest_matches(pair, limit=1).levels
    (only,) = level.shown
    assert only.text == [(4, 8)]
    assert level.hidden == 1


def test_what_was_cut_off_is_told() -> None:
    pair = made_up([RED, RING, END], [RED, RING, RED, RING, END, RED, END])
    assert strongest_matches(pair).read == len("red ring")
    assert strongest_matches(replace(pair, text="red ring of six")).read == len("red ring")
