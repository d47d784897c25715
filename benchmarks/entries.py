"""Time rows, blocks and entries of K, each beside one product with one column, in one process.

Run: ``python benchmarks/entries.py [--engine auto] [--model mlp]``; ratios are to be compared, not seconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

import ntk_lazy as nl


def network(name: str) -> tuple[nn.Module, Tensor]:
    """Make a model and its inputs."""
    if name == "mlp":
        widths = [2, *[256] * 6]
        layers = [m for i, o in pairwise(widths) for m in (nn.Linear(i, o), nn.Tanh())]
        return nn.Sequential(*layers, nn.Linear(256, 1)), torch.randn(10_000, 2)
    convolutions = (nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU())
    num_outputs = int(name.removeprefix("cnn"))
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(1024, num_outputs)), torch.randn(1000, 3, 16, 16)


def jobs(K: nl.NTKLinearOperator) -> dict[str, Callable[[], object]]:
    """List what is read off the kernel."""
    n = K.shape[0]
    few, rows, cols = (torch.randperm(n)[:size] for size in (100, 300, 300))
    left, right = torch.randint(n, (2, 1000))
    V = torch.randn(n, 1)
    return {
        "product, 1 column": lambda: K @ V,
        "one row": lambda: K[7],
        "100 rows": K[few].to_dense,
        "block 300 x 300": K[rows][:, cols].to_dense,
        "the same by index": lambda: K[rows[:, None], cols[None]],
        "1000 entries": lambda: K[left, right],
        "diagonal": K.diagonal,
        "pivoted Cholesky, rank 20": lambda: K.pivoted_cholesky(20),
    }


def seconds(job: Callable[[], object], repeats: int = 3) -> float:
    """Time the fastest of a few runs."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        job()
        times.append(time.perf_counter() - began)
    return min(times)


def main() -> None:
    """Print seconds, and how many products each job is worth."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--model", default="mlp", help="mlp, or cnn with its number of outputs: cnn1, cnn10")
    options = parser.parse_args()
    torch.manual_seed(0)
    module, x = network(options.model)
    K = nl.ntk(module, x, engine=options.engine).detach()
    K.explain()  # measures the machine
    unit = None
    for name, job in jobs(K).items():
        took = seconds(job)
        unit = unit or took
        print(f"{name:26} {took:9.4f} s {took / unit:8.2f} products", flush=True)


if __name__ == "__main__":
    main()
