"""Matrices with known eigenvalues, and an operator that behaves in whatever way a test wants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from ntk_lazy.rows import Rows


@dataclass(frozen=True)
class Spectrum:
    """A symmetric matrix given by its eigenvalues, with Haar-distributed eigenvectors."""

    name: str
    values: tuple[float, ...]

    def __str__(self) -> str:
        return self.name

    def matrix(self, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
        """Build the matrix in float64, scale it and round it once."""
        Q = haar(len(self.values))
        A = (Q * torch.tensor(self.values, dtype=torch.float64)) @ Q.mT
        return ((A + A.mT) / 2 * scale).to(dtype)


@cache
def haar(n: int, seed: int = 7) -> Tensor:
    """Draw an orthogonal matrix."""
    generator = torch.Generator().manual_seed(seed)
    Q, R = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return Q * R.diagonal().sign()


def spectrum(name: str, value: Callable[[int], float], n: int) -> Spectrum:
    """Tabulate eigenvalue number ``i = 1..n``."""
    return Spectrum(name, tuple(sorted((float(value(i)) for i in range(1, n + 1)), reverse=True)))


def hard_spectra(n: int) -> list[Spectrum]:
    """The named hard cases: degenerate, clustered, rank-deficient, flat, steep."""

    def grouped(spread: float) -> Callable[[int], float]:
        return lambda i: (1 + (i - 1) // 10) ** -2.0 * (1 - spread * ((i - 1) % 10) / 9)

    table: dict[str, Callable[[int], float]] = {
        "zero": lambda i: 0.0,
        "multiple of the identity": lambda i: 3.7,
        "rank 1": lambda i: float(i == 1),
        "rank below k": lambda i: 1 / i if i <= 5 else 0.0,
        "rank exactly k": lambda i: 1 / i if i <= 10 else 0.0,
        "10 copies at the top": lambda i: 1.0 if i <= 10 else 0.1 / i,
        "24 copies at the top": lambda i: 1.0 if i <= 24 else 0.1 / i,
        "10 copies at the cut": lambda i: 2 / i if i <= 5 else 0.2 if i <= 15 else 0.05 / i,
        "10 copies inside": lambda i: 1 / i if i <= 3 else 0.3 if i <= 13 else 0.2 / i,
        "clusters of 1e-3": grouped(1e-3),
        "clusters of 1e-6": grouped(1e-6),
        "power 1": lambda i: 1 / i,
        "power 1.3": lambda i: i**-1.3,
        "power 2": lambda i: i**-2.0,
        "exponential": lambda i: 2.0**-i,
        "step and flat tail": lambda i: 1.0 if i <= 12 else 1e-3,
        "one huge value": lambda i: 1.0 if i == 1 else 1e-6 / i,
        "plateau": lambda i: 1 - i / 1000,
        "nearly positive": lambda i: 1 / i if i <= 20 else -1e-16,
        "indefinite": lambda i: 1 / i if i <= n // 2 else -1 / (i - n // 2),
        "linear": lambda i: (n - i) / n,
    }
    return [spectrum(name, value, n) for name, value in table.items()]


def named_matrices(n: int) -> dict[str, Tensor]:
    """Matrices of the textbooks whose entries are simple and whose eigenvalues are not."""
    index = torch.arange(n, dtype=torch.float64)
    wilkinson = torch.diag((index - (n - 1) / 2).abs())
    wilkinson += torch.diag(torch.ones(n - 1, dtype=torch.float64), 1)
    wilkinson += torch.diag(torch.ones(n - 1, dtype=torch.float64), -1)
    lauchli = torch.cat([torch.ones(1, n - 1, dtype=torch.float64), 1e-3 * torch.eye(n - 1, dtype=torch.float64)])
    return {
        "Hilbert": 1 / (index[:, None] + index + 1),
        "Wilkinson": wilkinson,
        "Läuchli": lauchli @ lauchli.mT,
        "ones": torch.ones(n, n, dtype=torch.float64),
        "identity": torch.eye(n, dtype=torch.float64),
    }


def study_spectra(n: int) -> list[Spectrum]:
    """The spectra that the counts of products refer to, with values shaped like those of real kernels."""

    def exponential(i: int) -> float:
        return 1.0 if i == 1 else max(1 / 20 * (20 * 1e-6) ** ((i - 2) / 98), 1e-12)

    def grouped(spread: float) -> Callable[[int], float]:
        return lambda i: (1 + (i - 1) // 10) ** -2.0 * (1 - spread * ((i - 1) % 10) / 9)

    return [
        spectrum("pow2.1", lambda i: 1.0 if i == 1 else (i / 2) ** -2.07 / 30, n),
        spectrum("exp", exponential, n),
        spectrum("pow1.3", lambda i: 1.0 if i == 1 else (i / 2) ** -1.3 / 20, n),
        spectrum("clus10", grouped(0.15), n),
        spectrum("tight10", grouped(0.001), n),
    ]


@dataclass
class Spy:
    """A symmetric operator that counts, and that can be told to misbehave."""

    matrix: Tensor
    tamper: Callable[[int, Tensor, Tensor], object] = lambda call, V, image: image
    num_outputs: int = 1
    widths: list[int] = field(default_factory=list)

    @property
    def rows(self) -> Rows:
        return Rows(self.matrix.shape[0])

    @property
    def dtype(self) -> torch.dtype:
        return self.matrix.dtype

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    def matmul(self, V: Tensor) -> Tensor:
        self.widths.append(V.shape[1])
        return self.tamper(len(self.widths), V, self.matrix @ V)  # type: ignore[return-value]


@dataclass
class Factored(Spy):
    """``J Jᵀ`` by two products, with half products on offer."""

    factor: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    num_half_calls: int = 0

    def matmul(self, V: Tensor) -> Tensor:
        self.widths.append(V.shape[1])
        return self.factor @ (self.factor.mT @ V)

    def half_gram(self, V: Tensor) -> Tensor:
        self.num_half_calls += 1
        half = (self.factor.mT @ V).double()
        return half.mT @ half


def factored(values: list[float], num_features: int, dtype: torch.dtype) -> Factored:
    """Make ``J`` with these squares of singular values; its stored entries define the exact answer."""
    n = len(values)
    right = haar(num_features, seed=8)[:, :n]
    J = (haar(n) * torch.tensor(values, dtype=torch.float64).sqrt()) @ right.mT
    J = J.to(dtype)
    return Factored(matrix=torch.zeros(n, 0, dtype=dtype), factor=J)
