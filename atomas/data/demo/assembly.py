"""Recipes of building blocks, and the molecules that one recipe can be arranged into."""

from dataclasses import dataclass
from random import Random

from rdkit import Chem
from rdkit.Chem import rdCIPLabeler

from atomas.data.demo.blocks import AMINE_NITROGEN, LINKS, RINGS, SUBSTITUENTS, Block, may_bond

MIN_HEAVY_ATOMS, MAX_HEAVY_ATOMS = 10, 45


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a molecule is made of, without saying what is attached where."""

    rings: tuple[str, ...]
    links: tuple[str, ...]
    substituents: tuple[str, ...]


def draw_recipe(rng: Random) -> Recipe:
    """Rings (1 to 3), one link fewer, and 0 to 4 substituents: more of these the fewer rings there are."""
    num_rings = rng.choices((1, 2, 3), (0.1, 0.68, 0.22))[0]
    num_substituents = rng.choice({1: (2, 3, 3, 4), 2: (1, 2, 2, 3), 3: (0, 1, 1)}[num_rings])
    names = list(RINGS)
    return Recipe(
        rings=tuple(rng.choices(names, [RINGS[name].weight for name in names], k=num_rings)),
        links=_draw(LINKS, num_rings - 1, rng),
        substituents=_draw(SUBSTITUENTS, num_substituents, rng),
    )


def arrange(recipe: Recipe, rng: Random) -> Chem.Mol | None:
    """One molecule with these blocks in random places, or None where this try met no bond that BRICS allows.

    Double bonds become E or Z at random, and stereocentres, if there are one or two, R or S in half of the
    molecules.
    """
    sites = _Sites()
    for ring in rng.sample(recipe.rings, len(recipe.rings)):
        sites.add_ring(ring)
    for number, smiles in enumerate(rng.sample(recipe.links, len(recipe.links)), start=1):
        if not sites.add_link(smiles, rng.randrange(number), number, rng):
            return None
    for smiles in recipe.substituents:
        if not sites.add_substituent(smiles, rng):
            return None
    molecule = sites.molecule()
    if molecule is None or not MIN_HEAVY_ATOMS <= molecule.GetNumHeavyAtoms() <= MAX_HEAVY_ATOMS:
        return None
    if any(molecule.HasSubstructMatch(pattern) for pattern in _IMPLAUSIBLE):
        return None
    if rng.random() < 0.5:
        _set_stereocentres(molecule, rng)
    _set_double_bonds(molecule, rng)
    return molecule


class _Sites:
    """Blocks laid side by side and bonded step by step.

    `_free` maps the open atoms of each ring to the types of bond that they may form.
    """

    def __init__(self) -> None:
        self._blocks = Chem.RWMol()
        self._free: list[dict[int, int]] = []
        self._dummies: list[int] = []

    def add_ring(self, name: str) -> None:
        offset = self._insert(_RING_MOLECULES[name])
        self._free.append({offset + atom: kind for atom, kind in _RING_SITES[name].items()})

    def add_link(self, smiles: str, one: int, other: int, rng: Random) -> bool:
        """Join two rings by number; a ring's amine nitrogen is taken first, two times out of three."""
        ends = _ends(smiles)
        rng.shuffle(ends)
        options = [
            (a, b)
            for a, kind_a in self._free[one].items()
            for b, kind_b in self._free[other].items()
            if (
                may_bond(ends[0][1], kind_a) and may_bond(ends[1][1], kind_b)
                if ends
                else may_bond(kind_a, kind_b)
            )
        ]
        if not options:
            return False
        preferred = [
            (a, b) for a, b in options if AMINE_NITROGEN in (self._free[one][a], self._free[other][b])
        ]
        pair = rng.choice(preferred if preferred and rng.random() < 2 / 3 else options)
        del self._free[one][pair[0]], self._free[other][pair[1]]
        if not ends:
            self._bond(*pair)
            return True
        offset = self._insert(_fragment(smiles))
        for (dummy, _), atom in zip(ends, pair, strict=True):
            self._replace(offset + dummy, atom)
        return True

    def add_substituent(self, smiles: str, rng: Random) -> bool:
        [(dummy, kind)] = _ends(smiles)
        options = [
            (ring, atom)
            for ring, free in enumerate(self._free)
            for atom in free
            if may_bond(kind, free[atom])
        ]
        if not options:
            return False
        ring, atom = rng.choice(options)
        del self._free[ring][atom]
        self._replace(self._insert(_fragment(smiles)) + dummy, atom)
        return True

    def molecule(self) -> Chem.Mol | None:
        self._blocks.BeginBatchEdit()
        for dummy in self._dummies:
            self._blocks.RemoveAtom(dummy)
        self._blocks.CommitBatchEdit()
        molecule = self._blocks.GetMol()
        if Chem.SanitizeMol(molecule, catchErrors=True) != Chem.SanitizeFlags.SANITIZE_NONE:
            return None
        return molecule

    def _insert(self, fragment: Chem.Mol) -> int:
        offset: int = self._blocks.GetNumAtoms()
        self._blocks.InsertMol(fragment)
        return offset

    def _replace(self, dummy: int, atom: int) -> None:
        [neighbour] = self._blocks.GetAtomWithIdx(dummy).GetNeighbors()
        self._dummies.append(dummy)
        self._bond(atom, neighbour.GetIdx())

    def _bond(self, one: int, other: int) -> None:
        self._blocks.AddBond(one, other, Chem.BondType.SINGLE)
        for index in (one, other):
            if self._blocks.GetAtomWithIdx(index).GetIsAromatic():
                # The hydrogen of a pyrrole-like [nH] makes room.
                self._blocks.GetAtomWithIdx(index).SetNumExplicitHs(0)


def _draw(table: tuple[Block, ...], count: int, rng: Random) -> tuple[str, ...]:
    return tuple(block.smiles for block in rng.choices(table, [block.weight for block in table], k=count))


def _fragment(smiles: str) -> Chem.Mol:
    return _FRAGMENTS[smiles][0]


def _ends(smiles: str) -> list[tuple[int, int]]:
    return list(_FRAGMENTS[smiles][1]) if smiles else []


def _parse_fragment(smiles: str) -> tuple[Chem.Mol, tuple[tuple[int, int], ...]]:
    fragment = Chem.MolFromSmiles(smiles)
    return fragment, tuple((a.GetIdx(), a.GetIsotope()) for a in fragment.GetAtoms() if a.GetAtomicNum() == 0)


def _ring_sites(ring: Chem.Mol) -> dict[int, int]:
    return {atom.GetIdx(): _ring_bond_type(atom) for atom in ring.GetAtoms() if atom.GetTotalNumHs() > 0}


def _ring_bond_type(atom: Chem.Atom) -> int:
    """BRICS type of a ring atom towards a substituent."""
    if atom.GetAtomicNum() == 7:
        return 9 if atom.GetIsAromatic() else AMINE_NITROGEN
    beside_heteroatom = any(neighbour.GetAtomicNum() != 6 for neighbour in atom.GetNeighbors())
    if atom.GetIsAromatic():
        return 14 if beside_heteroatom else 16
    return 13 if beside_heteroatom else 15


def _set_double_bonds(molecule: Chem.Mol, rng: Random) -> None:
    for before, one, other, after in molecule.GetSubstructMatches(_LINKING_DOUBLE_BOND):
        bond = molecule.GetBondBetweenAtoms(one, other)
        bond.SetStereoAtoms(*((before, after) if bond.GetBeginAtomIdx() == one else (after, before)))
        is_trans = rng.random() < 2 / 3
        bond.SetStereo(Chem.BondStereo.STEREOTRANS if is_trans else Chem.BondStereo.STEREOCIS)
        Chem.SetDoubleBondNeighborDirections(molecule)


def _set_stereocentres(molecule: Chem.Mol, rng: Random) -> None:
    centres = [index for index, _ in Chem.FindMolChiralCenters(molecule, includeUnassigned=True)]
    if not 1 <= len(centres) <= 2:
        return
    for index in centres:
        tag = rng.choice((Chem.ChiralType.CHI_TETRAHEDRAL_CW, Chem.ChiralType.CHI_TETRAHEDRAL_CCW))
        molecule.GetAtomWithIdx(index).SetChiralTag(tag)
    Chem.AssignStereochemistry(molecule, cleanIt=True, force=True)
    rdCIPLabeler.AssignCIPLabels(molecule)
    labels = [a.GetPropsAsDict().get("_CIPCode") for a in molecule.GetAtoms() if a.GetChiralTag() != _NO_TAG]
    # Relative (cis / trans) ring stereo carries no R or S of its own: leave it unspecified.
    if any(label not in ("R", "S") for label in labels):
        for index in centres:
            molecule.GetAtomWithIdx(index).SetChiralTag(_NO_TAG)


_NO_TAG = Chem.ChiralType.CHI_UNSPECIFIED
_LINKING_DOUBLE_BOND = Chem.MolFromSmarts("*[CX3;H1]=[CX3;H1]*")
_RING_MOLECULES = {name: Chem.MolFromSmiles(block.smiles) for name, block in RINGS.items()}
_RING_SITES = {name: _ring_sites(ring) for name, ring in _RING_MOLECULES.items()}
_FRAGMENTS = {
    block.smiles: _parse_fragment(block.smiles) for block in (*LINKS, *SUBSTITUENTS) if block.smiles
}
# Acetals, aminals and their like, which fall apart in water.
_IMPLAUSIBLE = tuple(
    Chem.MolFromSmarts(smarts)
    for smarts in (
        "[#7,#8,#16,F,Cl;!$([#16](=O)=O)][CX4;!$(C(F)(F)F);!$([CH2;R])][#7,#8,#16]",
        "[#7,#8,SX2;!a;+0]-[#7,#8;!a;+0]",
    )
)
