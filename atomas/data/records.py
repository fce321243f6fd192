"""One row of a pair file -> one record of the corpus, or the reason why not."""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

from atomas.data.molecules import IdentityKind, InvalidMoleculeError, parse_molecule, skeleton
from atomas.data.shards import encode_record
from atomas.data.sources import Row
from atomas.data.texts import clean_text


class Keys(NamedTuple):
    """63-bit identities of what a row holds (0: not asked for)."""

    molecule: int
    skeleton: int
    text: int
    scaffold: int


class Accepted(NamedTuple):
    """A record, encoded, and what the build needs to know of it."""

    line: int
    encoded: bytes
    keys: Keys
    hazards: tuple[str, ...]


class Rejected(NamedTuple):
    """A row that makes no record: its hazard's name, the reason in words and the row's beginning."""

    line: int
    hazard: str
    reason: str
    excerpt: str


@dataclass(frozen=True, kw_only=True)
class Examiner:
    """Turns the rows of the file called `source` into records."""

    source: str
    identity: IdentityKind
    with_scaffold: bool

    def examine(self, row: Row) -> Accepted | Rejected:
        """The record of one row, or why it makes none."""
        if row.problem:
            return Rejected(row.line, "malformed_row", row.problem, row.excerpt)
        if not row.smiles.strip():
            return Rejected(row.line, "missing_value", "no SMILES", row.excerpt)
        text = clean_text(row.text)
        if not text.text:
            return Rejected(row.line, "missing_value", "no text", row.excerpt)
        try:
            molecule = parse_molecule(row.smiles, identity=self.identity, with_scaffold=self.with_scaffold)
        except InvalidMoleculeError as error:
            return Rejected(row.line, "invalid_molecule", str(error), row.excerpt)
        record = {
            "id": row.id.strip() or str(row.line),
            "smiles": molecule.smiles,
            "canonical_smiles": molecule.canonical_smiles,
            "inchikey": molecule.inchikey,
            "text": text.text,
            "source": self.source,
        }
        keys = record_keys(molecule.inchikey, text.text, molecule.scaffold if self.with_scaffold else None)
        return Accepted(row.line, encode_record(record), keys, molecule.hazards + text.hazards)


def reference_keys(row: Row, kind: IdentityKind) -> Keys | None:
    """Identities of a row of an evaluation set; None where its molecule is not valid.

    A text that is missing has the identity 0.
    """
    try:
        molecule = parse_molecule(row.smiles, identity=kind)
    except InvalidMoleculeError:
        return None
    return record_keys(molecule.inchikey, clean_text(row.text).text)


def record_keys(inchikey: str, text: str, scaffold: str | None = None) -> Keys:
    """Identities of a record; of a text that is empty, and of a scaffold that is None: 0."""
    molecule, connectivity = identity(inchikey), skeleton(inchikey)
    return Keys(
        molecule,
        molecule if connectivity == inchikey else identity(connectivity),
        identity(text) if text else 0,
        0 if scaffold is None else identity(scaffold),
    )


def identity(name: str) -> int:
    """First 63 bits of the SHA-256 of `name`."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1
