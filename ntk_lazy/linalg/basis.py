"""A growing set of orthonormal columns, with the Gram matrix that says how orthonormal they are."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ntk_lazy.linalg.tiles import combine, gram, row_tiles
from ntk_lazy.rows import Rows


class Basis:
    """Columns ``V`` of one dtype on one device, and ``M = Vᵀ V`` in float64.

    Columns are stored one after the other, so that appending writes and never moves; a full store grows
    by half. Columns of float32 are orthonormal to about 1e-7 only: ``M`` keeps what is missing, and the
    Rayleigh-Ritz step takes it into account. A basis without Gram matrix (``has_gram=False``) is a plain store, for
    the images of another.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        capacity: int = 64,
        has_gram: bool = True,
    ) -> None:
        self.rows = rows
        self._has_gram = has_gram
        self._store = torch.empty(max(1, capacity), rows.local, dtype=dtype, device=device)
        self._size = 0
        self.gram_matrix: Float64[Tensor, "m m"] = torch.zeros(0, 0, dtype=torch.float64)

    @property
    def size(self) -> int:
        """Number of columns."""
        return self._size

    @property
    def num_bytes(self) -> int:
        """Bytes of the store, the unused columns included."""
        return self._store.numel() * self._store.element_size()

    @property
    def block(self) -> Float[Tensor, "n m"]:
        """All columns, as a view."""
        return self.columns(0, self._size)

    def columns(self, start: int, stop: int) -> Float[Tensor, "n b"]:
        """Columns ``start:stop``, as a view."""
        return self._store[start:stop].mT

    def append(self, Q: Float[Tensor, "n b"]) -> None:
        """Add columns, and the rows of the Gram matrix that belong to them."""
        stop = self._size + Q.shape[1]
        if stop > self._store.shape[0]:
            grown = self._store.new_empty(max(stop, self._store.shape[0] * 3 // 2), self._store.shape[1])
            grown[: self._size] = self._store[: self._size]
            self._store = grown
        self._store[self._size : stop] = Q.mT
        if self._has_gram:
            new = gram(self.columns(0, stop), self.columns(self._size, stop), rows=self.rows)
            M = torch.empty(stop, stop, dtype=torch.float64)
            M[: self._size, : self._size] = self.gram_matrix
            M[:, self._size :] = new
            M[self._size :, :] = new.mT
            self.gram_matrix = M
        self._size = stop

    def rotate_(self, S: Float64[Tensor, "m j"]) -> None:
        """Replace the columns by ``V S`` in place, tile by tile of rows; ``j`` may be smaller than ``m``."""
        small = S.mT.to(self._store.device)
        for tile in row_tiles(self._store.shape[1], self._size + S.shape[1], device=small.device):
            self._store[: S.shape[1], tile] = (small @ self._store[: self._size, tile].double()).to(self._store.dtype)
        self._size = S.shape[1]
        if self._has_gram:
            self.gram_matrix = gram(self.block, rows=self.rows)

    def rotate_tail_(self, start: int, U: Float64[Tensor, "b b"]) -> None:
        """Replace the columns from ``start`` on by their combinations with an orthogonal matrix."""
        self._store[start : self._size] = combine(self.columns(start, self._size), U).mT
        if self._has_gram:
            new = gram(self.block, self.columns(start, self._size), rows=self.rows)
            self.gram_matrix[:, start:] = new
            self.gram_matrix[start:, :] = new.mT
