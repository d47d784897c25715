"""All entries, then LAPACK: the method for small operators and for many pairs."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

from ntk_lazy.eigen.iteration import RitzPairs, Space
from ntk_lazy.eigen.product import Product
from ntk_lazy.linalg import row_tiles
from ntk_lazy.linalg.largest_pairs import largest_pairs
from ntk_lazy.shapes import Block

Known = tuple[Float64[Tensor, "n d"], Float64[Tensor, "n d"]]


class DenseSpectrum:
    """The whole matrix in float64 on the CPU, and its eigenvectors.

    Its columns come from products with unit vectors; or the operator has written them down; or an earlier search has
    multiplied an orthonormal basis ``V``, and products with the rest of the space complete it.

    Cost: ``n`` products, those of ``V`` among them, or none; ``40 n²`` bytes, about ``9 n³`` operations; one process
        must be able to hold it.
    """

    def __init__(
        self,
        product: Product,
        *,
        num_wanted: int,
        block_size: int,
        matrix: Float64[Tensor, "n n"] | None = None,
        known: Known | None = None,
    ) -> None:
        self._product = product
        self._num_wanted = num_wanted
        self._block_size = block_size
        self._matrix = matrix
        self._known = known

    @property
    def next_width(self) -> int:
        """All columns that are not known."""
        if self._matrix is not None:
            return 0
        return self._product.rows.total - (0 if self._known is None else self._known[0].shape[1])

    @property
    def is_exhaustive(self) -> bool:
        """Nothing can be missing."""
        return True

    @property
    def held_bytes(self) -> int:
        """Bytes of the matrix, of its eigenvectors, and of what LAPACK works in."""
        return 5 * self._product.rows.total**2 * 8

    def step(self) -> RitzPairs:
        """Write the matrix down, if it is not, and diagonalise it."""
        if self._matrix is None:
            self._matrix = self._by_products()
        K, dtype = self._matrix, self._product.operator.dtype
        asymmetry = _symmetrise_(K)
        theta, U, norm = largest_pairs(K, min(self._num_wanted + 1, K.shape[0]))
        self._product.note_norm(norm)
        # The residual of what is handed out, which is rounded to the dtype of the operator.
        rounded = U.to(dtype).double()
        residuals = (K @ rounded - rounded * theta).norm(dim=0)
        return RitzPairs(
            theta=theta,
            coefficients=U,
            residuals=residuals,
            removable=torch.zeros_like(residuals),
            asymmetry=asymmetry,
        )

    def space(self) -> Space:
        """Everything, in the coordinates of the rows."""
        K = self._written
        eye = torch.eye(K.shape[0], dtype=torch.float64)
        return Space(self.combine(eye), K, eye)

    def combine(self, coefficients: Float64[Tensor, "m j"]) -> Block:
        """Round to the dtype of the operator."""
        rows, operator = self._product.rows, self._product.operator
        return coefficients[rows.start : rows.end].to(operator.device, operator.dtype)

    def combine_images(self, coefficients: Float64[Tensor, "m j"]) -> Block:
        """Multiply with the matrix."""
        return self.combine(self._written @ coefficients)

    def inject(self, block: Block) -> None:
        """Nothing can be added."""

    def tighten(self, rtol: float) -> None:
        """Nothing can be improved."""

    @property
    def _written(self) -> Float64[Tensor, "n n"]:
        assert self._matrix is not None
        return self._matrix

    def _by_products(self) -> Float64[Tensor, "n n"]:
        """Multiply the identity, or what a basis lacks of the space, block by block."""
        rows, operator = self._product.rows, self._product.operator
        n = rows.total
        if self._known is None:
            basis, images, first = None, torch.zeros(n, n, dtype=torch.float64), 0
        else:
            V, known = self._known
            first = V.shape[1]
            # What is stored is multiplied, not what it was rounded from.
            rest = torch.linalg.qr(V, mode="complete").Q[:, first:].to(operator.dtype).double()
            basis, images = torch.cat([V, rest], dim=1), torch.zeros(n, n, dtype=torch.float64)
            images[rows.start : rows.end, :first] = known[rows.start : rows.end]
        for begin in range(first, n, self._block_size):
            columns = torch.arange(begin, min(begin + self._block_size, n))
            if basis is None:
                block = torch.zeros(n, len(columns), dtype=operator.dtype)
                block[columns, columns - begin] = 1
            else:
                block = basis[:, columns].to(operator.dtype)
            image = self._product(block[rows.start : rows.end].to(operator.device))
            images[rows.start : rows.end, begin : begin + len(columns)] = image.double().cpu()
        images = rows.sum(images)
        if basis is None:
            return images
        # A B = images, for a basis that is orthonormal to the rounding of its dtype.
        return torch.linalg.solve(basis, images, left=False)


def _symmetrise_(K: Float64[Tensor, "n n"]) -> float:
    """Replace a matrix by the mean of itself and its transpose; return the largest difference of the two."""
    largest = 0.0
    for tile in row_tiles(K.shape[0], K.shape[1], device=K.device):
        right, below = K[tile, tile.start :], K[tile.start :, tile].mT
        largest = max(largest, float((right - below).abs().max()))
        mean = (right + below) / 2
        K[tile, tile.start :] = mean
        K[tile.start :, tile] = mean.mT
    return largest
