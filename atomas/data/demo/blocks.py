"""The building blocks of the demo corpus: rings, links between rings, substituents.

A block ends in dummy atoms whose isotope is the type of the bond that it may form. Types 1 to 16 are those
of BRICS (Degen et al., ChemMedChem 2008, 3, 1503), and `may_bond` follows RDKit's table of them. Types 20 to
22 are ours: they stand for bonds that BRICS never cuts (to halogens, nitro, hydroxy, alkenes), and decorate a
ring inside its fragment.
"""

from dataclasses import dataclass
from functools import cache

from rdkit.Chem import BRICS

AROMATIC_ONLY, CARBOCYCLIC, ANY_CARBON = 20, 21, 22
ALKYL_TO_HETEROATOM, AMINE_NITROGEN, ALKYL_TO_RING = 4, 5, 8


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fragment and how often it is drawn, relative to the others of its table."""

    smiles: str
    weight: float = 1.0


@cache
def may_bond(one: int, other: int) -> bool:
    """Whether two ends of these types form a single bond."""
    return any((a, b) in _BONDS for a in _types(one) for b in _types(other))


def _types(kind: int) -> tuple[int, ...]:
    # BRICS types the same sp3 carbon 4 towards a heteroatom and 8 towards a ring.
    return (ALKYL_TO_HETEROATOM, ALKYL_TO_RING) if kind == ALKYL_TO_RING else (kind,)


def _bond_table() -> frozenset[tuple[int, int]]:
    pairs = {(int(a), int(b)) for group in BRICS.reactionDefs for a, b, bond in group if bond == "-"}
    pairs |= {(AROMATIC_ONLY, 14), (AROMATIC_ONLY, 16), (CARBOCYCLIC, 15), (CARBOCYCLIC, 16)}
    pairs |= {(ANY_CARBON, 14), (ANY_CARBON, 15), (ANY_CARBON, 16)}
    return frozenset(pairs | {(b, a) for a, b in pairs})


_BONDS = _bond_table()

# Atoms are written in the order of the IUPAC locants; atoms shared by two rings have none (3a, 7a, ...).
RINGS: dict[str, Block] = {
    "benzene": Block(smiles="c1ccccc1", weight=14),
    "pyridine": Block(smiles="n1ccccc1", weight=5),
    "pyrimidine": Block(smiles="n1cnccc1", weight=3),
    "pyrazine": Block(smiles="n1ccncc1", weight=1.5),
    "pyridazine": Block(smiles="n1ncccc1", weight=1),
    "furan": Block(smiles="o1cccc1", weight=2.5),
    "thiophene": Block(smiles="s1cccc1", weight=2.5),
    "pyrrole": Block(smiles="[nH]1cccc1", weight=1.5),
    "imidazole": Block(smiles="[nH]1cncc1", weight=1.5),
    "pyrazole": Block(smiles="[nH]1nccc1", weight=2),
    "oxazole": Block(smiles="o1cncc1", weight=1),
    "isoxazole": Block(smiles="o1nccc1", weight=1),
    "thiazole": Block(smiles="s1cncc1", weight=2),
    "1,2,4-triazole": Block(smiles="[nH]1ncnc1", weight=0.7),
    "1,3,4-thiadiazole": Block(smiles="s1cnnc1", weight=0.7),
    "indole": Block(smiles="[nH]1ccc2ccccc12", weight=2),
    "indazole": Block(smiles="[nH]1ncc2ccccc12", weight=0.8),
    "benzimidazole": Block(smiles="[nH]1cnc2ccccc12", weight=0.8),
    "benzofuran": Block(smiles="o1ccc2ccccc12", weight=1.2),
    "benzothiophene": Block(smiles="s1ccc2ccccc12", weight=1),
    "benzothiazole": Block(smiles="s1cnc2ccccc12", weight=1),
    "benzoxazole": Block(smiles="o1cnc2ccccc12", weight=0.7),
    "naphthalene": Block(smiles="c1cccc2ccccc12", weight=1.6),
    "quinoline": Block(smiles="n1cccc2ccccc12", weight=1.6),
    "isoquinoline": Block(smiles="c1nccc2ccccc12", weight=0.8),
    "quinoxaline": Block(smiles="n1ccnc2ccccc12", weight=0.6),
    "1,3-benzodioxole": Block(smiles="O1COc2ccccc12", weight=1),
    "indane": Block(smiles="C1CCc2ccccc12", weight=0.8),
    "tetralin": Block(smiles="C1CCCc2ccccc12", weight=0.6),
    "tetrahydroisoquinoline": Block(smiles="C1NCCc2ccccc12", weight=1.2),
    "cyclopropane": Block(smiles="C1CC1", weight=1.5),
    "cyclobutane": Block(smiles="C1CCC1", weight=0.8),
    "cyclopentane": Block(smiles="C1CCCC1", weight=1.5),
    "cyclohexane": Block(smiles="C1CCCCC1", weight=4),
    "cycloheptane": Block(smiles="C1CCCCCC1", weight=0.4),
    "azetidine": Block(smiles="N1CCC1", weight=1),
    "pyrrolidine": Block(smiles="N1CCCC1", weight=3),
    "piperidine": Block(smiles="N1CCCCC1", weight=6),
    "piperazine": Block(smiles="N1CCNCC1", weight=4),
    "morpholine": Block(smiles="O1CCNCC1", weight=4),
    "thiomorpholine": Block(smiles="S1CCNCC1", weight=1),
    "azepane": Block(smiles="N1CCCCCC1", weight=0.8),
    "oxetane": Block(smiles="O1CCC1", weight=0.5),
    "tetrahydrofuran": Block(smiles="O1CCCC1", weight=1),
    "tetrahydropyran": Block(smiles="O1CCCCC1", weight=1),
    "tetrahydrothiophene": Block(smiles="S1CCCC1", weight=0.4),
}

# The empty link is a bond from ring to ring.
LINKS: tuple[Block, ...] = (
    Block(smiles="", weight=3),
    Block(smiles="[6*]C(=O)N[5*]", weight=5),
    Block(smiles="[6*]C(=O)[1*]", weight=2.5),
    Block(smiles="[6*]C(=O)NC[8*]", weight=2),
    Block(smiles="[6*]C(=O)NCC[8*]", weight=1),
    Block(smiles="[6*]C(=O)NC(C)[8*]", weight=0.8),
    Block(smiles="[8*]CC(=O)N[5*]", weight=1.5),
    Block(smiles="[8*]CC(=O)[1*]", weight=0.8),
    Block(smiles="[8*]CCC(=O)N[5*]", weight=0.7),
    Block(smiles="[6*]C(=O)N(C)[5*]", weight=0.6),
    Block(smiles="[6*]C(=O)N(C)C[8*]", weight=0.6),
    Block(smiles="[3*]OCC(=O)N[5*]", weight=1),
    Block(smiles="[11*]SCC(=O)N[5*]", weight=0.6),
    Block(smiles="[6*]C(=O)O[3*]", weight=1),
    Block(smiles="[6*]C(=O)OC[8*]", weight=1.2),
    Block(smiles="[8*]CC(=O)OC[8*]", weight=0.5),
    Block(smiles="[3*]O[3*]", weight=2),
    Block(smiles="[3*]OC[8*]", weight=2.5),
    Block(smiles="[3*]OCC[8*]", weight=1),
    Block(smiles="[3*]OCCC[8*]", weight=0.6),
    Block(smiles="[5*]N[5*]", weight=2),
    Block(smiles="[5*]NC[8*]", weight=2),
    Block(smiles="[5*]NCC[8*]", weight=0.8),
    Block(smiles="[5*]N(C)C[8*]", weight=0.6),
    Block(smiles="[11*]S[11*]", weight=0.8),
    Block(smiles="[11*]SC[8*]", weight=1),
    Block(smiles="[20*]S(=O)(=O)N[5*]", weight=2),
    Block(smiles="[20*]S(=O)(=O)[12*]", weight=1.2),
    Block(smiles="[20*]S(=O)(=O)NC[8*]", weight=0.8),
    Block(smiles="[20*]S(=O)(=O)[20*]", weight=0.6),
    Block(smiles="[20*]S(=O)(=O)C[8*]", weight=0.4),
    Block(smiles="[5*]NC(=O)N[5*]", weight=1.2),
    Block(smiles="[5*]NC(=O)NC[8*]", weight=0.7),
    Block(smiles="[5*]NC(=O)OC[8*]", weight=0.8),
    Block(smiles="[8*]C[8*]", weight=2),
    Block(smiles="[8*]CC[8*]", weight=1),
    Block(smiles="[8*]CCC[8*]", weight=0.7),
    Block(smiles="[8*]CCCC[8*]", weight=0.4),
    Block(smiles="[8*]C(C)[8*]", weight=0.6),
    Block(smiles="[6*]C(=O)[6*]", weight=1.2),
    Block(smiles="[6*]C(=O)C[8*]", weight=0.7),
    Block(smiles="[6*]C(=O)CC[8*]", weight=0.5),
    Block(smiles="[20*]C=C[20*]", weight=1.1),
    Block(smiles="[20*]C=CC(=O)N[5*]", weight=0.7),
    Block(smiles="[20*]C#C[20*]", weight=0.6),
)

SUBSTITUENTS: tuple[Block, ...] = (
    Block(smiles="[22*]F", weight=4),
    Block(smiles="[20*]Cl", weight=4),
    Block(smiles="[20*]Br", weight=2),
    Block(smiles="[20*]I", weight=0.7),
    Block(smiles="[21*]O", weight=3),
    Block(smiles="[22*]N", weight=2),
    Block(smiles="[22*]C#N", weight=2),
    Block(smiles="[20*][N+](=O)[O-]", weight=2),
    Block(smiles="[22*]C(=O)O", weight=2),
    Block(smiles="[22*]C(=O)[O-]", weight=0.4),
    Block(smiles="[22*]C(N)=O", weight=0.8),
    Block(smiles="[20*]C=O", weight=0.7),
    Block(smiles="[20*]S(C)(=O)=O", weight=0.9),
    Block(smiles="[20*]S(N)(=O)=O", weight=0.8),
    Block(smiles="[20*]C#C", weight=0.4),
    Block(smiles="[20*]C=C", weight=0.4),
    Block(smiles="[8*]C", weight=4),
    Block(smiles="[8*]CC", weight=1.5),
    Block(smiles="[8*]CCC", weight=0.8),
    Block(smiles="[8*]CCCC", weight=0.6),
    Block(smiles="[8*]CCCCC", weight=0.3),
    Block(smiles="[8*]CCCCCC", weight=0.3),
    Block(smiles="[8*]C(C)C", weight=1),
    Block(smiles="[8*]C(C)(C)C", weight=0.8),
    Block(smiles="[20*]C(F)(F)F", weight=2),
    Block(smiles="[8*]CO", weight=1),
    Block(smiles="[8*]CN", weight=0.6),
    Block(smiles="[8*]C[NH3+]", weight=0.3),
    Block(smiles="[8*]C[N+](C)(C)C", weight=0.3),
    Block(smiles="[8*]CCO", weight=0.6),
    Block(smiles="[8*]CCCO", weight=0.4),
    Block(smiles="[8*]CC(=O)O", weight=0.7),
    Block(smiles="[8*]CCC(=O)O", weight=0.5),
    Block(smiles="[8*]CC#N", weight=0.4),
    Block(smiles="[8*]CCCl", weight=0.3),
    Block(smiles="[8*]CCOC", weight=0.5),
    Block(smiles="[3*]OC", weight=4),
    Block(smiles="[3*]OCC", weight=1.3),
    Block(smiles="[3*]OC(C)C", weight=0.6),
    Block(smiles="[3*]OCCCC", weight=0.4),
    Block(smiles="[3*]OC(F)(F)F", weight=1),
    Block(smiles="[3*]OC(C)=O", weight=0.6),
    Block(smiles="[3*]OCC(=O)O", weight=0.5),
    Block(smiles="[3*]OCCN(C)C", weight=0.4),
    Block(smiles="[11*]SC", weight=0.8),
    Block(smiles="[5*]N(C)C", weight=1),
    Block(smiles="[5*]NC", weight=0.6),
    Block(smiles="[5*]NC(C)=O", weight=1),
    Block(smiles="[6*]C(C)=O", weight=1),
    Block(smiles="[6*]C(=O)OC", weight=1.2),
    Block(smiles="[6*]C(=O)OCC", weight=0.8),
    Block(smiles="[1*]C(C)=O", weight=0.7),
    Block(smiles="[12*]S(C)(=O)=O", weight=0.5),
)
