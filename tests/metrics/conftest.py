"""A tokenizer and a WordNet small enough to know by heart."""

from collections.abc import Iterator
from pathlib import Path

import nltk
import pytest
from nltk.corpus import wordnet

SPECIAL = "[PAD] [UNK] [CLS] [SEP] [MASK]"
WORDS = f"{SPECIAL} the molecule is a an acid ester car ##boxylic ring ##s . and with two auto".split()


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    """A folder with a WordPiece vocabulary of the words of these tests."""
    folder = tmp_path / "tiny-words"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def without_wordnet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """What nltk finds in an empty folder: nothing."""
    yield from _wordnet_from(tmp_path / "nothing", monkeypatch)


@pytest.fixture
def tiny_wordnet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A WordNet of one set of synonyms: "car" and "auto"."""
    folder = tmp_path / "nltk_data" / "corpora" / "wordnet"
    folder.mkdir(parents=True)
    for part in ("adj", "adv", "noun", "verb"):
        for name in (f"{part}.exc", f"index.{part}", f"data.{part}"):
            (folder / name).write_text("")
    (folder / "lexnames").write_text("00\tnoun.artifact\t1\n")
    (folder / "data.noun").write_text("00000000 00 n 02 car 0 auto 0 000 | it drives\n")
    (folder / "index.noun").write_text("auto n 1 0 1 0 00000000\ncar n 1 0 1 0 00000000\n")
    for name in ("cntlist.rev", "index.sense"):
        (folder / name).write_text("")
    yield from _wordnet_from(tmp_path / "nltk_data", monkeypatch)


def _wordnet_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    _forget()
    monkeypatch.setattr(nltk.data, "path", [str(folder)])
    yield
    _forget()


def _forget() -> None:
    if "_unload" in vars(wordnet):  # it was loaded
        wordnet._unload()
