"""The pairs of a benchmark: real ones from a file, or generated ones; and batches of like lengths drawn from them."""

import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

import torch

from atomas.data.batching import PairBatch, RaggedTokens

READ_PAIRS = 2000
"""Rows of a file that are tokenised."""


class TokenPair(NamedTuple):
    """Ids of one pair, both ending with </s>."""

    text: list[int]
    smiles: list[int]


@dataclass(frozen=True, kw_only=True)
class PairSource:
    """Where pairs are from; without a file they are generated, without a tokenizer one is trained on them."""

    file: Path | None = None
    tokenizer: Path | None = None

    @property
    def description(self) -> str:
        """For people: which pairs, which vocabulary."""
        pairs = (
            "generated demo pairs" if self.file is None else f"real pairs of {'/'.join(self.file.parts[-2:])}"
        )
        pieces = (
            "a vocabulary trained on them"
            if self.tokenizer is None
            else f"the {self.tokenizer.name} vocabulary"
        )
        return f"{pairs}, {pieces}"

    def read(self, *, longest: int, vocabulary: int) -> list[TokenPair]:
        """The pairs of which no side is longer than `longest` tokens, shortest first.

        Tokens beyond the first `vocabulary`, which the published form does not have, become <unk>.

        Raises:
            AtomasError: the file or the tokenizer cannot be read.
        """
        from atomas.data.tokenizer import UNK_ID, AtomasTokenizer

        rows = _generated() if self.file is None else _rows(self.file)
        if self.tokenizer is None:
            tokenizer = AtomasTokenizer.train((side for row in rows for side in row), vocab_size=2048)
        else:
            tokenizer = AtomasTokenizer.load(self.tokenizer)
        sides = (
            [[i if i < vocabulary else UNK_ID for i in ids] for ids in tokenizer.encode_batch(list(side))]
            for side in zip(*rows, strict=True)
        )
        pairs = [TokenPair(text, smiles) for text, smiles in zip(*sides, strict=True)]
        kept = [pair for pair in pairs if max(map(len, pair)) <= longest]
        return sorted(kept, key=lambda pair: len(pair.text) + len(pair.smiles))


def draw_batches(pairs: Sequence[TokenPair], *, size: int, count: int, seed: int) -> list[list[TokenPair]]:
    """`count` batches of `size` pairs each.

    Stratified by length: `pairs`, which are sorted by it, are cut into `size` equal parts, and every batch has one pair
    of each, so that also small batches have the lengths of the corpus.
    """
    rng = random.Random(seed)
    bounds = [len(pairs) * part // size for part in range(size + 1)]
    batches = []
    for _ in range(count):
        batch = [pairs[rng.randrange(low, max(low + 1, high))] for low, high in pairwise(bounds)]
        rng.shuffle(batch)
        batches.append(batch)
    return batches


def collate(pairs: Sequence[TokenPair], first: int = 0) -> PairBatch:
    """One ragged batch, all of whose pairs are different; they are numbered from `first`."""
    numbers = torch.arange(first, first + len(pairs))
    return PairBatch(
        text=RaggedTokens.from_lists([pair.text for pair in pairs]),
        smiles=RaggedTokens.from_lists([pair.smiles for pair in pairs]),
        molecule_id=numbers,
        text_id=numbers,
        sample_id=numbers,
    )


def _rows(file: Path) -> list[tuple[str, str]]:
    """(text, SMILES) of the first rows."""
    from atomas.data.molecules import unescape_smiles
    from atomas.data.sources import Columns, PairFile

    rows = PairFile.parse(str(file)).rows(Columns())
    return [(row.text, unescape_smiles(row.smiles)) for row in islice(rows, READ_PAIRS) if not row.problem]


def _generated() -> list[tuple[str, str]]:
    from atomas.data.demo import build_demo_corpus
    from atomas.data.shards import Corpus

    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        build_demo_corpus(corpus, pairs=READ_PAIRS // 4, seed=0)
        return [(record["text"], record["smiles"]) for record in Corpus.open(corpus).split("train")]
