"""What is in a molecule: ring systems, functional groups, alkyl chains, and how they are joined.

Every heavy atom belongs to one unit, and the units form a tree whose inner nodes are rings and two-ended
links. A molecule for which that fails (a ring without a name here, a branched chain) has no anatomy and is
not described.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from rdkit import Chem
from rdkit.Chem import rdCIPLabeler

from atomas.data.demo.blocks import RINGS


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A named part of the molecule.

    `atoms` are those that the name speaks of; `own` leaves out a ring nitrogen that a group shares. `ends`
    names the two sides of a group that has a direction ("carbonyl" and "nitrogen" of an amide). `numberings`
    are the ways to number a ring by its IUPAC locants: each lists its atoms in the order of `RINGS`.
    """

    kind: str
    atoms: tuple[int, ...]
    own: tuple[int, ...]
    is_ring: bool = False
    numberings: tuple[tuple[int, ...], ...] = ()
    ends: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def locants(self, atoms: Sequence[int]) -> list[int]:
        """Lowest locants of these ring atoms (IUPAC P-14.4: the set first, then the order of `atoms`)."""
        options = [[numbering[atom] for atom in atoms] for numbering in self._atom_to_locant]
        return min(options, key=lambda locants: (sorted(locants), locants))

    @cached_property
    def _atom_to_locant(self) -> list[dict[int, int]]:
        skeleton = _RING_LOCANTS[self.kind]
        return [dict(zip(numbering, skeleton, strict=True)) for numbering in self.numberings]


@dataclass(frozen=True, kw_only=True)
class Attachment:
    """A way out of a ring: from `atom`, through `path` (units in order), to another ring or a loose end."""

    ring: int
    atom: int
    path: tuple[int, ...]
    far_ring: int | None
    far_atom: int | None


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """The units of a molecule, its links (each once) and its branches (attachments that end in no ring)."""

    molecule: Chem.Mol
    units: tuple[Unit, ...]
    links: tuple[Attachment, ...]
    branches: tuple[Attachment, ...]
    stereocentres: tuple[tuple[int, str], ...] = field(default=())

    @property
    def rings(self) -> list[int]:
        """Numbers of the units that are ring systems."""
        return [number for number, unit in enumerate(self.units) if unit.is_ring]

    def around(self, ring: int) -> list[tuple[int, int]]:
        """(ring atom, neighbouring unit) of every bond out of the ring, links first."""
        out = []
        for attachment in (*self.links, *self.branches):
            first = attachment.path[0] if attachment.path else attachment.far_ring
            last = attachment.path[-1] if attachment.path else attachment.ring
            if attachment.ring == ring and first is not None:
                out.append((attachment.atom, first))
            if attachment.far_ring == ring and attachment.far_atom is not None:
                out.append((attachment.far_atom, last))
        return out


def dissect(molecule: Chem.Mol) -> Anatomy | None:
    """The anatomy of a sanitised molecule, or None where some part of it has no name here."""
    units = [*_ring_systems(molecule)]
    if not units or any(not unit.kind for unit in units):
        return None
    claimed = {atom for unit in units for atom in unit.own}
    for unit in _groups(molecule, claimed):
        units.append(unit)
        claimed.update(unit.own)
    units.extend(_alkyls(molecule, claimed))
    if any(not unit.kind for unit in units):
        return None
    owner = {atom: number for number, unit in enumerate(units) for atom in unit.own}
    if len(owner) != molecule.GetNumAtoms():
        return None
    attachments = _attachments(molecule, units, owner)
    if attachments is None:
        return None
    rdCIPLabeler.AssignCIPLabels(molecule)
    centres = [(a.GetIdx(), a.GetProp("_CIPCode")) for a in molecule.GetAtoms() if a.HasProp("_CIPCode")]
    return Anatomy(
        molecule=molecule,
        units=tuple(units),
        links=tuple(a for a in attachments if a.far_ring is not None and a.ring < a.far_ring),
        branches=tuple(a for a in attachments if a.far_ring is None),
        stereocentres=tuple((atom, label) for atom, label in centres if label in ("R", "S")),
    )


def _ring_systems(molecule: Chem.Mol) -> Iterator[Unit]:
    systems: list[set[int]] = []
    for ring in molecule.GetRingInfo().AtomRings():
        fused = [system for system in systems if system & set(ring)]
        systems = [system for system in systems if not system & set(ring)]
        systems.append(set(ring).union(*fused))
    for system in sorted(systems, key=min):
        atoms = tuple(sorted(system))
        kind, numberings = _name_ring(molecule, system)
        yield Unit(kind=kind, atoms=atoms, own=atoms, is_ring=True, numberings=numberings)


def _name_ring(molecule: Chem.Mol, system: set[int]) -> tuple[str, tuple[tuple[int, ...], ...]]:
    for name, pattern in _RINGS_BY_FORMULA.get(_formula(molecule, system), ()):
        matches = molecule.GetSubstructMatches(pattern, uniquify=False)
        numberings = tuple(match for match in matches if set(match) == system)
        if numberings:
            return name, numberings
    return "", ()


def _groups(molecule: Chem.Mol, claimed: set[int]) -> Iterator[Unit]:
    """Functional groups by the order of `GROUPS`; a match counts if none of its chain atoms is taken."""
    taken = set(claimed)
    in_ring = claimed
    for kind, pattern, ends in _GROUP_PATTERNS:
        for match in molecule.GetSubstructMatches(pattern):
            own = tuple(sorted(atom for atom in match if atom not in in_ring))
            if not own or taken & set(own):
                continue
            taken.update(own)
            yield Unit(
                kind=_double_bond_kind(molecule, match) if kind == "alkene" else kind,
                atoms=tuple(sorted(match)),
                own=own,
                ends=tuple((word, tuple(sorted(match[i] for i in places))) for word, places in ends),
            )


def _double_bond_kind(molecule: Chem.Mol, match: Sequence[int]) -> str:
    stereo = molecule.GetBondBetweenAtoms(match[0], match[1]).GetStereo()
    return {Chem.BondStereo.STEREOE: "trans alkene", Chem.BondStereo.STEREOZ: "cis alkene"}.get(
        stereo, "alkene"
    )


def _alkyls(molecule: Chem.Mol, claimed: set[int]) -> Iterator[Unit]:
    """Connected carbons that nothing else has taken, named by length, branching and number of open ends."""
    unclaimed = set(range(molecule.GetNumAtoms())) - claimed
    left = {atom for atom in unclaimed if molecule.GetAtomWithIdx(atom).GetAtomicNum() == 6}
    while left:
        chain, frontier = set(), [min(left)]
        while frontier:
            atom = frontier.pop()
            if atom in left:
                left.remove(atom)
                chain.add(atom)
                frontier.extend(n.GetIdx() for n in molecule.GetAtomWithIdx(atom).GetNeighbors())
        yield Unit(kind=_name_alkyl(molecule, chain), atoms=tuple(sorted(chain)), own=tuple(sorted(chain)))


def _name_alkyl(molecule: Chem.Mol, chain: set[int]) -> str:
    inner: dict[int, int] = {}
    ends: list[int] = []
    for index in chain:
        neighbours = [n.GetIdx() for n in molecule.GetAtomWithIdx(index).GetNeighbors()]
        inner[index] = sum(n in chain for n in neighbours)
        ends.extend([index] * (len(neighbours) - inner[index]))
    shape = (len(chain), max(inner.values()), len(set(ends)), tuple(sorted(inner[end] for end in ends)))
    return _ALKYL_NAMES.get(shape, "")


def _attachments(molecule: Chem.Mol, units: list[Unit], owner: dict[int, int]) -> list[Attachment] | None:
    """Every way out of every ring; None if units form a cycle or one that is no ring has three neighbours."""
    bonds: dict[int, list[tuple[int, int, int]]] = {number: [] for number in range(len(units))}
    for bond in molecule.GetBonds():
        a, b = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        if owner[a] != owner[b]:
            bonds[owner[a]].append((a, owner[b], b))
            bonds[owner[b]].append((b, owner[a], a))
    if sum(map(len, bonds.values())) != 2 * (len(units) - 1):
        return None
    if any(len(bonds[number]) > 2 for number, unit in enumerate(units) if not unit.is_ring):
        return None
    found = []
    for ring in (number for number, unit in enumerate(units) if unit.is_ring):
        for atom, unit, entry in sorted(bonds[ring]):
            path, previous = [], ring
            while not units[unit].is_ring:
                path.append(unit)
                onward = [step for step in bonds[unit] if step[1] != previous]
                if not onward:
                    break
                previous, (_, unit, entry) = unit, onward[0]
            far = units[unit].is_ring
            found.append(
                Attachment(
                    ring=ring,
                    atom=atom,
                    path=tuple(path),
                    far_ring=unit if far else None,
                    far_atom=entry if far else None,
                )
            )
    return found


def _formula(molecule: Chem.Mol, atoms: set[int]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(Counter(molecule.GetAtomWithIdx(atom).GetSymbol() for atom in atoms).items()))


def _ring_patterns() -> dict[tuple[tuple[str, int], ...], list[tuple[str, Chem.Mol]]]:
    table: dict[tuple[tuple[str, int], ...], list[tuple[str, Chem.Mol]]] = {}
    for name, block in RINGS.items():
        ring = Chem.MolFromSmiles(block.smiles)
        # A pyrrole-like nitrogen is where the numbering starts, with or without its hydrogen.
        pattern = Chem.MolFromSmarts(block.smiles.replace("[nH]", "[nX3]"))
        table.setdefault(_formula(ring, set(range(ring.GetNumAtoms()))), []).append((name, pattern))
    return table


def _locants(smiles: str) -> tuple[int, ...]:
    """Locant of each atom in writing order; 0 for an atom that two rings share."""
    ring = Chem.MolFromSmiles(smiles)
    shared = [ring.GetRingInfo().NumAtomRings(atom) > 1 for atom in range(ring.GetNumAtoms())]
    return tuple(0 if is_shared else 1 + i - sum(shared[:i]) for i, is_shared in enumerate(shared))


_RINGS_BY_FORMULA = _ring_patterns()
_RING_LOCANTS = {name: _locants(block.smiles) for name, block in RINGS.items()}

# Kind, SMARTS, and for a group that has two sides their words with the places in the SMARTS. Earlier ones
# win: a methyl ester is not also an ester and a methyl group.
GROUPS: tuple[tuple[str, str, tuple[tuple[str, tuple[int, ...]], ...]], ...] = (
    ("carboxylic acid", "[CX3;!R](=O)[OX2H1]", ()),
    ("carboxylate", "[CX3;!R](=O)[OX1-]", ()),
    ("acetoxy", "[OX2;!R]C(=O)[CH3]", ()),
    ("methyl ester", "[CX3;!R;$(C[#6])](=O)[OX2][CH3]", ()),
    ("ethyl ester", "[CX3;!R;$(C[#6])](=O)[OX2][CH2][CH3]", ()),
    ("acetamido", "[NX3H1]C(=O)[CH3]", ()),
    ("acetyl", "[CX3;!R](=O)[CH3]", ()),
    ("carbamoyl", "[CX3;!R](=O)[NX3H2]", ()),
    ("methylsulfonyl", "[SX4;!R](=O)(=O)[CH3]", ()),
    ("sulfamoyl", "[SX4;!R](=O)(=O)[NX3H2]", ()),
    ("trifluoromethoxy", "[OX2]C(F)(F)F", ()),
    ("trifluoromethyl", "[CX4](F)(F)F", ()),
    ("methoxy", "[OX2;!R][CH3]", ()),
    ("ethoxy", "[OX2;!R][CH2][CH3]", ()),
    ("isopropoxy", "[OX2;!R][CH1]([CH3])[CH3]", ()),
    ("butoxy", "[OX2;!R][CH2][CH2][CH2][CH3]", ()),
    ("methylthio", "[SX2;!R][CH3]", ()),
    ("dimethylamino", "[NX3;!R;!$(NC=O);!$(NS=O)]([CH3])[CH3]", ()),
    ("methylamino", "[NX3H1;!$(NC=O);!$(NS=O)][CH3]", ()),
    ("trimethylammonium", "[NX4+]([CH3])([CH3])[CH3]", ()),
    ("nitro", "[N+](=O)[O-]", ()),
    ("cyano", "[CX2]#N", ()),
    ("formyl", "[CX3H1;!R]=O", ()),
    ("hydroxymethyl", "[CH2;!R;$([CH2][R])][OX2H1]", ()),
    ("aminomethyl", "[CH2;!R;$([CH2][R])][NX3H2]", ()),
    ("sulfonamide", "[SX4;!R](=O)(=O)[NX3]", (("sulfur", (0,)), ("nitrogen", (3,)))),
    ("sulfone", "[SX4;!R](=O)=O", ()),
    ("urea", "[NX3;!R]C(=O)[NX3;!R]", ()),
    ("carbamate", "[NX3]C(=O)[OX2;!R]", (("nitrogen", (0,)), ("oxygen", (3,)))),
    ("N-methyl amide", "[CX3;!R](=O)[NX3;!R][CH3]", (("carbonyl", (0, 1)), ("nitrogen", (2,)))),
    ("amide", "[CX3;!R](=O)[NX3]", (("carbonyl", (0, 1)), ("nitrogen", (2,)))),
    ("ester", "[CX3;!R](=O)[OX2;!R]", (("carbonyl", (0, 1)), ("oxygen", (2,)))),
    ("ketone", "[CX3;!R]=O", ()),
    ("vinyl", "[CX3H1;!R]=[CX3H2]", ()),
    ("ethynyl", "[CX2]#[CX2H1]", ()),
    ("alkene", "[CX3;!R]=[CX3;!R]", ()),
    ("alkyne", "[CX2]#[CX2]", ()),
    ("N-methyl amine", "[NX3H0;!R][CH3]", ()),
    ("ether", "[OX2H0;!R]", ()),
    ("thioether", "[SX2H0;!R]", ()),
    ("hydroxy", "[OX2H1]", ()),
    ("amino", "[NX3H2]", ()),
    ("ammonium", "[NX4H3+]", ()),
    ("amine", "[NX3H1;!R]", ()),
    ("fluoro", "F", ()),
    ("chloro", "Cl", ()),
    ("bromo", "Br", ()),
    ("iodo", "I", ()),
)
_GROUP_PATTERNS = tuple((kind, Chem.MolFromSmarts(smarts), ends) for kind, smarts, ends in GROUPS)

# (carbons, most neighbours inside, atoms with open ends, neighbours inside for each open end) -> kind.
_ALKYL_NAMES: dict[tuple[int, int, int, tuple[int, ...]], str] = {
    (1, 0, 1, (0,)): "methyl",
    (2, 1, 1, (1,)): "ethyl",
    (3, 2, 1, (1,)): "propyl",
    (3, 2, 1, (2,)): "isopropyl",
    (4, 2, 1, (1,)): "butyl",
    (4, 3, 1, (3,)): "tert-butyl",
    (5, 2, 1, (1,)): "pentyl",
    (6, 2, 1, (1,)): "hexyl",
    (1, 0, 1, (0, 0)): "methylene",
    (2, 1, 2, (1, 1)): "2-carbon chain",
    (3, 2, 2, (1, 1)): "3-carbon chain",
    (4, 2, 2, (1, 1)): "4-carbon chain",
    (2, 1, 1, (1, 1)): "methylated carbon",
}
# Every kind of unit that is no ring.
KINDS = (
    frozenset(kind for kind, _, _ in GROUPS)
    | frozenset(_ALKYL_NAMES.values())
    | {"trans alkene", "cis alkene"}
)
