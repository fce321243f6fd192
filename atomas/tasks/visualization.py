"""Pictures of what a checkpoint has aligned: PNG and SVG of every pair, and a page with all of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from atomas.data.molecules import InvalidMoleculeError, parse_molecule
from atomas.data.progress import Progress
from atomas.data.shards import Corpus
from atomas.errors import AtomasError
from atomas.interpretation.correspondence import correspondences
from atomas.interpretation.matches import strongest_matches
from atomas.training.checkpoint import resolve_checkpoint, verify_checkpoint
from atomas.training.model_files import read_model
from atomas.viz.alignment import draw_alignment
from atomas.viz.alignment_page import DrawnPair, write_page

PAGE = "index.html"


@dataclass(frozen=True, kw_only=True)
class NamedPair:
    """A pair to draw."""

    name: str
    """Of its files"""
    title: str
    smiles: str
    text: str


def visualize(
    checkpoint: Path, pairs: Sequence[NamedPair], out: Path, *, best: bool = False, momentum: bool = False
) -> Path:
    """Draw every pair into `out` as NAME.png and NAME.svg; the page that shows them all.

    Raises:
        AtomasError: the checkpoint is missing or damaged, has no hierarchy or cannot read a pair; `out` cannot
            be written.
    """
    folder = resolve_checkpoint(checkpoint, best=best)
    step = verify_checkpoint(folder)["step"]
    model, tokenizer, config = read_model(folder, momentum=momentum)
    try:
        out.mkdir(parents=True, exist_ok=True)
        drawn = []
        with Progress("drawing", len(pairs), unit="pairs") as progress:
            for pair in pairs:
                (found,) = correspondences(
                    model, tokenizer, [(pair.text, pair.smiles)], max_text_tokens=config.data.max_text_tokens
                )
                matches = strongest_matches(found)
                picture = out / f"{pair.name}.svg"
                draw_alignment(matches, [picture, picture.with_suffix(".png")], title=pair.title)
                drawn.append(DrawnPair(title=pair.title, picture=picture, matches=matches))
                progress.update()
        page = out / PAGE
        write_page(drawn, page, title=f"What {checkpoint.name} has aligned after {step:,} steps")
    except OSError as error:
        raise AtomasError(f"cannot write {error.filename or out}: {error.strerror or error}") from error
    return page


def given_pair(smiles: str, text: str) -> NamedPair:
    """A pair from the command line; AtomasError with RDKit's reason where the SMILES is no molecule."""
    try:
        molecule = parse_molecule(smiles)
    except InvalidMoleculeError as error:
        raise AtomasError(f"--smiles {smiles!r} is no molecule: {error}") from None
    if not text.strip():
        raise AtomasError("--text is empty: give the description of the molecule")
    return NamedPair(name="pair", title="A molecule and its description", smiles=molecule.smiles, text=text)


def corpus_pairs(data: Path | str, split: str, rows: Sequence[int]) -> list[NamedPair]:
    """Rows of a split, counted from 0; AtomasError for one that is not there."""
    part = Corpus.open(data).split(split)
    for row in rows:
        if not 0 <= row < part.num_records:
            raise AtomasError(
                f"split {split!r} of {data} has no row {row}: its {part.num_records} rows count from 0"
            )
    records = dict(enumerate(islice(part, max(rows) + 1)))
    return [
        NamedPair(
            name=f"{split}_{row}",
            title=f"{split} {row} ({records[row]['id']})",
            smiles=records[row]["smiles"],
            text=records[row]["text"],
        )
        for row in rows
    ]
