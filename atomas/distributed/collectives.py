"""The collectives that Atomas calls itself, without gradient: ragged where they must be, each under its name.

Everything that the losses, the momentum copy and the loop send goes through here, so that bytes can be counted and a
collective that hangs can be named. What DeepSpeed sends for gradients and weights does not.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from atomas.phases import Collective, communication


def world_size() -> int:
    """Number of ranks; 1 where no process group runs."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 where no process group runs."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def all_gather_sizes(size: int, device: torch.device, what: str) -> list[int]:
    """One integer of every rank, in rank order."""
    if world_size() == 1:
        return [size]
    sizes = [torch.empty(1, dtype=torch.int64, device=device) for _ in range(world_size())]
    with communication(Collective(kind="all_gather", what=what, payload_bytes=8)):
        dist.all_gather(sizes, torch.tensor([size], dtype=torch.int64, device=device))
    return [int(item) for item in torch.cat(sizes).tolist()]


def all_gather_rows(rows: Tensor, sizes: Sequence[int], what: str) -> Tensor:
    """The rows [n, ...] of all ranks, in rank order; `sizes` holds each rank's n.

    Rows are padded to the longest rank, because gloo wants equal shapes.
    """
    if world_size() == 1:
        return rows.detach()
    longest = max(sizes)
    padded = rows.detach().contiguous()
    if rows.shape[0] < longest:
        padded = torch.cat([padded, padded.new_zeros(longest - rows.shape[0], *rows.shape[1:])])
    parts = [torch.empty_like(padded) for _ in sizes]
    with communication(Collective(kind="all_gather", what=what, payload_bytes=padded.nbytes)):
        dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def reduce_scatter_rows(rows: Tensor, sizes: Sequence[int], what: str) -> Tensor:
    """The sum over ranks of `rows` [sum sizes, ...], of which each rank keeps its own part."""
    if world_size() == 1:
        return rows
    # gloo has no ragged reduce-scatter: parts are padded to the longest.
    longest = max(sizes)
    parts = [
        torch.cat([part, part.new_zeros(longest - len(part), *part.shape[1:])])
        for part in rows.split(list(sizes))
    ]
    total = torch.empty_like(parts[0])
    with communication(
        Collective(kind="reduce_scatter", what=what, payload_bytes=sum(p.nbytes for p in parts))
    ):
        dist.reduce_scatter(total, parts)
    return total[: sizes[rank()]]


def all_reduce(values: Tensor, what: str, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """Reduce in place over all ranks, and return `values`."""
    if world_size() > 1:
        with communication(Collective(kind="all_reduce", what=what, payload_bytes=values.nbytes)):
            dist.all_reduce(values, op=op)
    return values


def send_to_next(rows: Tensor, shape: Sequence[int], what: str) -> Callable[[], Tensor]:
    """Begin to send `rows` to rank + 1, and to receive a tensor of `shape` and the same dtype from rank - 1.

    Call the result, once, to wait for what is received; until then `rows` must not be written.
    """
    sent = rows.detach().contiguous()
    received = sent.new_empty(list(shape))
    after, before = (rank() + 1) % world_size(), (rank() - 1) % world_size()
    operations = [dist.P2POp(dist.isend, sent, after), dist.P2POp(dist.irecv, received, before)]
    operations = [operation for operation in operations if operation.tensor.numel()]
    with communication(Collective(kind="exchange", what=what, payload_bytes=sent.nbytes)):
        requests = dist.batch_isend_irecv(operations) if operations else []

    def wait() -> Tensor:
        with communication(Collective(kind="exchange", what=what, payload_bytes=0)):
            for request in requests:
                request.wait()
        operations.clear()  # held until here: no allocator may give away what is still being sent
        return received

    return wait
