"""Tokens beside the shards: a corpus tokenized once, for every run with the same tokenizer.

    DIR/tokens-<fingerprint>/index.json                written last; then DIR/index.json names the folder
                             tokenizer.json            the tokenizer itself
                             <split>/lengths.npy       token lengths of every pair, mapped by all processes of a node
                             <split>/shard-000000.tar  members 000000.safetensors: the blocks of the records' shard

The folder is a corpus in its own right, whose blocks hold arrays in place of JSON lines: a run that trains on
tokens reads no text. It is keyed by the SHA-256 of the tokenizer and names the fingerprint of the records.
"""

import hashlib
import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load, save

from atomas.data.batching import PairBatch, RaggedTokens, stable_id
from atomas.data.block_cache import BlockCache
from atomas.data.blocks import Compression
from atomas.data.lengths import TokenLengths, block_workers, stored_lengths
from atomas.data.loader import OrderedLoader
from atomas.data.progress import Progress
from atomas.data.shard_index import Shard, SplitIndex, file_sha256, rewrite_index, write_index
from atomas.data.shard_writer import ShardWriter
from atomas.data.shards import Corpus, Record, ShardedSplit
from atomas.data.tokenizer import EOS_ID, AtomasTokenizer
from atomas.disk import sync
from atomas.errors import AtomasError
from atomas.json_files import write_json

FOLDER_PREFIX = "tokens-"
_KIND = "safetensors"
_LENGTHS = "lengths.npy"
_WORK = "work"
"""Folder with the marks of finished shards, until all are."""
_NO_LIMIT = 2**62
"""Bytes of a token shard: it holds the blocks of one shard of records, however long."""


def tokenize_corpus(
    directory: Path,
    tokenizer: AtomasTokenizer,
    *,
    compression: Compression = "none",
    workers: int | None = None,
) -> Path:
    """Write the tokens of every split of a corpus; returns their folder, whose name ends with the fingerprint.

    What is there already and whole is left. A run that was cut off goes on with the shard it was at. `workers`:
    processes; None: as many as are worth it. Raises AtomasError for a folder that is no corpus or cannot be written.
    """
    corpus = Corpus.open(directory)
    folder = directory / f"{FOLDER_PREFIX}{tokenizer.fingerprint[:16]}"
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        if not _is_complete(folder, corpus, tokenizer):
            _prepare(partial, corpus, tokenizer, compression)
            splits = {
                name: _tokenize_split(split, partial, tokenizer, compression, workers)
                for name, split in corpus.splits.items()
            }
            _finish(partial, splits, corpus, tokenizer)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        shutil.rmtree(folder / _WORK, ignore_errors=True)
        _name_in_index(directory, folder, tokenizer)
    except OSError as error:
        raise AtomasError(
            f"cannot write {error.filename or folder}: {error.strerror or error}; "
            "make room and permissions right, then run it again: it goes on where it stopped"
        ) from error
    return folder


def open_tokens(corpus: Corpus, tokenizer: AtomasTokenizer) -> Corpus | None:
    """What `tokenize_corpus` wrote for this tokenizer; None where the corpus has no tokens at all.

    Raises AtomasError where it has tokens of other tokenizers only, or tokens of other records.
    """
    known = corpus.index.get("tokens", {})
    if not known:
        return None
    again = f"run `atomas data tokenize {corpus.storage} --tokenizer ...` with the run's tokenizer"
    ignore = "set data.tokens to `ignore` to tokenize while training"
    if tokenizer.fingerprint not in known:
        raise AtomasError(
            f"{corpus.storage} has the tokens of other tokenizers ({', '.join(name[:16] for name in known)}), "
            f"not of the run's ({tokenizer.fingerprint[:16]}): {again}, or {ignore}"
        )
    try:
        tokens = Corpus.open(corpus.storage.below(known[tokenizer.fingerprint]))
    except AtomasError as error:
        raise AtomasError(f"its tokens cannot be used ({error}): {again}, or {ignore}") from error
    if tokens.index.get("tokens_of") != _tokens_of(corpus, tokenizer):
        raise AtomasError(f"{tokens.storage} does not belong to the records beside it: {again}, or {ignore}")
    return tokens


def token_lengths(tokens: Corpus, split: str) -> TokenLengths:
    """The lengths that lie beside a split's tokens; AtomasError where they do not match the index."""
    name = f"{split}/{_LENGTHS}"
    storage, place = tokens.storage, tokens.storage.where(name)
    try:
        if storage.folder is not None:
            found = file_sha256(storage.folder / name)
        else:
            data = storage.read_whole(name)
            found = hashlib.sha256(data).hexdigest()
    except OSError as error:
        raise AtomasError(f"{place} cannot be read ({error.strerror or error}): tokenize again") from error
    if found != tokens.index["lengths"][split]:
        raise AtomasError(f"{place} is damaged: delete {storage} and tokenize again")
    if storage.folder is not None:
        return TokenLengths.load(storage.folder / name)
    text, smiles = np.load(io.BytesIO(data), allow_pickle=False)
    return TokenLengths(text=text, smiles=smiles)


@dataclass(frozen=True, kw_only=True)
class TokenBlock:
    """The tokens of the n pairs of a block, one after another."""

    text: NDArray[np.unsignedinteger]
    """[T] uint16, or uint32 where the vocabulary is large"""
    smiles: NDArray[np.unsignedinteger]
    text_bounds: list[int]
    """n + 1 places: text i stands at [bounds[i], bounds[i + 1])"""
    smiles_bounds: list[int]
    molecule_id: NDArray[np.int64]
    text_id: NDArray[np.int64]

    @staticmethod
    def decode(data: bytes) -> "TokenBlock":
        """The inverse of `encode_block`."""
        arrays = load(data)
        return TokenBlock(
            text=arrays["text"],
            smiles=arrays["smiles"],
            text_bounds=_bounds(arrays["text_lengths"]),
            smiles_bounds=_bounds(arrays["smiles_lengths"]),
            molecule_id=arrays["molecule_id"],
            text_id=arrays["text_id"],
        )


def encode_block(records: Sequence[Record], tokenizer: AtomasTokenizer) -> tuple[bytes, NDArray[np.uint16]]:
    """The tokens and identities of some records as safetensors, and their lengths [2, n]."""
    arrays: dict[str, NDArray[np.generic]] = {}
    lengths = []
    kind = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    for name in ("text", "smiles"):
        sequences = tokenizer.encode_batch([record[name] for record in records])
        sizes = [len(sequence) for sequence in sequences]
        arrays[name] = np.concatenate([np.array(sequence, dtype=kind) for sequence in sequences])
        arrays[f"{name}_lengths"] = np.array(sizes, dtype=np.uint32)
        lengths.append(stored_lengths(sizes))
    arrays["molecule_id"] = np.array([stable_id(record["inchikey"]) for record in records], dtype=np.int64)
    arrays["text_id"] = np.array([stable_id(record["text"]) for record in records], dtype=np.int64)
    return save(arrays), np.stack(lengths)


class TokenReader:
    """Batches of the pairs of a tokenized split; keeps the `cached_blocks` most recently used blocks."""

    def __init__(self, split: ShardedSplit, cached_blocks: int) -> None:
        self.blocks = BlockCache(split, partial(_read_block, split), cached_blocks)

    def collate(self, members: NDArray[np.int64], max_text_tokens: int | None = None) -> PairBatch:
        """The pairs of these numbers, as `atomas.data.batching.collate` makes them of their records."""
        numbers, rows = (column.tolist() for column in self.blocks.locate(members))
        limit = _NO_LIMIT if max_text_tokens is None else max_text_tokens
        text, smiles = [], []
        molecule_id = np.empty(len(rows), dtype=np.int64)
        text_id = np.empty(len(rows), dtype=np.int64)
        for place, (number, row) in enumerate(zip(numbers, rows, strict=True)):
            block = self.blocks[number]
            start, stop = block.text_bounds[row], block.text_bounds[row + 1]
            text.append(block.text[start : min(stop, start + limit)])
            smiles.append(block.smiles[block.smiles_bounds[row] : block.smiles_bounds[row + 1]])
            molecule_id[place] = block.molecule_id[row]
            text_id[place] = block.text_id[row]
        return PairBatch(
            text=_ragged(text),
            smiles=_ragged(smiles),
            molecule_id=torch.from_numpy(molecule_id),
            text_id=torch.from_numpy(text_id),
            sample_id=torch.from_numpy(members.astype(np.int64)),
        )


def _read_block(split: ShardedSplit, number: int) -> TokenBlock:
    return TokenBlock.decode(split.read_bytes(number))


def _ragged(sequences: Sequence[NDArray[np.unsignedinteger]]) -> RaggedTokens:
    """Sequences, the ends of which may have been cut off: each gets its </s> back."""
    lengths = np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences))
    ids = np.concatenate(sequences, dtype=np.int64)
    ids[np.cumsum(lengths) - 1] = EOS_ID
    return RaggedTokens(ids=torch.from_numpy(ids), lengths=torch.from_numpy(lengths))


def _bounds(lengths: NDArray[np.integer]) -> list[int]:
    return [0, *np.cumsum(lengths, dtype=np.int64).tolist()]


class _BlockTokens:
    def __init__(self, split: ShardedSplit, tokenizer: AtomasTokenizer) -> None:
        self._split = split
        self._tokenizer = tokenizer

    def __getitem__(self, block: int) -> tuple[bytes, NDArray[np.uint16]]:
        return encode_block(self._split.read_block(block), self._tokenizer)


def _is_complete(folder: Path, corpus: Corpus, tokenizer: AtomasTokenizer) -> bool:
    """Whether the folder holds the tokens of these very records; a damaged one does not: every byte is read."""
    try:
        tokens = Corpus.open(folder)
        if tokens.index.get("tokens_of") != _tokens_of(corpus, tokenizer):
            return False
        for name, split in tokens.splits.items():
            token_lengths(tokens, name)
            with Progress(f"checking {name}", split.num_records, unit="pairs") as progress:
                for shard in split.shards:
                    if file_sha256(folder / shard.path) != shard.sha256:
                        return False
                    progress.update(shard.num_records)
    except (AtomasError, OSError):
        return False
    return True


def _tokens_of(corpus: Corpus, tokenizer: AtomasTokenizer) -> dict[str, str]:
    return {"records": corpus.fingerprint, "tokenizer": tokenizer.fingerprint}


def _prepare(partial: Path, corpus: Corpus, tokenizer: AtomasTokenizer, compression: Compression) -> None:
    """A folder to go on in: that of a run that was cut off, if it did the same work."""
    work = {**_tokens_of(corpus, tokenizer), "compression": compression}
    marker = partial / _WORK / "work.json"
    if not marker.exists() or json.loads(marker.read_text(encoding="utf-8")) != work:
        shutil.rmtree(partial, ignore_errors=True)
        marker.parent.mkdir(parents=True)
        write_json(marker, work)


def _tokenize_split(
    split: ShardedSplit,
    partial: Path,
    tokenizer: AtomasTokenizer,
    compression: Compression,
    workers: int | None,
) -> SplitIndex:
    """One shard of tokens for every shard of records; a finished one is marked by its part of the index."""
    marks = [partial / _WORK / f"{split.name}-{number:06d}.json" for number in range(len(split.shards))]
    missing = [number for number, mark in enumerate(marks) if not mark.exists()]
    firsts = np.cumsum([0] + [len(shard.blocks) for shard in split.shards]).tolist()
    blocks = [block for number in missing for block in range(firsts[number], firsts[number + 1])]
    if workers is None:
        workers = block_workers(split)
    loader = OrderedLoader(_BlockTokens(split, tokenizer), blocks, num_workers=0 if workers == 1 else workers)
    encoded = iter(loader)
    with Progress(f"tokenizing {split.name}", split.num_records, unit="pairs") as progress:
        progress.update(split.num_records - sum(split.shards[number].num_records for number in missing))
        for number in missing:
            writer = ShardWriter(
                partial, split.name, kind=_KIND, compression=compression, shard_bytes=_NO_LIMIT,
                first_shard=number, first_block=firsts[number],
            )  # fmt: skip
            lengths = []
            with writer:
                for _ in split.shards[number].blocks:
                    data, sizes = next(encoded)
                    writer.write_block(data, sizes.shape[1])
                    lengths.append(sizes)
                    progress.update(sizes.shape[1])
            shard, own_lengths = writer.index().shards[0], marks[number].with_suffix(".npy")
            np.save(own_lengths, np.concatenate(lengths, axis=1))
            for path in (partial / shard.path, own_lengths):
                sync(path)  # before the mark, which says that they are there
            write_json(marks[number], shard.to_json())
    shards = tuple(Shard.from_json(json.loads(mark.read_text(encoding="utf-8"))) for mark in marks)
    text, smiles = np.concatenate([np.load(mark.with_suffix(".npy")) for mark in marks], axis=1)
    TokenLengths(text=text, smiles=smiles).save(partial / split.name / _LENGTHS)
    return SplitIndex(num_records=split.num_records, shards=shards)


def _finish(partial: Path, splits: dict[str, SplitIndex], corpus: Corpus, tokenizer: AtomasTokenizer) -> None:
    tokenizer.save(partial)
    write_index(
        partial, splits, counts={}, hazards={}, sources=[], options={},
        tokens_of=_tokens_of(corpus, tokenizer),
        lengths={name: file_sha256(partial / name / _LENGTHS) for name in splits},
    )  # fmt: skip


def _name_in_index(directory: Path, folder: Path, tokenizer: AtomasTokenizer) -> None:
    """The corpus's own index says which tokens there are: a remote folder cannot be listed."""
    index = Corpus.open(directory).index
    known = {**index.get("tokens", {}), tokenizer.fingerprint: folder.name}
    if index.get("tokens") != known:
        rewrite_index(directory, {**index, "tokens": known})
