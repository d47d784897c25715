"""Symmetric matrices whose eigenpairs are known because they were put in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DECAYS = {
    "1/i": lambda i: 1 / i,
    "1/i^2": lambda i: i**-2,
    "0.7^i": lambda i: 0.7**i,
    "one dominates": lambda i: torch.where(i == 1, 1e3, 1 / i),
    "twenty equal": lambda i: 1e-3 + 0.999 * (i <= 20).double(),
}


@dataclass(frozen=True, eq=False)
class KnownPairs:
    """What the measures read of an eigensolver's result."""

    values: Tensor
    vectors: Tensor
    residual_norms: Tensor
    noise_floor: float

    @classmethod
    def of(cls, K: Tensor, k: int) -> KnownPairs:
        """Return the top pairs of a dense matrix, from a dense eigensolver in float64."""
        values, vectors = torch.linalg.eigh(K.double())
        values, vectors = values.flip(0)[:k], vectors.flip(1)[:, :k].to(K.dtype)
        residuals = K.double() @ vectors.double() - vectors.double() * values
        return cls(values, vectors, residuals.norm(dim=0), 8 * torch.finfo(K.dtype).eps)


def decaying(name: str, n: int) -> Tensor:
    return DECAYS[name](torch.arange(1, n + 1, dtype=torch.float64))


def basis(n: int, k: int, *, seed: int) -> Tensor:
    """Orthonormal columns with uniform directions."""
    drawn = torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q


def matrix(values: Tensor, *, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A symmetric matrix with these eigenvalues and uniform directions."""
    Q = basis(len(values), len(values), seed=seed)
    K = (Q * values) @ Q.mT
    return ((K + K.mT) / 2).to(dtype)


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
