"""The gather against one process that holds all rows."""

from pathlib import Path

import torch
import torch.distributed as dist

from atomas.distributed.collectives import all_gather_sizes
from atomas.distributed.gather import gather_rows
from tests.ranks import run_ranks


def test_single_process_is_the_identity() -> None:
    rows = torch.randn(3, 2, requires_grad=True)
    assert gather_rows(rows, what="rows") is rows
    assert all_gather_sizes(5, torch.device("cpu"), "rows") == [5]


def _worker(rank: int, world: int, path: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    torch.manual_seed(0)
    everything = torch.randn(7, 3, dtype=torch.float64)
    weight = torch.randn(7, 7, dtype=torch.float64)
    sizes = [2, 5] if world == 2 else [1, 0, 2, 4]
    rows = everything.split(sizes)[rank].clone().requires_grad_()
    full = everything.clone().requires_grad_()

    gathered = gather_rows(rows, what="rows")
    assert torch.equal(gathered, everything)
    loss = (torch.tanh(gathered @ gathered.T) * weight).sum()
    loss.backward()
    (torch.tanh(full @ full.T) * weight).sum().backward()
    assert rows.grad is not None
    assert full.grad is not None
    # the average over ranks that data parallelism takes divides by the world size
    torch.testing.assert_close(rows.grad / world, full.grad.split(sizes)[rank], rtol=1e-12, atol=1e-12)

    ids = torch.arange(7).split(sizes)[rank]
    assert torch.equal(gather_rows(ids, what="ids"), torch.arange(7))
    dist.destroy_process_group()


def test_gradient_is_that_of_the_global_loss(tmp_path: Path) -> None:
    for world in (2, 4):
        run_ranks(_worker, world, world, str(tmp_path / f"store{world}"))
