"""Token lengths of every record of a split: measured once, then mapped from a file.

Two bytes a sequence, 400 MB for 100 million pairs, of which the processes of a node share one copy.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atomas.data.bad_samples import BlockError
from atomas.data.loader import OrderedLoader
from atomas.data.parallel import available_cores
from atomas.data.progress import Progress
from atomas.data.shards import Corpus, ShardedSplit
from atomas.data.tokenizer import AtomasTokenizer
from atomas.errors import AtomasError

_PARALLEL_FROM_BLOCKS = 32
_MAX_WORKERS = 16
_CHUNK = 2**20

LONGEST = 2**16 - 2
"""Longest limit that lengths of two bytes can be compared with: what is longer still is stored as one more."""

Lengths = NDArray[np.uint16]
OnBadBlock = Callable[[BlockError, int], None]


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
    """Tokens of each record of a split, </s> included, before any cut; both [num_records] uint16."""

    text: Lengths
    smiles: Lengths

    @staticmethod
    def measure(
        split: ShardedSplit, tokenizer: AtomasTokenizer, *, on_bad_block: OnBadBlock | None = None
    ) -> "TokenLengths":
        """Tokenize the whole split, in parallel where it is large, with progress.

        A block that cannot be read raises BlockError; or `on_bad_block` hears of it, with the number of its records,
        which count as too long for any use.
        """
        loader = OrderedLoader(
            _BlockLengths(split, tokenizer), range(len(split.blocks)), num_workers=block_workers(split)
        )
        parts = [np.empty((2, 0), dtype=np.uint16)]
        with Progress(f"measuring {split.name}", split.num_records, unit="pairs") as progress:
            for number, part in enumerate(loader):
                if isinstance(part, BlockError):
                    if on_bad_block is None:
                        raise part
                    count = split.blocks[number].num_records
                    on_bad_block(part, count)
                    part = np.full((2, count), LONGEST + 1, dtype=np.uint16)
                parts.append(part)
                progress.update(part.shape[1])
        text, smiles = np.concatenate(parts, axis=1)
        return TokenLengths(text=text, smiles=smiles)

    @staticmethod
    def load(path: Path) -> "TokenLengths":
        """Map what `save` wrote; raises AtomasError where it is damaged."""
        try:
            text, smiles = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise AtomasError(f"{path} cannot be read ({error}): delete it") from error
        return TokenLengths(text=text, smiles=smiles)

    def __reduce__(self) -> tuple[Any, ...]:
        """A process that is not forked maps the file again."""
        file = getattr(self.text, "filename", None)
        if file is not None:
            return TokenLengths.load, (Path(file),)
        return _in_memory, (self.text, self.smiles)

    def save(self, path: Path) -> None:
        """Write both columns, so that a reader sees all of the file or none."""
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=".lengths-")
        with os.fdopen(handle, "wb") as file:
            np.save(file, np.stack([self.text, self.smiles]))
        os.replace(partial, path)

    @staticmethod
    def resolve(
        corpus: Corpus,
        split: str,
        tokenizer: AtomasTokenizer,
        cache_dir: Path,
        *,
        on_bad_block: OnBadBlock | None = None,
    ) -> "TokenLengths":
        """Map the lengths from `cache_dir`, or `measure` them and leave them there.

        The file's name holds the fingerprints of corpus and tokenizer, so that it is never stale.
        """
        path = cache_dir / f"lengths-{split}-{corpus.fingerprint[:16]}-{tokenizer.fingerprint[:16]}.npy"
        if not path.exists():
            measured = TokenLengths.measure(corpus.split(split), tokenizer, on_bad_block=on_bad_block)
            measured.save(path)
        return TokenLengths.load(path)

    def select(self, *, max_text_tokens: int, max_smiles_tokens: int, text_is_written: bool) -> Selection:
        """Leave out what may not be cut: long SMILES, and long texts where the decoder has to write them."""
        for limit in (max_text_tokens, max_smiles_tokens):
            if limit > LONGEST:
                raise AtomasError(f"a limit of {limit} tokens a sequence: {LONGEST} is the longest there is")
        eligible = np.empty(len(self.text), dtype=np.bool_)
        dropped_smiles = long_texts = 0
        for start in range(0, len(self.text), _CHUNK):  # no more than a byte a pair is held at once
            part = slice(start, start + _CHUNK)
            long_smiles = self.smiles[part] > max_smiles_tokens
            long_text = ~long_smiles & (self.text[part] > max_text_tokens)
            eligible[part] = ~long_smiles & ~long_text if text_is_written else ~long_smiles
            dropped_smiles += int(long_smiles.sum())
            long_texts += int(long_text.sum())
        return Selection(
            eligible=eligible,
            dropped_smiles=dropped_smiles,
            dropped_texts=long_texts if text_is_written else 0,
            cut_texts=0 if text_is_written else long_texts,
        )

    def seen(
        self, members: NDArray[np.int64], max_text_tokens: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Lengths of the texts, cut, and of the SMILES of some records, both int64."""
        text = np.minimum(self.text[members], min(max_text_tokens, LONGEST)).astype(np.int64)
        return text, self.smiles[members].astype(np.int64)


def block_workers(split: ShardedSplit) -> int:
    """Processes worth starting to tokenize a split; 0: none but this."""
    return 0 if len(split.blocks) < _PARALLEL_FROM_BLOCKS else min(available_cores(), _MAX_WORKERS)


def _in_memory(text: Lengths, smiles: Lengths) -> TokenLengths:
    return TokenLengths(text=text, smiles=smiles)


def stored_lengths(lengths: Sequence[int]) -> Lengths:
    """Lengths in two bytes each; those that do not fit become the largest number that does."""
    return np.minimum(np.asarray(lengths, dtype=np.int64), LONGEST + 1).astype(np.uint16)


class _BlockLengths:
    def __init__(self, split: ShardedSplit, tokenizer: AtomasTokenizer) -> None:
        self._split = split
        self._tokenizer = tokenizer

    def __getitem__(self, block: int) -> Lengths | BlockError:
        """Token lengths of the texts and the SMILES of a block, [2, num_records]."""
        try:
            records = self._split.read_block(block)
        except BlockError as error:
            return error
        columns = ([record[name] for record in records] for name in ("text", "smiles"))
        return np.stack(
            [stored_lengths([len(ids) for ids in self._tokenizer.encode_batch(column)]) for column in columns]
        )
