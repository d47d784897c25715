"""When a pair counts as found."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

_FLOOR_IN_EPS = 8


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """``‖A x − theta x‖ <= rtol · |theta|``, for each pair by itself.

    A value below the floor, a share of ``‖A‖``, is made of rounding, so that no test relative to it can be met; there
    the residual must be below the floor too. This is what makes the null space of a rank-deficient operator count as
    found, with values of rounding size.

    Attributes:
        rtol: Relative tolerance.
        floor: Size of rounding, in the units of the values.
    """

    rtol: float
    floor: float

    def tolerances(self, theta: Float64[Tensor, " j"]) -> Float64[Tensor, " j"]:
        """Largest residual that each pair may have."""
        size = theta.abs()
        return torch.where(size > self.floor, self.rtol * size, torch.full_like(size, self.floor))

    def met(self, theta: Float64[Tensor, " j"], residuals: Float64[Tensor, " j"]) -> Bool[Tensor, " j"]:
        """Say which pairs count as found."""
        return residuals <= self.tolerances(theta)


def least_noise(dtype: torch.dtype, num_rows: int) -> float:
    """Noise that is assumed where less was measured: a sum in a lucky order measures none.

    Eight units of rounding of the products, and ``√n`` of the float64 algebra, whose backward error grows so in
    practice; the second matters for float64 operators alone.
    """
    own = _FLOOR_IN_EPS * torch.finfo(dtype).eps
    return float(own + num_rows**0.5 * torch.finfo(torch.float64).eps)
