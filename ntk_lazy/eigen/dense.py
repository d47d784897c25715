"""All entries, then LAPACK: the method for small operators and for many pairs."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

from ntk_lazy.eigen.iteration import RitzPairs, Space
from ntk_lazy.eigen.product import Product
from ntk_lazy.shapes import Block


class DenseSpectrum:
    """The whole matrix in float64 on the CPU, and its eigenvectors.

    Cost: ``n`` products, ``16 n²`` bytes, about ``9 n³`` operations; one process must be able to hold it.
    """

    def __init__(self, product: Product, *, num_wanted: int, block_size: int) -> None:
        self._product = product
        self._num_wanted = num_wanted
        self._block_size = block_size
        self._matrix = torch.zeros(0, 0, dtype=torch.float64)

    @property
    def next_width(self) -> int:
        """All columns."""
        return self._product.rows.total

    @property
    def is_exhaustive(self) -> bool:
        """Nothing can be missing."""
        return True

    @property
    def held_bytes(self) -> int:
        """Bytes of the matrix and of its eigenvectors."""
        return 2 * self._matrix.numel() * 8

    def step(self) -> RitzPairs:
        """Multiply with the identity, block by block, and diagonalise."""
        rows, operator = self._product.rows, self._product.operator
        n = rows.total
        K = torch.zeros(n, n, dtype=torch.float64)
        for begin in range(0, n, self._block_size):
            columns = torch.arange(begin, min(begin + self._block_size, n))
            unit = torch.zeros(n, len(columns), dtype=operator.dtype)
            unit[columns, columns - begin] = 1
            image = self._product(unit[rows.start : rows.end].to(operator.device))
            K[rows.start : rows.end, begin : begin + len(columns)] = image.double().cpu()
        K = rows.sum(K)
        asymmetry = float((K - K.mT).abs().max())
        self._matrix = (K + K.mT) / 2
        theta, U = torch.linalg.eigh(self._matrix)
        theta, U = theta.flip(0), U.flip(1)
        self._product.note_values(theta)
        theta, U = theta[: self._num_wanted + 1], U[:, : self._num_wanted + 1].contiguous()
        # The residual of what is handed out, which is rounded to the dtype of the operator.
        rounded = U.to(operator.dtype).double()
        residuals = (self._matrix @ rounded - rounded * theta).norm(dim=0)
        return RitzPairs(
            theta=theta,
            coefficients=U,
            residuals=residuals,
            removable=torch.zeros_like(residuals),
            asymmetry=asymmetry,
        )

    def space(self) -> Space:
        """Everything, in the coordinates of the rows."""
        n = self._matrix.shape[0]
        eye = torch.eye(n, dtype=torch.float64)
        return Space(self.combine(eye), self._matrix, eye)

    def combine(self, coefficients: Float64[Tensor, "m j"]) -> Block:
        """Round to the dtype of the operator."""
        rows, operator = self._product.rows, self._product.operator
        return coefficients[rows.start : rows.end].to(operator.device, operator.dtype)

    def combine_images(self, coefficients: Float64[Tensor, "m j"]) -> Block:
        """Multiply with the matrix."""
        return self.combine(self._matrix @ coefficients)

    def inject(self, block: Block) -> None:
        """Nothing can be added."""

    def tighten(self, rtol: float) -> None:
        """Nothing can be improved."""
