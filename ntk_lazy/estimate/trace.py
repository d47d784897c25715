"""The trace: exactly from the diagonal, or from random products where the diagonal is dear."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from ntk_lazy.errors import ArgumentError
from ntk_lazy.estimate.result import Estimate
from ntk_lazy.linalg import gram
from ntk_lazy.precision import ieee_precision
from ntk_lazy.products import Operator, diagonal_of, in_units, multiply, rows_of
from ntk_lazy.rows import Rows

# In units of the dtype's rounding: lifts what rounding makes of zero eigenvalues above zero.
_SHIFT = 20
_SMALLEST_SHIFT = 1e-8


@ieee_precision()
def trace(
    A: Operator,
    *,
    method: Literal["exact", "stochastic"] = "exact",
    num_samples: int = 32,
    seed: int = 0,
) -> Estimate:
    """Measure the sum of the eigenvalues.

    For a kernel ``J Jᵀ`` the exact way costs one reverse-mode sweep for each output and no product: use it unless
    there are very many outputs.

    Args:
        A: Symmetric; for ``"stochastic"`` also positive semi-definite.
        method: ``"exact"`` sums the diagonal. ``"stochastic"`` is XNysTrace: a Nyström approximation from
            ``num_samples`` products, and the rest from the same samples, each left out once. The error falls as
            fast as the eigenvalues do.
        num_samples: Random vectors of ``"stochastic"``, at least 4.
        seed: Of the random vectors.

    Returns:
        The trace; its standard error is 0 for ``"exact"``, and where ``num_samples`` reaches n.

    Cost: the diagonal, or one block of ``num_samples`` products; ``6 n m²`` flops for m samples.

    Raises:
        ShapeError: A is not square.
        ArgumentError: There are fewer than 4 samples, or A is not positive semi-definite.
        NonFiniteError: The operator returned a NaN or an infinity.

    Source: Epperly, Tropp and Webber, XTrace (SIAM J. Matrix Anal. Appl. 2024), XNysTrace with normalisation, here
        written in Gram matrices so that no long vector is orthonormalised. Standard error: the jackknife of Epperly
        and Tropp, Efficient error and variance estimation for randomized matrix computations (SISC 2024).
    """
    rows = rows_of(A)
    if method == "exact":
        value = rows.sum(diagonal_of(A).double().sum()).item()
        return Estimate(value=value, standard_error=0.0, num_products=0)
    if method != "stochastic":
        raise ArgumentError(f"method={method!r} is unknown. Choose 'exact' or 'stochastic'.")
    if num_samples < 4:
        raise ArgumentError(f"num_samples={num_samples} leaves no sample to judge the others by; give at least 4.")
    if num_samples >= rows.total:
        return _trace_of_all_columns(A, rows)
    Omega = rows.random_block(num_samples, seed=seed, dtype=A.dtype, device=A.device)
    (Y,), unit = in_units([multiply(A, Omega)], rows)
    F, H, G = gram(Omega, rows=rows), gram(Omega, Y, rows=rows), gram(Y, rows=rows)
    scale = (G.trace() / F.trace()).sqrt()
    if scale == 0:
        return Estimate(value=0.0, standard_error=0.0, num_products=num_samples)
    value, error = _nystrom(F, H / scale, G / scale**2, rows.total, A.dtype)
    size = scale.item() * unit
    return Estimate(value=value * size, standard_error=error * size, num_products=num_samples)


def _trace_of_all_columns(A: Operator, rows: Rows) -> Estimate:
    """Multiply every unit vector: no more than as many samples would have cost."""
    local = torch.eye(rows.total, dtype=A.dtype, device=A.device)[rows.start : rows.end]
    value = rows.sum(multiply(A, local)[:, rows.start : rows.end].diagonal().double().sum()).item()
    return Estimate(value=value, standard_error=0.0, num_products=rows.total)


def _nystrom(
    F: Float64[Tensor, "m m"],
    H: Float64[Tensor, "m m"],
    G: Float64[Tensor, "m m"],
    num_rows: int,
    dtype: torch.dtype,
) -> tuple[float, float]:
    """Return the trace and its standard error from ``F = ΩᵀΩ``, ``H = ΩᵀAΩ`` and ``G = ΩᵀA²Ω``."""
    m = F.shape[0]
    H = (H + H.mT) / 2
    lowest = _lowest_eigenvalue(F, H)
    if lowest < -(torch.finfo(dtype).eps ** 0.5):
        raise ArgumentError(
            "vᵀ A v is negative for some v: the operator is not positive semi-definite, and the stochastic trace "
            "would be wrong. Use method='exact'."
        )
    # The trace of A + ν I is estimated instead and ν n taken off: no bias, whatever ν is.
    nu = max(_SHIFT * torch.finfo(dtype).eps, _SMALLEST_SHIFT, -2 * lowest)
    H, G = H + nu * F, G + 2 * nu * H + nu**2 * F
    value = _leave_one_out(F, H, G, num_rows).mean().item() - nu * num_rows
    # The estimates for the single samples share m − 1 samples each, so their spread says too little (by 3 where
    # λ_i = 0.7^i). The jackknife of the whole is never too small on average (Efron and Stein, Ann. Stat. 1981).
    kept = torch.arange(m).repeat(m, 1)[~torch.eye(m, dtype=torch.bool)].reshape(m, m - 1)
    pick = (kept[:, :, None], kept[:, None, :])
    without_one = _leave_one_out(F[pick], H[pick], G[pick], num_rows).mean(-1)
    error = (without_one - without_one.mean()).square().sum().sqrt().item()
    return value, max(error, _rounding(nu, dtype) * abs(value))


def _rounding(nu: float, dtype: torch.dtype) -> float:
    """Return what the standard error cannot be smaller than: rounding of the products, and of the small matrices."""
    return torch.finfo(dtype).eps + torch.finfo(torch.float64).eps / nu


def _leave_one_out(
    F: Float64[Tensor, "*b m m"], H: Float64[Tensor, "*b m m"], G: Float64[Tensor, "*b m m"], num_rows: int
) -> Float64[Tensor, "*b m"]:
    """Return one estimate of the trace for each sample, made of the approximation from the others.

    With ``Â = A Ω H⁻¹ (A Ω)ᵀ`` and sample i left out, ``tr Â_i = tr Â − (H⁻¹ G H⁻¹)_ii / (H⁻¹)_ii`` and
    ``ω_iᵀ (A − Â_i) ω_i = 1 / (H⁻¹)_ii``. The rest vanishes on the other samples, so only the part of ω_i
    orthogonal to them counts, of squared length ``1 / (F⁻¹)_ii``; its direction is uniform and its length is set
    to what it is on average.
    """
    L = torch.linalg.cholesky(H)
    half = torch.linalg.solve_triangular(L, G, upper=False)
    B = torch.linalg.solve_triangular(L, half.mT, upper=False)
    identity = torch.eye(F.shape[-1], dtype=torch.float64)
    inverse_half = torch.linalg.solve_triangular(L, identity.expand_as(L), upper=False)
    inverse_diagonal = inverse_half.square().sum(-2)
    downdates = (B @ inverse_half * inverse_half).sum(-2) / inverse_diagonal
    squared_lengths = 1 / torch.linalg.inv(F).diagonal(dim1=-2, dim2=-1)
    rest = (num_rows - F.shape[-1] + 1) / squared_lengths / inverse_diagonal
    return B.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True) - downdates + rest


def _lowest_eigenvalue(F: Tensor, H: Tensor) -> float:
    """Return the lowest eigenvalue of A on the span of the samples."""
    L = torch.linalg.cholesky(F)
    half = torch.linalg.solve_triangular(L, H, upper=False)
    return float(torch.linalg.eigvalsh(torch.linalg.solve_triangular(L, half.mT, upper=False))[0])
