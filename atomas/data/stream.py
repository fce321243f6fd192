"""From shards to batches: the pairs of every global batch, dealt to ranks, read by worker processes.

The position in the data is the number of batches consumed. What a global batch holds depends on the order
alone; the world size only decides who gets which pair.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from atomas.config import Config
from atomas.data.bad_samples import BlockError, ErrorPolicy, Skipped, append_left_out
from atomas.data.batching import PairBatch, collate
from atomas.data.block_cache import BlockCache
from atomas.data.corpora import Corpora
from atomas.data.lengths import Selection, TokenLengths
from atomas.data.loader import OrderedLoader
from atomas.data.order import GlobalOrder, MixedOrder, Order
from atomas.data.shards import Corpus, ShardedSplit
from atomas.data.tokenizer import AtomasTokenizer
from atomas.data.tokens import TokenReader, open_tokens, token_lengths
from atomas.errors import AtomasError

logger = logging.getLogger(__name__)

_FIELDS = ("text", "smiles", "inchikey")


@dataclass(frozen=True, kw_only=True)
class Source:
    """The pairs of one split, and how many tokens each has."""

    split: ShardedSplit
    lengths: TokenLengths
    tokens: ShardedSplit | None = None
    """Its pairs as tokens, which are read in place of texts where they are given"""


class PairStream:
    """One rank's part of each global batch: `stream[n]` is a pure function of n = 0, 1, ... without end.

    Global batch n holds the records at positions n B, ..., (n + 1) B - 1 of `order`. Each of W ranks gets B
    / W of them, dealt so that the ranks have nearly the same number of tokens. A record that cannot be read ends in
    an error, or its position goes to a record that can, which is another function of the position alone.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: AtomasTokenizer,
        order: Order,
        *,
        batch_size: int,
        max_text_tokens: int,
        policy: ErrorPolicy | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """`order` numbers the records of the first source, then those of the next.

        Raises AtomasError if W does not divide B or if an epoch is shorter than a batch.
        """
        if batch_size % world_size:
            legal = [size for size in range(1, batch_size + 1) if batch_size % size == 0]
            raise AtomasError(
                f"data.batch_size = {batch_size} cannot be divided among {world_size} ranks; "
                f"world sizes that divide it: {', '.join(map(str, legal))}"
            )
        if len(order) < batch_size:
            names = " and ".join(
                f"split {source.split.name!r} of {source.split.storage}" for source in sources
            )
            raise AtomasError(
                f"{names} has {len(order)} usable pairs, fewer than "
                f"data.batch_size = {batch_size}: lower it, or raise data.max_smiles_tokens or "
                "data.max_text_tokens"
            )
        self._sources = sources
        self._starts = np.cumsum([0] + [source.split.num_records for source in sources])
        self._readers: list[_Reader] = [
            TokenReader(source.tokens, order.window_blocks)
            if source.tokens is not None
            else _RecordReader(source.split, tokenizer, order.window_blocks)
            for source in sources
        ]
        self._order = order
        self._groups: dict[int, int] = {}
        """Of each source, the group whose shards were last asked for"""
        self._batch_size = batch_size
        self._max_text_tokens = max_text_tokens
        self._policy = policy or ErrorPolicy()
        self._rank = rank
        self._world_size = world_size

    @staticmethod
    def open(
        config: Config, corpora: Corpora, tokenizer: AtomasTokenizer, *, rank: int = 0, world_size: int = 1
    ) -> "PairStream":
        """The training stream of a run.

        Reads a corpus's tokens where it has any. Otherwise token lengths are kept in the run's folder; where they
        are not there yet, this measures them, so let one rank come first. Raises AtomasError for an unknown split,
        tokens of another tokenizer, an illegal world size or too few usable pairs.
        """
        data = config.data
        sources = [_open_source(config, corpus, tokenizer) for corpus in corpora.members]
        orders = []
        for number, source in enumerate(sources):
            selection = source.lengths.select(
                max_text_tokens=data.max_text_tokens,
                max_smiles_tokens=data.max_smiles_tokens,
                text_is_written=config.loss.task != "genmol" and config.loss.lm_weight > 0,
            )
            if rank == 0:
                _log_selection(config, source.split, selection)
            orders.append(
                GlobalOrder(
                    source.split.blocks.num_records,
                    # corpora of the same sizes are not to be permuted alike
                    seed=config.run.seed ^ (number << 40),
                    window_blocks=data.window_blocks,
                    eligible=selection.eligible,
                    shard_sizes=[len(shard.blocks) for shard in source.split.shards],
                    group_shards=data.group_shards,
                )
            )
        return PairStream(
            sources,
            tokenizer,
            _mix(orders, sources, corpora, config.run.seed),
            batch_size=data.batch_size,
            max_text_tokens=data.max_text_tokens,
            policy=ErrorPolicy(
                on_error=data.on_error, max_consecutive=data.max_consecutive_skips, max_total=data.max_skips
            ),
            rank=rank,
            world_size=world_size,
        )

    @property
    def order(self) -> Order:
        """Which record stands where; its length is the number of pairs in an epoch."""
        return self._order

    @property
    def policy(self) -> ErrorPolicy:
        """What becomes of records that cannot be read."""
        return self._policy

    def lengths(self, members: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens of the texts, cut, and of the SMILES of some records, both int64."""
        text, smiles = np.empty_like(members), np.empty_like(members)
        for number, places in self._by_source(members):
            own = members[places] - self._starts[number]
            text[places], smiles[places] = self._sources[number].lengths.seen(own, self._max_text_tokens)
        return text, smiles

    def __getitem__(self, number: int) -> PairBatch:
        """The rank's pairs of global batch `number`. AtomasError names an unreadable shard and block."""
        first = number * self._batch_size
        self._fetch_ahead(first)
        members = self._order.indices(first, first + self._batch_size)
        dealt = _deal(np.add(*self.lengths(members)), self._rank, self._world_size)
        own, skipped = self._readable(first + dealt, members[dealt])
        parts = []
        for source, places in self._by_source(own):
            part = self._readers[source].collate(own[places] - self._starts[source], self._max_text_tokens)
            parts.append(replace(part, sample_id=part.sample_id + int(self._starts[source])))
        return replace(PairBatch.join(parts), skipped=tuple(skipped))

    def _fetch_ahead(self, position: int) -> None:
        """Have the shards of the groups in use and of the next ones come to this node, where they lie elsewhere."""
        splits = [source.split if source.tokens is None else source.tokens for source in self._sources]
        if all(split.storage.folder is not None for split in splits):
            return
        for number, (split, upcoming) in enumerate(zip(splits, self._order.upcoming(position), strict=True)):
            if self._groups.get(number) != upcoming.group:
                self._groups[number] = upcoming.group
                split.storage.fetch_ahead([split.shards[shard] for shard in upcoming.shards])

    def _readable(
        self, positions: NDArray[np.int64], members: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], list[Skipped]]:
        """`members`, but where one cannot be read the first of its position's stand-ins that can."""
        broken = [self._readers[source].blocks.load(own) for source, own in self._split(members)]
        if not any(broken):
            return members, []
        readable, skipped, in_a_row = members.copy(), [], 0
        for place, (position, member) in enumerate(zip(positions.tolist(), members.tolist(), strict=True)):
            first_error = error = self._error(member)
            attempt = 0
            while error is not None:
                in_a_row += 1
                self._policy.check_consecutive(in_a_row, error)
                readable[place] = self._order.stand_in(position, attempt)
                attempt += 1
                error = self._error(int(readable[place]))
            in_a_row = 0
            if first_error is not None:
                skipped.append(
                    Skipped(
                        position=position, sample=member, stand_in=int(readable[place]), shard=first_error.shard,
                        block=first_error.block, offset=first_error.offset, reason=first_error.reason,
                    )
                )  # fmt: skip
        for source, own in self._split(readable):
            self._readers[source].blocks.load(own)
        return readable, skipped

    def _error(self, member: int) -> BlockError | None:
        ((source, own),) = self._split(np.array([member]))
        return next(iter(self._readers[source].blocks.load(own).values()), None)

    def _split(self, members: NDArray[np.int64]) -> list[tuple[int, NDArray[np.int64]]]:
        """The sources of some records, and the records' numbers in them."""
        return [
            (source, members[places] - self._starts[source]) for source, places in self._by_source(members)
        ]

    def _by_source(self, members: NDArray[np.int64]) -> list[tuple[int, NDArray[np.int64]]]:
        """The sources of some records, and the places of each one's."""
        sources = np.searchsorted(self._starts, members, side="right") - 1
        return [(int(source), np.flatnonzero(sources == source)) for source in np.unique(sources)]


class _Reader(Protocol):
    blocks: BlockCache

    def collate(self, members: NDArray[np.int64], max_text_tokens: int | None = None) -> PairBatch: ...


def _open_source(config: Config, corpus: Corpus, tokenizer: AtomasTokenizer) -> Source:
    data = config.data
    split = corpus.split(data.train_split)
    tokens = open_tokens(corpus, tokenizer) if data.tokens == "use" else None
    if tokens is not None:
        return Source(split=split, lengths=token_lengths(tokens, split.name), tokens=tokens.split(split.name))
    run_folder = Path(config.run.output_dir) / config.run.name

    def leave_out(error: BlockError, num_records: int) -> None:
        logger.warning("%d pairs are left out of the run: %s", num_records, error)
        append_left_out(run_folder, error, num_records)

    lengths = TokenLengths.resolve(
        corpus, split.name, tokenizer, run_folder, on_bad_block=leave_out if data.on_error == "skip" else None
    )
    return Source(split=split, lengths=lengths)


def _log_selection(config: Config, split: ShardedSplit, selection: Selection) -> None:
    logger.info(
        "split %r of %s: %d pairs of %d; dropped %d with a SMILES over %d tokens, %d with a text over %d; "
        "cut %d texts",
        split.name, split.storage, selection.eligible.sum(), split.num_records, selection.dropped_smiles,
        config.data.max_smiles_tokens, selection.dropped_texts, config.data.max_text_tokens, selection.cut_texts,
    )  # fmt: skip


def _mix(orders: list[GlobalOrder], sources: Sequence[Source], corpora: Corpora, seed: int) -> Order:
    if len(orders) == 1:
        return orders[0]
    for order, source in zip(orders, sources, strict=True):
        if not len(order):
            raise AtomasError(
                f"split {source.split.name!r} of {source.split.storage} has no usable pair: leave it out of data.corpus"
            )
    weights = corpora.mixing_weights([len(order) for order in orders])
    return MixedOrder(orders, [source.split.num_records for source in sources], weights, seed=seed)


def build_loader(
    stream: PairStream, numbers: Sequence[int], *, num_workers: int, pin_memory: bool = False
) -> OrderedLoader[PairBatch]:
    """The batches `numbers` of `stream`, made ahead of use by `num_workers` processes."""
    return OrderedLoader(stream, numbers, num_workers=num_workers, pin_memory=pin_memory)


def evaluation_batches(
    split: ShardedSplit,
    tokenizer: AtomasTokenizer,
    *,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    max_pairs: int | None = None,
    max_text_tokens: int | None = None,
    max_smiles_tokens: int | None = None,
) -> Iterator[tuple[PairBatch, int]]:
    """The first `max_pairs` records of `split` in stored order: batches, each with its number of real rows.

    Records are dealt to the ranks in runs of `batch_size`, less where the split is small. Every rank gives
    the same number of batches of the same size; behind its real rows a batch repeats the first record.
    A SMILES over `max_smiles_tokens` is left out, as in training, and the log says how many were.
    """
    stop = split.num_records if max_pairs is None else min(max_pairs, split.num_records)
    reader = _RecordReader(split, tokenizer, cached_blocks=2)
    chosen = list(range(stop))
    if max_smiles_tokens is not None:
        ids = tokenizer.encode_batch([reader[index]["smiles"] for index in chosen])
        chosen = [
            index for index, tokens in zip(chosen, ids, strict=True) if len(tokens) <= max_smiles_tokens
        ]
    if rank == 0 and len(chosen) < stop:
        logger.warning("split %r: %d pairs left out, their SMILES are over %s tokens",
                       split.name, stop - len(chosen), max_smiles_tokens)  # fmt: skip
    if not chosen:
        raise AtomasError(f"split {split.name!r} of {split.storage} has no usable pair")
    size = min(batch_size, -(-len(chosen) // world_size))
    for first in range(0, len(chosen), size * world_size):
        start = first + rank * size
        own = chosen[start : start + size]
        filled = own + chosen[:1] * (size - len(own))
        records = [reader[index] for index in filled]
        batch = collate(records, tokenizer, sample_ids=filled, max_text_tokens=max_text_tokens)
        yield batch, len(own)


class _RecordReader:
    """Batches of the pairs of a split; keeps the `cached_blocks` most recently used blocks."""

    def __init__(self, split: ShardedSplit, tokenizer: AtomasTokenizer, cached_blocks: int) -> None:
        self.blocks = BlockCache(split, partial(_read_records, split), cached_blocks)
        self._tokenizer = tokenizer

    def __getitem__(self, index: int) -> dict[str, str]:
        """One record."""
        (number,), (row,) = self.blocks.locate(np.array([index]))
        return self.blocks[int(number)][int(row)]

    def collate(self, members: NDArray[np.int64], max_text_tokens: int | None = None) -> PairBatch:
        """The pairs of these numbers, tokenized."""
        numbers, rows = (column.tolist() for column in self.blocks.locate(members))
        return collate(
            [self.blocks[number][row] for number, row in zip(numbers, rows, strict=True)],
            self._tokenizer,
            sample_ids=members,
            max_text_tokens=max_text_tokens,
        )


def _deal(cost: NDArray[np.integer], rank: int, world_size: int) -> NDArray[np.int64]:
    """Positions in the batch that fall to `rank`: sorted by cost, dealt forth and back like cards."""
    rows = np.argsort(-cost, kind="stable").reshape(-1, world_size)
    rows[1::2] = rows[1::2, ::-1]
    return np.sort(rows[:, rank])


def _read_records(split: ShardedSplit, number: int) -> list[dict[str, str]]:
    return [{name: record[name] for name in _FIELDS} for record in split.read_block(number)]
