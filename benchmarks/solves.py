"""Count products of conjugate gradients to a relative residual of 1e-6, beside those of linear_operator.

    python benchmarks/solves.py [--rows 1000]

For kernels of four networks and a radial basis function, each with noise from 1e-4 to 1 of the mean diagonal, in
float64: this library with a Nyström preconditioner of the rank that it chooses, without one, and with rank 50 (products
that make it counted); linear_operator's ``linear_cg`` without one, and with its pivoted Cholesky factor of rank 15, its
default, and 50 (rows of K counted as products). ``-`` is a solve that did not arrive within 1,000 steps, with the true
residual that it reached. The right-hand side is a function of the inputs with noise.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import torch
from linear_operator import settings, to_linear_operator
from linear_operator.operators import AddedDiagLinearOperator, ConstantDiagLinearOperator
from linear_operator.utils import linear_cg
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "workers"))
from networks import CASES

import ntk_lazy as nl
from ntk_lazy.linalg.conjugate_gradients import Preconditioner, conjugate_gradients
from ntk_lazy.linalg.nystrom import nystrom_root
from ntk_lazy.solves import Solve, Spectrum, cheapest_rank, num_sampled_rows

RTOL, MOST, RANK = 1e-6, 1000, 50
NOISES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def kernels(rows: int) -> dict[str, Tensor]:
    """Dense kernels, so that the count is of the solver and not of the machine."""
    found = {}
    for case in ("mlp", "siren", "cnn", "transformer"):
        n = rows if case in ("mlp", "siren") else rows // 4
        K = nl.ntk(CASES[case].network().double(), CASES[case].inputs(n).double()).detach()
        found[case] = K.to_dense(max_dense_bytes=1 << 34)
    x = CASES["mlp"].inputs(rows).double()
    found["RBF"] = torch.exp(-torch.cdist(x, x).square() / (2 * 0.3**2))
    return found


class Counted:
    """Multiplies with a matrix and counts columns."""

    def __init__(self, A: Tensor) -> None:
        self.A, self.columns = A, 0

    def __call__(self, V: Tensor) -> Tensor:
        """Return A V."""
        self.columns += V.shape[-1]
        return self.A @ V


def chosen(A: Tensor, noise: float) -> int:
    """The rank that a plan chooses, from a sample of rows."""
    rows = torch.randperm(len(A), generator=torch.Generator().manual_seed(0))[: num_sampled_rows(len(A))]
    spectrum = Spectrum.of_sample(torch.linalg.eigvalsh(A[rows][:, rows]), len(A))
    return cheapest_rank(Solve(noise=noise, rtol=RTOL), spectrum, A.dtype, most=len(A))


def ours(A: Tensor, noise: float, b: Tensor, rank: int | None) -> tuple[int, Tensor]:
    rank = chosen(A, noise) if rank is None else rank
    K, shifted = Counted(A), Counted(A + noise * torch.eye(len(A), dtype=A.dtype))
    preconditioner = None
    if rank:
        L = nystrom_root(K, A.shape, rank, dtype=A.dtype, device=A.device)
        Q, _ = torch.linalg.qr(torch.cat([L, noise**0.5 * torch.eye(rank, dtype=A.dtype)]))
        Q = Q[: len(A)]
        preconditioner = Preconditioner(lambda V: (V - Q @ (Q.mT @ V)) / noise)
    found = conjugate_gradients(shifted, b, rtol=RTOL, max_steps=MOST, preconditioner=preconditioner)
    return K.columns + shifted.columns, found.X


def theirs(A: Tensor, noise: float, b: Tensor, rank: int) -> tuple[int, Tensor]:
    shifted = Counted(A + noise * torch.eye(len(A), dtype=A.dtype))
    diagonal = ConstantDiagLinearOperator(torch.tensor([noise], dtype=A.dtype), diag_shape=len(A))
    operator = AddedDiagLinearOperator(to_linear_operator(A), diagonal)
    with (
        settings.max_preconditioner_size(rank),
        settings.min_preconditioning_size(1),
        warnings.catch_warnings(action="ignore"),
    ):
        preconditioner, _, _ = operator._preconditioner()
        X = linear_cg(shifted, b, tolerance=RTOL, max_iter=MOST, max_tridiag_iter=0, preconditioner=preconditioner)
    return shifted.columns + rank, X


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000)
    options = parser.parse_args()
    ways = {"ours": (ours, None)} | {f"ours, rank {rank}": (ours, rank) for rank in (0, RANK)}
    ways |= {f"linear_cg, rank {rank}": (theirs, rank) for rank in (0, 15, RANK)}
    print(f"{'kernel':12s} {'noise':>7s}" + "".join(f"{name:>20s}" for name in ways))
    for name, A in kernels(options.rows).items():
        generator = torch.Generator().manual_seed(0)
        b = (A @ torch.randn(len(A), 1, generator=generator, dtype=A.dtype)) / A.norm()
        b = b / b.norm() + 0.1 * torch.randn(len(A), 1, generator=generator, dtype=A.dtype) / len(A) ** 0.5
        for share in NOISES:
            noise = share * float(A.diagonal().mean())
            cells = []
            for run, rank in ways.values():
                products, X = run(A, noise, b, rank)
                residual = float((b - A @ X - noise * X).norm() / b.norm())
                cells.append(f"{products}" if residual <= 1.01 * RTOL else f"- ({residual:.0e})")
            print(f"{name:12s} {share:7.0e}" + "".join(f"{cell:>20s}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
