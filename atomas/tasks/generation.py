"""Captions or molecules for a user's own inputs, with what RDKit thinks of a written molecule."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from atomas.data.molecules import InvalidMoleculeError, parse_molecule
from atomas.data.progress import Progress
from atomas.tasks.decoding import Writer
from atomas.tasks.inputs import Inputs, by_length


@dataclass(frozen=True, kw_only=True)
class Output:
    """One thing that was written."""

    line: int
    """of the input"""
    input: str
    rank: int
    """1 is the best of the input's outputs"""
    output: str
    valid: bool | None
    """whether a written SMILES is a molecule; None for a caption"""
    reason: str | None
    """why it is none"""
    duplicate_of: int | None
    """the best rank among this input's outputs that is the same molecule, or the same caption; None for the first"""


def write_outputs(
    writer: Writer, inputs: Inputs, *, batch_size: int, hidden: bool = False
) -> Iterator[list[Output]]:
    """All outputs of each input, input by input as they stood; `batch_size` inputs are decoded together.

    `hidden` shows no progress: where the outputs themselves are shown.
    """
    done: dict[int, list[Output]] = {}
    following = 0
    with Progress("writing", len(inputs.values), unit="inputs", hidden=hidden) as progress:
        for number, batch in enumerate(by_length(inputs.values, batch_size)):
            written = writer.write([inputs.values[position] for position in batch], seed=number)
            for position, outputs in zip(batch, written, strict=True):
                line, source = inputs.numbers[position], inputs.values[position]
                done[position] = _judged(line, source, outputs, molecules=inputs.kind == "text")
            progress.update(len(batch))
            while following in done:
                yield done.pop(following)
                following += 1


def print_outputs(groups: Iterator[list[Output]], file: Path | None) -> None:
    """Show outputs as they come; `file` takes them as JSON lines, one for each output."""
    stream: TextIO | None = None if file is None else file.open("w", encoding="utf-8")
    try:
        for group in groups:
            if stream is None:
                _show(group)
            else:
                stream.writelines(json.dumps(asdict(output), ensure_ascii=False) + "\n" for output in group)
                stream.flush()
    finally:
        if stream is not None:
            stream.close()
    if file is not None:
        print(f"outputs: {file}", file=sys.stderr)


def _show(group: list[Output]) -> None:
    print(f"{group[0].input}")
    for output in group:
        marks = []
        if output.valid is False:
            marks.append(f"no molecule: {output.reason}")
        if output.duplicate_of is not None:
            marks.append(f"same as {output.duplicate_of}")
        print(f"  {output.rank}  {output.output}" + (f"   [{'; '.join(marks)}]" if marks else ""), flush=True)


def _judged(line: int, source: str, outputs: list[str], *, molecules: bool) -> list[Output]:
    first: dict[str, int] = {}
    judged = []
    for rank, output in enumerate(outputs, start=1):
        valid, reason, identity = None, None, output
        if molecules:
            try:
                identity, valid = parse_molecule(output).canonical_smiles, True
            except InvalidMoleculeError as error:
                valid, reason = False, str(error)
        same = first.setdefault(identity, rank)
        judged.append(
            Output(
                line=line, input=source, rank=rank, output=output, valid=valid, reason=reason,
                duplicate_of=None if same == rank else same,
            )
        )  # fmt: skip
    return judged
