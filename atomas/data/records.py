"""One row of a pair file -> one record of the corpus, or the reason why not."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from atomas.data.molecules import InvalidMoleculeError, murcko_scaffold, parse_molecule, skeleton
from atomas.data.shards import encode_record
from atomas.data.sources import Row
from atomas.data.texts import clean_text


class Accepted(NamedTuple):
    """A record, encoded, and what the build needs to know of it: 63-bit identities and hazards found."""

    line: int
    encoded: bytes
    molecule: int
    skeleton: int
    text: int
    scaffold: int
    hazards: tuple[str, ...]


class Rejected(NamedTuple):
    """A row that makes no record: its hazard's name, the reason in words and the row's beginning."""

    line: int
    hazard: str
    reason: str
    excerpt: str


def examine_rows(source: str, rows: Sequence[Row], with_scaffold: bool) -> list[Accepted | Rejected]:
    """Turn rows of the file called `source` into records, in order (the unit of work of a process)."""
    return [_examine(source, row, with_scaffold) for row in rows]


def molecule_keys(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """Identities (molecule, skeleton) of the valid molecules among `rows`."""
    keys = []
    for row in rows:
        try:
            inchikey = parse_molecule(row.smiles).inchikey
        except InvalidMoleculeError:
            continue
        keys.append((identity(inchikey), identity(skeleton(inchikey))))
    return keys


def identity(name: str) -> int:
    """First 63 bits of the SHA-256 of `name`."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


def _examine(source: str, row: Row, with_scaffold: bool) -> Accepted | Rejected:
    if row.problem:
        return Rejected(row.line, "malformed_row", row.problem, row.excerpt)
    if not row.smiles.strip():
        return Rejected(row.line, "missing_value", "no SMILES", row.excerpt)
    text = clean_text(row.text)
    if not text.text:
        return Rejected(row.line, "missing_value", "no text", row.excerpt)
    try:
        molecule = parse_molecule(row.smiles)
    except InvalidMoleculeError as error:
        return Rejected(row.line, "invalid_molecule", str(error), row.excerpt)
    record = {
        "id": row.id.strip() or str(row.line),
        "smiles": molecule.smiles,
        "canonical_smiles": molecule.canonical_smiles,
        "inchikey": molecule.inchikey,
        "text": text.text,
        "source": source,
    }
    return Accepted(
        line=row.line,
        encoded=encode_record(record),
        molecule=identity(molecule.inchikey),
        skeleton=identity(skeleton(molecule.inchikey)),
        text=identity(text.text),
        scaffold=identity(murcko_scaffold(molecule.smiles)) if with_scaffold else 0,
        hazards=molecule.hazards + text.hazards,
    )
