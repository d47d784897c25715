"""Block Lanczos: a Krylov relation that any block may join."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

from ntk_lazy.eigen.criterion import Criterion
from ntk_lazy.eigen.iteration import RitzPairs, Space
from ntk_lazy.eigen.product import Product
from ntk_lazy.eigen.random_columns import RandomColumns
from ntk_lazy.linalg import Basis, combine, orthonormalise, rayleigh_ritz
from ntk_lazy.shapes import Block

_MAY_WAIT = 0.95  # of the tolerance: the part of a residual that need not be reduced further


class BlockKrylov:
    """The relation ``A V[:, :d] = V H`` with orthonormal ``V`` of ``m`` columns, ``d`` of them multiplied.

    The ``m − d`` *pending* columns wait to be multiplied, ``block_size`` in a call, first come, first served: a
    start that is wider than a block makes no call wider. All of an image that the basis does not hold joins it
    as new pending columns, so the relation is exact up to rounding whatever was pending: the start block,
    random columns after a breakdown, what a completeness probe found, or the last block before a restart.
    Coefficients are kept as they were measured (``H`` is not assumed to be banded), which is full
    reorthogonalisation.

    Cost: ``2 k + 6 b`` long vectors for the basis, which is enough for most spectra. A basis that needs more grows
        by half, up to ``max_basis`` and one block, and is held twice while it is copied.
    """

    def __init__(
        self,
        product: Product,
        draw: RandomColumns,
        *,
        start: Block,
        block_size: int,
        num_wanted: int,
        max_basis: int,
        rtol: float,
    ) -> None:
        self._product = product
        self._draw = draw
        self._num_wanted = num_wanted
        self._max_basis = max_basis
        self._rtol = rtol
        self._block_size = block_size
        self._num_due = 0
        self._num_next = 0
        rows = product.rows
        typical = min(2 * num_wanted + 6 * start.shape[1], max_basis, rows.total)
        self._basis = Basis(rows, dtype=draw.dtype, device=draw.device, capacity=typical)
        self._num_done = 0
        self._H = torch.zeros(0, 0, dtype=torch.float64)
        self.inject(start)

    @property
    def next_width(self) -> int:
        """Pending columns in the next call."""
        return self._num_next

    @property
    def is_exhaustive(self) -> bool:
        """Whether the basis spans all rows and is multiplied."""
        return self._num_done == self._product.rows.total

    @property
    def num_multiplied(self) -> int:
        """Columns whose images are known."""
        return self._num_done

    @property
    def next_loss(self) -> int:
        """Multiplied columns that the next step gives up, in a restart."""
        return self._num_done - self._num_kept if self._must_restart else 0

    @property
    def held_bytes(self) -> int:
        """Bytes of the basis."""
        return self._basis.num_bytes

    def inject(self, block: Block) -> None:
        """Add the directions of a block that are new as pending columns; its own copy is overwritten."""
        room = self._product.rows.total - self._basis.size
        if room == 0:
            return
        made = orthonormalise(
            block.clone(),
            [self._basis.block],
            rows=self._product.rows,
            width=min(block.shape[1], room),
            draw=self._draw,
        )
        self._basis.append(made.Q)
        self._H = torch.cat([self._H, self._H.new_zeros(made.Q.shape[1], self._H.shape[1])])
        self._num_due = self._basis.size - self._num_done
        self._num_next = min(self._num_due, self._block_size)

    def tighten(self, rtol: float) -> None:
        """Aim at a smaller tolerance from the next step on."""
        self._rtol = rtol

    def step(self) -> RitzPairs:
        """Multiply the next columns, restarting first when their image would not fit."""
        width = self._num_next
        if self._must_restart:
            self._restart()
        done, size = self._num_done, self._basis.size
        made = orthonormalise(
            self._product(self._basis.columns(done, done + width)),
            [self._basis.block],
            rows=self._product.rows,
            width=width,
            draw=self._draw,
        )
        self._basis.append(made.Q)
        H = torch.zeros(self._basis.size, done + width, dtype=torch.float64)
        H[:size, :done] = self._H
        H[:size, done:] = made.C
        H[size:, done:] = made.R
        self._H = H
        self._num_done = done + width
        self._num_due = max(0, self._num_due - width)
        pairs = self._extract(self._num_wanted + 1)
        self._choose_next(pairs)
        return pairs

    def space(self) -> Space:
        """The multiplied columns; ``Vᵀ A V = M H``."""
        d = self._num_done
        M = self._basis.gram_matrix
        return Space(self._basis.columns(0, d), M[:d] @ self._H, M[:d, :d])

    def combine(self, coefficients: Float64[Tensor, "m j"]) -> Block:
        """Form long vectors from coefficients in the multiplied columns."""
        return combine(self._basis.columns(0, self._num_done), coefficients)

    def combine_images(self, coefficients: Float64[Tensor, "m j"]) -> Block:
        """Form ``A x`` from the relation."""
        return combine(self._basis.block, self._H @ coefficients)

    @property
    def _must_restart(self) -> bool:
        return self._basis.size + self._num_next > self._max_basis and self._num_done > self._num_kept

    @property
    def _num_kept(self) -> int:
        """Ritz vectors that survive a restart: those wanted and half of the room that two more blocks leave.

        The surplus keeps the last wanted pairs converging and remembers values that are still on their way up.
        """
        k = self._num_wanted
        room = self._max_basis - k - 2 * (self._basis.size - self._num_done)
        return k + max(1, k // 8, room // 2)

    def _extract(self, num_pairs: int) -> RitzPairs:
        """Project on the multiplied columns."""
        d, T, M = self._num_done, self.space().T, self._basis.gram_matrix
        theta, Y = rayleigh_ritz(T, M[:d, :d])
        self._product.note_norm(float(theta.abs().max()))
        theta, Y = theta[:num_pairs], Y[:, :num_pairs]
        Z = self._H @ Y
        Z[:d] -= Y * theta
        return RitzPairs(
            theta=theta,
            coefficients=Y,
            residuals=(Z * (M @ Z)).sum(dim=0).clamp_min(0).sqrt(),
            removable=Z[d:].norm(dim=0),
            asymmetry=float((T - T.mT).abs().max()),
        )

    def _choose_next(self, pairs: RitzPairs) -> None:
        """Turn the pending columns so that those which unfinished pairs need come first, and count them.

        The residual of a pair lies in the span of the pending columns. Directions in which all unfinished
        residuals together are within ``_MAY_WAIT`` of their tolerances can wait: near the end, a few columns
        finish the last pairs. At ``k = 100, b = 16`` this saves a tenth of the products and no block call.
        """
        k, d = self._num_wanted, self._num_done
        num_pending = self._basis.size - d
        self._num_next = min(num_pending, self._block_size)
        # Columns that were injected are multiplied in any case: no pair asks for what is not known yet.
        if num_pending == 0 or self._num_due or pairs.theta.numel() < k:
            return
        allowed = Criterion(rtol=self._rtol, floor=self._product.floor).tolerances(pairs.theta)[:k]
        unfinished = pairs.removable[:k] > allowed
        if not bool(unfinished.any()):
            return
        coupling = (self._H[d:] @ pairs.coefficients[:, :k])[:, unfinished] / allowed[unfinished]
        U, sigma, _ = torch.linalg.svd(coupling, full_matrices=True)
        rest = sigma.square().flip(0).cumsum(0).flip(0).sqrt()
        num_needed = int((rest > _MAY_WAIT).sum())
        if 0 < num_needed < self._num_next:
            self._basis.rotate_tail_(d, U)
            self._H[d:] = U.mT @ self._H[d:]
            self._num_next = num_needed

    def _restart(self) -> None:
        """Keep the best Ritz vectors and the pending block: the relation holds for these again.

        Source: Wu and Simon, SIAM J. Matrix Anal. Appl. 22 (2000), thick restart.
        """
        d, width = self._num_done, self._basis.size - self._num_done
        kept = self._extract(self._num_kept)
        num_kept = kept.theta.shape[0]
        S = torch.zeros(d + width, num_kept + width, dtype=torch.float64)
        S[:d, :num_kept] = kept.coefficients
        S[d:, num_kept:] = torch.eye(width, dtype=torch.float64)
        coupling = self._H[d:] @ kept.coefficients
        self._basis.rotate_(S)
        self._H = torch.cat([torch.diag(kept.theta), coupling])
        self._num_done = num_kept
