"""A wrapped string, parts of it on coloured boxes with a number in front. Lengths are points, y goes downwards."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

Style = Literal["plain", "bold", "mono"]

INK, PALE = "#222222", "#a0a0a0"
_LONGEST_WORD = 40
"""Characters after which a word is broken."""


@dataclass(frozen=True, kw_only=True)
class ColoredPart:
    """Characters [start, end), any number of times, on one colour, or in pale letters on none."""

    spans: Sequence[tuple[int, int]]
    color: str | None
    """None: pale letters"""
    label: str
    """Written in front of every span; may be empty"""


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Characters on one line that are all of one part, or of none."""

    string: str
    part: ColoredPart | None
    label: str
    x: float
    line: int
    width: float


@dataclass(frozen=True, kw_only=True)
class ColoredText:
    """Laid out for a width; `draw` puts it on matplotlib axes."""

    pieces: list[_Piece]
    size: float
    leading: float
    style: Style

    @classmethod
    def wrapped(
        cls,
        string: str,
        parts: Sequence[ColoredPart],
        *,
        width: float,
        size: float,
        leading: float,
        style: Style,
        limit: int,
    ) -> "ColoredText":
        """Break lines between words (of mono anywhere); more than `limit` characters are cut, and said to be.

        White space of any kind is drawn as blanks.
        """
        string = re.sub(r"\s", " ", string)
        owners: list[ColoredPart | None] = [None] * len(string)
        for part in parts:
            for start, end in part.spans:
                owners[start:end] = [part] * (end - start)
        if len(string) > limit:
            note = f" ... ({len(string) - limit:,} more characters)"
            string, owners = string[:limit] + note, owners[:limit] + [None] * len(note)
        text = cls(pieces=[], size=size, leading=leading, style=style)
        return replace(text, pieces=list(text._merged(text._wrap(string, owners, width))))

    @property
    def height(self) -> float:
        """Of all lines."""
        return self.leading * (1 + max((piece.line for piece in self.pieces), default=0))

    @property
    def width(self) -> float:
        """Of the longest line."""
        return max((piece.x + piece.width for piece in self.pieces), default=0.0)

    def draw(self, axes: Any, left: float, top: float) -> None:
        """Draw with the upper left corner there."""
        from matplotlib.patches import FancyBboxPatch

        for piece in self.pieces:
            x, middle = left + piece.x, top + self.leading * (piece.line + 0.5)
            baseline = middle + 0.36 * self.size
            if piece.part is not None and piece.part.color is not None:
                height = 1.45 * self.size
                box = FancyBboxPatch(
                    (x, middle - height / 2), piece.width, height,
                    boxstyle="round,pad=0,rounding_size=2.5", linewidth=0, facecolor=piece.part.color,
                )  # fmt: skip
                axes.add_patch(box)
            if piece.label:
                write(axes, x + 0.2 * self.size, baseline, piece.label, 0.68 * self.size, "bold")
            ink = PALE if piece.part is not None and piece.part.color is None else INK
            start = x + self._label_width(piece.label)
            write(axes, start, baseline, piece.string, self.size, self.style, ink)

    def _wrap(self, string: str, owners: list[ColoredPart | None], width: float) -> Iterator[_Piece]:
        x, line = 0.0, 0
        previous: ColoredPart | None = None
        for start, end in self._words(string):
            word = []
            for first, last in _runs(owners, start, end):
                part = owners[first]
                label = part.label if part is not None and part is not previous else ""
                advance = self._label_width(label) + text_width(string[first:last], self.size, self.style)
                word.append((string[first:last], part, label, advance))
                previous = part
            blank = string[start:end].isspace()
            if not blank and x + sum(advance for *_, advance in word) > width:
                x, line = 0.0, line + (x > 0)
            if blank and x == 0.0:
                continue
            for piece, part, label, advance in word:
                yield _Piece(string=piece, part=part, label=label, x=x, line=line, width=advance)
                x += advance

    def _words(self, string: str) -> Iterator[tuple[int, int]]:
        """What is kept on one line: words, and the spaces between them."""
        start = 0
        for at in range(1, len(string) + 1):
            ends = at == len(string) or self.style == "mono" or at - start >= _LONGEST_WORD
            if ends or string[at].isspace() != string[at - 1].isspace():
                yield start, at
                start = at

    def _merged(self, pieces: Iterator[_Piece]) -> Iterator[_Piece]:
        """Neighbours on a line that are of the same part become one, without white space at the end of a line."""
        last: _Piece | None = None
        for piece in pieces:
            if last is not None and piece.line == last.line and piece.part is last.part:
                last = replace(last, string=last.string + piece.string, width=last.width + piece.width)
                continue
            if last is not None:
                yield self._trimmed(last) if piece.line > last.line else last
            last = piece
        if last is not None:
            yield self._trimmed(last)

    def _trimmed(self, piece: _Piece) -> _Piece:
        kept = piece.string.rstrip()
        space = text_width(" ", self.size, self.style) * (len(piece.string) - len(kept))
        return replace(piece, string=kept, width=piece.width - space)

    def _label_width(self, label: str) -> float:
        return (0.4 + 0.48 * len(label)) * self.size if label else 0.0


def write(axes: Any, x: float, y: float, string: str, size: float, style: Style, ink: str = INK) -> None:
    """Put text on the axes from its baseline on. With hinting off it is as wide as it was measured."""
    axes.text(x, y, string, fontproperties=_font(size, style), color=ink, va="baseline", parse_math=False)


@cache
def text_width(string: str, size: float, style: Style) -> float:
    """Advance of a string on one line."""
    from matplotlib.textpath import text_to_path

    # between two bars, so that it is the advance that is measured and not the ink
    width, bars = (
        text_to_path.get_text_width_height_descent(one, _font(size, style), ismath=False)[0]
        for one in (f"|{string}|", "||")
    )
    return float(width - bars)


def _runs(owners: list[ColoredPart | None], start: int, end: int) -> Iterator[tuple[int, int]]:
    first = start
    for at in range(start + 1, end + 1):
        if at == end or owners[at] is not owners[first]:
            yield first, at
            first = at


@cache
def _font(size: float, style: Style) -> Any:
    from matplotlib.font_manager import FontProperties

    family = "DejaVu Sans Mono" if style == "mono" else "DejaVu Sans"
    return FontProperties(family=family, size=size, weight="bold" if style == "bold" else "normal")
