"""Whether two results are the same up to rounding, on a handful of examples."""

from __future__ import annotations

import torch
from torch import Tensor

# Rounding through a deep network stays under this many eps of the largest entry; the faults that are looked
# for (dropout, batch statistics, a missing derivative) are larger by orders of magnitude.
EPS_FACTOR = 1e4


def differs(found: Tensor, expected: Tensor, *, scale: float = 0.0) -> bool:
    """Whether a tensor differs from a finite one by more than rounding.

    Args:
        found: Any tensor.
        expected: What it should be.
        scale: Largest entry that rounding is measured against, where ``expected`` is one part of a whole.
    """
    if found.shape != expected.shape:
        return True
    if not expected.is_floating_point():
        return not torch.equal(found, expected)
    if expected.numel() == 0:
        return False
    bound = EPS_FACTOR * torch.finfo(expected.dtype).eps * max(largest(expected), scale)
    return not largest(found - expected) <= bound  # written so that a NaN differs


def largest(*tensors: Tensor) -> float:
    """Return the largest magnitude in some tensors, 0 for empty ones."""
    return max((float(t.abs().max()) for t in tensors if t.numel()), default=0.0)


def noise(shape: tuple[int, ...], *, like: Tensor, seed: int) -> Tensor:
    """Draw standard normal numbers that depend on the shape and the seed alone; the global RNG is not touched."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype=like.dtype, device=like.device)
