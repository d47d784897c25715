"""When an automatic search gives up its basis for the whole matrix, and how little that then costs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ntk_lazy.counts import DENSE_WIDTH
from ntk_lazy.eigen.dense import DenseSpectrum
from ntk_lazy.eigen.lanczos import BlockKrylov
from ntk_lazy.eigen.product import Product

_WASTE = 0.2  # of n: products that a search may lose before the matrix is written down
_OVERDUE = 2.0  # times what a search usually takes, where the operator writes itself down
MOST_CHECKS = 16
"""Products that certification may take of a matrix that is written down."""


@dataclass(frozen=True)
class WriteDown:
    """The way out of a search that does not come to its end: never more than about ``1.2 n`` products.

    A basis of d vectors that were multiplied is d columns of the matrix in other coordinates: the other ``n − d`` make
    it complete, so that only what restarts and probes have lost is paid twice. An operator that writes itself down for
    less than n products does that instead.

    Attributes:
        product: The operator.
        num_wanted: Pairs.
        typical: Products that a search usually takes.
    """

    product: Product
    num_wanted: int
    typical: float

    def take_over(self, method: BlockKrylov) -> tuple[DenseSpectrum, str] | None:
        """Return the method that ends the search, and its name; None while the search is worth its next step."""
        n, spent = self.product.rows.total, self.product.num_columns
        width = min(n, DENSE_WIDTH)
        lost = spent - method.num_multiplied
        is_wasteful = lost + method.next_loss > math.ceil(_WASTE * n) - MOST_CHECKS
        is_overdue = spent + method.next_width > min((1 + _WASTE) * n, max(_WASTE * n, _OVERDUE * self.typical))
        matrix = self.product.written_down() if is_wasteful or is_overdue else None
        known = None
        if matrix is None:
            if not is_wasteful or not self.product.affords(n - method.num_multiplied + MOST_CHECKS):
                return None
            eye = torch.eye(method.num_multiplied, dtype=torch.float64)
            known = self._gathered(method.combine(eye)), self._gathered(method.combine_images(eye))
        dense = DenseSpectrum(self.product, num_wanted=self.num_wanted, block_size=width, matrix=matrix, known=known)
        return dense, f"Dense(block_size={width})"

    def _gathered(self, block: Tensor) -> Tensor:
        """Put the rows of all processes together, in float64 on the CPU."""
        rows = self.product.rows
        whole = torch.zeros(rows.total, block.shape[1], dtype=torch.float64)
        whole[rows.start : rows.end] = block.double().cpu()
        return rows.sum(whole)
