"""One flat vector for all parameters of J, in the order of the model, and views of it as tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float, Float64
from torch import Tensor

_PIECE = 1 << 18  # numbers that are copied to float64 at once: 2 MB, which stay in cache


@dataclass(frozen=True)
class FlatLayout:
    """Where each parameter lies in the flat vector.

    Attributes:
        shapes: Shape of each parameter, by name.
        dtypes: Dtype of each parameter, by name.
    """

    shapes: dict[str, torch.Size]
    dtypes: dict[str, torch.dtype]

    @classmethod
    def of(cls, params: Mapping[str, Tensor]) -> Self:
        """Lay out the parameters in their own order."""
        return cls({n: p.shape for n, p in params.items()}, {n: p.dtype for n, p in params.items()})

    def slices(self) -> dict[str, slice]:
        """The place of each parameter."""
        places, start = {}, 0
        for name, shape in self.shapes.items():
            places[name] = slice(start, start + shape.numel())
            start += shape.numel()
        return places

    def views(self, W: Float[Tensor, "columns p"]) -> dict[str, Tensor]:
        """View a block of flat vectors as ``(columns, *shape)`` for each parameter."""
        return {
            name: W[:, place].reshape(-1, *self.shapes[name]).to(self.dtypes[name])
            for name, place in self.slices().items()
        }

    def add(self, W: Float[Tensor, "columns p"], part: Mapping[str, Tensor]) -> None:
        """Add parameter blocks to flat vectors, in place and without another copy of all of them."""
        for name, place in self.slices().items():
            W[:, place].add_(part[name].reshape(W.shape[0], -1))


def squared_norms(W: Float[Tensor, "k passes p"]) -> Float64[Tensor, " k"]:
    """Return the squared norm of each column, summed in float64 by pieces, so that no copy of a block is held."""
    total = torch.zeros(W.shape[0], dtype=torch.float64, device=W.device)
    size = max(1, _PIECE // max(1, W.shape[0] * W.shape[1]))
    for begin in range(0, W.shape[2], size):
        total += W[..., begin : begin + size].double().square().sum((1, 2))
    return total.cpu()
