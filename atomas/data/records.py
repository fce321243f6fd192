"""One row of a pair file -> one record of the corpus, or the reason why not."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rdkit import rdBase

from atomas.data.molecules import (
    Identified,
    IdentityKind,
    InvalidMoleculeError,
    describe,
    identify,
    parse_molecule,
    skeleton,
    unescape_smiles,
)
from atomas.data.row_formats import Row
from atomas.data.shard_writer import encode_record
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

    def examine(self, rows: Sequence[Row]) -> list[Accepted | Rejected]:
        """The records of rows, in order, or why they make none.

        RDKit sees all molecules first: in turns with the rest of the work, each would find its code and data
        gone from the processor's caches.
        """
        smiles = [unescape_smiles(row.smiles.strip()) for row in rows]
        with rdBase.BlockLogs():
            identified = [self._identify(one, row) for one, row in zip(smiles, rows, strict=True)]
        return [self._record(*one) for one in zip(rows, smiles, identified, strict=True)]

    def _identify(self, smiles: str, row: Row) -> Identified | InvalidMoleculeError | None:
        if row.problem or not smiles:
            return None
        try:
            return identify(smiles, identity=self.identity, with_scaffold=self.with_scaffold)
        except InvalidMoleculeError as error:
            return error

    def _record(
        self, row: Row, smiles: str, found: Identified | InvalidMoleculeError | None
    ) -> Accepted | Rejected:
        if row.problem:
            return Rejected(row.line, "malformed_row", row.problem, row.excerpt)
        if not smiles:
            return Rejected(row.line, "missing_value", "no SMILES", row.excerpt)
        text = clean_text(row.text)
        if not text.text:
            return Rejected(row.line, "missing_value", "no text", row.excerpt)
        if not isinstance(found, Identified):
            return Rejected(row.line, "invalid_molecule", str(found), row.excerpt)
        molecule = describe(row.smiles, smiles, found, self.identity)
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
