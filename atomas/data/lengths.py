"""Token lengths of every record of a split: measured once, then read from a file."""

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from atomas.data.loader import OrderedLoader
from atomas.data.parallel import available_cores
from atomas.data.progress import Progress
from atomas.data.shards import Corpus, ShardedSplit
from atomas.data.tokenizer import AtomasTokenizer

_PARALLEL_FROM_BLOCKS = 32
_MAX_WORKERS = 16


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The records that a run can use, and how many it cannot."""

    eligible: NDArray[np.bool_]
    """[num_records] bool"""
    dropped_smiles: int
    """Pairs whose SMILES is too long: a cut SMILES is not a molecule."""
    dropped_texts: int
    """Further pairs whose text is too long to be written."""
    cut_texts: int
    """Pairs that stay, with their text cut, because it is only read."""


@dataclass(frozen=True, kw_only=True)
class TokenLengths:
    """Tokens of each record of a split, </s> included, before any cut; both [num_records] int32."""

    text: NDArray[np.int32]
    smiles: NDArray[np.int32]

    @staticmethod
    def measure(split: ShardedSplit, tokenizer: AtomasTokenizer) -> "TokenLengths":
        """Tokenize the whole split, in parallel where it is large, with progress."""
        blocks = range(len(split.blocks))
        workers = 0 if len(blocks) < _PARALLEL_FROM_BLOCKS else min(available_cores(), _MAX_WORKERS)
        loader = OrderedLoader(_BlockLengths(split, tokenizer), blocks, num_workers=workers)
        parts = [np.empty((2, 0), dtype=np.int32)]
        with Progress(f"measuring {split.name}", split.num_records, unit="pairs") as progress:
            for part in loader:
                parts.append(part)
                progress.update(part.shape[1])
        text, smiles = np.concatenate(parts, axis=1)
        return TokenLengths(text=text, smiles=smiles)

    @staticmethod
    def resolve(corpus: Corpus, split: str, tokenizer: AtomasTokenizer, cache_dir: Path) -> "TokenLengths":
        """Read the lengths from `cache_dir`, or measure them and leave them there.

        The file's name holds the fingerprints of corpus and tokenizer, so that it is never stale.
        """
        path = cache_dir / f"lengths-{split}-{corpus.fingerprint[:16]}-{tokenizer.fingerprint[:16]}.npy"
        if path.exists():
            text, smiles = np.load(path)
            return TokenLengths(text=text, smiles=smiles)
        lengths = TokenLengths.measure(corpus.split(split), tokenizer)
        cache_dir.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=cache_dir, prefix=".lengths-")
        with os.fdopen(handle, "wb") as file:
            np.save(file, np.stack([lengths.text, lengths.smiles]))
        os.replace(partial, path)
        return lengths

    def select(self, *, max_text_tokens: int, max_smiles_tokens: int, text_is_written: bool) -> Selection:
        """Leave out what may not be cut: long SMILES, and long texts where the decoder has to write them."""
        long_smiles = self.smiles > max_smiles_tokens
        long_text = ~long_smiles & (self.text > max_text_tokens)
        return Selection(
            eligible=~long_smiles & ~long_text if text_is_written else ~long_smiles,
            dropped_smiles=int(long_smiles.sum()),
            dropped_texts=int(long_text.sum()) if text_is_written else 0,
            cut_texts=0 if text_is_written else int(long_text.sum()),
        )


class _BlockLengths:
    def __init__(self, split: ShardedSplit, tokenizer: AtomasTokenizer) -> None:
        self._split = split
        self._tokenizer = tokenizer

    def __getitem__(self, block: int) -> NDArray[np.int32]:
        """Token lengths of the texts and the SMILES of a block, [2, num_records]."""
        records = self._split.read_block(block)
        columns = ([record[name] for record in records] for name in ("text", "smiles"))
        return np.array(
            [[len(ids) for ids in self._tokenizer.encode_batch(column)] for column in columns], dtype=np.int32
        )
