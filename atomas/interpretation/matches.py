"""What there is to show of a pair: the strongest matches of each level, on characters, atoms and bonds.

Every cluster of the molecule answers to the text cluster with the highest cosine. Clusters that answer to the same
one are one match; its strength is the sum of their cosines, weighted by their importance, as the token interaction
adds them up (method section 3.2). Tokens that stand for nothing visible (</s>, dots) take no part.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from atomas.interpretation.correspondence import LevelCorrespondence, Offsets, PairCorrespondence
from atomas.interpretation.smiles_atoms import SmilesMap, scan_smiles

MAX_MATCHES = 8


@dataclass(frozen=True, kw_only=True)
class Match:
    """A part of the text and the fragments that answer to it."""

    number: int
    """From 1, in the order of the text"""
    text: list[tuple[int, int]]
    """Characters [start, end) of the text cluster, adjacent ones joined"""
    smiles: list[tuple[int, int]]
    """Characters [start, end) of the fragments, adjacent ones joined"""
    atoms: set[int]
    """Atoms whose element symbol a fragment holds"""
    similarity: float
    """Highest cosine of a fragment with the text cluster"""


@dataclass(frozen=True, kw_only=True)
class LevelMatches:
    """The strongest matches of one level."""

    number: int
    num_text: int
    """Clusters of the text"""
    num_smiles: int
    """Clusters of the molecule"""
    shown: list[Match]
    hidden: int
    """Matches that are weaker than those shown"""


@dataclass(frozen=True, kw_only=True)
class PairMatches:
    """A pair with the matches of all its levels."""

    text: str
    read: int
    """Characters of the text that the model reads; what is behind them was cut off"""
    smiles: str
    bonds: list[tuple[int, int]]
    """Atoms of every bond"""
    levels: list[LevelMatches]


def strongest_matches(pair: PairCorrespondence, *, limit: int = MAX_MATCHES) -> PairMatches:
    """At most `limit` matches of each level."""
    characters = scan_smiles(pair.smiles)
    return PairMatches(
        text=pair.text,
        read=max((end for _, end in pair.text_offsets), default=0),
        smiles=pair.smiles,
        bonds=characters.bonds,
        levels=[_level(level, pair, characters, limit) for level in pair.levels],
    )


def _level(
    level: LevelCorrespondence, pair: PairCorrespondence, characters: SmilesMap, limit: int
) -> LevelMatches:
    words = _clusters([start < end for start, end in pair.text_offsets], level.text.cluster)
    fragments = _clusters(
        [bool(characters.region(start, end)) for start, end in pair.smiles_offsets], level.smiles.cluster
    )
    if not (words and fragments):
        return LevelMatches(number=level.number, num_text=0, num_smiles=0, shown=[], hidden=0)
    similarity = level.similarity
    answers: dict[int, list[int]] = {}
    for fragment in fragments:
        best = words[int(similarity[words, fragment].argmax())]
        answers.setdefault(best, []).append(fragment)
    strength = {
        word: sum(level.smiles.weight[fragment] * similarity[word, fragment] for fragment in answering)
        for word, answering in answers.items()
    }
    chosen = sorted(answers, key=lambda word: -strength[word])[:limit]
    chosen.sort(key=lambda word: int(np.flatnonzero(level.text.cluster == word)[0]))
    return LevelMatches(
        number=level.number,
        num_text=len(level.text.weight),
        num_smiles=len(level.smiles.weight),
        shown=[
            _match(number, word, answers[word], level, pair, characters)
            for number, word in enumerate(chosen, start=1)
        ],
        hidden=len(answers) - len(chosen),
    )


def _match(
    number: int,
    word: int,
    fragments: Sequence[int],
    level: LevelCorrespondence,
    pair: PairCorrespondence,
    characters: SmilesMap,
) -> Match:
    spans = _spans(pair.smiles_offsets, np.isin(level.smiles.cluster, fragments))
    return Match(
        number=number,
        text=_joined(_spans(pair.text_offsets, level.text.cluster == word), pair.text),
        smiles=_joined(spans, pair.smiles),
        atoms={
            atom
            for atom, (symbol, _) in enumerate(characters.symbols)
            if any(start <= symbol < end for start, end in spans)
        },
        similarity=float(level.similarity[word, list(fragments)].max()),
    )


def _clusters(visible: list[bool], cluster: NDArray[np.int64]) -> list[int]:
    """Clusters that hold a token that is visible."""
    return sorted({int(number) for number, seen in zip(cluster, visible, strict=True) if seen})


def _spans(offsets: Offsets, chosen: NDArray[np.bool_]) -> list[tuple[int, int]]:
    return [offset for offset, one in zip(offsets, chosen, strict=True) if one and offset[0] < offset[1]]


def _joined(spans: list[tuple[int, int]], string: str) -> list[tuple[int, int]]:
    """Spans with nothing but white space between them become one."""
    joined: list[tuple[int, int]] = []
    for start, end in spans:
        if joined and not string[joined[-1][1] : start].strip():
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined
