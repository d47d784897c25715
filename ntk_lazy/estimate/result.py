"""A number that may have been sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float64
from torch import Tensor


@final
@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value with its standard error; ``float()`` gives the value.

    Attributes:
        value: The estimate.
        standard_error: One standard deviation of the sampling, itself estimated from the samples, rather too large
            than too small; 0 where nothing was sampled. Two of them make a bar.
        num_products: Products of an operator with one column that it took.
    """

    value: float
    standard_error: float
    num_products: int

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        if self.standard_error == 0:
            return f"{self.value:.6g}"
        return f"{self.value:.6g} ± {self.standard_error:.1g}"

    @property
    def relative_error(self) -> float:
        """The standard error relative to the value; 0 for an exact zero."""
        return self.standard_error / abs(self.value) if self.standard_error else 0.0


def error_of_mean(samples: Float64[Tensor, " m"]) -> float:
    """Return the standard error of a mean of at least 4 samples, widened for their number as Student's t is."""
    m = len(samples)
    return float(samples.std()) / (m * (m - 3) / (m - 1)) ** 0.5


def jackknife_error(without_one: Float64[Tensor, " m"]) -> float:
    """Return the standard error of a statistic from its values without each of at least 4 samples, widened alike."""
    m = len(without_one)
    spread = (without_one - without_one.mean()).square().sum()
    return float(torch.sqrt(spread * (m - 1) / m * (m - 1) / (m - 3)))
