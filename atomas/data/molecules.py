"""Molecules through RDKit: parsed, validated, identified."""

import hashlib
import re
from typing import Literal, NamedTuple

from rdkit import Chem, rdBase
from rdkit.Chem.Scaffolds import MurckoScaffold

from atomas.data.hazards import LONG_SMILES, OUTSIDE_T5, SHORT_SMILES

IdentityKind = Literal["inchikey", "smiles"]
"""What two spellings of a molecule share: its standard InChIKey, or (four times as fast) its canonical SMILES."""


class InvalidMoleculeError(ValueError):
    """RDKit refuses the molecule; the message is its reason."""


class Molecule(NamedTuple):
    """One valid molecule.

    `smiles` is as written, unescaped. `inchikey` identifies the molecule; where there is no standard
    InChI (wildcard atoms) or none is asked for, it is "SMILES:" and 27 hexadecimal digits of the SHA-256 of
    `canonical_smiles`. `scaffold` is its Bemis-Murcko scaffold if asked for, else "".
    """

    smiles: str
    canonical_smiles: str
    inchikey: str
    scaffold: str
    hazards: tuple[str, ...]


def parse_molecule(raw: str, *, identity: IdentityKind = "inchikey", with_scaffold: bool = False) -> Molecule:
    """Unescape, parse, validate and identify the SMILES `raw`.

    Raises InvalidMoleculeError with RDKit's reason.
    """
    smiles = unescape_smiles(raw.strip())
    with rdBase.BlockLogs():
        found = identify(smiles, identity=identity, with_scaffold=with_scaffold)
    return describe(raw, smiles, found, identity)


class Identified(NamedTuple):
    """What RDKit says of a molecule; `inchikey` is "" where there is none or none is asked for, so is `scaffold`."""

    canonical_smiles: str
    inchikey: str
    scaffold: str
    num_heavy_atoms: int


def identify(smiles: str, *, identity: IdentityKind, with_scaffold: bool) -> Identified:
    """The part of `parse_molecule` that is RDKit's; InvalidMoleculeError with its reason.

    RDKit speaks on stderr meanwhile, unless the caller blocks its logs: once for many molecules, as that costs a tenth
    of what a molecule does.
    """
    mol = _parsed(smiles)
    return Identified(
        Chem.MolToSmiles(mol),
        Chem.MolToInchiKey(mol) if identity == "inchikey" else "",
        str(MurckoScaffold.MurckoScaffoldSmiles(mol=mol, includeChirality=False)) if with_scaffold else "",
        mol.GetNumHeavyAtoms(),
    )


def describe(raw: str, smiles: str, found: Identified, identity: IdentityKind) -> Molecule:
    """The molecule written as `raw`, unescaped `smiles`."""
    canonical_smiles, inchikey, scaffold, num_heavy_atoms = found
    return Molecule(
        smiles=smiles,
        canonical_smiles=canonical_smiles,
        inchikey=inchikey or f"SMILES:{hashlib.sha256(canonical_smiles.encode()).hexdigest()[:27]}",
        scaffold=scaffold,
        hazards=_hazards(
            raw.strip(), smiles, canonical_smiles, num_heavy_atoms, identity == "inchikey" and not inchikey
        ),
    )


def _hazards(
    raw: str, smiles: str, canonical_smiles: str, num_heavy_atoms: int, lacks_inchikey: bool
) -> tuple[str, ...]:
    """What is odd about a molecule; a chain of tests, because a build asks of every row."""
    found = []
    if smiles != raw:
        found.append("doubled_backslash")
    if smiles != canonical_smiles:
        found.append("not_canonical")
    if "." in smiles:
        found.append("multi_component")
    if "*" in canonical_smiles:
        found.append("wildcard_atom")
    if num_heavy_atoms <= 1:
        found.append("single_atom" if num_heavy_atoms else "no_heavy_atom")
    if lacks_inchikey:
        found.append("no_inchikey")
    if len(smiles) < SHORT_SMILES:
        found.append("short_smiles")
    elif len(smiles) > LONG_SMILES:
        found.append("long_smiles")
    if OUTSIDE_T5.search(smiles):
        found.append("smiles_outside_t5")
    return tuple(found)


def unescape_smiles(smiles: str) -> str:
    r"""Turn doubled backslashes into single ones; idempotent.

    Two bond symbols never follow each other in SMILES, so that `\\` can only be an escaped `\`.
    """
    return re.sub(r"\\{2,}", r"\\", smiles) if "\\\\" in smiles else smiles


def to_mol(smiles: str) -> Chem.Mol:
    """Parse without a word on stderr; raises InvalidMoleculeError with RDKit's reason."""
    with rdBase.BlockLogs():
        return _parsed(smiles)


def _parsed(smiles: str) -> Chem.Mol:
    if smiles and smiles.split() != [smiles]:
        raise InvalidMoleculeError("white space inside the SMILES")
    mol = Chem.MolFromSmiles(smiles)
    if mol is None:
        with rdBase.CaptureErrorLog() as log:
            Chem.MolFromSmiles(smiles)
        raise InvalidMoleculeError(_first_reason(log.messages))
    if mol.GetNumAtoms() == 0:
        raise InvalidMoleculeError("no atoms")
    return mol


def is_molecule(smiles: str) -> bool:
    """Whether `to_mol` takes it."""
    try:
        to_mol(smiles)
    except InvalidMoleculeError:
        return False
    return True


def skeleton(inchikey: str) -> str:
    """What an InChIKey says of the connectivity alone: its first block (no stereo, isotopes, protonation)."""
    return inchikey if inchikey.startswith("SMILES:") else inchikey.partition("-")[0]


def _first_reason(log: str) -> str:
    first = next((line for line in log.splitlines() if line.strip()), "RDKit gives no reason")
    return re.sub(r"^\[[\d:]+\]\s*", "", first).strip()
