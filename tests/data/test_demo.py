"""The demo corpus: what its words say is checked against the molecules by other means than it was written."""

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from rdkit import Chem
from rdkit.Chem import rdMolDescriptors

from atomas.data.demo import build_demo_corpus
from atomas.data.demo.anatomy import KINDS, dissect
from atomas.data.demo.assembly import arrange, draw_recipe
from atomas.data.demo.blocks import RINGS, may_bond
from atomas.data.demo.corpus import split_sizes
from atomas.data.demo.phrasing import describe
from atomas.data.demo.words import GROUP_NOUNS, with_article
from atomas.data.shards import Corpus
from atomas.errors import AtomasError

PAIRS = 400
NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"]

# What the words mean, written down here without a look at how the corpus finds them: all atoms of one match.
MEANING = {
    "carboxylic acid|carboxylic acid group|carboxy group": "C(=O)[OX2H]",
    "carboxylate|carboxylate group": "C(=O)[O-]",
    "acetoxy group|acetate ester": "[OX2]C(=O)[CH3]",
    "methyl ester|methoxycarbonyl group": "C(=O)[OX2][CH3]",
    "ethyl ester|ethoxycarbonyl group": "C(=O)[OX2][CH2][CH3]",
    "acetamido group|acetylamino group": "[NX3]C(=O)[CH3]",
    "acetyl group|acetyl substituent": "C(=O)[CH3]",
    "carbamoyl group|primary amide": "C(=O)[NH2]",
    "methylsulfonyl group|methyl sulfone": "S(=O)(=O)[CH3]",
    "sulfamoyl group|primary sulfonamide": "S(=O)(=O)[NH2]",
    "trifluoromethoxy group|OCF3 group": "OC(F)(F)F",
    "trifluoromethyl group|CF3 group": "C(F)(F)F",
    "methoxy group|methoxy substituent|methyl ether": "O[CH3]",
    "ethoxy group|ethoxy substituent|ethyl ether": "O[CH2][CH3]",
    "isopropoxy group|isopropyl ether": "O[CH]([CH3])[CH3]",
    "butoxy group|butyl ether": "O[CH2][CH2][CH2][CH3]",
    "methylthio group|methylsulfanyl group": "[SX2][CH3]",
    "dimethylamino group|dimethylamine group": "[NX3]([CH3])[CH3]",
    "methylamino group|methylamine group": "[NH][CH3]",
    "trimethylammonium group|quaternary trimethylammonium": "[N+]([CH3])([CH3])[CH3]",
    "nitro group|nitro substituent": "[N+](=O)[O-]",
    "cyano group|nitrile|nitrile group": "C#N",
    "formyl group|aldehyde|aldehyde group": "[CH]=O",
    "hydroxymethyl group|CH2OH group": "[CH2][OH]",
    "aminomethyl group|CH2NH2 group": "[CH2][NH2]",
    "sulfonamide|sulfonamide group|sulfonamide linkage": "S(=O)(=O)[NX3;!H2]",
    "sulfone|sulfonyl group": "[S;$(S([#6])[#6])](=O)=O",
    "urea|urea group|urea linkage": "[NX3]C(=O)[NX3]",
    "carbamate|carbamate group|carbamate linkage": "[NX3]C(=O)[OX2H0]",
    "N-methyl amide|N-methylated amide": "C(=O)N[CH3]",
    "amide|amide group|amide linkage|amide bond": "[C;$(C[#6])](=O)[NX3;!H2]",
    "ester|ester group|ester linkage": "[C;$(C[#6])](=O)[OX2H0]",
    "ketone|ketone group|keto group": "[C;$(C([#6])[#6])]=O",
    "vinyl group|ethenyl group": "[CH]=[CH2]",
    "ethynyl group|terminal alkyne": "C#[CH]",
    "carbon-carbon double bond|alkene|trans double bond|E alkene|cis double bond|Z alkene": "C=C",
    "triple bond|alkyne|alkyne bridge": "C#C",
    "N-methyl amine|methylated amine": "[NX3H0][CH3]",
    "ether|ether oxygen|oxygen bridge|ether linkage": "[O;$(O([#6])[#6])]",
    "thioether|sulfide bridge|thioether linkage": "[S;$(S([#6])[#6])]",
    "hydroxy group|hydroxyl group|OH group|alcohol": "[OH;$(O[#6;!$(C=O)])]",
    "amino group|primary amine|NH2 group": "[NH2]",
    "ammonium group|protonated amine": "[NH3+]",
    "secondary amine|NH bridge|amine linkage": "[NX3H]",
    "fluoro substituent|fluorine atom|fluorine": "F",
    "chloro substituent|chlorine atom|chlorine": "Cl",
    "bromo substituent|bromine atom|bromine": "Br",
    "iodo substituent|iodine atom": "I",
    "methyl group|methyl substituent": "[CH3]",
    "ethyl group|ethyl substituent": "[CH2][CH3]",
    "propyl group|propyl chain": "[CH2][CH2][CH3]",
    "isopropyl group|isopropyl substituent": "[CH]([CH3])[CH3]",
    "butyl group|butyl chain": "[CH2][CH2][CH2][CH3]",
    "tert-butyl group|tert-butyl substituent": "C([CH3])([CH3])[CH3]",
    "pentyl group|pentyl chain": "[CH2][CH2][CH2][CH2][CH3]",
    "hexyl group|hexyl chain": "[CH2][CH2][CH2][CH2][CH2][CH3]",
    "methylene group|methylene bridge|CH2 group": "[CH2]",
    "ethylene chain|two-carbon chain": "[CH2][CH2]",
    "propylene chain|three-carbon chain": "[CH2][CH2][CH2]",
    "butylene chain|four-carbon chain": "[CH2][CH2][CH2][CH2]",
    "methyl-branched carbon|CH(CH3) group": "[CH][CH3]",
    "amide carbonyl|ester carbonyl|carbonyl group": "C=O",
    "amide nitrogen|sulfonamide nitrogen|carbamate nitrogen": "[NX3]",
    "ester oxygen|carbamate oxygen": "[OX2]",
    "sulfonamide sulfur": "S",
    "stereocentre": "[C;R0,R]",
    "halogen atom": "[F,Cl,Br,I]",
    "nitrogen atom": "[#7]",
    "oxygen atom": "[#8]",
    "sulfur atom": "[#16]",
    "CH3 group": "[CH3]",
}
SMARTS = {noun: smarts for nouns, smarts in MEANING.items() for noun in nouns.split("|")}
RING_WORDS = re.compile(r"(.+?)(?: ring system| ring| unit| bicycle)")
LOCANT = re.compile(r"(?:positions? ([\d, and]+)|([CNOS])-(\d+))")
DENIED = {
    "halogen": "[F,Cl,Br,I]",
    "fluorine": "F",
    "chlorine": "Cl",
    "sulfur": "[#16]",
    "nitrogen": "[#7]",
    "carbonyl group": "[#6]=O",
    "hydroxy group": "[OH]",
    "amide": "C(=O)[NX3]",
    "ester": "C(=O)[OX2H0]",
    "ether": "[#8]([#6])[#6]",
    "nitro group": "[N+](=O)[O-]",
    "nitrile": "C#N",
    "methyl group": "[CH3]",
    "saturated ring": "[R;!a]",
    "primary amine": "[NX3H2]",
}


def ring_pattern(smiles: str) -> tuple[Chem.Mol, list[int]]:
    """A ring system's query, and its atoms' locants: atoms of two rings have none (0)."""
    ring = Chem.MolFromSmiles(smiles)
    locants, number = [], 0
    for atom in ring.GetAtoms():
        is_shared = ring.GetRingInfo().NumAtomRings(atom.GetIdx()) > 1
        number += not is_shared
        locants.append(0 if is_shared else number)
    return Chem.MolFromSmarts(smiles.replace("[nH]", "[nX3]")), locants


RING_PATTERNS = {name: ring_pattern(block.smiles) for name, block in RINGS.items()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("demo") / "corpus"
    build_demo_corpus(folder, pairs=PAIRS, seed=7, workers=1)
    return Corpus.open(folder)


@pytest.fixture(scope="module")
def records(corpus: Corpus) -> list[dict[str, Any]]:
    return [record for split in corpus.splits.values() for record in split]


class Reading:
    """A record as a reader has it: the molecule parsed anew, and the spans with their words."""

    def __init__(self, record: dict[str, Any]) -> None:
        self.text: str = record["text"]
        self.molecule = Chem.MolFromSmiles(record["smiles"])
        self.spans = [
            (span["start"], span["end"], self.text[span["start"] : span["end"]], frozenset(span["atoms"]))
            for span in record["grounding"]
        ]
        self.distances = Chem.GetDistanceMatrix(self.molecule)

    def count(self, smarts: str) -> int:
        return len(self.molecule.GetSubstructMatches(Chem.MolFromSmarts(smarts)))

    def bonded(self, one: frozenset[int], other: frozenset[int]) -> bool:
        return any(self.distances[a, b] == 1 for a in one for b in other)

    def numberings(self) -> Iterator[tuple[str, frozenset[int], list[dict[int, int]]]]:
        """Every named ring system: its name, its atoms, and its locants in each possible numbering."""
        for name, (pattern, locants) in RING_PATTERNS.items():
            matches = self.molecule.GetSubstructMatches(pattern, uniquify=False)
            for atoms in {frozenset(match) for match in matches}:
                if self._is_whole_system(atoms):
                    options = [dict(zip(m, locants, strict=True)) for m in matches if set(m) == atoms]
                    yield name, atoms, options

    def _is_whole_system(self, atoms: frozenset[int]) -> bool:
        rings = [set(ring) for ring in self.molecule.GetRingInfo().AtomRings()]
        return all(ring <= atoms or len(ring & atoms) == 0 for ring in rings)


@pytest.fixture(scope="module")
def readings(records: list[dict[str, Any]]) -> list[Reading]:
    return [Reading(record) for record in records]


def singular(words: str) -> tuple[int, str]:
    """Turn "two fluorine atoms" into (2, "fluorine atom"); a noun without a number counts once."""
    first, _, noun = words.partition(" ")
    if first.lower() not in NUMBERS:
        return 1, words
    number = NUMBERS.index(first.lower())
    return number, noun if number == 1 else noun.removesuffix("s")


def known(words: str) -> str:
    """The noun as in the table: a capital at the start of a sentence undone."""
    lower = words[0].lower() + words[1:]
    return lower if lower in SMARTS else words


def test_every_noun_has_a_meaning_here() -> None:
    nouns = {noun for nouns in GROUP_NOUNS.values() for noun in nouns}
    assert nouns <= set(SMARTS)
    assert set(GROUP_NOUNS) == KINDS
    assert len(nouns) == sum(map(len, GROUP_NOUNS.values())), "one noun for two kinds of group"


def test_spans_cut_whole_words(readings: list[Reading]) -> None:
    for reading in readings:
        assert len(reading.spans) >= 3
        last = 0
        for start, end, words, atoms in reading.spans:
            assert last <= start < end <= len(reading.text)
            assert words == words.strip()
            assert not re.match(r"\w", reading.text[end : end + 1])
            assert not re.search(r"[\w-]$", reading.text[:start])
            assert atoms
            assert max(atoms) < reading.molecule.GetNumAtoms()
            last = end


def test_spans_are_the_atoms_that_their_words_name(readings: list[Reading]) -> None:
    seen: Counter[str] = Counter()
    for reading in readings:
        for _, _, words, atoms in reading.spans:
            if LOCANT.fullmatch(words[0].lower() + words[1:]) or LOCANT.fullmatch(words):
                continue
            ring = RING_WORDS.fullmatch(words)
            if ring and ring[1].lower().replace("phenyl", "benzene") in RINGS:
                kind = ring[1].lower().replace("phenyl", "benzene")
                assert (kind, atoms) in [(name, found) for name, found, _ in reading.numberings()]
                seen[kind] += 1
                continue
            number, noun = singular(words)
            noun = known(noun)
            matches = reading.molecule.GetSubstructMatches(Chem.MolFromSmarts(SMARTS[noun]))
            inside = [set(match) for match in matches if set(match) <= atoms]
            assert set().union(*inside) == atoms, (reading.text, words)
            assert len(inside) == number or noun in ("stereocentre", "urea"), (reading.text, words)
            seen[noun] += 1
    assert len(seen) > 100


def test_double_bond_words_match_the_stereo_of_the_bond(readings: list[Reading]) -> None:
    found = 0
    for reading in readings:
        for _, _, words, atoms in reading.spans:
            word = re.match(r"(?i)(trans|cis|E|Z) (?:double bond|alkene)", words)
            if word:
                stereo = reading.molecule.GetBondBetweenAtoms(*atoms).GetStereo()
                expected = {"trans": "STEREOE", "E": "STEREOE", "cis": "STEREOZ", "Z": "STEREOZ"}
                assert stereo.name == expected[word[1] if len(word[1]) == 1 else word[1].lower()]
                found += 1
    assert found


def test_totals_count_the_molecule(readings: list[Reading]) -> None:
    found = 0
    total = re.compile(
        r" has (\w+ [\w ]+?) in total|In all there (?:is|are) (\w+ [\w ]+?)\.|(\w+ [\w ]+) can be"
    )
    for reading in readings:
        for groups in total.findall(reading.text):
            words = next(filter(None, groups))
            number, noun = singular(words)
            assert number == reading.count(SMARTS[noun]), reading.text
            [atoms] = [atoms for _, _, found_words, atoms in reading.spans if found_words == words]
            assert len(atoms) == number * (2 if noun == "carbonyl group" else 1)
            found += 1
    assert found > 50


def test_properties_are_those_of_the_molecule(readings: list[Reading]) -> None:
    found: Counter[str] = Counter()
    properties = {
        "rotatable bond": rdMolDescriptors.CalcNumRotatableBonds,
        "hydrogen bond donor": rdMolDescriptors.CalcNumHBD,
        "ring": lambda molecule: molecule.GetRingInfo().NumRings(),
    }
    for reading in readings:
        for noun, compute in properties.items():
            for number, ending in re.findall(rf"(?:has|offers|from) (\w+) {noun}(s?)[.]", reading.text):
                assert compute(reading.molecule) == NUMBERS.index(number), reading.text
                assert (ending == "") == (number == "one")
                found[noun] += 1
        for size in re.findall(r"has about (\d+) heavy atoms", reading.text):
            assert abs(reading.molecule.GetNumHeavyAtoms() - int(size)) <= 2.5
            found["size"] += 1
        charge = Chem.GetFormalCharge(reading.molecule)
        assert re.findall(r"net charge of ([+-]\d)", reading.text) == ([f"{charge:+d}"] if charge else [])
        assert "uncharged" not in reading.text or charge == 0
        found["charge"] += charge != 0
    assert min(found.values()) >= 1
    assert len(found) == 5


def test_denials_are_true(readings: list[Reading]) -> None:
    found = 0
    for reading in readings:
        told = re.findall(r"(?:contains no|lacks any|[Tt]here is no) ([\w ]+)\.", reading.text)
        for pair in re.findall(r"contains neither (?:an? )?([\w ]+) nor (?:an? )?([\w ]+)\.", reading.text):
            told.extend(pair)
        for noun in told:
            assert reading.count(DENIED[noun]) == 0, (noun, reading.text)
            found += 1
    assert found > 50


def test_stereocentres_are_all_told(readings: list[Reading]) -> None:
    found = 0
    for reading in readings:
        centres = Chem.FindMolChiralCenters(reading.molecule, useLegacyImplementation=False)
        told = [atoms for _, _, words, atoms in reading.spans if "stereocentre" in words.lower()]
        assert told == ([{index for index, _ in centres}] if centres else [])
        if len(centres) == 1:
            label = centres[0][1]
            assert re.search(rf"[Ss]tereocentre(?: is|:| has) {label}\b", reading.text), reading.text
            possible = Chem.FindMolChiralCenters(reading.molecule, includeUnassigned=True)
            assert "only stereocentre" not in reading.text or len(possible) == 1
        if len(centres) == 2:
            labels = sorted(label for _, label in centres)
            expected = "one R and one S" if labels == ["R", "S"] else f"both {labels[0]}"
            assert expected in reading.text
        found += len(centres)
    assert found > 20


def test_ortho_meta_and_para_are_distances_in_the_ring(readings: list[Reading]) -> None:
    """Both parts named are bonded to one benzene ring, at the distance that the word says."""
    found: Counter[str] = Counter()
    steps = {"ortho": 1, "meta": 2, "para": 3}
    for reading in readings:
        benzenes = [atoms for name, atoms, _ in reading.numberings() if name == "benzene"]
        for match in re.finditer(r"\b(ortho|meta|para) to (each other|the)", reading.text):
            before = re.sub(r" \((?:ending|leading) [^)]*\)$", "", reading.text[: match.start()].rstrip())
            several = re.search(r"\((?:both|one (ortho|meta|para) and one)$", before)
            before = re.sub(r"( is| sits| \((both|one \w+ and one))$", "", before)
            one = next((atoms for _, end, _, atoms in reading.spans if end == len(before)), None)
            assert one, (before, match, reading.text)
            if match[2] == "each other":
                other, words = one, [match[1]]
            else:
                other = next(a for start, _, _, a in reading.spans if start > match.end() - 1)
                words = [match[1]] * 2 if several else [match[1]]
                if several and several[1]:
                    words[0] = several[1]
            expected = sorted(steps[word] for word in words)
            fits = []
            for ring in benzenes:
                at_one = [a for a in ring if reading.bonded(frozenset([a]), one - ring)]
                at_other = [a for a in ring if reading.bonded(frozenset([a]), other - ring)]
                if match[2] == "each other":
                    fits.append(len(at_one) == 2 and [reading.distances[at_one[0], at_one[1]]] == expected)
                elif len(at_other) == 1:
                    fits.append(sorted(reading.distances[a, at_other[0]] for a in at_one) == expected)
            assert any(fits), (reading.text, match)
            found[match[1]] += 1
    assert min(found[word] for word in steps) > 10


def test_locants_follow_one_numbering_of_the_ring(readings: list[Reading]) -> None:
    found = 0
    for reading in readings:
        told: dict[int, int] = {}
        for index, (_, end, words, atoms) in enumerate(reading.spans):
            locant = LOCANT.fullmatch(words if words[1] == "-" else words.lower())
            if not locant:
                continue
            numbers = [int(number) for number in re.findall(r"\d+", words)]
            assert len(numbers) == len(atoms)
            if len(numbers) == 1:
                told[next(iter(atoms))] = numbers[0]
            if locant[2]:
                assert {reading.molecule.GetAtomWithIdx(atom).GetSymbol() for atom in atoms} == {locant[2]}
            if reading.text[end:].startswith(" of "):
                assert atoms <= reading.spans[index + 1][3]
            found += 1
        for _, ring, numberings in reading.numberings():
            fits = [
                numbering
                for numbering in numberings
                if all(numbering[atom] == number for atom, number in told.items() if atom in ring)
            ]
            assert fits, (reading.text, told)
            for _, _, words, atoms in reading.spans:
                if words.startswith("positions ") and atoms <= ring:
                    numbers = sorted(int(number) for number in re.findall(r"\d+", words))
                    assert any(sorted(n[a] for a in atoms) == numbers for n in fits), reading.text
    assert found > 200


def test_substituents_sit_at_the_locants_told(readings: list[Reading]) -> None:
    found = 0
    for reading in readings:
        for match in re.finditer(r"((?: \((?:ending|leading)[^()]*\))?) at (?=[pC-S])", reading.text):
            named = [atoms for _, end, _, atoms in reading.spans if end == match.start()]
            place = [atoms for start, _, _, atoms in reading.spans if start == match.end()]
            if named and place:
                assert reading.bonded(named[0] - place[0], place[0]), (reading.text, match)
                found += 1
    assert found > 100


def test_links_are_told_in_their_order_and_direction(readings: list[Reading]) -> None:
    """Neighbours in a chain of groups are bonded; an amide's end looks to the ring that it is said to."""
    chains = sides = 0
    for reading in readings:
        for (_, end, _, atoms), (start, _, _, following) in zip(
            reading.spans, reading.spans[1:], strict=False
        ):
            between = reading.text[end:start]
            if re.fullmatch(r" (followed by|\(?ending in|\(?leading to) (an?|another|the) ", between):
                assert reading.bonded(atoms, following), reading.text
                chains += 1
            if re.fullmatch(
                r" (on the side of|towards|pointing to) (an?|the)( first| second| third)? ", between
            ):
                group = [a for _, e, _, a in reading.spans if e <= end and atoms < a][-1]
                others = group - atoms
                gained = min(reading.distances[a, r] for a in others for r in following)
                assert min(reading.distances[a, r] for a in atoms for r in following) < gained, reading.text
                sides += 1
    assert chains > 50
    assert sides > 30


def test_the_linked_rings_are_linked(readings: list[Reading]) -> None:
    """Between the rings of "X is linked to Y through Z" lie exactly the atoms of Z."""
    found = 0
    sentence = re.compile(
        r"[^.]*?\b(?:is (?:linked|connected) to|are joined by|joins|connects|leads to)\b[^.]*\."
    )
    for reading in readings:
        for match in sentence.finditer(reading.text):
            inside = [span for span in reading.spans if match.start() <= span[0] < match.end()]
            inside = inside[
                : next(
                    (
                        i
                        for i, s in enumerate(inside)
                        if re.search(r"(carbonyl|nitrogen|oxygen|sulfur)$", s[2])
                        and s[2].split()[0] in ("amide", "ester", "sulfonamide", "carbamate")
                    ),
                    len(inside),
                )
            ]
            rings = [span[3] for span in inside if RING_WORDS.fullmatch(span[2])]
            path = [
                span[3]
                for span in inside
                if not RING_WORDS.fullmatch(span[2]) and not LOCANT.fullmatch(span[2])
            ]
            path = [atoms for atoms in path if not any(atoms <= ring for ring in rings)]
            assert len(rings) == 2, (match[0], rings)
            chain = set().union(*path) - rings[0] - rings[1]
            if "direct bond" in match[0]:
                assert reading.bonded(*rings)
            else:
                assert all(reading.bonded(frozenset(chain), ring) for ring in rings), match[0]
            found += 1
    assert found > 100


# Names from the literature with their SMILES: the rings are numbered as chemists do.
@pytest.mark.parametrize(
    ("smiles", "ring", "locants"),
    [
        ("COc1ccc2[nH]ccc2c1", "indole", [5]),
        ("Cn1cnc(Br)c1", "imidazole", [1, 4]),
        ("Oc1cccc2cccnc12", "quinoline", [8]),
        ("Clc1cccc2c(Br)nccc12", "isoquinoline", [1, 5]),
        ("Fc1cccc(Cl)n1", "pyridine", [2, 6]),
        ("Clc1ncnc(C)c1", "pyrimidine", [4, 6]),
        ("O=C(O)c1ccoc1C", "furan", [2, 3]),
        ("Nc1ncc(Br)s1", "thiazole", [2, 5]),
        ("Cc1nc2cc(Cl)ccc2[nH]1", "benzimidazole", [2, 5]),
        ("O=Cc1ccc2OCOc2c1", "1,3-benzodioxole", [5]),
        ("CC1CCNCC1", "piperidine", [4]),
        ("CC1CN(CC)CCO1", "morpholine", [2, 4]),
        ("Cc1ccc2ccccc2c1O", "naphthalene", [1, 2]),
        ("Cc1cc(C)n[nH]1", "pyrazole", [3, 5]),
        ("OC1CCCC(C)C1", "cyclohexane", [1, 3]),
        ("Cc1cccc(O)c1Cl", "benzene", [1, 2, 3]),
    ],
)
def test_ring_numbering(smiles: str, ring: str, locants: list[int]) -> None:
    anatomy = dissect(Chem.MolFromSmiles(smiles))
    assert anatomy is not None
    [number] = anatomy.rings
    assert anatomy.units[number].kind == ring
    assert sorted(anatomy.units[number].locants([atom for atom, _ in anatomy.around(number)])) == locants


@pytest.mark.parametrize(
    "smiles",
    ["CCO", "c1ccc2cc3ccccc3cc2c1", "O=C1CCCCC1", "c1ccccc1CC(c1ccccc1)C", "c1ccccc1B(O)O", "[Na+].[Cl-]"],
)
def test_what_has_no_name_is_not_described(smiles: str) -> None:
    assert dissect(Chem.MolFromSmiles(smiles)) is None


def test_known_molecules_are_taken_apart() -> None:
    aspirin = dissect(Chem.MolFromSmiles("CC(=O)Oc1ccccc1C(=O)O"))
    assert aspirin is not None
    assert sorted(unit.kind for unit in aspirin.units) == ["acetoxy", "benzene", "carboxylic acid"]
    text, _ = describe(aspirin, Random(0))
    assert " ortho to " in text
    moclobemide = dissect(Chem.MolFromSmiles("Clc1ccc(cc1)C(=O)NCCN2CCOCC2"))
    assert moclobemide is not None
    [link] = moclobemide.links
    assert [moclobemide.units[unit].kind for unit in link.path] == ["amide", "2-carbon chain"]


def test_bonds_are_those_of_brics() -> None:
    assert may_bond(6, 16)
    assert may_bond(3, 8), "an ether oxygen and the end of a chain"
    assert may_bond(5, 1)
    assert not may_bond(3, 5)
    assert not may_bond(5, 5)
    assert not may_bond(20, 15), "aryl halides and the like stay aromatic"


def test_a_recipe_has_molecules_with_the_same_parts() -> None:
    rng = Random(3)
    made: dict[str, Chem.Mol] = {}
    while len(made) < 4:
        recipe = draw_recipe(rng)
        made = {Chem.MolToSmiles(m): m for _ in range(20) if (m := arrange(recipe, rng)) is not None}
    assert len({rdMolDescriptors.CalcMolFormula(m) for m in made.values()}) == 1
    kinds = [Counter(unit.kind for unit in anatomy.units) for m in made.values() if (anatomy := dissect(m))]
    assert len(kinds) >= 4


def test_articles() -> None:
    assert [with_article(noun) for noun in ("amide", "urea", "NH bridge", "OCF3 group", "hydroxy group")] == [
        *("an", "a", "an", "an", "a")
    ]


def test_records_are_distinct_and_sound(corpus: Corpus, records: list[dict[str, Any]]) -> None:
    assert {name: split.num_records for name, split in corpus.splits.items()} == split_sizes(PAIRS)
    assert len({record["inchikey"] for record in records}) == PAIRS
    assert len({record["id"] for record in records}) == PAIRS
    assert len({record["text"] for record in records}) == PAIRS
    written_otherwise = 0
    for record in records:
        molecule = Chem.MolFromSmiles(record["smiles"])
        assert record["canonical_smiles"] == Chem.MolToSmiles(molecule)
        assert record["inchikey"] == Chem.MolToInchiKey(molecule)
        assert 10 <= molecule.GetNumHeavyAtoms() <= 45
        assert list(record) == ["id", "smiles", "canonical_smiles", "inchikey", "text", "source", "grounding"]
        written_otherwise += record["smiles"] != record["canonical_smiles"]
    assert 0.2 < written_otherwise / PAIRS < 0.6


def test_a_list_of_parts_does_not_tell_molecules_apart(corpus: Corpus) -> None:
    """Most held-out molecules have others beside them with the same units."""
    parts: Counter[tuple[str, ...]] = Counter()
    for record in corpus.split("test"):
        anatomy = dissect(Chem.MolFromSmiles(record["smiles"]))
        assert anatomy is not None
        parts[tuple(sorted(unit.kind for unit in anatomy.units))] += 1
    shared = sum(count for count in parts.values() if count > 1)
    assert shared / sum(parts.values()) > 0.7


@pytest.mark.parametrize("pairs", [20, 100, 3999, 4000, 4999, 5000, 10_000, 100_000])
def test_split_sizes(pairs: int) -> None:
    sizes = split_sizes(pairs)
    assert sum(sizes.values()) == pairs
    assert min(sizes.values()) >= 1
    assert sizes["test"] == (500 if pairs >= 5000 else pairs // 10)
    assert pairs < 4000 or sizes["validation"] == max(200, pairs // 40)


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_bytes_depend_on_pairs_and_seed_alone(tmp_path: Path) -> None:
    build_demo_corpus(tmp_path / "one", pairs=60, seed=1, workers=1)
    script = (
        "import sys; from pathlib import Path; from atomas.data.demo import build_demo_corpus;"
        "build_demo_corpus(Path(sys.argv[1]), pairs=60, seed=1, workers=2)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "4711", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script, tmp_path / "two"], check=True, env=environment)
    assert _files(tmp_path / "one") == _files(tmp_path / "two")
    build_demo_corpus(tmp_path / "other", pairs=60, seed=2, workers=1)
    keys = [
        {record["inchikey"] for split in Corpus.open(tmp_path / name).splits.values() for record in split}
        for name in ("one", "other")
    ]
    assert len(keys[0] & keys[1]) < 6


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(AtomasError, match="--pairs 19"):
        build_demo_corpus(tmp_path / "few", pairs=19, seed=0)
    with pytest.raises(AtomasError, match="--workers 0"):
        build_demo_corpus(tmp_path / "none", pairs=20, seed=0, workers=0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(AtomasError, match="not an empty folder"):
        build_demo_corpus(tmp_path / "full", pairs=20, seed=0)
    with pytest.raises(AtomasError, match="cannot write"):
        build_demo_corpus(tmp_path / "full" / "notes.txt" / "below", pairs=20, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
