"""Peak memory on a GPU: what an operator holds beyond its arguments, results and gradients."""

from collections.abc import Callable

import pytest
import torch

import atomas_kernels as ak
from tests.gpu.problems import DEVICE, backends

pytestmark = pytest.mark.skipif(DEVICE.type != "cuda", reason="torch counts the memory of CUDA only")
MIB = 2**20


def _peak(run: Callable[[], object]) -> int:
    """Bytes allocated at most while it runs the second time."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def _fast(op: str) -> list[str]:
    return [name for name in backends(op) if name != "reference"]


@pytest.mark.parametrize("chosen", _fast("token_interaction"))
def test_token_interaction_holds_no_similarities(backend: Callable[[str], None], chosen: str) -> None:
    backend(chosen)
    batch, size, width = 128, 64, 256
    text, smiles = (
        torch.randn(batch * size, width, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(2)
    )
    weight = torch.full((batch * size,), 1 / size, device=DEVICE, requires_grad=True)
    lengths = torch.full((batch,), size, device=DEVICE)

    def run() -> object:
        scores = ak.token_interaction(text, smiles, weight, weight, lengths, lengths)
        return scores, torch.autograd.grad(scores.sum(), [text, smiles, weight])

    similarities = (batch * size) ** 2 * 2  # bytes in bfloat16
    assert _peak(run) < similarities / 2


@pytest.mark.parametrize("chosen", _fast("contrastive_cross_entropy"))
def test_contrastive_cross_entropy_holds_no_logits(backend: Callable[[str], None], chosen: str) -> None:
    backend(chosen)
    queries, queued, width = 1024, 65536, 256
    query, momentum_query, keys = (
        torch.randn(queries, width, device=DEVICE, dtype=torch.bfloat16) for _ in range(3)
    )
    queue = torch.randn(queued, width, device=DEVICE, dtype=torch.bfloat16)
    query.requires_grad_()
    temperature = torch.full((1,), 16.0, device=DEVICE, requires_grad=True)
    positive = torch.arange(queries, device=DEVICE)

    def run() -> object:
        loss = ak.contrastive_cross_entropy(
            query, momentum_query, keys, positive, temperature, alpha=0.4, queue=queue
        )
        return loss, torch.autograd.grad(loss, [query, temperature])

    logits = queries * (queries + queued) * 4
    assert _peak(run) < logits / 2


def test_clustering_holds_the_distances_within_sequences(backend: Callable[[str], None]) -> None:
    backend("native")
    sizes = [512, 100, 3, 300]
    tokens = torch.randn(sum(sizes), 768, device=DEVICE, dtype=torch.bfloat16)
    lengths = torch.tensor(sizes, device=DEVICE)
    distances = 4 * sum(size * size for size in sizes)
    assert _peak(lambda: ak.dpc_knn(tokens, lengths, ratio=0.25)) < distances + MIB


def test_momentum_update_holds_nothing(backend: Callable[[str], None]) -> None:
    backend("native")
    targets = [torch.zeros(4 * MIB, device=DEVICE) for _ in range(4)]
    sources = [torch.ones(4 * MIB, device=DEVICE, dtype=torch.bfloat16) for _ in range(4)]
    assert _peak(lambda: ak.momentum_update(targets, sources, 0.5)) < MIB
