"""`atomas data demo`: records drawn family by family, split, and written as a built corpus."""

import shutil
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

from rdkit import Chem, rdBase

from atomas.data.demo.anatomy import dissect
from atomas.data.demo.assembly import arrange, draw_recipe
from atomas.data.demo.phrasing import describe
from atomas.data.hazards import HAZARDS
from atomas.data.molecules import parse_molecule
from atomas.data.parallel import available_cores, ordered_map
from atomas.data.progress import Progress
from atomas.data.shard_index import SplitIndex, write_index
from atomas.data.shard_writer import ShardWriter
from atomas.data.shards import Record
from atomas.errors import AtomasError

MIN_PAIRS = 20
MAX_FAMILY = 8
ROOTED_SHARE = 0.4
FAMILIES_PER_TASK = 20

Described = tuple[Record, tuple[str, ...]]
"""A record without its id, and the hazards of its molecule."""


def build_demo_corpus(out: Path, *, pairs: int, seed: int, workers: int | None = None) -> dict[str, Any]:
    """Write `pairs` records with `grounding` into `out` and return the index.

    Molecules come in families: up to 8 arrangements of one recipe of building blocks, alike in what they
    contain and different in what is attached where. A family lies in one split (the exact sizes may cut
    one), so that neither its molecules nor its list of parts is known from training. The files depend on
    `pairs` and `seed` alone. `workers`: processes, by default one for every core.

    Raises AtomasError if `pairs` is below 20, `out` holds something or cannot be written.
    """
    if pairs < MIN_PAIRS:
        raise AtomasError(f"--pairs {pairs} is too few for three splits: ask for {MIN_PAIRS} or more")
    if workers is not None and workers < 1:
        raise AtomasError(f"--workers {workers}: at least 1 is needed")
    out = Path(out).absolute()
    partial = out.with_name(f".{out.name}.partial")
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise AtomasError(f"{out} exists and is not an empty folder: choose another --out")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        index = _build(partial, pairs, seed, workers or available_cores())
        partial.replace(out)
    except OSError as error:
        raise AtomasError(
            f"cannot write {error.filename or out}: {error.strerror or error}; choose another --out"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return index


def split_sizes(pairs: int) -> dict[str, int]:
    """Records per split: 10 % to test on, 500 at most; 5 % to validate, from 4,000 pairs on 2.5 % or 200."""
    test = 500 if pairs >= 5000 else pairs // 10
    validation = max(200, pairs // 40) if pairs >= 4000 else pairs // 20
    return {"train": pairs - test - validation, "validation": validation, "test": test}


def _build(folder: Path, pairs: int, seed: int, workers: int) -> dict[str, Any]:
    records, hazards = _draw_records(pairs, seed, workers)
    sizes = split_sizes(pairs)
    splits: dict[str, SplitIndex] = {}
    texts: dict[str, set[str]] = {}
    rest = iter(records)
    # In this order the test split is the same for every number of pairs from 5,000 on.
    for name in reversed(sizes):
        chosen = [next(rest) for _ in range(sizes[name])]
        Random(f"{seed}/{name}").shuffle(chosen)
        with ShardWriter(folder, name) as writer:
            for record in chosen:
                writer.write(record)
        splits[name] = writer.index()
        texts[name] = {record["text"] for record in chosen}
        hazards["duplicate_text"] += len(chosen) - len(texts[name])
    return write_index(
        folder,
        {name: splits[name] for name in sizes},
        counts={
            "rows": pairs,
            "accepted": pairs,
            "rejected": 0,
            "excluded": 0,
            "splits": {
                name: {"records": size, "molecules": size, "texts": len(texts[name])}
                for name, size in sizes.items()
            },
            "overlap": [],
        },
        hazards={name: hazards[name] for name in HAZARDS},
        sources=[{"name": "demo", "rows": pairs}],
        options={"pairs": pairs, "seed": seed},
    )


def _draw_records(pairs: int, seed: int, workers: int) -> tuple[list[Record], Counter[str]]:
    """The first `pairs` records of new molecules in the order of families, and the count of each hazard."""
    seen: set[str] = set()
    records: list[Record] = []
    hazards: Counter[str] = Counter()
    tasks = ((seed, first) for first in count(0, FAMILIES_PER_TASK))
    with Progress("drawing molecules", pairs, unit="pairs") as progress:
        for batch in ordered_map(_draw_families, tasks, workers=workers):
            before = len(records)
            for record, found in batch:
                if record["inchikey"] not in seen and len(records) < pairs:
                    seen.add(record["inchikey"])
                    hazards.update(found)
                    records.append({"id": f"demo-{len(records):06d}", **record})
            progress.update(len(records) - before)
            if len(records) == pairs:
                break
    return records, hazards


def _draw_families(seed: int, first: int) -> list[Described]:
    with rdBase.BlockLogs():
        return [
            one
            for family in range(first, first + FAMILIES_PER_TASK)
            for one in _draw_family(Random(f"{seed}/family/{family}"))
        ]


def _draw_family(rng: Random) -> Iterator[Described]:
    """Some arrangements of one recipe, described; fewer where the recipe allows fewer."""
    recipe, size = draw_recipe(rng), rng.randint(2, MAX_FAMILY)
    seen: set[str] = set()
    for _ in range(4 * size):
        molecule = arrange(recipe, rng)
        if molecule is None:
            continue
        canonical = Chem.MolToSmiles(molecule)
        if canonical in seen:
            continue
        described = _describe(canonical, rng)
        if described is not None:
            seen.add(canonical)
            yield described
        if len(seen) == size:
            return


def _describe(smiles: str, rng: Random) -> Described | None:
    if rng.random() < ROOTED_SHARE:
        molecule = Chem.MolFromSmiles(smiles)
        smiles = Chem.MolToSmiles(molecule, rootedAtAtom=rng.randrange(molecule.GetNumAtoms()))
    # Dissected as parsed from the record's own SMILES: the grounding is in its order of atoms.
    anatomy = dissect(Chem.MolFromSmiles(smiles))
    if anatomy is None:
        return None
    text, grounding = describe(anatomy, rng)
    identity = parse_molecule(smiles)
    record = {
        "smiles": smiles,
        "canonical_smiles": identity.canonical_smiles,
        "inchikey": identity.inchikey,
        "text": text,
        "source": "demo",
        "grounding": grounding,
    }
    return record, identity.hazards
