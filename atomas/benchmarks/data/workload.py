"""What every library has to do: the pairs of a split, and the batches that are made of them."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from atomas.data.batching import PairBatch, collate
from atomas.data.shards import Corpus, ShardedSplit
from atomas.data.tokenizer import AtomasTokenizer
from atomas.data.tokens import TokenBlock

Mode = Literal["tokens", "text"]

MAX_TEXT_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A split in both forms, and a folder where each library keeps its own."""

    corpus: Corpus
    split: ShardedSplit
    tokens: Corpus
    tokenizer: AtomasTokenizer
    batch_size: int
    scratch: Path

    @property
    def window_blocks(self) -> int:
        """As in training, but a quarter of the corpus at most: blocks must be read in every epoch."""
        return max(1, min(64, len(self.split.blocks) // 4))

    @property
    def shuffled(self) -> int:
        """Samples from among which the next is drawn, in every library."""
        return self.window_blocks * int(self.split.blocks.num_records.max())

    @property
    def kind(self) -> type[np.unsignedinteger[Any]]:
        """Of the stored ids."""
        return np.uint16 if self.tokenizer.vocab_size <= 2**16 else np.uint32

    @property
    def token_split(self) -> ShardedSplit:
        """The same pairs, tokenized."""
        return self.tokens.split(self.split.name)

    def samples(self, mode: Mode) -> Iterator[dict[str, Any]]:
        """What the formats of other libraries store of each pair, under its number."""
        if mode == "text":
            for number, record in enumerate(self.split):
                yield {
                    "number": number,
                    "text": record["text"],
                    "smiles": record["smiles"],
                    "inchikey": record["inchikey"],
                }
            return
        number = 0
        for index in range(len(self.token_split.blocks)):
            block = TokenBlock.decode(self.token_split.read_bytes(index))
            for row in range(len(block.molecule_id)):
                yield {
                    "number": number,
                    "text": block.text[block.text_bounds[row] : block.text_bounds[row + 1]],
                    "smiles": block.smiles[block.smiles_bounds[row] : block.smiles_bounds[row + 1]],
                    "molecule_id": int(block.molecule_id[row]),
                    "text_id": int(block.text_id[row]),
                }
                number += 1

    def batch(self, mode: Mode, samples: Sequence[Mapping[str, Any]]) -> PairBatch:
        """The batch of some samples, as every library but ours makes it: ids become one vector at once."""
        if mode == "text":
            return collate(
                samples,
                self.tokenizer,
                sample_ids=[sample["number"] for sample in samples],
                max_text_tokens=MAX_TEXT_TOKENS,
            )
        return collate_arrays(samples)

    def batches(self, mode: Mode, samples: Iterable[Mapping[str, Any]]) -> Iterator[PairBatch]:
        """Batches of a stream of samples; the last may be smaller."""
        stream = iter(samples)
        while own := list(islice(stream, self.batch_size)):
            yield self.batch(mode, own)


def collate_arrays(samples: Sequence[Mapping[str, Any]]) -> PairBatch:
    """A batch of tokenized pairs, each of which came as arrays."""
    import torch

    from atomas.data.batching import RaggedTokens
    from atomas.data.tokenizer import EOS_ID

    def ragged(name: str, limit: int | None = None) -> RaggedTokens:
        arrays = [sample[name][:limit] for sample in samples]
        lengths = np.fromiter(map(len, arrays), dtype=np.int64, count=len(arrays))
        ids = np.concatenate(arrays, dtype=np.int64)
        ids[np.cumsum(lengths) - 1] = EOS_ID
        return RaggedTokens(ids=torch.from_numpy(ids), lengths=torch.from_numpy(lengths))

    def integers(name: str) -> torch.Tensor:
        return torch.tensor([int(sample[name]) for sample in samples], dtype=torch.int64)

    return PairBatch(
        text=ragged("text", MAX_TEXT_TOKENS),
        smiles=ragged("smiles"),
        molecule_id=integers("molecule_id"),
        text_id=integers("text_id"),
        sample_id=integers("number"),
    )


def contents(batches: Iterable[PairBatch], limit: int) -> NDArray[np.void]:
    """The number and the SHA-256 of all that batches say of each of their first `limit` pairs, by number."""
    found: list[tuple[int, bytes]] = []
    for batch in batches:
        text = batch.text.ids.split(batch.text.lengths.tolist())
        smiles = batch.smiles.ids.split(batch.smiles.lengths.tolist())
        fields = (batch.sample_id.tolist(), batch.molecule_id.tolist(), batch.text_id.tolist(), text, smiles)
        for number, molecule_id, text_id, words, atoms in zip(*fields, strict=True):
            said = (molecule_id, text_id, words.tolist(), atoms.tolist())
            found.append((number, hashlib.sha256(json.dumps(said).encode()).digest()))
        if len(found) >= limit:
            break
    return np.array(sorted(found[:limit]), dtype=[("number", np.int64), ("digest", "V32")])
