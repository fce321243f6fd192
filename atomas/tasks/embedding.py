"""Global features of texts or molecules as a file for other programs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from atomas.data.batching import RaggedTokens, cut_text
from atomas.data.progress import Progress
from atomas.data.tokenizer import AtomasTokenizer
from atomas.errors import AtomasError
from atomas.model.atomas import AtomasModel
from atomas.tasks.inputs import Inputs

FORMATS = (".parquet", ".npz")


def embed(
    model: AtomasModel,
    tokenizer: AtomasTokenizer,
    inputs: Inputs,
    *,
    max_text_tokens: int,
    batch_size: int,
    device: torch.device,
) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Positions of `inputs.values` and their features [n, D], L2-normalised, `batch_size` at a time.

    Longer texts are cut as in training and in the evaluation of retrieval.
    """
    limit = max_text_tokens if inputs.kind == "text" else None
    values = inputs.values
    with Progress("embedding", len(values), unit="inputs") as progress:
        for first in range(0, len(values), batch_size):
            part = slice(first, min(first + batch_size, len(values)))
            ids = [cut_text(one, limit) for one in tokenizer.encode_batch(values[part])]
            tokens = RaggedTokens.from_lists(ids).to(device)
            yield part, model.embed(tokens, inputs.kind).features.float().cpu().numpy()
            progress.update(part.stop - part.start)


def write_embeddings(
    path: Path, inputs: Inputs, features: Iterator[tuple[slice, NDArray[np.float32]]], about: dict[str, Any]
) -> None:
    """Write `line`, `input` and `feature` of every input; a cut call leaves no file.

    Parquet is written batch by batch, NPZ from memory. `about` says where the features come from: the Parquet
    file's metadata under `atomas`, or the array `about` (JSON) of the NPZ.

    Raises:
        AtomasError: `path` has another ending.
    """
    if path.suffix not in FORMATS:
        raise AtomasError(f"--out {path}: the ending must be {' or '.join(FORMATS)}")
    partial = path.with_name(path.name + ".partial")
    try:
        if path.suffix == ".parquet":
            _write_parquet(partial, inputs, features, about)
        else:
            with partial.open("wb") as file:
                np.savez(
                    file,
                    line=np.array(inputs.numbers, dtype=np.int64),
                    input=np.array(inputs.values),
                    feature=np.concatenate([block for _, block in features]),
                    about=np.array(json.dumps(about)),
                )
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _write_parquet(
    path: Path, inputs: Inputs, features: Iterator[tuple[slice, NDArray[np.float32]]], about: dict[str, Any]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer = None
    try:
        for part, block in features:
            columns = {
                "line": pa.array(inputs.numbers[part], pa.int64()),
                "input": pa.array(inputs.values[part], pa.string()),
                "feature": pa.FixedSizeListArray.from_arrays(block.reshape(-1), block.shape[1]),
            }
            table = pa.table(columns, metadata={"atomas": json.dumps(about)})
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()
