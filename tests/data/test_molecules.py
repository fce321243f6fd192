"""Molecules: unescaped once, validated with RDKit's reason, identified, in silence."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atomas.data.molecules import (
    InvalidMoleculeError,
    parse_molecule,
    skeleton,
    unescape_smiles,
)
from atomas.data.sources import Columns, PairFile


def test_doubled_backslashes_are_unescaped() -> None:
    doubled = parse_molecule(r"C/C=C\\C")
    single = parse_molecule(r"C/C=C\C")
    assert doubled.smiles == single.smiles == r"C/C=C\C"
    assert doubled.inchikey == single.inchikey
    assert "doubled_backslash" in doubled.hazards
    assert "doubled_backslash" not in single.hazards
    assert "smiles_outside_t5" in single.hazards


@given(st.text(alphabet="C/\\=()"))
def test_unescaping_is_idempotent(smiles: str) -> None:
    once = unescape_smiles(smiles)
    assert unescape_smiles(once) == once
    assert "\\\\" not in once


@pytest.mark.parametrize(
    ("smiles", "reason"),
    [
        ("O=Cl(=O)(=O)F", "Explicit valence for atom # 1 Cl, 7, is greater than permitted"),
        ("C1CC", "unclosed ring"),
        ("CC)", "extra close parentheses"),
        ("c1cccc1", "Can't kekulize"),
        ("water", "syntax error"),
        ("CC O", "white space"),
        ("", "no atoms"),
    ],
)
def test_invalid_molecules_have_a_reason(smiles: str, reason: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InvalidMoleculeError, match=reason):
        parse_molecule(smiles)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("smiles", "hazards"),
    [
        ("CCO", set()),
        ("OCC", {"not_canonical"}),
        ("*", {"wildcard_atom", "no_heavy_atom", "no_inchikey", "short_smiles"}),
        ("*CC*", {"wildcard_atom", "no_inchikey"}),
        ("[125Te]", {"single_atom"}),
        ("C", {"single_atom", "short_smiles"}),
        ("[H+]", {"no_heavy_atom"}),
        ("[Cl-].[K+]", {"multi_component"}),
        ("C" * 513, {"long_smiles"}),
    ],
)
def test_hazards_of_molecules(smiles: str, hazards: set[str]) -> None:
    assert set(parse_molecule(smiles).hazards) == hazards


def test_identity_without_inchikey_is_that_of_the_canonical_smiles() -> None:
    one, same, other = (parse_molecule(smiles) for smiles in ("*CCO", "OCC*", "*CCN"))
    assert one.inchikey == same.inchikey != other.inchikey
    assert one.inchikey.startswith("SMILES:")
    assert skeleton(one.inchikey) == one.inchikey


def test_skeleton_forgets_stereo() -> None:
    left, right = (parse_molecule(smiles).inchikey for smiles in ("C[C@H](N)C(=O)O", "C[C@@H](N)C(=O)O"))
    assert left != right
    assert skeleton(left) == skeleton(right) == "QNAYBMKLOCPYGJ"


@pytest.mark.parametrize(
    ("smiles", "scaffold"),
    [
        ("CC(=O)Oc1ccccc1C(=O)O", "c1ccccc1"),
        ("C[C@@H]1CCCN1c1ccccc1", "c1ccc(N2CCCC2)cc1"),
        ("CCO", ""),
    ],
)
def test_murcko_scaffold(smiles: str, scaffold: str) -> None:
    assert parse_molecule(smiles, with_scaffold=True).scaffold == scaffold
    assert parse_molecule(smiles).scaffold == ""


def test_fast_identity_is_that_of_the_canonical_smiles() -> None:
    one, same, other = (parse_molecule(smiles, identity="smiles") for smiles in ("CCO", "OCC", "CCN"))
    assert one.inchikey == same.inchikey != other.inchikey
    assert one.inchikey.startswith("SMILES:")
    assert "no_inchikey" not in one.hazards


def test_real_chebi_backslashes(shared_data: Path) -> None:
    rows = PairFile.parse(str(shared_data / "chebi20/validation.txt")).rows(Columns())
    doubled = [row.smiles for row in rows if "\\\\" in row.smiles]
    assert len(doubled) == 502
    for smiles in doubled[::25]:
        molecule = parse_molecule(smiles)
        assert molecule.smiles == smiles.replace("\\\\", "\\")
        assert "doubled_backslash" in molecule.hazards
