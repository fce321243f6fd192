"""The command line as a whole."""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from atomas.cli import command_parser

ROOT = Path(__file__).parents[1]


def test_every_command_shows_an_example() -> None:
    found = list(_parsers(command_parser()))
    assert len(found) > 30
    assert [parser.prog for parser in found if "xample" not in parser.format_help()] == []


def test_commands_that_messages_and_documents_name_are_there() -> None:
    names = {parser.prog for parser in _parsers(command_parser())}
    groups = {name for name in names if any(other.startswith(f"{name} ") for other in names)} - {"atomas"}
    files = [*(ROOT / "atomas").rglob("*.py"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    said = {
        (file.relative_to(ROOT).as_posix(), words)
        for file in files
        for words in re.findall(r"`atomas((?: [a-z][a-z-]+)+)", file.read_text(encoding="utf-8"))
    }
    assert len(said) > 30
    unknown = set()
    for file, words in said:
        first, *others = words.split()
        name = f"atomas {first}"
        if name in groups and others:
            name += f" {others[0]}"
        if name not in names:
            unknown.add((file, name))
    assert unknown == set()


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and those of its sub-commands."""
    declare = getattr(parser, "declare", None)
    if declare is not None:
        declare(parser)
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from _parsers(child)
