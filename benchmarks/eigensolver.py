"""Count what eigensolvers spend on the spectra of the tests: block calls, products, and sets that are wrong.

    python benchmarks/eigensolver.py [-n 1000] [-k 100] [--rtol 1e-3] [--peers]

Each row is one solver on one spectrum. ``products`` is the operator times one column, everything included;
``search`` leaves out the probe and the certification, which peers do not have. ``residual`` is the largest
``‖A v − λ v‖ / λ`` and ``error`` the largest relative error of a value, both against LAPACK in float64. scipy's
lobpcg gets the tolerance ``rtol · λ_k``, which nobody knows in practice.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "eigen"))
from eigen_cases import Spectrum, Spy, study_spectra

from ntk_lazy.eigen import LOBPCG, Lanczos, Solver, eigsh


def array(operator: Spy, V: np.ndarray) -> np.ndarray:
    """Multiply as scipy wants it."""
    return operator.matmul(torch.from_numpy(V.reshape(len(V), -1))).numpy().reshape(V.shape)


Found = tuple[torch.Tensor, torch.Tensor, int]


def ours(solver: Solver) -> Callable[[Spy, int, float, float], Found]:
    def solve(operator: Spy, k: int, rtol: float, smallest: float) -> Found:
        pairs = eigsh(operator, k, solver=solver, rtol=rtol, on_unconverged="return")
        return pairs.values, pairs.vectors, pairs.cost.search_columns

    return solve


def arpack(operator: Spy, k: int, rtol: float, smallest: float) -> Found:
    from scipy.sparse.linalg import LinearOperator
    from scipy.sparse.linalg import eigsh as scipy_eigsh

    n = operator.rows.total
    A = LinearOperator((n, n), matvec=partial(array, operator), dtype=np.float64)
    values, vectors = scipy_eigsh(A, k, tol=rtol, v0=np.random.default_rng(0).standard_normal(n))
    return torch.from_numpy(values[::-1].copy()), torch.from_numpy(vectors[:, ::-1].copy()), sum(operator.widths)


def scipy_lobpcg(operator: Spy, k: int, rtol: float, smallest: float) -> Found:
    from scipy.sparse.linalg import LinearOperator, lobpcg

    n = operator.rows.total
    A = LinearOperator((n, n), matvec=partial(array, operator), matmat=partial(array, operator), dtype=np.float64)
    X = np.random.default_rng(0).standard_normal((n, k))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values, vectors = lobpcg(A, X, tol=rtol * smallest, maxiter=200)
    order = np.argsort(values)[::-1]
    return torch.from_numpy(values[order]), torch.from_numpy(vectors[:, order]), sum(operator.widths)


def solvers(with_peers: bool) -> Iterator[tuple[str, Callable[[Spy, int, float, float], Found]]]:
    for b in (4, 8, 16, 32):
        yield f"Lanczos b={b}", ours(Lanczos(block_size=b))
    yield "LOBPCG", ours(LOBPCG())
    if with_peers:
        yield "scipy eigsh", arpack
        yield "scipy lobpcg*", scipy_lobpcg


def measure(spectrum: Spectrum, k: int, rtol: float, *, with_peers: bool) -> None:
    A = spectrum.matrix()
    exact = torch.linalg.eigvalsh(A).flip(0)[:k]
    for name, solve in solvers(with_peers):
        operator = Spy(A)
        began = time.perf_counter()
        values, X, search = solve(operator, k, rtol, float(exact[-1]))
        seconds = time.perf_counter() - began
        residual = float(((A @ X - X * values).norm(dim=0) / values.abs()).max())
        error = float(((values - exact) / exact).abs().max())
        verdict = "wrong" if residual <= rtol < error else "" if residual <= 1.01 * rtol else "not converged"
        print(
            f"{spectrum.name:10s} {name:14s} {len(operator.widths):6d} {sum(operator.widths):9d} {search:8d} "
            f"{residual:10.1e} {error:9.1e} {seconds:8.2f}  {verdict}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=1000, help="rows")
    parser.add_argument("-k", type=int, default=100, help="pairs")
    parser.add_argument("--rtol", type=float, default=1e-3)
    parser.add_argument("--peers", action="store_true", help="also run scipy")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("spectrum   solver          calls  products   search   residual     error  seconds")
    for spectrum in study_spectra(options.n):
        measure(spectrum, options.k, options.rtol, with_peers=options.peers)


if __name__ == "__main__":
    main()
