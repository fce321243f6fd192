"""From a molecule's anatomy to an English description whose words are grounded in atoms."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import TypeVar

from rdkit import Chem

from atomas.data.demo.anatomy import Anatomy, Attachment, Unit
from atomas.data.demo.facts import whole_molecule
from atomas.data.demo.words import (
    GROUP_NOUNS,
    Phrase,
    Span,
    about,
    enumerate_phrases,
    fill,
    number_word,
    plain,
    plural,
    ring_nouns,
    with_article,
    write,
)

T = TypeVar("T")
MIN_WORDS, MAX_WORDS = 25, 50

_DISTANCE_WORDS = {1: "ortho", 2: "meta", 3: "para"}
_ORDINALS = ("first", "second", "third")
_LINK_SENTENCES = (
    "{a} is linked to {b} through {path}",
    "{a} is connected to {b} by {path}",
    "{a} and {b} are joined by {path}",
    "{path} joins {a} to {b}",
    "{path} connects {a} with {b}",
    "from {a}, {path} leads to {b}",
)
_BOND_SENTENCES = (
    "{a} is bonded directly to {b}",
    "{a} and {b} share a single bond",
    "a direct bond joins {a} and {b}",
    "{a} is attached to {b} without a linker",
)
_RING_SENTENCES = (
    "{ring} carries {items}",
    "{ring} bears {items}",
    "{ring} is substituted with {items}",
    "on {ring} one finds {items}",
    "attached to {ring}: {items}",
)
_BARE_SENTENCES = (
    "{ring} carries no other substituent",
    "{ring} is otherwise unsubstituted",
    "nothing else is attached to {ring}",
)
_SIDE_CLAUSES = (
    ", the {end} on the side of {ring}",
    ", with the {end} towards {ring}",
    ", the {end} pointing to {ring}",
)


def describe(anatomy: Anatomy, rng: Random) -> tuple[str, list[Span]]:
    """A description of some 30 to 75 words, and its grounding: which characters speak of which atoms.

    Links between rings and the place of every substituent are always told; counts, properties and
    negations fill up what is left of the length.
    """
    narrator = _Narrator(anatomy, rng)
    sentences = [build() for build in narrator.plan()]
    facts, more = whole_molecule(anatomy, rng)
    limit = rng.randint(MIN_WORDS, MAX_WORDS)
    while more and (not facts or _num_words([*sentences, *facts]) < limit):
        facts.append(more.pop())
    for fact in facts:
        sentences.insert(rng.choice((0, len(sentences), len(sentences))), fact)
    return write(sentences)


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """How the places on a ring are told: by locants, relative to an anchor or each other, or not at all.

    `locants`: ring atom -> locant; `anchor`: ring atom and the unit on it, for ortho, meta and para.
    """

    locants: dict[int, int]
    anchor: tuple[int, int] | None = None
    is_pair: bool = False


class _Narrator:
    """Builds the sentences about links and rings, and remembers what has been introduced."""

    def __init__(self, anatomy: Anatomy, rng: Random) -> None:
        self._anatomy = anatomy
        self._rng = rng
        self._units = anatomy.units
        self._introduced: list[int] = []
        self._nouns = {
            unit.kind: rng.choice(ring_nouns(unit.kind) if unit.is_ring else GROUP_NOUNS[unit.kind])
            for unit in self._units
        }
        self._bonded_to = {ring: anatomy.around(ring) for ring in anatomy.rings}
        self._layouts = {ring: self._layout(ring) for ring in anatomy.rings}
        self._locant_style = rng.choice(("position", "position", "symbol"))

    def plan(self) -> list[Callable[[], Phrase]]:
        """The sentences in their order, not yet built: links, then rings; or rings first; or ring by ring."""
        order = self._rng.choices(("links first", "rings first", "mixed"), (0.55, 0.25, 0.2))[0]
        links = [partial(self._link, link) for link in self._shuffled(self._anatomy.links)]
        rings: list[Callable[[], Phrase]] = []
        for ring in self._shuffled(self._anatomy.rings):
            # "No other substituent" makes sense once the links of the ring have been told.
            rings.extend(self._about_ring(ring, may_be_bare=bool(links) and order == "links first"))
        if order == "mixed":
            return self._shuffled([*links, *rings])
        return [*links, *rings] if order == "links first" else [*rings, *links]

    def _shuffled(self, items: Sequence[T]) -> list[T]:
        return self._rng.sample(items, len(items))

    def _layout(self, ring: int) -> _Layout:
        unit, bonded = self._units[ring], self._bonded_to[ring]
        atoms = [atom for atom, _ in bonded]
        is_uniform = (
            len({self._anatomy.molecule.GetAtomWithIdx(atom).GetSymbol() for atom in unit.atoms}) == 1
        )
        is_uniform = is_uniform and len(unit.numberings) == 2 * len(unit.atoms)
        if is_uniform and len(atoms) == 1:
            return _Layout(locants={})
        by_locants = _Layout(locants=dict(zip(atoms, unit.locants(atoms), strict=True)))
        if unit.kind != "benzene" or len(atoms) > 3:
            return by_locants
        branches = [branch for branch in self._anatomy.branches if branch.ring == ring]
        kinds = [self._units[other].kind for _, other in bonded]
        anchors = [pair for pair, kind in zip(bonded, kinds, strict=True) if kinds.count(kind) == 1]
        if len(atoms) == 2 and not anchors:
            is_pair = len(branches) == 2 and all(len(branch.path) == 1 for branch in branches)
            return _Layout(locants={}, is_pair=True) if is_pair else by_locants
        if len(atoms) == 2:
            return _Layout(locants={}, anchor=anchors[0])
        # Links come first in `kinds`: "the CH2 group is para to ..." must not fit a second CH2 group.
        links = kinds[: len(kinds) - len(branches)]
        is_clear = anchors and all(kinds.count(kind) == 1 for kind in links)
        if is_clear and self._rng.random() < 0.75:
            distances = sorted(_ring_distance(unit, anchors[0][0], atom) for atom in atoms)[1:]
            # Ortho and meta to the anchor may be 2,3 or 2,5: locants tell them apart.
            if distances != [1, 2]:
                return _Layout(locants={}, anchor=anchors[0])
        return by_locants

    def _link(self, link: Attachment) -> Phrase:
        assert link.far_ring is not None
        assert link.far_atom is not None
        ends = ((link.ring, link.atom), (link.far_ring, link.far_atom))
        path = link.path
        if self._rng.random() < 0.5:
            ends, path = (ends[1], ends[0]), path[::-1]
        sentence = fill(
            self._rng.choice(_LINK_SENTENCES if path else _BOND_SENTENCES),
            a=lambda: self._ring_at(*ends[0]),
            b=lambda: self._ring_at(*ends[1]),
            path=lambda: self._path(path),
        )
        for unit in path:
            if self._units[unit].ends and set(self._units[unit].atoms) == set(self._units[unit].own):
                return (*sentence, *self._side(self._units[unit], ends[0][0], ends[1][0]))
        return sentence

    def _side(self, unit: Unit, one: int, other: int) -> Phrase:
        """Which ring an end of an amide, ester, ... looks at."""
        (word, atoms), (_, opposite) = self._rng.sample(unit.ends, 2)
        distances = Chem.GetDistanceMatrix(self._anatomy.molecule)[:, self._units[one].atoms]
        faces_one = distances[atoms, :].min() < distances[opposite, :].min()
        return fill(
            self._rng.choice(_SIDE_CLAUSES),
            end=lambda: about(f"{unit.kind.removeprefix('N-methyl ')} {word}", atoms),
            ring=lambda: self._ring(one if faces_one else other),
        )

    def _path(self, path: tuple[int, ...]) -> Phrase:
        out = self._group(path[0])
        for unit in path[1:]:
            out = (*out, *plain(" followed by "), *self._group(unit))
        return out

    def _about_ring(self, ring: int, *, may_be_bare: bool) -> list[Callable[[], Phrase]]:
        layout = self._layouts[ring]
        branches = [branch for branch in self._anatomy.branches if branch.ring == ring]
        sentences: list[Callable[[], Phrase]] = []
        if branches:
            sentences.append(partial(self._ring_sentence, ring, branches))
        elif may_be_bare and self._rng.random() < 0.3:
            template = self._rng.choice(_BARE_SENTENCES)
            sentences.append(lambda: fill(template, ring=lambda: self._ring(ring)))
        if layout.anchor:
            loose = {branch.atom for branch in branches}
            for atom, unit in self._bonded_to[ring]:
                if atom != layout.anchor[0] and atom not in loose:
                    sentences.append(partial(self._relation_sentence, ring, atom, unit))
        return sentences

    def _ring_sentence(self, ring: int, branches: list[Attachment]) -> Phrase:
        alike: dict[tuple[str, ...], list[Attachment]] = {}
        for branch in branches:
            kinds = tuple(self._units[unit].kind for unit in branch.path)
            key = kinds if len(kinds) == 1 else (*kinds, str(branch.atom))
            alike.setdefault(key, []).append(branch)
        anchor = self._layouts[ring].anchor
        groups = self._shuffled(list(alike.values()))
        groups.sort(key=lambda group: anchor is None or group[0].atom != anchor[0])
        return fill(
            self._rng.choice(_RING_SENTENCES),
            ring=lambda: self._ring(ring),
            items=lambda: enumerate_phrases([self._item(ring, group) for group in groups]),
        )

    def _relation_sentence(self, ring: int, atom: int, unit: int) -> Phrase:
        anchor = self._layouts[ring].anchor
        assert anchor is not None
        relation = _DISTANCE_WORDS[_ring_distance(self._units[ring], anchor[0], atom)]
        template = self._rng.choice(
            (
                f"on {{ring}}, {{one}} is {relation} to {{other}}",
                f"{{one}} sits {relation} to {{other}} on {{ring}}",
            )
        )
        return fill(
            template,
            ring=lambda: self._ring(ring),
            one=lambda: self._beside(unit),
            other=lambda: self._beside(anchor[1]),
        )

    def _item(self, ring: int, group: list[Attachment]) -> Phrase:
        """As in "two fluorine atoms at positions 2 and 6", "a methoxy group para to the amide"."""
        if len(group) > 1:
            units = [branch.path[0] for branch in group]
            self._introduced.extend(units)
            noun = plural(self._nouns[self._units[units[0]].kind])
            atoms = [atom for unit in units for atom in self._units[unit].atoms]
            item = about(f"{number_word(len(group))} {noun}", atoms)
        else:
            item = self._group(group[0].path[0])
            for number, unit in enumerate(group[0].path[1:], start=2):
                verb = "ending in" if number == len(group[0].path) else "leading to"
                item = (*item, *plain(f"{' (' if number == 2 else ' '}{verb} "), *self._group(unit))
            if len(group[0].path) > 1:
                item = (*item, *plain(")"))
        return (*item, *self._place(ring, [branch.atom for branch in group]))

    def _place(self, ring: int, atoms: list[int]) -> Phrase:
        layout = self._layouts[ring]
        if layout.is_pair:
            relation = _DISTANCE_WORDS[_ring_distance(self._units[ring], *atoms)]
            return plain(f" {relation} to each other")
        if layout.anchor:
            anchor, unit = layout.anchor
            if atoms == [anchor]:
                return ()
            words = [_DISTANCE_WORDS[_ring_distance(self._units[ring], anchor, atom)] for atom in atoms]
            if len(words) == 1:
                return (*plain(f" {words[0]} to "), *self._beside(unit))
            how = f"both {words[0]}" if words[0] == words[1] else f"one {words[0]} and one {words[1]}"
            return (*plain(f" ({how} to "), *self._beside(unit), *plain(")"))
        if layout.locants:
            return (*plain(" at "), *self._locants(ring, atoms))
        return ()

    def _locants(self, ring: int, atoms: list[int]) -> Phrase:
        """As in "position 3", "positions 2 and 6", "C-3"; the words speak of the ring atoms."""
        locants = self._layouts[ring].locants
        atoms = sorted(atoms, key=lambda atom: locants[atom])
        if self._locant_style == "symbol":
            symbols = [self._anatomy.molecule.GetAtomWithIdx(atom).GetSymbol() for atom in atoms]
            named = zip(symbols, atoms, strict=True)
            return enumerate_phrases([about(f"{symbol}-{locants[atom]}", [atom]) for symbol, atom in named])
        numbers = [str(locants[atom]) for atom in atoms]
        if len(numbers) == 1:
            return about(f"position {numbers[0]}", atoms)
        return about(f"positions {', '.join(numbers[:-1])} and {numbers[-1]}", atoms)

    def _ring_at(self, ring: int, atom: int) -> Phrase:
        if self._layouts[ring].locants:
            return (*self._locants(ring, [atom]), *plain(" of "), *self._ring(ring))
        return self._ring(ring)

    def _beside(self, unit: int) -> Phrase:
        """What else is on a ring; known from there, so "the" even at its first mention."""
        if self._units[unit].is_ring:
            return self._ring(unit)
        return (*plain("the "), *about(self._nouns[self._units[unit].kind], self._units[unit].atoms))

    def _ring(self, ring: int) -> Phrase:
        kind = self._units[ring].kind
        alike = [other for other in self._anatomy.rings if self._units[other].kind == kind]
        met = [other for other in self._introduced if other in alike]
        if ring not in met:
            self._introduced.append(ring)
        noun = self._nouns[kind]
        if len(alike) == 1:
            article = "the" if met else with_article(noun)
        elif ring in met:
            article = f"the {_ORDINALS[met.index(ring)]}"
        else:
            article = f"a {_ORDINALS[len(met)]}"
        return (*plain(f"{article} "), *about(noun, self._units[ring].atoms))

    def _group(self, unit: int) -> Phrase:
        kind = self._units[unit].kind
        noun = self._nouns[kind]
        if unit in self._introduced:
            article = "the"
        elif any(self._units[other].kind == kind for other in self._introduced):
            article = "another"
        else:
            article = with_article(noun)
        if unit not in self._introduced:
            self._introduced.append(unit)
        return (*plain(f"{article} "), *about(noun, self._units[unit].atoms))


def _ring_distance(unit: Unit, one: int, other: int) -> int:
    numbering = unit.numberings[0]
    steps = abs(numbering.index(one) - numbering.index(other))
    return min(steps, len(numbering) - steps)


def _num_words(sentences: list[Phrase]) -> int:
    return sum(len("".join(piece for piece, _ in sentence).split()) for sentence in sentences)
