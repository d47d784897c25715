"""Time the three engines, and put beside it what the planner predicted and chose.

    python benchmarks/engines.py [--only TEXT]

A job is some products in a row. Each engine is timed on the first product, with what it captures or writes down, and on
later ones, from which the time of jobs of 1 and of 30 products follows. ``ratio`` is predicted over measured. The last
lines name the worst prediction and the worst choice. Results are compared with plain ``torch.func`` by
``benchmarks/peers.py``; here the engines are compared with each other.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent / "workers"))
from networks import CASES

import ntk_lazy as nl

ENGINES = ("autodiff", "factors", "gram")
JOBS = (
    ("mlp", 2_000, 1),
    ("mlp", 2_000, 16),
    ("mlp", 10_000, 16),
    ("siren", 5_000, 16),
    ("cnn", 256, 16),
    ("cnn", 256, 64),
    ("cnn, C=10", 256, 16),
    ("transformer", 256, 16),
    ("transformer, C=10", 256, 16),
    ("resnet", 64, 16),
    ("lstm", 256, 4),
)
CALLS = (1, 30)
REPEATS = 3


def seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def measure(case: str, n: int, k: int, engine: str) -> tuple[float, float, torch.Tensor]:
    """Seconds of the first product and of a later one, and the product."""
    K = nl.ntk(CASES[case].network(), CASES[case].inputs(n), engine=engine).detach()
    V = torch.randn(K.shape[1], k, generator=torch.Generator().manual_seed(0))
    K @ V[:, :1]  # what only the first product of a process does
    with K.linearised(k * max(CALLS)):
        first = seconds(lambda: K @ V)
        later = statistics.median(seconds(lambda: K @ V) for _ in range(REPEATS))
        return first, later, K @ V


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    options = parser.parse_args()
    predictions, choices = [], []
    print(f"{'job':42s} {'engine':10s} {'predicted':>10s} {'measured':>10s} {'ratio':>7s}")
    for case, n, k in JOBS:
        if options.only not in case:
            continue
        plans = {
            calls: nl.ntk(CASES[case].network(), CASES[case].inputs(n)).explain(k, calls).alternatives
            for calls in CALLS
        }
        possible = {way.engine for way in plans[1]}
        timed = {engine: measure(case, n, k, engine) for engine in ENGINES if engine in possible}
        exact = timed["autodiff"][2]
        for engine, (_, _, product) in timed.items():
            assert float((product - exact).norm() / exact.norm()) < 1e-5, f"{engine} disagrees on {case}"
        for calls, ways in plans.items():
            job = f"{case}, N = {n:,}, k = {k}, {calls} products"
            taken = {e: first + (calls - 1) * later for e, (first, later, _) in timed.items()}
            for way in ways:
                ratio = way.seconds / taken[way.engine]
                predictions.append((max(ratio, 1 / ratio), f"{job}, {way.engine}: {ratio:.2f}"))
                mark = "  chosen" if way is ways[0] else ""
                print(f"{job:42s} {way.engine:10s} {way.seconds:10.3f} {taken[way.engine]:10.3f} {ratio:7.2f}{mark}")
            lost = taken[ways[0].engine] / min(taken.values())
            choices.append((lost, f"{job}: {ways[0].engine} takes {lost:.2f} times the best"))
    for title, found, asked in (("prediction", predictions, 2.0), ("choice", choices, 1.3)):
        worst, text = max(found)
        print(f"worst {title}: {text} ({'met' if worst <= asked else 'MISSED'}: {asked} asked)")


if __name__ == "__main__":
    main()
