"""Layers whose weights and matrix products have the run's precision, while all between them is float32.

Every layer of the heads takes any floating input and returns float32 (float64 for float64), so that softmaxes,
norms, clustering and losses never see less, whether the run casts weights to bf16 or uses autocast. `RMSNorm` is the
backbone's and returns what its matrix products take.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from atomas_kernels import dropout


class Linear(nn.Linear):
    """[..., D_in] -> [..., D_out]."""

    def forward(self, input: Tensor) -> Tensor:
        """Multiply in the weight's dtype."""
        return at_least_float32(super().forward(input.to(self.weight.dtype)))


class LayerNorm(nn.LayerNorm):
    """[..., D] -> [..., D]."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise in float32 with scale and shift of any dtype."""
        x = at_least_float32(input)
        return F.layer_norm(
            x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps
        )


class RMSNorm(nn.Module):
    """[..., D] -> [..., D] in the weight's dtype: T5's norm, without mean and shift.

    Computed in float32 (float64 for float64) and rounded once, after the product with the weight. That is T5's own
    to rounding in float32; in bf16 T5 rounds the normalised states before that product too, and in float64 it takes
    the variance in float32.
    """

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        """Share the [D] `weight` of another norm."""
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, input: Tensor) -> Tensor:
        """Divide by the root of the mean square."""
        x = at_least_float32(input)
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps).to(self.weight.dtype)


class Dropout(nn.Dropout):
    """Any shape, unchanged; in training the operator, where torch does not compile its own."""

    def forward(self, input: Tensor) -> Tensor:
        """Set values to zero at the rate, and scale the others so that the mean stays."""
        if not self.training or not self.p or is_compiling():
            return super().forward(input)
        return dropout(input, self.p)


class SequenceConvolution(nn.Conv1d):
    """Convolution of width 3 without bias along each sequence of a ragged batch, zeros beyond its ends."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width, kernel_size=3, padding=1, bias=False)

    def forward(self, input: Tensor, positions: Tensor) -> Tensor:  # type: ignore[override]
        """[T, D] tokens and their [T] places within their sequences -> [T, D].

        One product with all three taps, then the outer two are shifted: the input is never unfolded.
        """
        taps = self.weight.permute(2, 0, 1).flatten(0, 1)
        before, here, after = F.linear(input.to(taps.dtype), taps).chunk(3, dim=1)
        first = (positions == 0)[:, None]
        # The token before a sequence's first one, and the token after its last one, belong to its neighbours.
        from_left = F.pad(before[:-1], (0, 0, 1, 0)).masked_fill(first, 0)
        from_right = F.pad(after[1:].masked_fill(first[1:], 0), (0, 0, 0, 1))
        return at_least_float32(from_left + here + from_right)


def at_least_float32(values: Tensor) -> Tensor:
    """float64 stays, every other floating dtype becomes float32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def product_dtype(weight: Tensor) -> torch.dtype:
    """What a matrix product with `weight` takes: autocast's dtype where that is on, the weight's elsewhere."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def full_precision(device: torch.device) -> Any:
    """Context in which autocast is off."""
    return torch.autocast(device.type, enabled=False)
