"""Cross entropy over a large vocabulary without the logits of a whole batch."""

from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from atomas_kernels import checks
from atomas_kernels.reference.segments import compute_dtype

_LOGITS_PER_CHUNK = {"cpu": 1 << 22, "cuda": 1 << 24}
"""Entries of one chunk [rows, V]; 16 and 64 MiB in float32. A GPU wants larger products than a core."""
_ROW_ALIGNMENT = 16
"""Entries; 64 bytes in float32."""


def lm_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int) -> Tensor:
    """See `atomas_kernels.lm_cross_entropy`."""
    valid = (labels != ignore_index).nonzero().squeeze(1)
    labels = labels[valid]
    checks.index_range("labels", labels, weight.shape[0])
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden[valid], weight, labels)
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of hidden [n, D] @ weight^T; both gradients are finished in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        n, vocabulary = hidden.shape[0], weight.shape[0]
        accumulate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        loss = torch.zeros((), dtype=accumulate, device=hidden.device)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.empty_like(weight, dtype=accumulate) if need_weight else None

        entries = _LOGITS_PER_CHUNK.get(hidden.device.type, max(_LOGITS_PER_CHUNK.values()))
        rows = max(1, min(n, entries // max(vocabulary, 1)))
        # Fresh pages for the logits of every chunk, or rows that start anywhere in a cache line, cost a CPU about a
        # quarter of the product.
        buffer = hidden.new_empty(rows, ceil(vocabulary / _ROW_ALIGNMENT) * _ROW_ALIGNMENT)[:, :vocabulary]
        for start in range(0, n, rows):
            h, target = hidden[start : start + rows], labels[start : start + rows, None]
            logits = compute_dtype(torch.mm(h, weight.T, out=buffer[: len(h)]))
            wanted, highest = logits.gather(1, target), logits.amax(dim=1, keepdim=True)
            # One exponential, in place, for the loss and its gradient.
            exponential = logits.sub_(highest).exp_()
            total = exponential.sum(dim=1, keepdim=True)
            loss += (total.log() + highest - wanted).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            gradient = exponential.mul_(1 / (n * total))
            gradient.scatter_add_(1, target, gradient.new_full(target.shape, -1 / n))
            gradient = gradient.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(gradient, weight, out=grad_hidden[start : start + rows])
            if grad_weight is None:
                continue
            if grad_weight.dtype != h.dtype:
                product = gradient.T @ h
                grad_weight = grad_weight.add_(product) if start else grad_weight.copy_(product)
            elif start:
                grad_weight.addmm_(gradient.T, h)
            else:
                torch.mm(gradient.T, h, out=grad_weight)
        if grad_weight is not None and not n:
            grad_weight.zero_()

        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype))
        return loss / max(n, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        # In place where they are wanted once: the weight's is as large as the vocabulary.
        scale = torch.mul if _graph_is_kept() else Tensor.mul_
        grad_hidden, grad_weight = (
            None if g is None else scale(g, grad_loss).to(g.dtype) for g in ctx.saved_tensors
        )
        return grad_hidden, grad_weight, None


def _graph_is_kept() -> bool:
    """Whether the backward pass that runs may be followed by another one over the same graph."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return asked is None or bool(asked())
