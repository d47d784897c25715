"""A number that may have been sampled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float64
from torch import Tensor

_LARGEST_SKEW = 8**0.5  # of a quadratic form in normal numbers: that of one direction


@final
@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value with its standard error; ``float()`` gives the value.

    Attributes:
        value: The estimate.
        standard_error: One standard deviation of the sampling, itself estimated from the samples, rather too large
            than too small; 0 where nothing was sampled. Two of them make a bar that covers at least 93 of 100: it is
            widened for few samples and for skewed ones.
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


def error_of_mean(products: Float64[Tensor, "m m"], overlaps: Float64[Tensor, "m m"]) -> float:
    """Return the standard error of the mean of at least 4 quadratic forms, widened for their number and their skew.

    Args:
        products: ``ω_iᵀ C ω_j``; the forms are on its diagonal.
        overlaps: ``ω_iᵀ ω_j``.
    """
    m = len(products)
    return float(products.diagonal().std()) / (m * (m - 3) / (m - 1)) ** 0.5 * skew_widening(products, overlaps)


def skew_widening(products: Float64[Tensor, "m m"], overlaps: Float64[Tensor, "m m"]) -> float:
    """Say by how much an error of a mean of quadratic forms must be widened for them being skewed: ``1 + |γ|/√m``.

    A form in which one direction counts is a χ² of one degree: where a mean of few comes out low their spread does so
    too, and the bar is short on the side where the truth lies. Its upper end moves by ``(2 z² + 1) γ / (6 √m)``
    standard errors, 0.75 of what is added here for ``z = 2``; the rest is for terms of higher order, which count with
    16 samples.

    The third moment of 16 numbers says next to nothing. But products of different samples have
    ``E (ω_iᵀ C ω_j)² = tr C²`` and a like one of three in a circle is ``tr C³``: 120 pairs and 560 triples. For samples
    of one length, C counts without its mean eigenvalue, which adds the same to each.

    Source: Hall, On the removal of skewness by transformation (J. R. Stat. Soc. B 54, 1992), equation 2.
    """
    m = len(products)
    centred = products - products.trace() / overlaps.trace() * overlaps
    centred = centred - torch.diag(centred.diagonal())
    square = float(centred.square().sum()) / (m * (m - 1))
    cube = float((centred @ centred * centred).sum()) / (m * (m - 1) * (m - 2))
    if not square > 0:
        return 1.0
    return 1 + min(8 * abs(cube) / (2 * square) ** 1.5, _LARGEST_SKEW) / m**0.5


def jackknife_error(without_one: Float64[Tensor, " m"]) -> float:
    """Return the standard error of a statistic from its values without each of at least 4 samples, widened alike."""
    m = len(without_one)
    spread = (without_one - without_one.mean()).square().sum()
    return float(torch.sqrt(spread * (m - 1) / m * (m - 1) / (m - 3)))
