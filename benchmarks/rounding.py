"""Compare float32 products with those of the float64 model, as they are and with every sum in float64.

    python benchmarks/rounding.py

What float64 sums do not cure is what float32 does to the network itself. Of ones, signs and random columns the worst.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent / "workers"))
from networks import CASES

import ntk_lazy as nl
from ntk_lazy.engines.uses import outer, use


@contextmanager
def sums_in_float64() -> Iterator[None]:
    """Have factors multiplied in float64, and each result rounded once."""
    before = {module: (module.add_gram_, module.times_transposed) for module in (outer, use)}
    for module in before:
        module.add_gram_ = lambda W, D, A: W.add_((D.mT.double() @ A.double()).to(W.dtype))
        module.times_transposed = lambda A, B: (A.double() @ B.double().mT).to(A.dtype)
    try:
        yield
    finally:
        for module, (add_gram, times) in before.items():
            module.add_gram_, module.times_transposed = add_gram, times


def error(product: Tensor, exact: Tensor) -> float:
    """The largest relative error of a column."""
    return float(((product - exact).norm(dim=0) / exact.norm(dim=0)).max())


def main() -> None:
    print(f"{'case':14s} {'N':>6s} {'float32':>10s} {'float64 sums':>13s}")
    for case, n in (("mlp", 4_000), ("siren", 4_000), ("cnn", 128), ("transformer", 64)):
        x = CASES[case].inputs(n)
        V = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
        V[:, 0], V[:, 1] = 1, V[:, 1].sign()
        exact = nl.ntk(CASES[case].network().double(), x.double(), engine="factors").detach() @ V.double()
        K = nl.ntk(CASES[case].network(), x, engine="factors").detach()
        plain = error(K @ V, exact)
        with sums_in_float64():
            print(f"{case:14s} {n:6,d} {plain:10.1e} {error(K @ V, exact):13.1e}", flush=True)


if __name__ == "__main__":
    main()
