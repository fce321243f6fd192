"""Alignment pictures: everything is inside, nothing overlaps, and the page needs no other file."""

import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from atomas.cli import main
from atomas.data.demo import build_demo_corpus
from atomas.interpretation.matches import LevelMatches, Match, PairMatches
from atomas.interpretation.smiles_atoms import in_string_order, scan_smiles
from atomas.viz.alignment import BADGE_SIZE, PALETTE, _badges, counted
from atomas.viz.alignment_page import DrawnPair, write_page
from atomas.viz.colored_text import ColoredPart, ColoredText
from atomas.viz.depiction import depict
from tests.small_checkpoint import write_small

TEXT = "The molecule is a chlorobenzene with a methyl group; it has a role as a metabolite. " * 4
PART = ColoredPart(spans=[(4, 12), (16, 40), (60, 63)], color="#77AADD", label="1")


def wrapped(string: str, parts: list[ColoredPart], *, width: float = 200, limit: int = 10_000) -> ColoredText:
    return ColoredText.wrapped(string, parts, width=width, size=11, leading=20, style="plain", limit=limit)


def test_wrapped_text_loses_nothing_and_stays_within_its_width() -> None:
    text = wrapped(TEXT, [PART])
    lines = [[p for p in text.pieces if p.line == n] for n in range(text.pieces[-1].line + 1)]
    assert " ".join("".join(piece.string for piece in line).strip() for line in lines) == TEXT.strip()
    for line in lines:
        assert line[0].x == 0
        for piece, following in pairwise(line):
            assert piece.x + piece.width == pytest.approx(following.x)
            assert piece.part is not following.part
    assert text.width <= 200
    assert text.height == 20 * len(lines)
    colored = "".join(piece.string for piece in text.pieces if piece.part is PART)
    expected = "".join(TEXT[start:end] for start, end in PART.spans)
    assert colored.replace(" ", "") == expected.replace(" ", "")


def test_words_longer_than_a_line_and_long_texts_are_cut() -> None:
    assert wrapped("W" * 200, [], width=496).width <= 496
    text = wrapped(TEXT, [], width=10_000, limit=50)
    assert [p.string for p in text.pieces] == [f"{TEXT[:50]} ... ({len(TEXT) - 50} more characters)"]


def test_tabs_and_line_feeds_are_drawn_as_blanks() -> None:
    assert [p.string for p in wrapped("a\tring\nof atoms", [], width=1000).pieces] == ["a ring of atoms"]


def test_small_rings_on_a_macrocycle_keep_their_shape() -> None:
    smiles = (
        "CN1[C@@H](CC2=CC=C(C=C2)OC3=CC4=CC(=C3O)C5=CC=CC6=C5NC=C6C[C@H](C(=O)NCC(=O)N[C@H]4C1=O)N)C(=O)O"
    )
    drawing = depict(smiles, max_width=380, max_height=300)
    molecule = in_string_order(smiles)
    for ring in molecule.GetRingInfo().AtomRings():
        if len(ring) == 6:
            corners = drawing.atoms[list(ring)]
            radii = np.linalg.norm(corners - corners.mean(axis=0), axis=1)
            assert radii.max() < 1.5 * radii.min()


@pytest.mark.parametrize(
    "smiles", ["C", "[Na+].[Cl-]", "Cc1ccccc1", "C1CCCCCCCCCCCCC1", "C" * 120, "O=C(O)[C@H](N)CS"]
)
def test_molecules_fit_their_frame(smiles: str) -> None:
    drawing = depict(smiles, max_width=300, max_height=200)
    assert len(drawing.atoms) == len(scan_smiles(smiles).symbols)
    assert drawing.width <= 310
    assert drawing.height <= 210
    points = np.array(
        [point for stroke in drawing.strokes for _, points in stroke.commands for point in points]
    )
    for corner in (*drawing.atoms, *points):
        assert -1 <= corner[0] <= drawing.width + 1
        assert -1 <= corner[1] <= drawing.height + 1
    assert drawing.bond <= 24.1


def test_numbers_cover_no_atom_and_no_other_number() -> None:
    smiles = "Cc1ccc(Cl)cc1C(=O)NCCO"
    drawing, bonds = depict(smiles, max_width=380, max_height=300), scan_smiles(smiles).bonds
    matches = [
        Match(number=n, text=[], smiles=[], atoms=atoms, similarity=1.0)
        for n, atoms in enumerate([{0}, {1, 2, 3, 4, 6, 7}, {5}, {8, 9, 10}, {11, 12, 13}], start=1)
    ]
    badges = list(_badges(drawing, bonds, matches))
    assert {match.number for match, _ in badges} == {1, 2, 3, 4, 5}
    places = np.array([place for _, place in badges])
    for place, others in ((p, np.delete(places, n, axis=0)) for n, p in enumerate(places)):
        taken = np.concatenate([drawing.atoms, others])
        assert np.linalg.norm(taken - place, axis=1).min() > BADGE_SIZE


def test_colors_are_distinct_and_light_enough_for_dark_text() -> None:
    assert len(set(PALETTE)) == 8
    for color in PALETTE:
        red, green, blue = (int(color[n : n + 2], 16) / 255 for n in (1, 3, 5))
        assert 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.55


def test_counts_are_in_english() -> None:
    assert counted(1, "part of the text") == "1 part of the text"
    assert counted(2, "part of the text") == "2 parts of the text"
    assert counted(2, "weaker match") == "2 weaker matches"


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "checkpoint"
    write_small(folder, max_tokens=512)
    return folder


def visualize(*arguments: object) -> int:
    try:
        main(["visualize", *map(str, arguments)])
    except SystemExit as exit:
        return int(exit.code or 0)
    return 0


def test_rows_of_a_corpus(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_demo_corpus(tmp_path / "corpus", pairs=40, seed=1, workers=1)
    out = tmp_path / "pictures"
    options = ["--checkpoint", checkpoint, "--data", tmp_path / "corpus", "--out", out]
    assert visualize(*options, "--rows", 3, 0) == 0
    assert str(out / "index.html") in capsys.readouterr().out
    assert sorted(file.name for file in out.iterdir()) == [
        "index.html", "test_0.png", "test_0.svg", "test_3.png", "test_3.svg",
    ]  # fmt: skip
    ElementTree.parse(out / "test_0.svg")
    page = Page()
    page.feed((out / "index.html").read_text(encoding="utf-8"))
    assert not page.open
    assert all(link.startswith(("#", "data:image/svg+xml;base64,")) for link in page.links)
    assert len(page.links) == 4
    assert not re.search(r"<script|url\(|@import", (out / "index.html").read_text(encoding="utf-8"))
    assert visualize(*options, "--rows", 99) == 2
    assert "no row 99" in capsys.readouterr().err


def test_what_a_text_says_is_no_html(tmp_path: Path) -> None:
    match = Match(number=1, text=[(0, 9)], smiles=[(0, 2)], atoms={0, 1}, similarity=0.5)
    level = LevelMatches(number=0, num_text=1, num_smiles=1, shown=[match], hidden=0)
    (tmp_path / "a.svg").write_text("<svg/>")
    pair = DrawnPair(
        title="1 < 2",
        picture=tmp_path / "a.svg",
        matches=PairMatches(text="<b>&amp;x", read=9, smiles="CC", bonds=[(0, 1)], levels=[level]),
    )
    write_page([pair], tmp_path / "page.html", title="a & b")
    content = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<td>&lt;b&gt;&amp;amp;x</td><td><code>CC</code></td>" in content
    assert "<title>a &amp; b</title>" in content
    assert "<h2>1 &lt; 2</h2>" in content


def test_a_pair_of_ones_own_and_its_mistakes(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--checkpoint", checkpoint, "--out", tmp_path / "pictures"]
    text = "Price: $5 and $6 of {salt} & \u03b1-water"
    assert visualize(*options, "--smiles", "[Na+].[Cl-].O", "--text", text) == 0
    capsys.readouterr()
    for arguments, message in (
        (["--smiles", "C1CC", "--text", "a ring"], "is no molecule"),
        (["--smiles", "CC", "--text", " "], "--text is empty"),
        (["--smiles", "CC"], "say what to draw"),
        (["--smiles", "CC", "--text", "x", "--data", tmp_path], "say what to draw"),
        ([], "say what to draw"),
    ):
        assert visualize(*options, *arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("atomas: error: ")
        assert message in line
