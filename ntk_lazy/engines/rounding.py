"""Whether two results are the same up to rounding, on a handful of examples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Self, final

import torch
from torch import Tensor

# Rounding through a deep network stays under this many eps of the largest entry; the faults that are looked
# for (dropout, batch statistics, a missing derivative) are larger by orders of magnitude.
_EPS_FACTOR = 1e4


@final
@dataclass(frozen=True)
class Rounding:
    """What rounding may do to a result.

    Attributes:
        bound: Relative to the largest entry.
    """

    bound: float

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> Self:
        """Take the bound of the coarsest dtype that a computation goes through."""
        eps = max((torch.finfo(t.dtype).eps for t in tensors if t.is_floating_point()), default=0.0)
        return cls(_EPS_FACTOR * eps)

    def separates(
        self, found: Tensor, expected: Tensor, *, scale: float = 0.0, measured: Callable[[], float] | None = None
    ) -> bool:
        """Whether a tensor differs from a finite one by more than rounding.

        Args:
            found: Any tensor.
            expected: What it should be.
            scale: Largest entry that rounding is measured against, where ``expected`` is one part of a whole.
            measured: Measures what rounding really does, where large terms may have cancelled; asked only if the
                difference is more than rounding of results of this size.
        """
        if found.shape != expected.shape:
            return True
        difference = largest(found - expected)
        # Written so that a NaN differs.
        if difference <= self.bound * max(largest(expected), scale):
            return False
        return not (measured is not None and difference <= measured())


def largest(*tensors: Tensor) -> float:
    """Return the largest magnitude in some tensors, 0 for empty ones, NaN if one holds a NaN."""
    return float(torch.tensor([float(t.abs().max()) for t in tensors if t.numel()] or [0.0]).max())


def noise(shape: tuple[int, ...], *, like: Tensor, seed: int) -> Tensor:
    """Draw standard normal numbers that depend on the shape and the seed alone; the global RNG is not touched."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype=like.dtype, device=like.device)
