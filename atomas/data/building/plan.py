"""What a build does, in files that its processes share on one node or many.

.NAME.build/
plan.json           inputs and options; another plan in the same folder starts anew
lock                held while a build runs
scan/000000.json    parts of one file
parts.json          all parts
examine/000000/     records.jsonl, rejected.jsonl, keys.parquet, summary.json of one part
resolve/            decisions of every part, shards to write, counts
write/              what became of every shard
corpus/             the corpus, renamed to NAME when it is complete
stages/             marks of the tasks that are done, and their logs
"""

import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from atomas.data.blocks import Compression
from atomas.data.molecules import IdentityKind
from atomas.data.row_formats import Part
from atomas.data.shard_index import FORMAT
from atomas.data.shard_writer import BLOCK_SIZE, SHARD_BYTES
from atomas.data.sources import Columns, PairFile
from atomas.data.splitting import SplitBy
from atomas.disk import sync
from atomas.errors import AtomasError
from atomas.json_files import write_json
from atomas.version import __version__

Criterion = Literal["molecule", "text", "pair"]
MIN_PART_BYTES = 128 * 2**10
MAX_PART_BYTES = 16 * 2**20
PARTS_WANTED = 64


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What decides the bytes of a corpus, besides its input files."""

    columns: Columns = field(default_factory=Columns)
    """Which columns of the pair files hold SMILES, text and id."""

    fractions: Mapping[str, float] | None = None
    """Split -> its share; the shares sum to 1. None: every file names its split."""

    by: SplitBy = "random"
    """What never lies in two splits: a molecule ("random") or a Bemis-Murcko scaffold."""

    seed: int = 0
    """Of the random order of molecules."""

    identity: IdentityKind = "inchikey"
    """What tells that two molecules are the same."""

    deduplicate: Sequence[Criterion] = ()
    """Of records that share this, only the first of each split (with fractions: of all) is kept; one after another."""

    exclude: Sequence[str] = ()
    """Corpora (folders) or pair files whose molecules are left out."""

    exclude_by: Literal["molecule", "skeleton"] = "molecule"
    """Compare whole InChIKeys, or their first block (leaves out stereoisomers as well)."""

    compression: Compression = "none"
    """Of the blocks in the shards."""

    weights: Mapping[str, float] = field(default_factory=dict)
    """Pair file as given -> its weight when sources are mixed; 1 where it is not named."""

    @property
    def needs_scaffolds(self) -> bool:
        """Whether scaffolds decide the splits."""
        return self.by == "scaffold" and self.fractions is not None


@dataclass(frozen=True, kw_only=True)
class Input:
    """A pair file, or a corpus whose molecules are left out (`split` is None for both kinds of the latter)."""

    name: str
    split: str | None
    path: str
    """FILE or ARCHIVE.zip:MEMBER, or a corpus folder; absolute."""
    weight: float = 1.0

    @property
    def is_corpus(self) -> bool:
        """Whether it is a built corpus."""
        return Path(self.path).is_dir()

    @property
    def file(self) -> PairFile:
        """The pair file."""
        return PairFile.parse(self.path)


@dataclass(frozen=True, kw_only=True)
class PlannedPart:
    """A part of input `file`; `names` are the columns of the file. Of a corpus: blocks [start, stop) of a split."""

    file: int
    names: tuple[str, ...]
    part: Part


class Plan:
    """A build in the folder `folder`: its inputs, then the references (what is left out)."""

    def __init__(self, folder: Path, inputs: Sequence[Input], recipe: Recipe) -> None:
        self.folder = folder
        self.inputs = tuple(inputs)
        self.recipe = recipe

    @property
    def pair_files(self) -> tuple[Input, ...]:
        """The inputs whose rows make the corpus."""
        return tuple(one for one in self.inputs if one.split is not None)

    @property
    def references(self) -> tuple[Input, ...]:
        """The inputs whose molecules are left out, in the order of `recipe.exclude`."""
        return tuple(one for one in self.inputs if one.split is None)

    @property
    def split_names(self) -> tuple[str, ...]:
        """Names of the splits, in order."""
        if self.recipe.fractions is not None:
            return tuple(self.recipe.fractions)
        return tuple(dict.fromkeys(one.split for one in self.pair_files if one.split is not None))

    @property
    def part_bytes(self) -> int:
        """Aimed-at size of a part; it decides nothing of what is written."""
        total = sum(one.file.num_bytes() for one in self.inputs if not one.is_corpus)
        return min(max(total // PARTS_WANTED, MIN_PART_BYTES), MAX_PART_BYTES)

    def save(self) -> bool:
        """Write plan.json; if the folder holds another plan, empty it first. Whether there was a plan to go on with."""
        plan = json.loads(json.dumps(self._to_json()))
        path = self.folder / "plan.json"
        try:
            if json.loads(path.read_text(encoding="utf-8")) == plan:
                return True
        except (OSError, ValueError):
            pass
        for old in self.folder.iterdir():
            if old.name != "lock":
                shutil.rmtree(old) if old.is_dir() else old.unlink()
        write_json(path, plan)
        return False

    @staticmethod
    def load(folder: Path) -> "Plan":
        """The plan that `save` wrote."""
        plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        recipe = plan["recipe"]
        header = recipe["columns"]["header"]
        columns = Columns(**{**recipe["columns"], "header": tuple(header) if header else None})
        return Plan(
            folder, [Input(**one) for one in plan["inputs"]], Recipe(**{**recipe, "columns": columns})
        )

    def _to_json(self) -> dict[str, Any]:
        files = [Path(one.path) / "index.json" if one.is_corpus else one.file.path for one in self.inputs]
        stats = [file.stat() for file in files]
        return {
            "inputs": [asdict(one) for one in self.inputs],
            "files": [[one.st_size, one.st_mtime_ns] for one in stats],
            "recipe": asdict(self.recipe),
            "part_bytes": self.part_bytes,
            "shards": [FORMAT, BLOCK_SIZE, SHARD_BYTES],
            "versions": [__version__, version("rdkit")],
        }

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder; AtomasError if another build does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise AtomasError(
                    f"another build of {self.folder.name.removesuffix('.build').removeprefix('.')} is running "
                    f"(it holds {self.folder}/lock): wait for it or choose another --out"
                ) from error
            yield

    def scan_file(self, number: int) -> Path:
        """What the scan of input `number` found."""
        return self.folder / "scan" / f"{number:06d}.json"

    def part_folder(self, number: int) -> Path:
        """What became of part `number`."""
        return self.folder / "examine" / f"{number:06d}"

    def save_parts(self) -> list[PlannedPart]:
        """Collect what the scans found; number the parts in the order of the inputs."""
        parts = []
        for number in range(len(self.inputs)):
            scan = json.loads(self.scan_file(number).read_text(encoding="utf-8"))
            parts += [{"file": number, "names": scan["names"], "part": part} for part in scan["parts"]]
        write_json(self.folder / "parts.json", parts)
        return self.parts()

    def parts(self) -> list[PlannedPart]:
        """All parts."""
        parts = json.loads((self.folder / "parts.json").read_text(encoding="utf-8"))
        return [
            PlannedPart(file=one["file"], names=tuple(one["names"]), part=Part(**one["part"]))
            for one in parts
        ]


@contextmanager
def complete_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that takes the name `path` at the end, on disk to its last byte."""
    partial = path.with_name(f"{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    for file in partial.iterdir():
        sync(file)
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)
    sync(path.parent)
