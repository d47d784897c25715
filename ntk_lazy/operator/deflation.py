"""A preconditioner from eigenpairs that somebody has already."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_lazy.errors import ArgumentError, ShapeError
from ntk_lazy.linalg.conjugate_gradients import Map

_MOST_DEFECT = 1e-2  # relative residual of a pair
_MOST_OVERLAP = 100.0  # in eps; the preconditioner takes vectors for orthonormal


def root_of_pairs(matmul: Map, kernel: Any, values: Tensor, vectors: Tensor) -> Float[Tensor, "n k"]:
    """Check eigenpairs of a kernel, and return ``V sqrt(Λ)``, with which ``K ≈ V Λ Vᵀ`` is a preconditioner.

    Args:
        matmul: Multiplies with K.
        kernel: K, for its shape, dtype and device.
        values: Shape ``(k,)``, positive.
        vectors: Shape ``(n, k)``, orthonormal.

    Cost: a product with one column, and ``n k²`` operations.

    Raises:
        ShapeError: Sizes, dtype or device that are not those of K.
        ArgumentError: Values that are not positive, vectors that are not orthonormal, pairs that are not those of K.
    """
    n = kernel.shape[-1]
    if vectors.ndim != 2 or vectors.shape[0] != n or values.shape != vectors.shape[1:] or not values.numel():
        raise ShapeError(
            f"values of shape {tuple(values.shape)} and vectors of shape {tuple(vectors.shape)} are no pairs of a "
            f"kernel with {n} rows: pass (k,) and ({n}, k)."
        )
    if vectors.dtype != kernel.dtype or vectors.device != kernel.device:
        raise ShapeError(
            f"vectors are {vectors.dtype} on {vectors.device} and the kernel is {kernel.dtype} on {kernel.device}; "
            "convert them."
        )
    values = values.detach().to(vectors.device, torch.float64)
    vectors = vectors.detach()
    if not bool((values > 0).all() & values.isfinite().all()):
        raise ArgumentError("an eigenvalue is not positive and finite: pass those pairs alone that are above rounding.")
    slack = _MOST_OVERLAP * torch.finfo(kernel.dtype).eps
    overlap = vectors.mT @ vectors - torch.eye(len(values), dtype=vectors.dtype, device=vectors.device)
    if not float(overlap.abs().max()) <= slack:
        raise ArgumentError(f"VᵀV differs from the unit matrix by {float(overlap.abs().max()):.1e}: orthonormalise V.")
    signs = torch.randint(2, values.shape, generator=torch.Generator().manual_seed(0)).mul(2).sub(1).to(values)
    # Divided by its value, each pair has the same part in the image.
    mixed = (vectors @ (signs / values).to(vectors.dtype)).unsqueeze(1)
    image = (vectors @ signs.to(vectors.dtype)).unsqueeze(1)
    defect = float((matmul(mixed) - image).norm() / image.norm())
    if not defect <= _MOST_DEFECT:
        raise ArgumentError(
            f"these are not eigenpairs of this kernel: residuals are {defect:.1e} of the values, {_MOST_DEFECT:g} is "
            "allowed. Pairs belong to one set of points, parameters and scale; of a search that ended early, pass the "
            "converged ones."
        )
    return vectors * values.sqrt().to(vectors.dtype)
