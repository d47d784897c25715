"""The small eigenproblem of a projection, solved in float64 on the CPU."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor


def rayleigh_ritz(
    T: Float64[Tensor, "m m"], M: Float64[Tensor, "m m"]
) -> tuple[Float64[Tensor, " m"], Float64[Tensor, "m m"]]:
    """Solve ``T y = theta M y`` for a symmetric ``T`` and a Gram matrix ``M`` close to the identity.

    Args:
        T: ``Vᵀ A V``; symmetrised here.
        M: ``Vᵀ V`` of the stored columns. Using it, and not the identity, removes the 1e-7 by which float32
            columns miss orthonormality from the eigenvalues.

    Returns:
        Values in descending order and ``Y`` with ``Yᵀ M Y = I``.
    """
    L = torch.linalg.cholesky(M)
    half = torch.linalg.solve_triangular(L, (T + T.mT) / 2, upper=False)
    reduced = torch.linalg.solve_triangular(L, half.mT, upper=False)
    theta, Z = torch.linalg.eigh((reduced + reduced.mT) / 2)
    Y = torch.linalg.solve_triangular(L.mT, Z, upper=True)
    return theta.flip(0), Y.flip(1)
