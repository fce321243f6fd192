"""Which atom or bond every character of a SMILES string writes.

Atoms are numbered in the order in which the string writes them, which is RDKit's order as long as it keeps
hydrogens that are atoms of their own ([H]): `in_string_order` parses so.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from rdkit import Chem, rdBase

from atomas.data.molecules import InvalidMoleculeError

_ORGANIC = re.compile(r"Cl|Br|[BCNOPSFIbcnops*]")
# isotope, symbol; what follows is of the same atom
_BRACKET = re.compile(r"\[\d*(\*|#\d+|se|as|te|si|[bcnops]|[A-Z][a-z]?)[^\[\]]*\]")
_BOND = re.compile(r"->|<-|[-=#$:/\\~]")
_RING = re.compile(r"\d|%\d\d|%\(\d{1,5}\)")


@dataclass(kw_only=True)
class SmilesMap:
    """A scanned SMILES. Every character writes an atom or a bond; a dot neither."""

    symbols: list[tuple[int, int]] = field(default_factory=list)
    """Characters [start, end) of each atom's element symbol, without isotope, charge, hydrogens and brackets"""
    bonds: list[tuple[int, int]] = field(default_factory=list)
    """The two atoms of each bond, the one that is written first before the other"""
    atom: list[int | None] = field(default_factory=list)
    """Per character: the atom it helps to write"""
    bond: list[int | None] = field(default_factory=list)
    """Per character: the bond that it writes (symbol, ring closure) or encloses (parentheses of a branch)"""

    def atoms_in(self, start: int, end: int) -> set[int]:
        """Atoms that the characters [start, end) help to write."""
        return {atom for atom in self.atom[start:end] if atom is not None}

    def bonds_in(self, start: int, end: int) -> set[int]:
        """Bonds that the characters [start, end) write or enclose."""
        return {bond for bond in self.bond[start:end] if bond is not None}

    def region(self, start: int, end: int) -> set[int]:
        """Atoms of the characters [start, end); where they write none, both ends of their bonds."""
        return self.atoms_in(start, end) or {
            atom for bond in self.bonds_in(start, end) for atom in self.bonds[bond]
        }


def scan_smiles(smiles: str) -> SmilesMap:
    """Scan a SMILES that RDKit accepts.

    Raises:
        ValueError: names the first character that no SMILES has there.
    """
    return _Scanner(smiles).scan()


def in_string_order(smiles: str) -> Chem.Mol:
    """The molecule with its atoms numbered as `scan_smiles` does; InvalidMoleculeError if RDKit refuses."""
    parameters: Any = Chem.SmilesParserParams()
    parameters.removeHs = False
    with rdBase.BlockLogs():
        molecule = Chem.MolFromSmiles(smiles, parameters)
    if molecule is None:
        raise InvalidMoleculeError(f"RDKit refuses {smiles!r}")
    return molecule


class _Scanner:
    def __init__(self, smiles: str) -> None:
        self._smiles = smiles
        self._map = SmilesMap(atom=[None] * len(smiles), bond=[None] * len(smiles))
        self._previous: int | None = None
        """The atom that the next one is bonded to"""
        self._waiting: list[int] = []
        """Bond symbol and opening parenthesis of a bond whose second atom is still to come"""
        self._branches: list[tuple[int, int]] = []
        """Atom before, and parenthesis of, every open branch"""
        self._rings: dict[int, tuple[int, list[int]]] = {}
        """Atom and characters of every open ring closure"""

    def scan(self) -> SmilesMap:
        position = 0
        while position < len(self._smiles):
            position = self._step(position)
        if self._branches or self._rings or self._waiting:
            raise ValueError(f"{self._smiles!r} ends with a branch, a ring or a bond that is still open")
        return self._map

    def _step(self, at: int) -> int:
        """Read what starts at character `at`; where the next begins."""
        if match := _ORGANIC.match(self._smiles, at):
            self._add_atom(match.span(), match.span())
        elif match := _BRACKET.match(self._smiles, at):
            self._add_atom(match.span(), match.span(1))
        elif match := _BOND.match(self._smiles, at):
            self._waiting += range(*match.span())
        elif match := _RING.match(self._smiles, at):
            self._close_ring(int(re.sub(r"\D", "", match[0])), range(*match.span()))
        elif self._smiles[at] == "(" and self._previous is not None:
            self._branches.append((self._previous, at))
            self._waiting.append(at)
        elif self._smiles[at] == ")" and self._branches:
            self._previous, opening = self._branches.pop()
            self._map.bond[at] = self._map.bond[opening]
        elif self._smiles[at] == ".":
            self._previous, self._waiting = None, []
        else:
            raise ValueError(f"character {at} of {self._smiles!r} is not SMILES: {self._smiles[at]!r}")
        return match.end() if match else at + 1

    def _add_atom(self, characters: tuple[int, int], symbol: tuple[int, int]) -> None:
        atom = len(self._map.symbols)
        self._map.symbols.append(symbol)
        for position in range(*characters):
            self._map.atom[position] = atom
        if self._previous is not None:
            self._add_bond(self._previous, atom, self._waiting)
        self._previous, self._waiting = atom, []

    def _close_ring(self, number: int, characters: Iterable[int]) -> None:
        """A bond symbol before the number is the ring bond's, at either end."""
        if self._previous is None:
            raise ValueError(f"{self._smiles!r} closes ring {number} without an atom")
        written = [*self._waiting, *characters]
        self._waiting = []
        if number in self._rings:
            atom, before = self._rings.pop(number)
            self._add_bond(atom, self._previous, [*before, *written])
        else:
            self._rings[number] = (self._previous, written)

    def _add_bond(self, first: int, second: int, characters: Iterable[int]) -> None:
        for position in characters:
            self._map.bond[position] = len(self._map.bonds)
        self._map.bonds.append((first, second))
