"""`atomas train` whose clusters are those of another run: python pinned_clusters.py FOLDER train ...

A step whose clusters FOLDER does not hold yet finds its own, and leaves them there; a step that finds them there takes
them, whichever rank has which pair, and notes in `own-*.json` how many sequences it would have clustered otherwise.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atomas.cli import main
from atomas.data.batching import PairBatch
from atomas.model import polymerization
from atomas.model.atomas import AtomasModel
from atomas.training import loop


class Pinned:
    """The clusters of one step, by sample and by the number of the call: a modality's level."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._find = polymerization.dpc_knn
        self._known: dict[tuple[int, int], Tensor] = {}
        self._own: dict[tuple[int, int], Tensor] = {}
        self._samples: list[int] = []
        self._call = 0

    def begin_step(self, step: int) -> None:
        path = self._file(step)
        self._known, self._own = (torch.load(path) if path.exists() else {}), {}

    def end_step(self, step: int, rank: int) -> None:
        if not self._known:
            torch.save(self._own, self._file(step))
            return
        differ = sum(not torch.equal(own, self._known[key]) for key, own in self._own.items())
        note = {"sequences": len(self._own), "differ": differ}
        (self._folder / f"own-{step}-{rank}.json").write_text(json.dumps(note))

    def begin_pass(self, batch: PairBatch) -> None:
        self._samples, self._call = batch.sample_id.tolist(), 0

    def dpc_knn(self, tokens: Tensor, lengths: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        assignment, counts = self._find(tokens, lengths, **options)
        keys = [(sample, self._call) for sample in self._samples]
        self._call += 1
        self._own |= dict(zip(keys, assignment.split(lengths.tolist()), strict=True))
        if self._known:
            assignment = torch.cat([self._known[key] for key in keys])
        return assignment, counts

    def _file(self, step: int) -> Path:
        return self._folder / f"clusters-{step}.pt"


if __name__ == "__main__":
    pinned = Pinned(Path(sys.argv[1]))
    polymerization.dpc_knn = pinned.dpc_knn  # type: ignore[attr-defined]
    represent, take_step = AtomasModel.represent, loop._train_step

    def pinned_pass(model: AtomasModel, batch: PairBatch, *arguments: Any) -> Any:
        pinned.begin_pass(batch)
        return represent(model, batch, *arguments)

    def pinned_step(session: Any, *arguments: Any) -> Any:
        pinned.begin_step(session.step + 1)
        step = take_step(session, *arguments)
        pinned.end_step(session.step + 1, session.placement.rank)
        return step

    AtomasModel.represent = pinned_pass  # type: ignore[method-assign]
    loop._train_step = pinned_step
    sys.exit(main(sys.argv[2:]))
