"""What a user gives a model to read: texts or SMILES, from the command line or a file of lines."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from atomas.data.molecules import InvalidMoleculeError, to_mol, unescape_smiles
from atomas.errors import AtomasError

Kind = Literal["text", "smiles"]


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Usable inputs of one kind, and where each stood."""

    kind: Kind
    values: list[str]
    numbers: list[int]
    """line of each in its file, counted from 1"""


def read_inputs(kind: Kind, *, value: str | None = None, file: Path | None = None) -> Inputs:
    """A single `value`, or the lines of `file` (`-` is standard input); blank lines are passed over.

    A SMILES is unescaped and must be one that RDKit reads. A single bad one is an error; of a file each bad line is
    told on standard error and left out. What follows a SMILES on its line is a name and passed over.

    Raises:
        AtomasError: nothing usable is left, or the file cannot be read.
    """
    if value is not None:
        try:
            return Inputs(kind=kind, values=[_checked(kind, value)], numbers=[1])
        except InvalidMoleculeError as error:
            raise AtomasError(f"--smiles {value!r} is no molecule: {error}") from None
    assert file is not None
    values, numbers = [], []
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        try:
            # In .smi files a name may follow the SMILES.
            values.append(_checked(kind, line if kind == "text" else line.split(maxsplit=1)[0]))
            numbers.append(number)
        except InvalidMoleculeError as error:
            print(f"{file}:{number}: left out, {line.strip()!r} is no molecule: {error}", file=sys.stderr)
    if not values:
        raise AtomasError(f"{file} holds no usable {'text' if kind == 'text' else 'SMILES'}")
    return Inputs(kind=kind, values=values, numbers=numbers)


def without_long(inputs: Inputs, lengths: Sequence[int], limit: int | None) -> Inputs:
    """Those inputs whose `lengths`, in tokens, are within `limit` (None: all); the others are told on standard error.

    Raises:
        AtomasError: none is.
    """
    if limit is None:
        return inputs
    kept = [place for place, length in enumerate(lengths) if length <= limit]
    for place, length in enumerate(lengths):
        if length > limit:
            told = (
                f"line {inputs.numbers[place]}: left out, it has {length} tokens and the model reads {limit}"
            )
            print(told, file=sys.stderr)
    if not kept:
        raise AtomasError(f"no input has at most {limit} tokens, the most that the model reads")
    return Inputs(
        kind=inputs.kind,
        values=[inputs.values[place] for place in kept],
        numbers=[inputs.numbers[place] for place in kept],
    )


def by_length(values: Sequence[str], batch_size: int) -> list[list[int]]:
    """Positions of `values` in batches of like length, the longest first: what does not fit fails at once."""
    order = sorted(range(len(values)), key=lambda position: -len(values[position]))
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


def _checked(kind: Kind, value: str) -> str:
    value = value.strip()
    if not value:
        raise AtomasError("the input is empty")
    if kind == "text":
        return value
    smiles = unescape_smiles(value)
    to_mol(smiles)
    return smiles


def _lines(file: Path) -> list[str]:
    try:
        content = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        return content.decode("utf-8-sig").split("\n")
    except OSError as error:
        raise AtomasError(f"cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise AtomasError(f"{file} is not UTF-8: byte {error.start}") from None
