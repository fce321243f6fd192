"""Texts: mojibake is undone, good Unicode is never touched."""

import csv
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atomas.data.texts import clean_text, repair_mojibake

SIGNS = [
    "\u03b1",
    "\u2103",
    "\u00b0",
    "\u00b5m",
    "\u00e9",
    "\u2019",
    "\u2013",
    "\u00d7",
    "\u2122",
    "\u0394",
    "\u2032",
]
SIGNS += ["\u2192", "\u2265", "\u00b7", "na\u00efve", "\u00c9", "\ufb01", "\u03c0", "\u00b1"]


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_mojibake_is_undone(sign: str, encoding: str) -> None:
    # Five bytes have no character in Windows-1252; programs leave U+FFFD there, which nobody can undo.
    broken = sign.encode().decode(encoding, errors="replace")
    expected = sign if "\ufffd" not in broken else broken
    assert repair_mojibake(f"at 4{broken}, {broken}") == f"at 4{expected}, {expected}"


@pytest.mark.parametrize("sign", SIGNS)
def test_double_mojibake_is_undone(sign: str) -> None:
    twice = sign.encode().decode("latin-1").encode().decode("latin-1")
    assert repair_mojibake(f"at 4{twice}") == f"at 4{sign}"


@pytest.mark.parametrize(
    "text",
    [
        "45 \u00c5\u00b2 and 3 \u00c5\u00b3",  # square and cubic Angstrom: also valid UTF-8 bytes
        "\u00d8\u00b2 \u00d7\u00b0",
        "\u03b2-D-glucose 5\u2032, 10 \u00b0C \u00b1 2 \u00b5m \u00b7 H2O",
        "\u201cna\u00efve\u201d \u2013 l\u2019\u00c2ge, MA\u00c7\u00c3\u201d, \u00ab caf\u00e9 \u00bb",
        "\u65e5\u672c\u8a9e \u0391\u03b8\u03ae\u03bd\u03b1",
    ],
)
def test_good_unicode_is_kept(text: str) -> None:
    assert repair_mojibake(text) == text


@given(st.text())
def test_cleaning_is_idempotent(text: str) -> None:
    once = clean_text(text)
    again = clean_text(once.text)
    assert again.text == once.text
    assert "mojibake" not in again.hazards


@given(st.text(alphabet=st.characters(max_codepoint=0x7E, min_codepoint=0x20)))
def test_ascii_is_only_stripped(text: str) -> None:
    cleaned = clean_text(text)
    assert "phrase_set" in cleaned.hazards or cleaned.text == text.strip()


def test_hazards_of_texts() -> None:
    assert clean_text("  plain text ").hazards == ()
    assert clean_text('a "quote').hazards == ("odd_quotes",)
    assert clean_text("\u03b1").hazards == ("non_ascii_text",)
    assert clean_text("4\u00ce\u00b1").hazards == ("mojibake", "non_ascii_text")
    assert clean_text("lost \ufffd").hazards == ("non_ascii_text", "lost_character")
    assert clean_text("H<sub>2</sub>O &#945;").hazards == ("markup", "text_outside_t5")
    assert clean_text("x" * 2049).hazards == ("long_text",)


def test_set_of_phrases_is_joined_in_written_order() -> None:
    cleaned = clean_text("""{'zeta agonist', "alzheimer's disease", 'a'}""")
    assert cleaned.text == "zeta agonist; alzheimer's disease; a"
    assert cleaned.hazards == ("phrase_set",)
    for other in ("{'a': 1}", "{'a', b}", "{'a', 1}", "{'a'", "{x}", "{'a'} or {'b'}"):
        assert clean_text(other).text == other


def test_real_captions(shared_data: Path) -> None:
    counts = {}
    for name in ("pcdes/validation", "chebi20/validation", "pubchem324k/validation", "pcdes/misaligned"):
        with (shared_data / f"{name}.txt").open(encoding="utf-8", newline="\n") as file:
            rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[1:]
        cleaned = [clean_text(row[2]) for row in rows]
        counts[name] = sum("mojibake" in one.hazards for one in cleaned)
        left = {character for one in cleaned for character in one.text if "\x80" <= character <= "\x9f"}
        assert not left, name
    assert counts == {
        "pcdes/validation": 50,
        "chebi20/validation": 0,
        "pubchem324k/validation": 0,
        "pcdes/misaligned": 0,
    }
