"""Sentences about the molecule as a whole: stereo, charge, counts, properties, and what is not there."""

from random import Random

from rdkit import Chem
from rdkit.Chem import rdMolDescriptors

from atomas.data.demo.anatomy import Anatomy
from atomas.data.demo.words import (
    COUNTED,
    DENIED,
    MASS_NOUNS,
    Phrase,
    about,
    fill,
    number_word,
    plain,
    plural,
    with_article,
)

_SUBJECTS = ("the molecule", "the compound", "the structure", "this compound", "this molecule")


def whole_molecule(anatomy: Anatomy, rng: Random) -> tuple[list[Phrase], list[Phrase]]:
    """Sentences that have to be told (stereo, charge), and others in random order."""
    molecule, subject = anatomy.molecule, rng.choice(_SUBJECTS)
    must = [*_stereo(anatomy, rng), *_charge(molecule, subject)]
    may = [
        *_counts(molecule, subject, rng),
        *_properties(molecule, subject, rng),
        *_denials(molecule, subject, rng),
    ]
    rng.shuffle(may)
    return must, may


def _stereo(anatomy: Anatomy, rng: Random) -> list[Phrase]:
    centres = anatomy.stereocentres
    if not centres:
        return []
    if len(centres) == 1:
        [(atom, label)] = centres
        template = rng.choice(
            (
                f"the {{centre}} is {label} configured",
                f"{{centre}}: {label}",
                f"the only {{centre}} has {label} configuration",
            )
        )
        return [fill(template, centre=lambda: about("stereocentre", [atom]))]
    labels = [label for _, label in centres]
    how = f"both {labels[0]}" if labels[0] == labels[1] else "one R and one S"
    noun = about("two stereocentres", [atom for atom, _ in centres])
    return [fill(f"there are {{centres}}, {how}", centres=lambda: noun)]


def _charge(molecule: Chem.Mol, subject: str) -> list[Phrase]:
    charge = Chem.GetFormalCharge(molecule)
    return [plain(f"{subject} carries a net charge of {charge:+d}")] if charge else []


def _counts(molecule: Chem.Mol, subject: str, rng: Random) -> list[Phrase]:
    out = []
    for noun, smarts in COUNTED:
        matches = molecule.GetSubstructMatches(_PATTERNS[smarts])
        if matches:
            words = f"{number_word(len(matches))} {noun if len(matches) == 1 else plural(noun)}"
            counted = about(words, [atom for match in matches for atom in match])
            template = rng.choice(
                (f"{subject} has {{n}} in total", "in all there are {n}", "{n} can be counted")
            )
            out.append(_agree(template, len(matches), counted))
    return rng.sample(out, min(2, len(out)))


def _agree(template: str, count: int, counted: Phrase) -> Phrase:
    return fill(template.replace("there are", "there is") if count == 1 else template, n=lambda: counted)


def _properties(molecule: Chem.Mol, subject: str, rng: Random) -> list[Phrase]:
    num_rotatable = rdMolDescriptors.CalcNumRotatableBonds(molecule)
    num_donors = rdMolDescriptors.CalcNumHBD(molecule)
    num_rings = rdMolDescriptors.CalcNumRings(molecule)
    about_size = 5 * round(molecule.GetNumHeavyAtoms() / 5)
    out = [
        f"{subject} has {_counted(num_rotatable, 'rotatable bond')}",
        f"{subject} offers {_counted(num_donors, 'hydrogen bond donor')}",
        f"{subject} is built from {_counted(num_rings, 'ring')}",
        f"{subject} has about {about_size} heavy atoms",
    ]
    if Chem.GetFormalCharge(molecule) == 0:
        out.append(f"{subject} is uncharged")
    return [plain(sentence) for sentence in rng.sample(out, 2)]


def _counted(count: int, noun: str) -> str:
    return f"{number_word(count)} {noun if count == 1 else plural(noun)}"


def _denials(molecule: Chem.Mol, subject: str, rng: Random) -> list[Phrase]:
    absent = [noun for noun, smarts in DENIED if not molecule.HasSubstructMatch(_PATTERNS[smarts])]
    if not absent:
        return []
    if len(absent) > 1 and rng.random() < 0.4:
        one, other = (
            noun if noun in MASS_NOUNS else f"{with_article(noun)} {noun}" for noun in rng.sample(absent, 2)
        )
        return [plain(f"{subject} contains neither {one} nor {other}")]
    noun = rng.choice(absent)
    templates = (
        f"{subject} contains no {noun}",
        f"{subject} lacks any {noun}",
        f"there is no {noun}",
    )
    return [plain(rng.choice(templates))]


_PATTERNS = {smarts: Chem.MolFromSmarts(smarts) for _, smarts in (*COUNTED, *DENIED)}
