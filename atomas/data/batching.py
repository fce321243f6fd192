"""Ragged batches: flat tokens and lengths. Nothing is ever padded."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from atomas.data.bad_samples import Skipped


class Encoder(Protocol):
    """What `collate` needs of a tokenizer."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of every text, each ending with the end-of-sequence id."""
        ...


@dataclass(frozen=True, kw_only=True)
class RaggedTokens:
    """Token ids of B sequences one after another; every sequence ends with </s> (id 1), none is padded."""

    ids: Tensor
    """[T] int64"""
    lengths: Tensor
    """[B] int64, sums to T"""

    @classmethod
    def from_lists(cls, sequences: Sequence[Sequence[int]]) -> "RaggedTokens":
        """Concatenate B sequences of ids."""
        return cls(
            ids=torch.from_numpy(np.fromiter(chain.from_iterable(sequences), dtype=np.int64)),
            lengths=torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int64),
        )

    @staticmethod
    def join(parts: Sequence["RaggedTokens"]) -> "RaggedTokens":
        """The sequences of all parts, one after another."""
        return RaggedTokens(
            ids=torch.cat([part.ids for part in parts]), lengths=torch.cat([part.lengths for part in parts])
        )

    def to(self, device: torch.device | str) -> "RaggedTokens":
        """The same tokens on `device`; asynchronous from pinned memory."""
        return RaggedTokens(
            ids=self.ids.to(device, non_blocking=True), lengths=self.lengths.to(device, non_blocking=True)
        )

    def split(self, counts: list[int]) -> list["RaggedTokens"]:
        """Consecutive parts of `counts` sequences each."""
        parts = self.lengths.split(counts)
        ids = self.ids.split([int(part.sum()) for part in parts])
        return [RaggedTokens(ids=own, lengths=part) for own, part in zip(ids, parts, strict=True)]

    def pin_memory(self) -> "RaggedTokens":
        """The same tokens in page-locked memory; the loader calls this where there is CUDA."""
        return RaggedTokens(ids=self.ids.pin_memory(), lengths=self.lengths.pin_memory())


@dataclass(frozen=True, kw_only=True)
class PairBatch:
    """b molecule-text pairs of one rank."""

    text: RaggedTokens
    smiles: RaggedTokens
    molecule_id: Tensor
    """[b] int64, equal for equal molecules: see `stable_id` of the InChIKey"""
    text_id: Tensor
    """[b] int64, equal for equal texts: see `stable_id` of the text"""
    sample_id: Tensor
    """[b] int64, number of the record in the run's corpora"""
    skipped: tuple[Skipped, ...] = ()
    """Samples that could not be read, in whose place others stand"""

    def __len__(self) -> int:
        """Return b, the number of pairs."""
        return len(self.sample_id)

    def __reduce__(self) -> tuple[Any, ...]:
        """Between processes a batch is a few short arrays: seven tensors in shared memory take ten times as long."""
        tensors = (
            self.text.ids, self.text.lengths, self.smiles.ids, self.smiles.lengths,
            self.molecule_id, self.text_id, self.sample_id,
        )  # fmt: skip
        return _unpack_batch, (self.skipped, *(_narrow(tensor.numpy()) for tensor in tensors))

    def to(self, device: torch.device | str) -> "PairBatch":
        """The same batch on `device`; asynchronous from pinned memory."""
        return PairBatch(
            text=self.text.to(device),
            smiles=self.smiles.to(device),
            molecule_id=self.molecule_id.to(device, non_blocking=True),
            text_id=self.text_id.to(device, non_blocking=True),
            sample_id=self.sample_id.to(device, non_blocking=True),
        )

    @staticmethod
    def join(parts: Sequence["PairBatch"]) -> "PairBatch":
        """The pairs of all parts, one after another."""
        if len(parts) == 1:
            return parts[0]
        return PairBatch(
            text=RaggedTokens.join([part.text for part in parts]),
            smiles=RaggedTokens.join([part.smiles for part in parts]),
            molecule_id=torch.cat([part.molecule_id for part in parts]),
            text_id=torch.cat([part.text_id for part in parts]),
            sample_id=torch.cat([part.sample_id for part in parts]),
        )

    def split(self, count: int) -> list["PairBatch"]:
        """`count` consecutive, nearly equal parts, which are those of `Partition.chunk`."""
        if count == 1:
            return [self]
        bounds = [len(self) * number // count for number in range(count + 1)]
        counts = [stop - start for start, stop in pairwise(bounds)]
        parts = zip(
            self.text.split(counts),
            self.smiles.split(counts),
            self.molecule_id.split(counts),
            self.text_id.split(counts),
            self.sample_id.split(counts),
            strict=True,
        )
        return [
            PairBatch(text=text, smiles=smiles, molecule_id=molecule, text_id=text_id, sample_id=sample)
            for text, smiles, molecule, text_id, sample in parts
        ]

    def pin_memory(self) -> "PairBatch":
        """The same batch in page-locked memory; the loader calls this where there is CUDA."""
        return PairBatch(
            text=self.text.pin_memory(),
            smiles=self.smiles.pin_memory(),
            molecule_id=self.molecule_id.pin_memory(),
            text_id=self.text_id.pin_memory(),
            sample_id=self.sample_id.pin_memory(),
            skipped=self.skipped,
        )


@dataclass(frozen=True, kw_only=True)
class TokenizedPair:
    """One record, ready to be put into a batch."""

    text: Sequence[int]
    smiles: Sequence[int]
    molecule_id: int
    text_id: int
    sample_id: int


def token_passes(lengths: Sequence[int], budget: int) -> list[int]:
    """Number of consecutive sequences in each pass: as many as have `budget` tokens, and one at least."""
    counts: list[int] = []
    room = 0
    for length in lengths:
        if not counts or length > room:
            counts.append(0)
            room = budget
        counts[-1] += 1
        room -= length
    return counts


def split_groups(groups: Sequence[Tensor], count: int) -> list[Tensor]:
    """The same rows in at least `count` groups, by halving the largest ones; rows must be enough."""
    parts = list(groups)
    while len(parts) < count:
        largest = max(range(len(parts)), key=lambda number: len(parts[number]))
        assert len(parts[largest]) > 1, f"{len(parts)} rows cannot make {count} groups"
        parts[largest : largest + 1] = parts[largest].tensor_split(2)
    return parts


def collate(
    records: Sequence[Mapping[str, Any]],
    tokenizer: Encoder,
    *,
    sample_ids: Iterable[int] | None = None,
    max_text_tokens: int | None = None,
) -> PairBatch:
    """Tokenize b records (see `tokenize_pairs`) into one batch; `sample_ids` default to 0, 1, ..."""
    return collate_pairs(
        tokenize_pairs(records, tokenizer, sample_ids=sample_ids, max_text_tokens=max_text_tokens)
    )


def tokenize_pairs(
    records: Sequence[Mapping[str, Any]],
    tokenizer: Encoder,
    *,
    sample_ids: Iterable[int] | None = None,
    max_text_tokens: int | None = None,
) -> list[TokenizedPair]:
    """Token ids and identities of `records`.

    A text longer than `max_text_tokens` is cut, keeping </s>. A SMILES is never cut: a part is no molecule.
    """
    texts = tokenizer.encode_batch([record["text"] for record in records])
    smiles = tokenizer.encode_batch([record["smiles"] for record in records])
    numbers = range(len(records)) if sample_ids is None else sample_ids
    return [
        TokenizedPair(
            text=cut_text(text_ids, max_text_tokens),
            smiles=smiles_ids,
            molecule_id=stable_id(record["inchikey"]),
            text_id=stable_id(record["text"]),
            sample_id=int(number),
        )
        for record, text_ids, smiles_ids, number in zip(records, texts, smiles, numbers, strict=True)
    ]


def collate_pairs(pairs: Sequence[TokenizedPair]) -> PairBatch:
    """Put b tokenized pairs into one batch."""
    return PairBatch(
        text=RaggedTokens.from_lists([pair.text for pair in pairs]),
        smiles=RaggedTokens.from_lists([pair.smiles for pair in pairs]),
        molecule_id=torch.tensor([pair.molecule_id for pair in pairs], dtype=torch.int64),
        text_id=torch.tensor([pair.text_id for pair in pairs], dtype=torch.int64),
        sample_id=torch.tensor([pair.sample_id for pair in pairs], dtype=torch.int64),
    )


def _narrow(values: NDArray[np.int64]) -> NDArray[Any]:
    """The same numbers in two bytes each, where they fit."""
    fits = values.size == 0 or (values.min() >= 0 and values.max() < 2**16)
    return values.astype(np.uint16) if fits else values


def _unpack_batch(skipped: tuple[Skipped, ...], *arrays: NDArray[Any]) -> PairBatch:
    text, text_lengths, smiles, smiles_lengths, molecule_id, text_id, sample_id = (
        torch.from_numpy(array.astype(np.int64)) for array in arrays
    )
    return PairBatch(
        text=RaggedTokens(ids=text, lengths=text_lengths),
        smiles=RaggedTokens(ids=smiles, lengths=smiles_lengths),
        molecule_id=molecule_id,
        text_id=text_id,
        sample_id=sample_id,
        skipped=skipped,
    )


def stable_id(value: str) -> int:
    """First 63 bits of the SHA-256 of `value`: the same in every process, and it fits an int64."""
    return int.from_bytes(hashlib.sha256(value.encode()).digest()[:8], "big") >> 1


def cut_text(ids: Sequence[int], limit: int | None) -> Sequence[int]:
    """At most `limit` tokens of a text, the last, </s>, among them; None: all."""
    if limit is None or len(ids) <= limit:
        return ids
    return [*ids[: limit - 1], ids[-1]]
