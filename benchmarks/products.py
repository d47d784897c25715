"""Time products with the NTK against plain torch.func, at the scale of the paper: N = 10,000, 6 x 256, C = 1.

Ratios of one run count; the seconds depend on the machine. ``python benchmarks/products.py [--examples N]``.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap

import ntk_lazy as nl

WIDTHS = (2, 256, 256, 256, 256, 256, 1)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for d_in, d_out in itertools.pairwise(WIDTHS):
        layers += [nn.Linear(d_in, d_out), nn.LeakyReLU()]
    return nn.Sequential(*layers[:-1])


def interleaved(jobs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each job, the jobs taking turns so that a slow moment hits them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for job in jobs.values():
        job()
    for _ in range(repeats):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(s) for name, s in seconds.items()}


def plain(net: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """The product as one writes it down with torch.func: everything at once."""
    params = {n: p.detach() for n, p in net.named_parameters()}

    def outputs(p: dict[str, Tensor]) -> Tensor:
        return functional_call(net, p, (x,)).squeeze(1)

    def multiply(V: Tensor) -> Tensor:
        transpose = vjp(outputs, params)[1]
        W = vmap(lambda v: transpose(v)[0])(V.mT)
        return vmap(lambda w: jvp(outputs, (params,), (w,))[1])(W).mT

    return multiply


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    net, x = network(), torch.rand(options.examples, 2) * 2 - 1
    K, peer = nl.ntk(net, x).detach(), plain(net, x)
    A = torch.randn(2048, 2048)
    rate = 2 * 2048**3 / interleaved({"gemm": lambda: A @ A}, 5)["gemm"] / 1e9
    print(f"N = {options.examples:,}, P = {K.num_params:,}; float32 matrix product {rate:.0f} GFLOP/s")
    print(f"{'k':>3} {'chunks':>12} {'ntk_lazy':>10} {'kept':>10} {'torch.func':>11}   s a column; share of the rate")
    for k in (1, 8, 16):
        V = torch.randn(options.examples, k)
        with K.linearised():
            kept = interleaved({"kept": lambda V=V: K._matmul(V)}, options.repeats)["kept"]
        took = interleaved({"lazy": lambda V=V: K @ V, "peer": lambda V=V: peer(V)}, options.repeats)
        error = float((K @ V - peer(V)).norm() / (K @ V).norm())
        plan = K.explain(k)
        share = plan.predicted_flops / took["lazy"] / 1e9 / rate
        chunks = f"{plan.chunks.examples} x {plan.chunks.columns}"
        print(
            f"{k:3d} {chunks:>12} {took['lazy'] / k:10.4f} {kept / k:10.4f} {took['peer'] / k:11.4f}   "
            f"{share:.0%}, difference {error:.0e}"
        )


if __name__ == "__main__":
    main()
