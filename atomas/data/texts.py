"""Texts as they come from the wild: what is repaired, and what is only noted."""

import ast
import re
from typing import NamedTuple

from atomas.data.hazards import LONG_TEXT, OUTSIDE_T5


class CleanText(NamedTuple):
    """A text ready for use and the hazards found in it."""

    text: str
    hazards: tuple[str, ...]


def clean_text(raw: str) -> CleanText:
    """Strip `raw`, join a set of phrases, repair mojibake; good Unicode stays as it is. Idempotent."""
    hazards = []
    text = raw.strip()
    phrases = _phrase_set(text)
    if phrases is not None:
        hazards.append("phrase_set")
        text = "; ".join(phrases)
    repaired = repair_mojibake(text).strip()
    if repaired != text:
        hazards.append("mojibake")
        text = repaired
    if text.count('"') % 2:
        hazards.append("odd_quotes")
    is_ascii = text.isascii()
    if not is_ascii:
        hazards.append("non_ascii_text")
    # most texts can be told at a glance to have neither of the two, which takes a third of a search
    if not (is_ascii and text.isprintable()) and _LOST.search(text):
        hazards.append("lost_character")
    if ("<" in text or "&" in text) and _MARKUP.search(text):
        hazards.append("markup")
    if len(text) > LONG_TEXT:
        hazards.append("long_text")
    if OUTSIDE_T5.search(text):
        hazards.append("text_outside_t5")
    return CleanText(text=text, hazards=tuple(hazards))


def repair_mojibake(text: str) -> str:
    """Undo UTF-8 that was read as Latin-1 or Windows-1252, where nothing else can be meant.

    Only runs that are a whole UTF-8 character are replaced, and only those that start with one of
    A-circumflex, A-tilde, I-circumflex, I-diaeresis (Latin-1 signs and letters, Greek), a-circumflex
    (punctuation, symbols) or i-diaeresis: in good text none of these stands before such signs, whereas
    for instance a capital A-ring does (an area in square Angstrom).
    """
    while not text.isascii():
        repaired = _MOJIBAKE.sub(_decode, text)
        if repaired == text:
            break
        text = repaired
    return text


# Windows-1252 puts printable characters where Latin-1 has the controls 0x80 - 0x9F.
_WINDOWS = {
    bytes([byte]).decode("cp1252"): byte
    for byte in range(0x80, 0xA0)
    if byte not in (0x81, 0x8D, 0x8F, 0x90, 0x9D)
}
_QUOTES_AND_DASHES = "".join(character for character, byte in _WINDOWS.items() if 0x91 <= byte <= 0x97)
_PRINTABLE = re.escape("".join(_WINDOWS))
_PRINTABLE_SYMBOLS = re.escape("".join(set(_WINDOWS) - set(_QUOTES_AND_DASHES)))
_MOJIBAKE = re.compile(
    "[\u00c2\u00c3\u00ce\u00cf][\x80-\xbf]"
    # After a capital, a capital with a quote or a dash may just be a word's end.
    f"|(?<![A-Z\u00c0-\u00de])[\u00c2\u00c3\u00ce\u00cf][{_PRINTABLE}]"
    f"|[\u00e2\u00ef][\x80-\xbf{_PRINTABLE_SYMBOLS}][\x80-\xbf{_PRINTABLE}]"
)
_LOST = re.compile("[\ufffd\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_MARKUP = re.compile(r"&(?:#\d+|#x[0-9a-fA-F]+|[a-zA-Z]{2,8});|</?(?:sub|sup|i|b|em|p|br|a)\b[^>]*>")


_PHRASE = r"(?:'[^'\\\n]*'|\"[^\"\\\n]*\")"
_PLAIN_SET = re.compile(rf"\{{{_PHRASE}(?:, {_PHRASE})*\}}")
"""A set as `repr` writes it, without an escape."""
_PLAIN_PHRASE = re.compile(r"'([^']*)'|\"([^\"]*)\"")


def _decode(match: re.Match[str]) -> str:
    try:
        return bytes(_WINDOWS.get(character, ord(character) & 0xFF) for character in match[0]).decode()
    except UnicodeDecodeError:
        return match[0]


def _phrase_set(text: str) -> list[str] | None:
    """The phrases of a text like `{'antioxidant', "alzheimer's disease"}` in written order, or None."""
    if not (text.startswith(("{'", '{"')) and text.endswith("}")):
        return None
    if _PLAIN_SET.fullmatch(text):  # Python's parser takes as long as RDKit
        return [(single or double).strip() for single, double in _PLAIN_PHRASE.findall(text)]
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    if not isinstance(tree, ast.Set):
        return None
    phrases = [node.value for node in tree.elts if isinstance(node, ast.Constant)]
    if len(phrases) < len(tree.elts) or not all(isinstance(phrase, str) for phrase in phrases):
        return None
    return [str(phrase).strip() for phrase in phrases]
