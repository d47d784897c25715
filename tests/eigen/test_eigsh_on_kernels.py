"""The solver and the kernel of a network together: values of a dense float64 kernel, products of the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ntk_lazy import ntk
from ntk_lazy.eigen import LOBPCG, Lanczos, Solver, eigsh


def network(num_outputs: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, num_outputs))


@pytest.mark.slow
@pytest.mark.parametrize("solver", [Lanczos(block_size=16), LOBPCG()], ids=repr)
@pytest.mark.parametrize("num_outputs", [1, 10])
def test_a_float32_kernel_gives_the_values_of_its_float64_twin(num_outputs: int, solver: Solver) -> None:
    k, n = 60, 600
    model = network(num_outputs)
    x = torch.randn(n // num_outputs, 8, generator=torch.Generator().manual_seed(1))
    pairs = eigsh(ntk(model, x), k, solver=solver)
    dense = ntk(model.double(), x.double()).to_dense().detach()
    exact = torch.linalg.eigvalsh(dense).flip(0)[:k]
    X = pairs.vectors.double()
    assert float(((pairs.values - exact) / exact).abs().max()) <= 3e-6
    assert float(((dense @ X - X * exact).norm(dim=0) / exact).max()) <= 1.2e-3
    assert float((X.mT @ X - torch.eye(k)).abs().max()) <= 1e-6
    assert pairs.cost.half_columns == k
    if isinstance(solver, Lanczos):
        assert pairs.cost.search_columns <= 1.1 * (1.75 * k + 5 * 16)


@pytest.mark.gpu
@pytest.mark.parametrize("solver", [Lanczos(block_size=16), LOBPCG()], ids=repr)
def test_a_gpu_gives_the_values_of_the_cpu(solver: Solver) -> None:
    model = network(3)
    x = torch.randn(200, 8, generator=torch.Generator().manual_seed(1))
    here = eigsh(ntk(model, x), 20, solver=solver)
    there = eigsh(ntk(model.cuda(), x.cuda()), 20, solver=solver)
    assert there.vectors.is_cuda
    assert float(((there.values - here.values) / here.values).abs().max()) <= 3e-6
