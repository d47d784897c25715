"""LOBPCG on an orthonormal ``[X P W]``: few block calls, fixed memory."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

from ntk_lazy.eigen.criterion import Criterion
from ntk_lazy.eigen.iteration import RitzPairs, Space
from ntk_lazy.eigen.product import Product
from ntk_lazy.eigen.random_columns import RandomColumns
from ntk_lazy.linalg import Basis, column_norms, combine, gram, orthonormalise, rayleigh_ritz
from ntk_lazy.shapes import Block


class LocallyOptimal:
    """Blocks ``[X P W]``, orthonormal, with their images.

    Converged columns of ``X`` stay in the projection and only leave ``W`` (soft locking), so that they keep improving
    and cannot stall the others. ``P`` is what the Ritz vectors owe to ``[P W]``, made orthogonal to ``X`` in
    coefficients, before any long vector is touched. Images follow the same rotations, which are orthogonal, so
    that their errors do not grow.

    Cost: six blocks of ``k`` plus the guard columns.

    Source: Hetmaniuk and Lehoucq, J. Comput. Phys. 218 (2006), basis selection; Duersch et al., SIAM J. Sci.
        Comput. 40 (2018), ortho-LOBPCG.
    """

    def __init__(
        self,
        product: Product,
        draw: RandomColumns,
        *,
        start: Block,
        num_wanted: int,
        rtol: float,
    ) -> None:
        self._product = product
        self._draw = draw
        self._num_wanted = num_wanted
        self._rtol = rtol
        self._width = min(start.shape[1], product.rows.total)
        rows = product.rows
        capacity = min(3 * self._width, rows.total)
        self._basis = Basis(rows, dtype=draw.dtype, device=draw.device, capacity=capacity)
        self._images = Basis(rows, dtype=draw.dtype, device=draw.device, capacity=capacity, has_gram=False)
        self._num_old = 0
        self._last: RitzPairs | None = None
        self._pending = orthonormalise(start.clone(), [], rows=rows, width=self._width, draw=draw).Q

    @property
    def next_width(self) -> int:
        """Columns of ``W``."""
        return self._pending.shape[1]

    @property
    def is_exhaustive(self) -> bool:
        """Whether the space is everything."""
        return self._basis.size == self._product.rows.total

    @property
    def held_bytes(self) -> int:
        """Bytes of the blocks and their images."""
        pending = self._pending.numel() * self._pending.element_size()
        return self._basis.num_bytes + self._images.num_bytes + pending

    def inject(self, block: Block) -> None:
        """Let directions join the next ``W``."""
        room = self._product.rows.total - self._basis.size - self._pending.shape[1]
        made = orthonormalise(
            block.clone(),
            [self._basis.block, self._pending],
            rows=self._product.rows,
            width=min(block.shape[1], room),
            draw=self._draw,
        )
        self._pending = torch.cat([self._pending, made.Q], dim=1)
        self._width = min(self._width + block.shape[1], self._product.rows.total)

    def tighten(self, rtol: float) -> None:
        """Aim at a smaller tolerance; columns that counted as converged may come back into ``W``."""
        self._rtol = rtol
        if self._last is not None and not self.is_exhaustive:
            self._choose_residuals(self._last)

    def step(self) -> RitzPairs:
        """Multiply ``W``, project on ``[X P W]``, and choose the next ``X``, ``P`` and ``W``."""
        image = self._product(self._pending)
        self._basis.append(self._pending)
        self._images.append(image)
        space = self.space()
        T, M = space.T, space.M
        asymmetry = float((T - T.mT).abs().max())
        theta, Y = rayleigh_ritz(T, M)
        self._product.note_norm(float(theta.abs().max()))
        num_kept = min(self._width, theta.numel())
        kept = Y[:, :num_kept]
        if not self.is_exhaustive:
            rotation = torch.cat([kept, self._directions(kept, M)], dim=1) if self._num_old else kept
            self._basis.rotate_(rotation)
            self._images.rotate_(rotation)
            kept = torch.eye(self._basis.size, num_kept, dtype=torch.float64)
        theta = theta[:num_kept]
        defects = self._defects(theta, kept)
        residuals = column_norms(defects, rows=self._product.rows)
        self._last = RitzPairs(
            theta=theta,
            coefficients=kept,
            residuals=residuals,
            removable=residuals,
            asymmetry=asymmetry,
            # Images are rotated with the vectors, and residuals are differences of the two.
            rounding=self._product.floor,
        )
        self._num_old = num_kept
        self._choose_residuals(self._last, defects)
        return self._last

    def space(self) -> Space:
        """``[X P]`` with ``W`` folded in."""
        T = gram(self._basis.block, self._images.block, rows=self._product.rows)
        return Space(self._basis.block, T, self._basis.gram_matrix)

    def combine(self, coefficients: Float64[Tensor, "m j"]) -> Block:
        """Form long vectors."""
        return combine(self._basis.block, coefficients)

    def combine_images(self, coefficients: Float64[Tensor, "m j"]) -> Block:
        """Form their images."""
        return combine(self._images.block, coefficients)

    def _directions(self, kept: Tensor, M: Tensor) -> Tensor:
        """Coefficients of ``P``: the new vectors without their part in the old ones, orthonormal to the new."""
        Z = kept.clone()
        Z[: self._num_old] = 0
        for _ in range(2):
            Z -= kept @ (kept.mT @ (M @ Z))
        norms = (Z * (M @ Z)).sum(dim=0).clamp_min(0).sqrt()
        # Directions of a column that no longer moves are made of the rounding of float64.
        moving = norms > torch.finfo(torch.float64).eps ** 0.5
        Z = Z[:, moving] / norms[moving]
        eigenvalues, U = torch.linalg.eigh(Z.mT @ M @ Z)
        distinct = eigenvalues > torch.finfo(torch.float64).eps ** 0.5
        return Z @ (U[:, distinct] * eigenvalues[distinct].rsqrt())

    def _defects(self, theta: Tensor, kept: Tensor) -> Block:
        """Form ``A X − X Λ``."""
        R = self.combine_images(kept)
        X = self.combine(kept)
        R -= X * theta.to(X.device, X.dtype)
        return R

    def _choose_residuals(self, pairs: RitzPairs, R: Block | None = None) -> None:
        """Make the next ``W`` of the residuals of columns that have not converged."""
        if R is None:
            R = self._defects(pairs.theta, pairs.coefficients)
        active = ~Criterion(rtol=self._rtol, floor=self._product.floor).met(pairs.theta, pairs.residuals)
        self._pending = orthonormalise(
            R[:, active.to(R.device)],
            [self._basis.block],
            rows=self._product.rows,
            width=int(active.sum()),
            draw=self._draw,
        ).Q
