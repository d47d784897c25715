"""Predictions hold what the memory budget of the kernel allows."""

from __future__ import annotations

from typing import Any

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.likelihoods import GaussianLikelihood
from torch import Generator, Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ntk_lazy.gp import NTKKernel, big_data


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


class Largest(TorchDispatchMode):
    """Record the bytes of the largest tensor."""

    num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = (t.untyped_storage().nbytes() for t in tree_leaves(result) if isinstance(t, Tensor))
        self.num_bytes = max(self.num_bytes, *sizes, 0)
        return result


class Regression(gpytorch.models.ExactGP):
    def __init__(self, budget: int, engine: str) -> None:
        super().__init__(draw(80, 3), draw(80, seed=3), GaussianLikelihood())
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(3, 100), nn.Tanh(), nn.Linear(100, 100), nn.Tanh(), nn.Linear(100, 1))
        self.covar_module = NTKKernel(network, engine=engine, memory_budget=budget)
        self.double()

    def forward(self, x: Tensor) -> MultivariateNormal:
        return MultivariateNormal(torch.zeros(x.shape[:-1], dtype=x.dtype), self.covar_module(x))


@pytest.mark.parametrize("engine", ["auto", "factors"])
def test_a_root_in_weights_is_kept_where_it_fits_a_quarter_of_the_budget(engine: str):
    # 80 vectors of 10,601 parameters take 6.8 MB.
    budget = 10_000_000
    gp = Regression(budget, engine).eval()
    with torch.no_grad(), big_data(rank=10):
        gp(draw(5, 3, seed=4))  # what is found out about the network is not of the prediction
        gp.train().eval()
        with Largest() as largest:
            variance = gp(draw(30, 3, seed=2)).variance
    assert bool((variance > 0).all())
    assert largest.num_bytes <= budget / 2
