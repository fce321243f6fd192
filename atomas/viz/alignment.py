"""The picture of a pair: molecule and text at every level, matching parts in one colour under one number.

All lengths are points. The colours are Paul Tol's light scheme, made for dark text on it and safe for the
colour-blind; the numbers say the same again.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atomas.interpretation.matches import LevelMatches, Match, PairMatches
from atomas.viz.colored_text import INK, ColoredPart, ColoredText
from atomas.viz.depiction import Commands, Depiction, Look, depict

PALETTE = ("#77AADD", "#EE8866", "#EEDD88", "#FFAABB", "#44BB99", "#99DDFF", "#BBCC33", "#AAAA00")
FAINT, RULE = "#6b6b6b", "#d9d9d9"

LEVEL_NAMES = (
    ("Atoms and words", "SMILES token", "text token"),
    ("Fragments and phrases", "fragment", "phrase"),
    ("Molecule and paragraph", "part of the molecule", "part of the text"),
)

WIDTH, MARGIN, GUTTER = 960.0, 28.0, 28.0
HEADER, ROW_TITLE, ROW_GAP, FOOTER = 62.0, 26.0, 18.0, 34.0
MOLECULE_WIDTH, MAX_MOLECULE_HEIGHT = 380.0, 300.0
TEXT_SIZE, SMILES_SIZE, BADGE_SIZE = 11.0, 7.5, 7.0
MAX_BADGES = 3
"""Connected parts of one match that get its number."""
MAX_TEXT, MAX_SMILES = 1500, 400
"""Characters that are shown."""

_STYLE = {
    "font.family": "DejaVu Sans",
    "text.hinting": "none",
    "text.hinting_factor": 1,
    "svg.fonttype": "path",
    "svg.hashsalt": "atomas",
}


def draw_alignment(pair: PairMatches, paths: Iterable[Path], *, title: str) -> None:
    """Draw all levels of `pair` once, and write every one of `paths`: PNG or SVG by its ending.

    Raises:
        InvalidMoleculeError: RDKit cannot draw the molecule.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    depiction = depict(pair.smiles, max_width=MOLECULE_WIDTH, max_height=MAX_MOLECULE_HEIGHT)
    rows = [_Row.of(level, pair, depiction) for level in pair.levels]
    height = HEADER + sum(row.height for row in rows) + FOOTER
    with plt.rc_context(_STYLE):
        figure = plt.figure(figsize=(WIDTH / 72, height / 72))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, WIDTH), ylim=(height, 0))
        axes.axis("off")
        axes.text(
            MARGIN, HEADER / 2 + 4, title, size=15, weight="bold", color=INK, va="center", parse_math=False
        )
        top = HEADER
        for row in rows:
            row.draw(axes, top)
            top += row.height
        note = (
            "Same number, same colour: a part of the text and the atoms that match it best (cosine). "
            f"At most {len(PALETTE)} matches of a level are coloured, the strongest."
        )
        axes.text(MARGIN, top + FOOTER / 2 - 3, note, size=8.5, color=FAINT, va="center")
        for path in paths:
            figure.savefig(path, dpi=200, metadata={"Date": None} if path.suffix == ".svg" else {})
        plt.close(figure)


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One level, laid out."""

    level: LevelMatches
    bonds: list[tuple[int, int]]
    depiction: Depiction
    text: ColoredText
    text_is_cut: bool
    """The model does not read all of it"""
    smiles: ColoredText

    @classmethod
    def of(cls, level: LevelMatches, pair: PairMatches, depiction: Depiction) -> "_Row":
        shown = level.shown
        text = ColoredText.wrapped(
            pair.text,
            [
                *(ColoredPart(spans=m.text, color=color(m), label=str(m.number)) for m in shown),
                ColoredPart(spans=[(pair.read, len(pair.text))], color=None, label=""),
            ],
            width=WIDTH - 2 * MARGIN - MOLECULE_WIDTH - GUTTER,
            size=TEXT_SIZE, leading=1.9 * TEXT_SIZE, style="plain", limit=MAX_TEXT,
        )  # fmt: skip
        smiles = ColoredText.wrapped(
            pair.smiles,
            [ColoredPart(spans=m.smiles, color=color(m), label="") for m in shown],
            width=MOLECULE_WIDTH,
            size=SMILES_SIZE, leading=1.6 * SMILES_SIZE, style="mono", limit=MAX_SMILES,
        )  # fmt: skip
        return cls(
            level=level, bonds=pair.bonds, depiction=depiction, text=text, smiles=smiles,
            text_is_cut=bool(pair.text[pair.read :].strip()),
        )  # fmt: skip

    @property
    def height(self) -> float:
        return ROW_TITLE + max(self.depiction.height + self.smiles.height + 6, self.text.height) + ROW_GAP

    def draw(self, axes: Any, top: float) -> None:
        name, fragment, phrase = LEVEL_NAMES[min(self.level.number, len(LEVEL_NAMES) - 1)]
        axes.plot([MARGIN, WIDTH - MARGIN], [top, top], color=RULE, linewidth=0.8)
        axes.text(MARGIN, top + 15, name, size=11.5, weight="bold", color=INK, va="center")
        counts = f"{counted(self.level.num_smiles, fragment)}, {counted(self.level.num_text, phrase)}"
        if self.text_is_cut:
            counts += " (pale: not read)"
        if self.level.hidden:
            counts += f"; {counted(self.level.hidden, 'weaker match')} not coloured"
        axes.text(WIDTH - MARGIN, top + 15, counts, size=8.5, color=FAINT, va="center", ha="right")
        body = top + ROW_TITLE
        left = MARGIN + (MOLECULE_WIDTH - self.depiction.width) / 2
        _draw_molecule(axes, self.depiction, self.bonds, self.level.shown, left, body)
        smiles_left = MARGIN + (MOLECULE_WIDTH - self.smiles.width) / 2
        self.smiles.draw(axes, smiles_left, body + self.depiction.height + 6)
        self.text.draw(axes, MARGIN + MOLECULE_WIDTH + GUTTER, body)


def color(match: Match) -> str:
    """Of a match, wherever it is drawn."""
    return PALETTE[(match.number - 1) % len(PALETTE)]


def counted(number: int, noun: str) -> str:
    """As in "2 parts of the text"."""
    head, *rest = noun.split(" of ")
    plural = "" if number == 1 else "es" if head.endswith("ch") else "s"
    return " of ".join([f"{number} {head}{plural}", *rest])


def _draw_molecule(
    axes: Any,
    depiction: Depiction,
    bonds: list[tuple[int, int]],
    matches: list[Match],
    left: float,
    top: float,
) -> None:
    """Halos under the atoms and bonds of every match, RDKit's drawing, and the numbers."""
    from matplotlib.collections import LineCollection

    atoms = depiction.atoms + (left, top)
    radius = 0.36 * depiction.bond
    for match in matches:
        inside = [atoms[list(bond)] for bond in bonds if match.atoms.issuperset(bond)]
        axes.add_collection(
            LineCollection(inside, linewidths=2 * radius, colors=color(match), capstyle="round", zorder=1)
        )
        x, y = atoms[sorted(match.atoms)].T
        axes.scatter(x, y, s=(2 * radius) ** 2, color=color(match), linewidths=0, zorder=1)
    for alike in {stroke.look: None for stroke in depiction.strokes}:
        commands = [c for stroke in depiction.strokes if stroke.look == alike for c in stroke.commands]
        axes.add_patch(_patch(commands, alike, left, top))
    for match, (x, y) in _badges(depiction, bonds, matches):
        axes.text(
            left + x, top + y, str(match.number), size=BADGE_SIZE, weight="bold", color=INK, ha="center",
            va="center_baseline", zorder=5,
            bbox={"boxstyle": "circle,pad=0.22", "facecolor": color(match), "edgecolor": INK, "linewidth": 0.5},
        )  # fmt: skip


def _badges(
    depiction: Depiction, bonds: list[tuple[int, int]], matches: list[Match]
) -> Iterator[tuple[Match, NDArray[np.float64]]]:
    """Places for the numbers: beside the largest connected parts of every match, where there is most room.

    The largest part always gets its number; others only where it covers nothing.
    """
    atoms = depiction.atoms
    corner = np.array([depiction.width, depiction.height]) - BADGE_SIZE
    taken = [*atoms, *(atoms[list(pair)].mean(axis=0) for pair in bonds)]
    for match in matches:
        parts = sorted(_connected(match.atoms, bonds), key=len, reverse=True)
        for rank, part in enumerate(parts[:MAX_BADGES]):
            place, clearance = _roomiest(atoms[sorted(part)], np.array(taken), depiction.bond, corner)
            if rank == 0 or clearance > BADGE_SIZE:
                taken.append(place)
                yield match, place


def _roomiest(
    part: NDArray[np.float64], taken: NDArray[np.float64], bond: float, corner: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float]:
    """A point near `part` and inside the drawing that is far from everything drawn, and how far it is."""
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    near = [part + reach * bond * direction for reach in (0.75, 1.0) for direction in circle]
    candidates = np.concatenate([part.mean(axis=0, keepdims=True), *near]).clip(BADGE_SIZE, corner)
    clearance = np.linalg.norm(candidates[:, None] - taken[None], axis=2).min(axis=1)
    distance = np.linalg.norm(candidates[:, None] - part[None], axis=2).min(axis=1)
    best = (np.minimum(clearance, bond) - 0.3 * distance).argmax()
    return candidates[best], float(clearance[best])


def _connected(atoms: set[int], bonds: list[tuple[int, int]]) -> list[set[int]]:
    parts = [{atom} for atom in sorted(atoms)]
    for first, second in bonds:
        if first in atoms and second in atoms:
            one = next(part for part in parts if first in part)
            other = next(part for part in parts if second in part)
            if one is not other:
                one |= other
                parts.remove(other)
    return parts


def _patch(commands: Commands, look: Look, left: float, top: float) -> Any:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Curve

    codes = {"M": Curve.MOVETO, "L": Curve.LINETO, "Q": Curve.CURVE3, "C": Curve.CURVE4}
    vertices: list[tuple[float, float]] = []
    kinds = []
    for letter, points in commands:
        if letter == "Z":
            vertices.append(vertices[-1])
            kinds.append(Curve.CLOSEPOLY)
        else:
            vertices += [(x + left, y + top) for x, y in points]
            kinds += [codes[letter]] * len(points)
    return PathPatch(
        Curve(vertices, kinds), facecolor=INK if look.fill else "none", edgecolor=INK,
        linewidth=0.3 if look.fill else look.width,
        linestyle=(0, look.dash) if look.dash else "solid", capstyle="butt", zorder=3,
    )  # fmt: skip
