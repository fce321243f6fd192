"""The libraries: how each writes the pairs in its format, and streams an epoch of them, shuffled."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from atomas.benchmarks.data.workload import MAX_TEXT_TOKENS, Mode, Workload
from atomas.data.batching import PairBatch
from atomas.data.lengths import TokenLengths
from atomas.data.loader import OrderedLoader
from atomas.data.order import GlobalOrder
from atomas.data.stream import PairStream, Source
from atomas.data.tokens import token_lengths


@dataclass(frozen=True, kw_only=True)
class Provider:
    """One library. ImportError, or any other error, where it cannot run."""

    name: str
    epochs: Callable[[Workload, Mode], Iterator[PairBatch]]
    """Batches epoch after epoch without end."""


def providers() -> dict[str, Provider]:
    """By name, ours first; all in one process but for the one with a worker."""
    found = [
        Provider(name="atomas", epochs=lambda workload, mode: _ours(workload, mode, 0)),
        Provider(name="atomas, 1 worker", epochs=lambda workload, mode: _ours(workload, mode, 1)),
        Provider(name="webdataset", epochs=_webdataset),
        Provider(name="mosaicml-streaming", epochs=_streaming),
        Provider(name="litdata", epochs=_litdata),
        Provider(name="datasets", epochs=_datasets),
    ]
    return {provider.name: provider for provider in found}


def _ours(workload: Workload, mode: Mode, workers: int) -> Iterator[PairBatch]:
    lengths = token_lengths(workload.tokens, workload.split.name)
    stream = open_stream(workload, mode, lengths)
    yield from OrderedLoader(stream, range(10**9), num_workers=workers)


def open_stream(workload: Workload, mode: Mode, lengths: TokenLengths) -> PairStream:
    """The stream that training reads."""
    order = GlobalOrder(workload.split.blocks.num_records, seed=0, window_blocks=workload.window_blocks)
    source = Source(
        split=workload.split, lengths=lengths, tokens=workload.token_split if mode == "tokens" else None
    )
    return PairStream(
        [source], workload.tokenizer, order, batch_size=workload.batch_size, max_text_tokens=MAX_TEXT_TOKENS
    )


def _forever(workload: Workload, mode: Mode, epoch: Callable[[], Iterable[Any]]) -> Iterator[PairBatch]:
    """`epoch()` anew each time, as a generator: an iterator of litdata starts again whenever it is asked for one."""
    while True:
        yield from workload.batches(mode, (sample for sample in epoch()))


def _webdataset(workload: Workload, mode: Mode) -> Iterator[PairBatch]:
    """A tar member per sample, and its shuffle buffer."""
    import webdataset

    folder = workload.scratch / f"webdataset-{mode}"
    if not folder.exists():
        folder.mkdir()
        with webdataset.ShardWriter(str(folder / "shard-%06d.tar"), maxcount=20_000, verbose=0) as writer:
            for sample in workload.samples(mode):
                writer.write({"__key__": f"{sample['number']:09d}", **_as_members(sample, mode)})
    urls = sorted(map(str, folder.glob("*.tar")))
    seeds = iter(range(10**9))

    def epoch() -> Iterator[dict[str, Any]]:
        dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).shuffle(
            workload.shuffled, initial=workload.shuffled, seed=next(seeds)
        )
        return (_from_members(sample, mode, workload.kind) for sample in dataset)

    return _forever(workload, mode, epoch)


def _as_members(sample: dict[str, Any], mode: Mode) -> dict[str, Any]:
    """One member: JSON, or the least that arrays can be read from."""
    if mode == "text":
        return {"json": {name: sample[name] for name in ("text", "smiles", "inchikey")}}
    head = np.array([sample["molecule_id"], sample["text_id"], len(sample["text"])], dtype=np.int64)
    return {"bin": head.tobytes() + sample["text"].tobytes() + sample["smiles"].tobytes()}


def _from_members(sample: dict[str, Any], mode: Mode, kind: Any) -> dict[str, Any]:
    number = int(sample["__key__"])
    if mode == "text":
        return {"number": number, **json.loads(sample["json"])}
    molecule_id, text_id, size = np.frombuffer(sample["bin"], dtype=np.int64, count=3).tolist()
    ids = np.frombuffer(sample["bin"], dtype=kind, offset=24)
    return {
        "number": number, "text": ids[:size], "smiles": ids[size:],
        "molecule_id": molecule_id, "text_id": text_id,
    }  # fmt: skip


def _streaming(workload: Workload, mode: Mode) -> Iterator[PairBatch]:
    """MDS shards with typed columns."""
    from streaming import MDSWriter, StreamingDataset

    folder = workload.scratch / f"streaming-{mode}"
    if not folder.exists():
        kind = str(np.dtype(workload.kind))
        columns = (
            {"number": "int", "text": "str", "smiles": "str", "inchikey": "str"}
            if mode == "text"
            else {
                "number": "int", "text": f"ndarray:{kind}", "smiles": f"ndarray:{kind}",
                "molecule_id": "int", "text_id": "int",
            }
        )  # fmt: skip
        with MDSWriter(out=str(folder), columns=columns) as writer:
            for sample in workload.samples(mode):
                writer.write(sample)
    dataset = StreamingDataset(
        local=str(folder), shuffle=True, batch_size=workload.batch_size, shuffle_block_size=workload.shuffled
    )
    return _forever(workload, mode, lambda: dataset)


def _litdata(workload: Workload, mode: Mode) -> Iterator[PairBatch]:
    """Its chunks, written by `optimize`."""
    import litdata

    folder = workload.scratch / f"litdata-{mode}"
    if not folder.exists():
        samples = list(workload.samples(mode))
        litdata.optimize(
            fn=_Pick(samples), inputs=list(range(len(samples))), output_dir=str(folder),
            chunk_bytes="64MB", num_workers=1, start_method="fork",
        )  # fmt: skip
    dataset = litdata.StreamingDataset(str(folder), shuffle=True, drop_last=False)
    return _forever(workload, mode, lambda: dataset)


class _Pick:
    def __init__(self, samples: list[dict[str, Any]]) -> None:
        self._samples = samples

    def __call__(self, number: int) -> dict[str, Any]:
        return self._samples[number]


def _datasets(workload: Workload, mode: Mode) -> Iterator[PairBatch]:
    """An iterable over Parquet files with a shuffle buffer, as arrays of numpy."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    folder = workload.scratch / f"datasets-{mode}"
    if not folder.exists():
        folder.mkdir()
        table = pyarrow.Table.from_pylist(list(workload.samples(mode)))
        pyarrow.parquet.write_table(table, folder / "part-000000.parquet", row_group_size=1000)
    files = sorted(str(path) for path in Path(folder).glob("*.parquet"))
    dataset = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    if mode == "tokens":
        dataset = dataset.with_format("numpy")
    seeds = iter(range(10**9))
    return _forever(workload, mode, lambda: dataset.shuffle(seed=next(seeds), buffer_size=workload.shuffled))
