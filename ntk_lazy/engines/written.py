"""K as it is kept between products: its largest part by a few vectors in float64, the rest as a matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self, final

import torch
from jaxtyping import Float64
from torch import Tensor

from ntk_lazy.engines.chunks import slices
from ntk_lazy.engines.contract import GramMatrix, OtherBlock
from ntk_lazy.gemm import times_transposed
from ntk_lazy.shapes import Block

_RANK = 16  # the spectrum of a network falls by two to four orders over so many pairs
_PIECE_BYTES = 4 << 20  # of each of two copies in float64


@final
@dataclass(frozen=True, eq=False)
class WrittenKernel:
    """``K = rest + U diag(s) Uᵀ``.

    A sum of n products in float32 is off by about ``eps ‖K‖``, which hides eigenvalues a million times smaller than
    the largest. Whoever takes the few largest pairs out in float64 beforehand is off by ``eps ‖rest‖``.

    Attributes:
        rest: What is left; K itself where U has no columns.
        U: Orthonormal columns.
        s: Their weights.
    """

    rest: GramMatrix
    U: Float64[Tensor, "n1 r"]
    s: Float64[Tensor, " r"]

    @classmethod
    def plain(cls, K: GramMatrix) -> Self:
        """Nothing is taken out."""
        none = torch.zeros(K.shape[0], 0, dtype=torch.float64, device=K.device)
        return cls(K, none, none[:0].sum(0))

    @classmethod
    def of_symmetric(cls, K: GramMatrix) -> Self:
        """Take the largest pairs out of a symmetric K, in place; of float64 none.

        Any U and s would do: how near they are to eigenpairs only decides how small the rest becomes.

        Cost: two products with 16 columns and one float64 product of rank 16.

        Source: Halko, Martinsson and Tropp, SIAM Review 53 (2011), Algorithm 4.1.
        """
        n = K.shape[0]
        if K.dtype != torch.float32 or n <= 4 * _RANK:
            return cls.plain(K)
        random = torch.Generator(device=K.device).manual_seed(n)
        start = torch.randn(n, _RANK, generator=random, dtype=K.dtype, device=K.device)
        Q, _ = torch.linalg.qr((K @ start).double())
        small = Q.mT @ (K @ Q.to(K.dtype)).double()
        if not bool(small.isfinite().all()):
            return cls.plain(K)  # an entry that overflowed: products will show it
        s, S = torch.linalg.eigh((small + small.mT) / 2)
        U = Q @ S
        for piece in slices(n, max(1, min(_PIECE_BYTES // 8, n * n // 64) // n)):
            K[piece] = torch.addmm(K[piece].double(), U[piece] * s, U.mT, alpha=-1).to(K.dtype)
        return cls(K, U, s)

    def matmul(self, V: OtherBlock) -> Block:
        """Return K V.

        Cost: ``2 n1 n2 k`` flops.
        """
        Y = times_transposed(self.rest, V.mT)
        if not len(self.s):
            return Y
        return (Y.double() + self.U @ (self.s[:, None] * (self.U.mT @ V.double()))).to(Y.dtype)
