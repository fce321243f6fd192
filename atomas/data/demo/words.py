"""The nouns of the demo corpus, and text whose pieces remember the atoms that they speak of."""

import re
from collections.abc import Callable, Sequence

# A piece of text and its atoms; no atoms: the piece speaks of none.
Phrase = tuple[tuple[str, tuple[int, ...]], ...]
Span = dict[str, int | list[int]]


def plain(text: str) -> Phrase:
    """Text about no atom in particular."""
    return ((text, ()),)


def about(text: str, atoms: Sequence[int]) -> Phrase:
    """Text that speaks of these atoms."""
    return ((text, tuple(sorted(atoms))),)


def fill(template: str, **slots: Callable[[], Phrase]) -> Phrase:
    """Replace each {slot}, called in reading order: a first mention differs from later ones."""
    pieces: list[tuple[str, tuple[int, ...]]] = []
    for literal, name in re.findall(r"([^{]*)(?:\{(\w+)\})?", template):
        if literal:
            pieces.append((literal, ()))
        if name:
            pieces.extend(slots[name]())
    return tuple(pieces)


def enumerate_phrases(items: Sequence[Phrase]) -> Phrase:
    """Join as in "a", "a and b", "a, b and c"."""
    out: list[tuple[str, tuple[int, ...]]] = []
    for number, item in enumerate(items):
        if number:
            out.append((" and " if number == len(items) - 1 else ", ", ()))
        out.extend(item)
    return tuple(out)


def write(sentences: Sequence[Phrase]) -> tuple[str, list[Span]]:
    """Capitalise, punctuate and join sentences; spans are character offsets into the text."""
    text, spans = "", []
    for sentence in sentences:
        text += " " if text else ""
        first = len(text)
        for piece, atoms in sentence:
            if atoms:
                spans.append(Span(start=len(text), end=len(text) + len(piece), atoms=list(atoms)))
            text += piece
        text = text[:first] + text[first].upper() + text[first + 1 :] + "."
    return text, spans


def with_article(noun: str) -> str:
    """The article "a" or "an", as the noun is spoken."""
    return "an" if re.match(r"[aeio]|N[-H]|O[HC]|E ", noun) else "a"


def number_word(number: int) -> str:
    """Zero to twelve in words, more in digits."""
    words = (
        "no",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
    )
    return words[number] if number < len(words) else str(number)


def plural(noun: str) -> str:
    """Every noun below takes an s."""
    return noun + "s"


_FUSED = {
    "indole",
    "indazole",
    "benzimidazole",
    "benzofuran",
    "benzothiophene",
    "benzothiazole",
    "benzoxazole",
    "naphthalene",
    "quinoline",
    "isoquinoline",
    "quinoxaline",
    "1,3-benzodioxole",
    "indane",
    "tetralin",
    "tetrahydroisoquinoline",
}


def ring_nouns(kind: str) -> tuple[str, ...]:
    """Nouns for a ring system by its name."""
    if kind == "benzene":
        return ("benzene ring", "phenyl ring")
    if kind in _FUSED:
        return (f"{kind} ring system", f"{kind} unit", f"{kind} bicycle")
    return (f"{kind} ring", f"{kind} ring", f"{kind} unit")


GROUP_NOUNS: dict[str, tuple[str, ...]] = {
    "carboxylic acid": ("carboxylic acid", "carboxylic acid group", "carboxy group"),
    "carboxylate": ("carboxylate", "carboxylate group"),
    "acetoxy": ("acetoxy group", "acetate ester"),
    "methyl ester": ("methyl ester", "methoxycarbonyl group"),
    "ethyl ester": ("ethyl ester", "ethoxycarbonyl group"),
    "acetamido": ("acetamido group", "acetylamino group"),
    "acetyl": ("acetyl group", "acetyl substituent"),
    "carbamoyl": ("carbamoyl group", "primary amide"),
    "methylsulfonyl": ("methylsulfonyl group", "methyl sulfone"),
    "sulfamoyl": ("sulfamoyl group", "primary sulfonamide"),
    "trifluoromethoxy": ("trifluoromethoxy group", "OCF3 group"),
    "trifluoromethyl": ("trifluoromethyl group", "CF3 group"),
    "methoxy": ("methoxy group", "methoxy substituent", "methyl ether"),
    "ethoxy": ("ethoxy group", "ethoxy substituent", "ethyl ether"),
    "isopropoxy": ("isopropoxy group", "isopropyl ether"),
    "butoxy": ("butoxy group", "butyl ether"),
    "methylthio": ("methylthio group", "methylsulfanyl group"),
    "dimethylamino": ("dimethylamino group", "dimethylamine group"),
    "methylamino": ("methylamino group", "methylamine group"),
    "trimethylammonium": ("trimethylammonium group", "quaternary trimethylammonium"),
    "nitro": ("nitro group", "nitro substituent"),
    "cyano": ("cyano group", "nitrile", "nitrile group"),
    "formyl": ("formyl group", "aldehyde", "aldehyde group"),
    "hydroxymethyl": ("hydroxymethyl group", "CH2OH group"),
    "aminomethyl": ("aminomethyl group", "CH2NH2 group"),
    "sulfonamide": ("sulfonamide", "sulfonamide group", "sulfonamide linkage"),
    "sulfone": ("sulfone", "sulfonyl group"),
    "urea": ("urea", "urea group", "urea linkage"),
    "carbamate": ("carbamate", "carbamate group", "carbamate linkage"),
    "N-methyl amide": ("N-methyl amide", "N-methylated amide"),
    "amide": ("amide", "amide group", "amide linkage", "amide bond"),
    "ester": ("ester", "ester group", "ester linkage"),
    "ketone": ("ketone", "ketone group", "keto group"),
    "vinyl": ("vinyl group", "ethenyl group"),
    "ethynyl": ("ethynyl group", "terminal alkyne"),
    "alkene": ("carbon-carbon double bond", "alkene"),
    "trans alkene": ("trans double bond", "E alkene"),
    "cis alkene": ("cis double bond", "Z alkene"),
    "alkyne": ("triple bond", "alkyne", "alkyne bridge"),
    "N-methyl amine": ("N-methyl amine", "methylated amine"),
    "ether": ("ether", "ether oxygen", "oxygen bridge", "ether linkage"),
    "thioether": ("thioether", "sulfide bridge", "thioether linkage"),
    "hydroxy": ("hydroxy group", "hydroxyl group", "OH group", "alcohol"),
    "amino": ("amino group", "primary amine", "NH2 group"),
    "ammonium": ("ammonium group", "protonated amine"),
    "amine": ("secondary amine", "NH bridge", "amine linkage"),
    "fluoro": ("fluoro substituent", "fluorine atom", "fluorine"),
    "chloro": ("chloro substituent", "chlorine atom", "chlorine"),
    "bromo": ("bromo substituent", "bromine atom", "bromine"),
    "iodo": ("iodo substituent", "iodine atom"),
    "methyl": ("methyl group", "methyl substituent"),
    "ethyl": ("ethyl group", "ethyl substituent"),
    "propyl": ("propyl group", "propyl chain"),
    "isopropyl": ("isopropyl group", "isopropyl substituent"),
    "butyl": ("butyl group", "butyl chain"),
    "tert-butyl": ("tert-butyl group", "tert-butyl substituent"),
    "pentyl": ("pentyl group", "pentyl chain"),
    "hexyl": ("hexyl group", "hexyl chain"),
    "methylene": ("methylene group", "methylene bridge", "CH2 group"),
    "2-carbon chain": ("ethylene chain", "two-carbon chain"),
    "3-carbon chain": ("propylene chain", "three-carbon chain"),
    "4-carbon chain": ("butylene chain", "four-carbon chain"),
    "methylated carbon": ("methyl-branched carbon", "CH(CH3) group"),
}

# What can be counted or denied of the whole molecule: noun, SMARTS of one of it. Denials are as broad as the
# words: "no amide" also excludes ureas and carbamates.
COUNTED: tuple[tuple[str, str], ...] = (
    ("halogen atom", "[F,Cl,Br,I]"),
    ("fluorine atom", "[F]"),
    ("nitrogen atom", "[#7]"),
    ("oxygen atom", "[#8]"),
    ("sulfur atom", "[#16]"),
    ("carbonyl group", "[CX3]=[OX1]"),
    ("CH3 group", "[CH3]"),
)
MASS_NOUNS = {"halogen", "fluorine", "chlorine", "sulfur", "nitrogen"}
DENIED: tuple[tuple[str, str], ...] = (
    ("halogen", "[F,Cl,Br,I]"),
    ("fluorine", "[F]"),
    ("chlorine", "[Cl]"),
    ("sulfur", "[#16]"),
    ("nitrogen", "[#7]"),
    ("carbonyl group", "[CX3]=[OX1]"),
    ("hydroxy group", "[OX2H]"),
    ("amide", "[CX3](=O)[NX3]"),
    ("ester", "[CX3](=O)[OX2H0]"),
    ("ether", "[OX2H0,o]"),
    ("nitro group", "[N+](=O)[O-]"),
    ("nitrile", "C#N"),
    ("methyl group", "[CH3]"),
    ("saturated ring", "[A;R]"),
    ("primary amine", "[NX3H2]"),
)
