"""Make tall blocks orthonormal, to each other and to a basis, with the factor that undoes it.

Gram matrices are summed in float64, so that Cholesky QR survives condition numbers at which float32
Householder vectors have long lost the small directions. Where even that fails, the rank is revealed by
the eigenvalues of the scaled Gram matrix and the missing columns are drawn at random: a block never gets
narrower without the caller knowing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ntk_lazy.linalg.tiles import column_norms, combine, gram, subtract_
from ntk_lazy.rows import Rows

_EPS64 = torch.finfo(torch.float64).eps
_MAX_ROUNDS = 4
_NOISE_IN_EPS = 8
_LOST = 1e-3  # of a unit column; the shift lets a direction shrink to its share of sqrt(shift), about 1e-6


@dataclass(frozen=True, kw_only=True)
class Orthonormalised:
    """``W = V C + Q R`` with ``[V Q]`` orthonormal.

    Attributes:
        Q: Shape ``(n, r)``; the last ``num_random`` columns have nothing to do with ``W``.
        C: Shape ``(m, b)``, coefficients in the basis.
        R: Shape ``(r, b)``; the rows of random columns are zero.
        num_random: Columns drawn to make up the width.
    """

    Q: Tensor
    C: Tensor
    R: Tensor
    num_random: int


def orthonormalise(
    W: Float[Tensor, "n b"],
    known: Sequence[Tensor],
    *,
    rows: Rows,
    width: int,
    draw: Callable[[int], Tensor],
) -> Orthonormalised:
    """Split a block into its part in a basis and orthonormal new columns, ``width`` of them.

    Args:
        W: Local rows of the block; overwritten.
        known: Blocks that together are the orthonormal basis ``V``, possibly none.
        rows: Adds the partial sums of all processes.
        width: Columns wanted; cut to ``n - m``, the room that is left.
        draw: Gives random columns for the directions that ``W`` lacks.

    Returns:
        Factors with ``Q`` of the width asked for. ``Q`` is orthogonal to ``V`` to a few units of rounding.

    Cost: ``8 n m b + 8 n b²`` float64 operations and four small transfers, for a block of full rank.

    Source: CGS2: Giraud et al., Numer. Math. 101 (2005). Cholesky QR with a shift: Fukaya et al., SIAM J.
        Sci. Comput. 42 (2020), Algorithm 4.2. Rank from the scaled Gram matrix: Stathopoulos and Wu, SIAM
        J. Sci. Comput. 23 (2002).
    """
    known = [block for block in known if block.shape[1]]
    width = min(width, rows.total - sum(block.shape[1] for block in known))
    before = column_norms(W, rows=rows)
    C = project_out_(W, known, rows=rows)
    Q, R = _reveal_rank(W, known, before, rows=rows)
    if Q.shape[1] > width:
        Q, R = _strongest(Q, R, width)
    num_random = 0
    for _ in range(_MAX_ROUNDS):
        missing = width - Q.shape[1]
        if missing <= 0:
            break
        drawn = draw(missing)
        size = column_norms(drawn, rows=rows)
        project_out_(drawn, [*known, Q], rows=rows)
        fresh, _ = _reveal_rank(drawn, [*known, Q], size, rows=rows)
        Q = torch.cat([Q, fresh], dim=1)
        num_random += fresh.shape[1]
    if num_random:
        R = torch.cat([R, R.new_zeros(num_random, R.shape[1])])
    return Orthonormalised(Q=Q, C=C, R=R, num_random=num_random)


def project_out_(W: Float[Tensor, "n b"], known: Sequence[Tensor], *, rows: Rows) -> Float64[Tensor, "m b"]:
    """Replace ``W`` by ``W − V C`` and return ``C``, by two passes of classical Gram-Schmidt.

    A second pass: one leaves errors of order ``eps ‖W‖ / ‖W − V C‖``, which come back as ghost copies of
    converged pairs; two are enough. ``V`` is given as blocks.
    """
    C = torch.zeros(sum(block.shape[1] for block in known), W.shape[1], dtype=torch.float64)
    for _ in range(2):
        corrections = [gram(block, W, rows=rows) for block in known]
        for block, correction in zip(known, corrections, strict=True):
            subtract_(W, block, correction)
        if corrections:
            C += torch.cat(corrections)
    return C


def _reveal_rank(W: Tensor, known: Sequence[Tensor], before: Tensor, *, rows: Rows) -> tuple[Tensor, Tensor]:
    """Factor ``W = Q R`` up to what is rounding of columns that once had the norms ``before``.

    One round finds the directions that a float64 Gram matrix can tell apart; what they leave of ``W`` is
    scaled anew and searched again, so that nothing above rounding is lost.
    """
    num_columns = W.shape[1]
    room = min(num_columns, rows.total - sum(block.shape[1] for block in known))
    noise = _NOISE_IN_EPS * torch.finfo(W.dtype).eps * before
    parts: list[Tensor] = []
    factors: list[Tensor] = []
    found = 0
    for _ in range(_MAX_ROUNDS):
        G = gram(W, rows=rows)
        alive = G.diagonal().clamp_min(0).sqrt() > noise
        if found >= room or not bool(alive.any()):
            break
        Q = combine(W, _whitening(G, alive, shifted=True))
        Q = _polish(Q, [*known, *parts], rows=rows)
        if Q.shape[1] == 0:
            break
        S = gram(Q, W, rows=rows)
        S[:, ~alive] = 0
        parts.append(Q)
        factors.append(S)
        found += Q.shape[1]
        if Q.shape[1] == num_columns:
            break
        subtract_(W, Q, S)
    if not parts:
        return W[:, :0], torch.zeros(0, num_columns, dtype=torch.float64)
    return torch.cat(parts, dim=1)[:, :room], torch.cat(factors)[:room]


def _whitening(G: Tensor, alive: Tensor, *, shifted: bool) -> Tensor:
    """Find ``T`` such that ``W T`` is nearly orthonormal, from ``G = Wᵀ W`` and the columns that count.

    Plain Cholesky first; then, where allowed, Cholesky of the shifted matrix, whose columns a second pass
    can finish; else eigenvectors, and only as many as have a direction of their own.
    """
    index = alive.nonzero().flatten()
    scale = G.diagonal()[index].rsqrt()
    S = G[index][:, index] * scale[:, None] * scale
    b = len(index)
    eye = torch.eye(b, dtype=torch.float64)
    shift = 11 * (b * b + b * (b + 1)) * _EPS64
    L, info = torch.linalg.cholesky_ex(S)
    is_safe = int(info) == 0 and float(L.diagonal().min()) ** 2 > shift
    if not is_safe and shifted:
        L, info = torch.linalg.cholesky_ex(S + shift * eye)
        is_safe = int(info) == 0
    if is_safe:
        inner = torch.linalg.solve_triangular(L, eye, upper=False).mT
    else:
        eigenvalues, U = torch.linalg.eigh(S)
        keep = eigenvalues > shift * float(eigenvalues[-1])
        inner = U[:, keep] * eigenvalues[keep].rsqrt()
    T = torch.zeros(G.shape[0], inner.shape[1], dtype=torch.float64)
    T[index] = scale[:, None] * inner
    return T


def _polish(Q: Tensor, known: list[Tensor], *, rows: Rows) -> Tensor:
    """Repeat projection and Cholesky until the columns are orthonormal, to each other and to ``known``."""
    tolerance = 2 * torch.finfo(Q.dtype).eps
    for _ in range(_MAX_ROUNDS):
        defect = 0.0
        for block in known:
            if block.shape[1]:
                C = gram(block, Q, rows=rows)
                largest = float(C.abs().max())
                if largest > tolerance:
                    subtract_(Q, block, C)
                    defect = max(defect, largest)
        G = gram(Q, rows=rows)
        own = float((G - torch.eye(Q.shape[1], dtype=torch.float64)).abs().max())
        if max(own, defect) <= tolerance:
            break
        # A column that shrank to this was made of rounding: the outer round looks again at what it left.
        alive = G.diagonal().clamp_min(0).sqrt() > _LOST
        if not bool(alive.any()):
            return Q[:, :0]
        Q = combine(Q, _whitening(G, alive, shifted=False))
    return Q


def _strongest(Q: Tensor, R: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Keep the ``width`` directions that carry most of the block."""
    U, sigma, Wt = torch.linalg.svd(R, full_matrices=False)
    return combine(Q, U[:, :width]), sigma[:width, None] * Wt[:width]
