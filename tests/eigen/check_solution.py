"""The five points that any set of eigenpairs is checked on, against LAPACK in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ntk_lazy.eigen import EigenResult


def check_solution(pairs: EigenResult, A: Tensor, k: int, *, rtol: float = 1e-3) -> None:
    """Check a set that was reported as converged.

    Orthonormality, Rayleigh quotients, honest residuals, the space of the vectors, and completeness.

    Args:
        pairs: The result.
        A: The matrix, as the operator stores it.
        k: Pairs that were asked for.
        rtol: The tolerance that was asked for.
    """
    # A power of two changes no digit, and keeps squares of 1e-30 out of the subnormal numbers.
    scale = 2.0 ** round(float(A.double().abs().max().clamp_min(1e-300).log2()))
    exact_A, values = A.double() / scale, pairs.values / scale
    reported = pairs.residual_norms / scale
    exact, U = torch.linalg.eigh(exact_A)
    exact, U = exact.flip(0), U.flip(1)
    norm = float(exact.abs().max())
    X = pairs.vectors.double()
    eps = torch.finfo(pairs.vectors.dtype).eps
    floor = pairs.noise_floor * norm
    n = A.shape[0]

    assert pairs.status == "converged"
    assert bool(pairs.converged.all())
    assert values.shape == reported.shape == (k,)
    assert X.shape == (n, k)
    assert bool((values.diff() <= 0).all())

    gram_defect = (X.mT @ X - torch.eye(k, dtype=torch.float64)).abs().max()
    assert gram_defect <= min(1e-6, 100 * eps * n**0.5), f"orthonormality {gram_defect:.1e}"

    quotients = ((exact_A @ X) * X).sum(dim=0)
    assert bool(((quotients - values).abs() <= rtol**2 * values.abs() + floor).all()), "Rayleigh quotients"

    true = (exact_A @ X - X * values).norm(dim=0)
    assert bool((true <= 1.1 * torch.maximum(rtol * values.abs(), torch.tensor(floor))).all()), "residuals"
    assert bool((true <= 2 * reported + floor).all()), "residuals are reported too small"
    assert bool((reported <= 2 * true + 2 * floor).all()), "residuals are reported too large"

    # A residual of rtol moves a value by less than rtol, so a larger difference is another eigenvalue.
    missed = (values - exact[:k]).abs() > rtol * exact[:k].abs() + 2 * floor
    assert not bool(missed.any()), f"values {missed.nonzero().flatten().tolist()} belong to other eigenvalues"

    # Davis-Kahan for the first m vectors, wherever the spectrum has a gap that says something.
    gaps = exact[:k] - torch.cat([exact[1:], exact[-1:] - 1])[:k]
    for m in (gaps > 10 * (true.norm() + floor)).nonzero().flatten().tolist():
        sine = float((X[:, : m + 1] - U[:, : m + 1] @ (U[:, : m + 1].mT @ X[:, : m + 1])).norm())
        bound = float(true[: m + 1].norm() / (gaps[m] - true.norm())) + 100 * eps
        assert sine <= 2 * bound, f"space of the first {m + 1} vectors: {sine:.1e} above {bound:.1e}"
