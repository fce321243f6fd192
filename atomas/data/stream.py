"""From shards to batches: the pairs of every global batch, dealt to ranks, read by worker processes.

The position in the data is the number of batches consumed. What a global batch holds depends on the order
alone; the world size only decides who gets which pair.
"""

import logging
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from atomas.config import Config
from atomas.data.batching import PairBatch, collate
from atomas.data.lengths import TokenLengths
from atomas.data.loader import OrderedLoader
from atomas.data.order import GlobalOrder
from atomas.data.shards import Corpus, ShardedSplit
from atomas.data.tokenizer import AtomasTokenizer
from atomas.data.tokens import TokenReader, open_tokens, token_lengths
from atomas.errors import AtomasError

logger = logging.getLogger(__name__)

_FIELDS = ("text", "smiles", "inchikey")


class PairStream:
    """One rank's part of each global batch: `stream[n]` is a pure function of n = 0, 1, ... without end.

    Global batch n holds the records at positions n B, ..., (n + 1) B - 1 of `order`. Each of W ranks gets B
    / W of them, dealt so that the ranks have nearly the same number of tokens.
    """

    def __init__(
        self,
        split: ShardedSplit,
        tokenizer: AtomasTokenizer,
        order: GlobalOrder,
        lengths: TokenLengths,
        *,
        batch_size: int,
        max_text_tokens: int,
        tokens: ShardedSplit | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """`order` and `lengths` are those of `split`, and so are its `tokens`, which are read where they are given.

        Raises AtomasError if W does not divide B or if an epoch is shorter than a batch.
        """
        if batch_size % world_size:
            legal = [size for size in range(1, batch_size + 1) if batch_size % size == 0]
            raise AtomasError(
                f"data.batch_size = {batch_size} cannot be divided among {world_size} ranks; "
                f"world sizes that divide it: {', '.join(map(str, legal))}"
            )
        if len(order) < batch_size:
            raise AtomasError(
                f"split {split.name!r} of {split.storage} has {len(order)} usable pairs, fewer than "
                f"data.batch_size = {batch_size}: lower it, or raise data.max_smiles_tokens or "
                "data.max_text_tokens"
            )
        self._records = _RecordReader(split, order.window_blocks)
        self._tokens = TokenReader(tokens, order.window_blocks) if tokens else None
        self._tokenizer = tokenizer
        self._order = order
        self._lengths = lengths
        self._batch_size = batch_size
        self._max_text_tokens = max_text_tokens
        self._rank = rank
        self._world_size = world_size

    @staticmethod
    def open(
        config: Config, corpus: Corpus, tokenizer: AtomasTokenizer, *, rank: int = 0, world_size: int = 1
    ) -> "PairStream":
        """The training stream of a run.

        Reads the corpus's tokens where it has any. Otherwise token lengths are kept in the run's folder; where they
        are not there yet, this measures them, so let one rank come first. Raises AtomasError for an unknown split,
        tokens of another tokenizer, an illegal world size or too few usable pairs.
        """
        data = config.data
        split = corpus.split(data.train_split)
        tokens = open_tokens(corpus, tokenizer) if data.tokens == "use" else None
        if tokens is not None:
            lengths = token_lengths(tokens, split.name)
        else:
            run_folder = Path(config.run.output_dir) / config.run.name
            lengths = TokenLengths.resolve(corpus, split.name, tokenizer, run_folder)
        selection = lengths.select(
            max_text_tokens=data.max_text_tokens,
            max_smiles_tokens=data.max_smiles_tokens,
            text_is_written=config.loss.task != "genmol" and config.loss.lm_weight > 0,
        )
        if rank == 0:
            logger.info(
                "split %r: %d pairs of %d; dropped %d with a SMILES over %d tokens, %d with a text over %d; "
                "cut %d texts",
                split.name, selection.eligible.sum(), split.num_records, selection.dropped_smiles,
                data.max_smiles_tokens, selection.dropped_texts, data.max_text_tokens, selection.cut_texts,
            )  # fmt: skip
        order = GlobalOrder(
            split.blocks.num_records,
            seed=config.run.seed,
            window_blocks=data.window_blocks,
            eligible=selection.eligible,
        )
        return PairStream(
            split,
            tokenizer,
            order,
            lengths,
            batch_size=data.batch_size,
            max_text_tokens=data.max_text_tokens,
            tokens=tokens.split(split.name) if tokens else None,
            rank=rank,
            world_size=world_size,
        )

    @property
    def lengths(self) -> TokenLengths:
        """Tokens of every record of the split."""
        return self._lengths

    @property
    def order(self) -> GlobalOrder:
        """Which record stands where; its length is the number of pairs in an epoch."""
        return self._order

    def __getitem__(self, number: int) -> PairBatch:
        """The rank's pairs of global batch `number`. AtomasError names an unreadable shard and block."""
        members = self._order.indices(number * self._batch_size, (number + 1) * self._batch_size)
        cost = np.add(*self._lengths.seen(members, self._max_text_tokens))
        own = members[_deal(cost, self._rank, self._world_size)]
        if self._tokens is not None:
            return self._tokens.collate(own, self._max_text_tokens)
        return collate(
            [self._records[index] for index in own],
            self._tokenizer,
            sample_ids=own,
            max_text_tokens=self._max_text_tokens,
        )


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
    reader = _RecordReader(split, cached_blocks=2)
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
    """Records of a split by index; keeps the `cached_blocks` most recently used blocks."""

    def __init__(self, split: ShardedSplit, cached_blocks: int) -> None:
        self._split = split
        self._bounds = np.concatenate([[0], np.cumsum(split.blocks.num_records, dtype=np.int64)])
        self._cached_blocks = cached_blocks
        self._blocks: OrderedDict[int, list[dict[str, str]]] = OrderedDict()

    def __getitem__(self, index: int) -> dict[str, str]:
        number = int(np.searchsorted(self._bounds, index, side="right")) - 1
        if number not in self._blocks:
            if len(self._blocks) == self._cached_blocks:
                self._blocks.popitem(last=False)
            self._blocks[number] = [
                {name: record[name] for name in _FIELDS} for record in self._split.read_block(number)
            ]
        self._blocks.move_to_end(number)
        return self._blocks[number][int(index - self._bounds[number])]


def _deal(cost: NDArray[np.integer], rank: int, world_size: int) -> NDArray[np.int64]:
    """Positions in the batch that fall to `rank`: sorted by cost, dealt forth and back like cards."""
    rows = np.argsort(-cost, kind="stable").reshape(-1, world_size)
    rows[1::2] = rows[1::2, ::-1]
    return np.sort(rows[:, rank])
