"""A Gaussian process on 50,000 points whose kernel is a network's: train scale and noise, predict 10,000 points.

    python benchmarks/gaussian_process.py [--points 50000] [--tests 10000] [--steps 10]

Prints seconds, products with K and the columns of each part, what these columns would take at the rate that the machine
multiplied matrices with just before, and the peak of resident memory beyond that of libraries and data. Nothing as
large as K fits ``max_dense_bytes``, so that writing K down would be an error. The targets are a function that the
network does not know, with noise of standard deviation 0.1.
"""

from __future__ import annotations

import argparse
import itertools
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import gpytorch
import torch
from gpytorch.kernels import ScaleKernel
from torch import Tensor, nn

from ntk_lazy.engines.rates import seconds
from ntk_lazy.gemm import times_transposed
from ntk_lazy.gp import NTKKernel, big_data
from ntk_lazy.operator.ntk_linear_operator import NTKLinearOperator

FEATURES, WIDTH = 8, 128
NOISE = 0.1


class Regression(gpytorch.models.ExactGP):
    """Constant mean, scaled tangent kernel."""

    def __init__(self, x: Tensor, y: Tensor, kernel: NTKKernel) -> None:
        super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
        self.mean_module, self.covar_module = gpytorch.means.ConstantMean(), ScaleKernel(kernel)

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        """Return the prior at x, shape ``(N, D)``."""
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def network() -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for d_in, d_out in itertools.pairwise((FEATURES, WIDTH, WIDTH, WIDTH, 1)):
        layers += [nn.Linear(d_in, d_out), nn.Tanh()]
        # Where torch begins, tanh is nearly the identity, and the kernel that of linear regression.
        nn.init.normal_(layers[-2].weight, std=1.3 / d_in**0.5)
        nn.init.normal_(layers[-2].bias, std=0.3)
    return nn.Sequential(*layers[:-1])


def target(x: Tensor) -> Tensor:
    return x[:, 0].sin() + x[:, 1] * x[:, 2] / 2 + (x[:, 3] - x[:, 4]).abs()


def peak() -> int:
    (line,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(line) * 1024


@contextmanager
def counted() -> Iterator[list[int]]:
    """Columns of each product with K."""
    columns: list[int] = []
    matmul: Callable[..., Tensor] = NTKLinearOperator._matmul

    def spy(self: NTKLinearOperator, rhs: Tensor) -> Tensor:
        columns.append(rhs.shape[-1] if rhs.ndim > 1 else 1)
        return matmul(self, rhs)

    NTKLinearOperator._matmul = spy
    try:
        yield columns
    finally:
        NTKLinearOperator._matmul = matmul


def rate() -> float:
    """Operations of a matrix product in a second; measured each time, for a machine that others use changes."""
    A = torch.full((2048, 2048), 0.5)
    return 2 * 2048**3 / seconds(lambda: times_transposed(A, A), "cpu")


@contextmanager
def part(name: str, columns: list[int], flops: float) -> Iterator[None]:
    """Print what a part took; a product with one column takes so many operations."""
    found, began, before = rate(), time.perf_counter(), len(columns)
    yield
    spent, mine = time.perf_counter() - began, columns[before:]
    least = sum(mine) * flops / found
    print(
        f"{name:22s} {spent:7.1f} s  {len(mine):4d} products  {sum(mine):5d} columns, {least:6.1f} s at "
        f"{found / 1e9:.0f} GFLOP/s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("points", 50_000), ("tests", 10_000), ("steps", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(1)
    x, z = (torch.randn(n, FEATURES, generator=generator) for n in (options.points, options.tests))
    y = target(x) + NOISE * torch.randn(options.points, generator=generator)
    net = network()
    flops = 4.0 * options.points * sum(p.numel() for p in net.parameters())
    kernel = NTKKernel(net, memory_budget="3GB", max_dense_bytes=options.points**2)
    gp = Regression(x, y, kernel)
    # In the units of the targets: K of a network has entries of the size of its width.
    with torch.no_grad():
        gp.covar_module.outputscale = y.var() / kernel(x[:100], diag=True).mean()
        gp.likelihood.noise = 0.1 * y.var()
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(gp.likelihood, gp)
    optimiser = torch.optim.Adam(gp.parameters(), lr=0.3)
    Path("/proc/self/clear_refs").write_text("5")
    before, began = peak(), time.perf_counter()
    with counted() as columns, big_data():
        for step in range(options.steps):
            with part(f"step {step}", columns, flops):
                optimiser.zero_grad()
                loss = -mll(gp(x), y)
                loss.backward()
                optimiser.step()
            scale, noise = gp.covar_module.outputscale.item(), gp.likelihood.noise.item()
            print(f"  loss {float(loss.detach()):.4f}, scale {scale:.4f}, noise {noise:.5f}", flush=True)
        gp.eval()
        with torch.no_grad():
            with part("first mean", columns, flops):
                mean = gp(z).mean
            with part("first variance", columns, flops):
                variance = gp.likelihood(gp(z)).variance
            with part("again", columns, flops):
                posterior = gp.likelihood(gp(z))
                _ = posterior.mean, posterior.variance
    error = mean - target(z)
    print(f"error of the mean {float(error.square().mean().sqrt()):.4f}, noise {gp.likelihood.noise.item() ** 0.5:.4f}")
    inside = (error.abs() <= 2 * variance.sqrt()).float().mean()
    print(f"within two standard deviations of the prediction: {float(inside):.3f} of the noiseless targets")
    print(f"in all {time.perf_counter() - began:.0f} s, {(peak() - before) / 1e9:.2f} GB beyond libraries and data")


if __name__ == "__main__":
    main()
