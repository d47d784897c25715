"""A basis in which a symmetric matrix is tridiagonal, whatever its units and however often an eigenvalue repeats."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from jaxtyping import Float, Float64
from torch import Generator, Tensor

from ntk_lazy.precision import ieee_precision

Starts: TypeAlias = Float[Tensor, "*batch n m"]
Bases: TypeAlias = Float[Tensor, "*batch m k n"]
Tridiagonal: TypeAlias = Float64[Tensor, "*batch m k k"]

_NOISE = 10.0  # in eps of the largest image and the root of n: what is left of an image that lies in the basis
_PASSES = 2  # of Gram and Schmidt; a third one is for what is left once it has length one


@ieee_precision()
def krylov_bases(matmul: Callable[[Tensor], Tensor], starts: Starts, size: int) -> tuple[Bases, Tridiagonal]:
    """Run the process of Lanczos from each start by itself, with products in common.

    Where the images of a start end, in an invariant subspace, the process goes on from a random vector: eigenvalues
    that repeat are found as often as they occur, and with ``size = n`` the basis is complete. It ends early where
    nothing but rounding is left of the matrix outside of the basis.

    Args:
        matmul: Multiplies with A, a batch of symmetric matrices.
        starts: Not zero.
        size: Most vectors in a basis; at most n.

    Returns:
        Q with orthonormal rows, and ``Q A Qᵀ`` in float64. A start that ended before others has zero rows.

    Cost: ``size`` products with m columns, ``6 n size²`` operations for each start; the bases are held.

    Source: Lanczos (1950), with complete orthogonalisation; a fresh vector where a subspace ends, as in Golub and Van
        Loan, Matrix Computations (2013), section 10.1.
    """
    *batch, n, m = starts.shape
    size = min(size, n)
    Q = starts.new_zeros(*batch, m, size, n)
    T = torch.zeros(*batch, m, size, size, dtype=torch.float64, device=starts.device)
    generator = Generator().manual_seed(0)
    V = _unit(starts.mT)  # vectors lie as rows
    largest = torch.zeros(*batch, m, 1, dtype=torch.float64, device=starts.device)
    is_alive = torch.ones(*batch, m, 1, dtype=torch.bool, device=starts.device)
    is_fresh = torch.zeros_like(is_alive)
    for step in range(size):
        image = matmul(V.mT).mT
        norm = _norm(image)
        largest = largest.maximum(norm)
        floor = _NOISE * n**0.5 * torch.finfo(V.dtype).eps * largest
        # A random vector has a part in whatever is left of A.
        is_alive &= ~(is_fresh & (norm <= floor))
        if not bool(is_alive.any()):
            return Q[..., :step, :], T[..., :step, :step]
        Q[..., step, :] = torch.where(is_alive, V, 0)
        T[..., step, step] = torch.where(is_alive, _inner(V, image), 0).squeeze(-1)
        if step + 1 == size:
            break
        left = image
        for _ in range(_PASSES):
            left = _without(left, Q[..., : step + 1, :])
        beta = _norm(left)
        is_fresh = is_alive & ~(beta > floor)
        if bool(is_fresh.any()):
            random = torch.randn(*batch, m, n, generator=generator, dtype=torch.float64).to(V)
            for _ in range(_PASSES):
                random = _without(_unit(random), Q[..., : step + 1, :])
            left, beta = torch.where(is_fresh, random, left), torch.where(is_fresh, 0, beta)
        beta = torch.where(is_alive, beta, 0).squeeze(-1)
        T[..., step, step + 1], T[..., step + 1, step] = beta, beta
        V = _unit(_without(_unit(left), Q[..., : step + 1, :]))
    return Q, T


def _without(V: Tensor, basis: Tensor) -> Tensor:
    """Take out of each row what lies in its basis."""
    V = V.unsqueeze(-2)
    return (V - (V @ basis.mT) @ basis).squeeze(-2)


def _unit(V: Tensor) -> Tensor:
    norm = _norm(V)
    return (V / torch.where(norm > 0, norm, 1.0)).to(V.dtype)


def _norm(V: Tensor) -> Tensor:
    return torch.linalg.vector_norm(V, dim=-1, keepdim=True, dtype=torch.float64)


def _inner(X: Tensor, Y: Tensor) -> Tensor:
    return (X.double() * Y.double()).sum(-1, keepdim=True)
