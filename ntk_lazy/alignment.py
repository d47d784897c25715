"""How a kernel lies to a target, an output or a residual, and how two kernels or two eigenspaces lie to each other."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ntk_lazy.columns import HasVectors, as_directions, check_orthonormal, span_of
from ntk_lazy.errors import ArgumentError, DegenerateError, ShapeError
from ntk_lazy.linalg import gram
from ntk_lazy.linalg.gram import row_tiles
from ntk_lazy.rows import Rows

# A cumulative energy above 1 by this much is rounding in float32 vectors; more says that they are not orthonormal.
_ENERGY_SLACK = 1e-3
_SMALLEST_SINE = 1e-5


def relative_energy(pairs: HasVectors | Tensor, phi: Float[Tensor, "*shape"]) -> Float64[Tensor, " k"]:
    """Measure how much of a function lies in the span of the first 1, 2, … k eigenvectors.

    Also known as cumulative power (of a target) or energy concentration. Where eigenvalues are close to each
    other their vectors turn into one another from step to step: read the energy at the end of such a group,
    never inside it. The rest of the vectors holds ``1 − E(φ, k)``; a φ that does not depend on the kernel has
    ``k/n`` on average.

    Args:
        pairs: An ``EigenResult``, or a tensor of orthonormal columns ``(n, k)``, most important first.
        phi: ``(n,)`` or ``(N, C)`` with ``n = N C`` in the order ``i * C + c``, or ``(n, c)`` for c functions
            together (Frobenius inner product). Not centred here.

    Returns:
        ``E(φ, j) = Σ_{i≤j} ‖v_iᵀφ‖² / ‖φ‖²`` for j = 1 … k, shape ``(k,)``, float64 on the CPU: in [0, 1] and never
        falling. Energies over pairs below the noise floor of the result mean nothing.

    Cost: ``2 n k c`` flops in float64, no product.

    Raises:
        ShapeError: φ does not fit the rows.
        NonFiniteError: φ or the vectors hold a NaN or an infinity.
        DegenerateError: φ is zero.
        ArgumentError: The vectors are not orthonormal.

    Source: Kopitkov and Indelman, Neural Spectrum Alignment (ICANN 2020); Canatar, Bordelon and Pehlevan,
        Spectral bias and task-model alignment (Nat. Commun. 2021), cumulative power.
    """
    V = span_of(pairs, name="pairs")
    direction, rows = as_directions(phi, V.shape[0], name="phi").to(V.device), Rows(V.shape[0])
    if isinstance(pairs, Tensor):
        check_orthonormal(gram(V, rows=rows), V.dtype, name="pairs")
    coefficients = gram(V, direction, rows=rows)
    energy = coefficients.square().sum(1).cumsum(0) / direction.square().sum().cpu()
    if not energy[-1] <= 1 + _ENERGY_SLACK:
        raise ArgumentError(
            f"{V.shape[1]} vectors hold {energy[-1]:.4f} of the energy of phi, more than all of it: they are not "
            "orthonormal. Take them from eigsh."
        )
    return energy.clamp(max=1.0)


def principal_angles(U: HasVectors | Tensor, V: HasVectors | Tensor) -> Float64[Tensor, " j"]:
    """Measure the angles between two eigenspaces, which do not depend on the basis chosen in either.

    Small angles come from sines and large ones from cosines, so that both ends are accurate.

    Args:
        U: An ``EigenResult`` or linearly independent columns ``(n, k)``.
        V: The same on the same rows, ``(n, m)``; m may differ from k.

    Returns:
        ``min(k, m)`` angles in radians, from 0 to π/2, ascending, float64 on the CPU.

    Cost: ``4 n (k + m)²`` flops in float64, no product; no copy of a block is made.

    Raises:
        ShapeError: The blocks have different rows.
        DegenerateError: The columns of one are linearly dependent.

    Source: Björck and Golub, Numerical methods for computing angles between linear subspaces (Math. Comp. 1973),
        section 3.
    """
    first, second = span_of(U, name="U"), span_of(V, name="V")
    if first.shape[1] < second.shape[1]:
        first, second = second, first
    whiten_first, whiten_second = _whitener(first), _whitener(second)
    M = whiten_first @ _cross(first, second) @ whiten_second.mT
    cosines = torch.linalg.svdvals(M).clamp(max=1.0)
    sines = _sines(first, second, whiten_first.mT @ M, whiten_second)
    return torch.where(cosines.square() < 0.5, cosines.acos(), sines.asin())


def subspace_overlap(U: HasVectors | Tensor, V: HasVectors | Tensor) -> float:
    """Measure how much two eigenspaces have in common, between 0 (orthogonal) and 1 (one holds the other).

    Compare with the baseline ``max(k, m)/n``, what a random subspace gets. It falls when k cuts through a group
    of close eigenvalues although the kernel hardly changed: choose k at a gap.

    Args:
        U: An ``EigenResult`` or linearly independent columns ``(n, k)``.
        V: The same on the same rows, ``(n, m)``.

    Returns:
        ``‖UᵀV‖_F² / min(k, m)`` for orthonormal U and V, the mean squared cosine of the principal angles.

    Cost: ``2 n (k + m)²`` flops in float64, no product.

    Raises:
        ShapeError: The blocks have different rows.
        DegenerateError: The columns of one are linearly dependent.
    """
    first, second = span_of(U, name="U"), span_of(V, name="V")
    M = _whitener(first) @ _cross(first, second) @ _whitener(second).mT
    return min(1.0, M.square().sum().item() / min(M.shape))


def _cross(first: Tensor, second: Tensor) -> Tensor:
    if first.shape[0] != second.shape[0]:
        raise ShapeError(f"vectors of {first.shape[0]} and of {second.shape[0]} rows do not live in one space.")
    return gram(first, second.to(first.device), rows=Rows(first.shape[0]))


def _whitener(V: Tensor) -> Tensor:
    """Return the small matrix W for which ``V Wᵀ`` is orthonormal."""
    G = gram(V, rows=Rows(V.shape[0]))
    norms = G.diagonal().sqrt()
    if not norms.isfinite().all():
        raise ShapeError("a block of vectors holds a NaN or an infinity.")
    factor, info = torch.linalg.cholesky_ex(G / norms.outer(norms))
    # A pivot is the sine between a column and those before it; whitening loses its square from 16 digits.
    if info != 0 or not factor.diagonal().min() > _SMALLEST_SINE:
        raise DegenerateError(f"the {V.shape[1]} columns are linearly dependent, so they span less than they should.")
    return torch.linalg.solve_triangular(factor, torch.diag(1 / norms), upper=False)


def _sines(first: Tensor, second: Tensor, coefficients: Tensor, whiten_second: Tensor) -> Tensor:
    """Return the sines of the angles, ascending: singular values of what the first space leaves of the second."""
    # A running triangular factor, not a Gram matrix: that would lose the sines below 1e-8.
    triangle = torch.zeros(0, second.shape[1], dtype=torch.float64, device=second.device)
    for tile in row_tiles(second.shape[0], first.shape[1] + second.shape[1]):
        rest = second[tile].double() @ whiten_second.mT.to(second.device)
        rest -= (first[tile].double() @ coefficients.to(first.device)).to(second.device)
        triangle = torch.linalg.qr(torch.cat([triangle, rest]), mode="r").R
    return torch.linalg.svdvals(triangle.cpu()).flip(0).clamp(max=1.0)
