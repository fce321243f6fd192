"""Alignment pictures of many pairs on one HTML page that needs nothing but itself."""

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from atomas.interpretation.matches import LevelMatches, PairMatches
from atomas.viz.alignment import LEVEL_NAMES, color

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }
img { width: 100%; height: auto; border: 1px solid #ddd; border-radius: 6px; }
section { margin-bottom: 3rem; }
nav a { margin-right: 1rem; }
table { border-collapse: collapse; margin: .5rem 0 1rem; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .25rem .6rem; border-bottom: 1px solid #eee; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
code { overflow-wrap: anywhere; }
.key { display: inline-block; min-width: 1.5em; text-align: center; border-radius: 4px; font-weight: bold; }
"""


@dataclass(frozen=True, kw_only=True)
class DrawnPair:
    """A pair whose picture is there."""

    title: str
    picture: Path
    """SVG"""
    matches: PairMatches


def write_page(drawn: Sequence[DrawnPair], path: Path, *, title: str) -> None:
    """Write every picture, and the words and fragments of its matches as tables, into one file."""
    path.write_text("\n".join(_page(drawn, title)) + "\n", encoding="utf-8")


def _page(drawn: Sequence[DrawnPair], title: str) -> Iterator[str]:
    yield f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>'
    yield f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>"
    links = (f'<a href="#pair-{number}">{escape(pair.title)}</a>' for number, pair in enumerate(drawn))
    yield f"<nav>{' '.join(links)}</nav>"
    for number, pair in enumerate(drawn):
        picture = base64.b64encode(pair.picture.read_bytes()).decode()
        yield f'<section id="pair-{number}">\n<h2>{escape(pair.title)}</h2>'
        yield f'<img alt="Clusters of {escape(pair.title)}" src="data:image/svg+xml;base64,{picture}">'
        yield "<details>\n<summary>Matches in words</summary>"
        for level in pair.matches.levels:
            yield from _table(level, pair.matches)
        yield "</details>\n</section>"
    yield "</body>\n</html>"


def _table(level: LevelMatches, pair: PairMatches) -> Iterator[str]:
    yield f"<h3>{LEVEL_NAMES[min(level.number, len(LEVEL_NAMES) - 1)][0]}</h3>\n<table>"
    yield "<tr><th></th><th>text</th><th>fragments</th><th>cosine</th></tr>"
    for match in level.shown:
        words = " … ".join(escape(pair.text[start:end]) for start, end in match.text)
        pieces = " … ".join(f"<code>{escape(pair.smiles[start:end])}</code>" for start, end in match.smiles)
        key = f'<span class="key" style="background: {color(match)}">{match.number}</span>'
        yield f'<tr><td>{key}</td><td>{words}</td><td>{pieces}</td><td class="number">{match.similarity:.2f}</td></tr>'
    yield "</table>"
