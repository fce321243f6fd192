"""Characters of SMILES against RDKit's own parse, on whole corpora."""

import csv
import zipfile
from pathlib import Path

import pytest
from rdkit import Chem

from atomas.data.molecules import InvalidMoleculeError, unescape_smiles
from atomas.interpretation.smiles_atoms import in_string_order, scan_smiles

ORDERS = {"=": Chem.BondType.DOUBLE, "#": Chem.BondType.TRIPLE}


def check(smiles: str) -> None:
    """Atoms, elements and bonds are RDKit's; every character but a dot belongs to one of them, and to one only."""
    found, molecule = scan_smiles(smiles), in_string_order(smiles)
    symbols = [smiles[start:end].capitalize() for start, end in found.symbols]
    assert symbols == [atom.GetSymbol() for atom in molecule.GetAtoms()], smiles
    pairs = [tuple(sorted((bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()))) for bond in molecule.GetBonds()]
    assert sorted(tuple(sorted(bond)) for bond in found.bonds) == sorted(pairs), smiles
    assert len(found.atom) == len(found.bond) == len(smiles)
    for position, character in enumerate(smiles):
        owners = (found.atom[position] is not None) + (found.bond[position] is not None)
        assert owners == (character != "."), (smiles, position)
    for atom, (start, end) in enumerate(found.symbols):
        assert found.atoms_in(start, end) == {atom}
    as_written = Chem.MolFromSmiles(smiles, sanitize=False)  # sanitising rewrites perchlorates and their like
    for position, character in enumerate(smiles):
        number = found.bond[position]
        if character in ORDERS and number is not None:
            bond = as_written.GetBondBetweenAtoms(*found.bonds[number])
            assert bond.GetBondType() == ORDERS[character], (smiles, position)


@pytest.mark.parametrize(
    "smiles",
    [
        "C", "*", "[125Te]", "[H][H]", "[2H]O[H]", "CCO", "C(=O)(O)C", "c1ccc2ccccc2c1", "C%12CC%12",
        "[Na+].[Cl-]", "C1.C1", "C%(105)CCC%(105)", "F/C=C\\F", "C/1=C/CCCCCC1", "C=1CCCCC1", "C1CC=1",
        "N[C@@H](C)C(=O)[O-]", "[O-][N+](=O)c1ccc(cc1)Cl",
        "[nH]1cccc1", "C[Si](C)(C)C", "c1cc[se]c1", "[Fe++]", "[13CH3:7]Br", "N->[Pt]<-N",
        "[Co@OH15](F)(Cl)(Br)(I)(N)O", "C1CC12CC2", "[Cu]$[Cu]", "C12C3C4C1C5C2C3C45",
    ],
)  # fmt: skip
def test_written_forms(smiles: str) -> None:
    check(smiles)


def test_every_chebi_smiles(shared_data: Path) -> None:
    rows = (shared_data / "chebi20" / "validation.txt").read_text(encoding="utf-8").split("\n")[1:]
    smiles = [unescape_smiles(row.split("\t")[1]) for row in rows if row]
    assert len(smiles) > 3000
    for one in smiles:
        check(one)


@pytest.mark.slow
def test_every_other_smiles(shared_data: Path) -> None:
    """Other writers of SMILES: PubChem, MoleculeNet's chemists, RDKit's own canonical form."""
    checked = 0
    for one in _all_smiles(shared_data):
        try:
            molecule = in_string_order(one)
        except InvalidMoleculeError:
            continue
        check(one)
        if checked % 10 == 0:
            check(Chem.MolToSmiles(molecule))
        checked += 1
    assert checked > 20_000


def _all_smiles(shared_data: Path) -> list[str]:
    found: list[str] = []
    for name in (
        "iupac/train.txt",
        "iupac/validation.txt",
        "pubchem324k/validation.txt",
        "pcdes/validation.txt",
    ):
        rows = (shared_data / name).read_text(encoding="utf-8").split("\n")
        found += [fields[1] for fields in (row.split("\t") for row in rows) if len(fields) > 1]
    for file in sorted((shared_data / "moleculenet").glob("*.csv")):
        with file.open(newline="", encoding="utf-8") as stream:
            for row in csv.DictReader(stream):
                found += [value for key, value in row.items() if key in ("smiles", "mol") and value]
    with zipfile.ZipFile(shared_data / "lpm24" / "additional_data.zip") as archive:
        name = next(n for n in archive.namelist() if n.endswith("train_props.txt"))
        lines = archive.read(name).decode("utf-8").split("\n")[::25]
        found += [line.split("\t")[0] for line in lines if line]
    return [unescape_smiles(one) for one in found if one and not any(c.isspace() for c in one)]


@pytest.mark.parametrize("smiles", ["C(", "C1CC", "C)", "1CC1", "C=", "(C)", "C!C", "[C"])
def test_what_is_no_smiles_is_refused(smiles: str) -> None:
    with pytest.raises(ValueError, match="C"):
        scan_smiles(smiles)


def test_characters_belong_where_a_chemist_would_put_them() -> None:
    smiles = "C[C@@H](Cl)c1ccccc1.[Na+]"
    found = scan_smiles(smiles)
    assert found.atoms_in(1, 7) == {1}  # the whole bracket is one atom
    assert found.bonds[found.bond[smiles.index("(")]] == (1, 2)  # type: ignore[index]
    assert found.bond[smiles.index(")")] == found.bond[smiles.index("(")]
    closures = [position for position, character in enumerate(smiles) if character == "1"]
    assert {found.bonds[found.bond[position]] for position in closures} == {(3, 8)}  # type: ignore[index]
    assert found.region(closures[0], closures[0] + 1) == {3, 8}
    assert found.region(smiles.index("."), smiles.index(".") + 1) == set()
    assert scan_smiles("F/C=C/F").region(1, 2) == {0, 1}
    assert scan_smiles("C(C)(.C)C").bond[4] is None  # no bond leads into this branch
