"""What GPyTorch writes down of a lazy kernel, measured and compared with the table of docs/gp-lazy.md.

Sizes are primes, and no other dimension is as large as the test set, so that the shape of a tensor tells what it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import LinearKernel, RBFKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from torch import Generator, Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ntk_lazy as nl
from ntk_lazy.gp import NTKKernel, big_data

N, TESTS, INDUCING = 127, 31, 7
PAGE = Path(__file__).parents[2] / "docs" / "gp-lazy.md"
SIZES = {"nothing": 0, "test x test": TESTS * TESTS, "N x test": N * TESTS, "N x N": N * N}


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


X, Z, Y = draw(N, 3), draw(TESTS, 3, seed=2), draw(N, seed=3)


class Largest(TorchDispatchMode):
    """Record which matrices between sets of points are produced."""

    def __init__(self) -> None:
        super().__init__()
        self.found = "nothing"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.is_floating_point():
                for what in self._kinds(t):
                    self.found = max(self.found, what, key=lambda name: SIZES[name])
        return result

    @staticmethod
    def _kinds(t: Tensor) -> Iterator[str]:
        # A fantasy, inducing points and joint covariances have N plus some rows.
        train = sum(size in (N, N + 1, N + INDUCING, N + TESTS) for size in t.shape)
        tests = sum(size == TESTS for size in t.shape)
        if train >= 2:
            yield "N x N"
        elif train and tests:
            yield "N x test"
        elif tests >= 2:
            yield "test x test"


class Model(gpytorch.models.ExactGP):
    def __init__(self, kernel: Any) -> None:
        super().__init__(X, Y, GaussianLikelihood())
        self.covar_module = kernel
        self.double()

    def forward(self, x: Tensor) -> MultivariateNormal:
        return MultivariateNormal(torch.zeros(x.shape[:-1], dtype=x.dtype), self.covar_module(x))


class Variational(gpytorch.models.ApproximateGP):
    def __init__(self, kernel: Any) -> None:
        distribution = gpytorch.variational.CholeskyVariationalDistribution(INDUCING)
        super().__init__(gpytorch.variational.VariationalStrategy(self, draw(INDUCING, 3, seed=7), distribution))
        self.covar_module = kernel

    def forward(self, x: Tensor) -> MultivariateNormal:
        return MultivariateNormal(torch.zeros(x.shape[:-1], dtype=x.dtype), self.covar_module(x))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def ntk_kernel(max_dense_bytes: int | None = None) -> NTKKernel:
    # By automatic differentiation in chunks: at this size K is the cheapest thing to keep, and the plan would keep it.
    return NTKKernel(network(), engine="autodiff", chunk_size=64, max_dense_bytes=max_dense_bytes)


def scaled(kernel: Any) -> Any:
    return ScaleKernel(kernel).double()


def _likelihood(kernel: Any) -> None:
    gp = Model(scaled(kernel)).train()
    loss = -gpytorch.mlls.ExactMarginalLogLikelihood(gp.likelihood, gp)(gp(X), Y)
    loss.backward()


def _predict(kernel: Any, read: Callable[[MultivariateNormal], Any]) -> None:
    gp = Model(scaled(kernel)).eval()
    with torch.no_grad():
        read(gp(Z))


def _fantasy(kernel: Any) -> None:
    gp = Model(scaled(kernel)).eval()
    with torch.no_grad():
        _ = gp(Z).mean
        _ = gp.get_fantasy_model(draw(1, 3, seed=5), draw(1, seed=6))(Z).mean


def _inducing(kernel: Any) -> None:
    gp, likelihood = Variational(scaled(kernel)).double(), GaussianLikelihood().double()
    (-gpytorch.mlls.VariationalELBO(likelihood, gp, num_data=N)(gp(X), Y)).backward()


@contextmanager
def defaults() -> Iterator[None]:
    yield


@contextmanager
def exact_variances() -> Iterator[None]:
    with big_data(variance_rank=0, rank=20):
        yield


@contextmanager
def lazily() -> Iterator[None]:
    with big_data(variance_rank=20, rank=20):
        yield


def _of(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda kernel: read(scaled(kernel)(X).evaluate_kernel())


v = draw(N, 2, seed=4)
OPERATIONS: dict[tuple[str, str], tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    ("marginal likelihood and its gradient", "`big_data`"): (lazily, _likelihood),
    ("marginal likelihood and its gradient", "default"): (defaults, _likelihood),
    ("predictive mean", "`big_data`"): (lazily, lambda k: _predict(k, lambda p: p.mean)),
    ("predictive mean", "default"): (defaults, lambda k: _predict(k, lambda p: p.mean)),
    ("predictive variance", "`big_data`"): (lazily, lambda k: _predict(k, lambda p: p.variance)),
    ("predictive variance", "`big_data(variance_rank=0)`"): (
        exact_variances,
        lambda k: _predict(k, lambda p: p.variance),
    ),
    ("predictive covariance", "`big_data`"): (lazily, lambda k: _predict(k, lambda p: p.covariance_matrix)),
    ("samples of the posterior", "`big_data`"): (lazily, lambda k: _predict(k, lambda p: p.rsample())),
    ("mean of `get_fantasy_model`", "`big_data`"): (lazily, _fantasy),
    ("bound of inducing points and its gradient", "default"): (defaults, _inducing),
    ("`kernel(X) @ v`", "default"): (defaults, _of(lambda K: K @ v)),
    ("`kernel(X, diag=True)`", "default"): (defaults, lambda k: scaled(k)(X, diag=True)),
    ("`diagonal()`", "default"): (defaults, _of(lambda K: K.diagonal())),
    ("`add_jitter()`, `add_diagonal()`", "default"): (defaults, _of(lambda K: K.add_jitter(0.1) @ v)),
    ("slices, `K[a:b, c:d] @ v`", "default"): (defaults, _of(lambda K: K[3:90, 5:100] @ v[:95])),
    ("a row, `K[i]`", "default"): (defaults, _of(lambda K: K[7])),
    ("entries, `K[[i], [j]]`", "default"): (defaults, _of(lambda K: K[torch.arange(9), torch.arange(9)])),
    ("sum of kernels, times v", "default"): (defaults, lambda k: (scaled(k) + scaled(LinearKernel()))(X) @ v),
    ("product of kernels, times v", "default"): (defaults, lambda k: (scaled(k) * scaled(RBFKernel()))(X) @ v),
    ("`solve()`", "`big_data`"): (lazily, _of(lambda K: K.add_jitter(0.1).solve(v))),
    ("`pivoted_cholesky()`", "default"): (defaults, _of(lambda K: K.pivoted_cholesky(5))),
    ("`to_dense()`, `covariance_matrix`", "`big_data`"): (lazily, _of(lambda K: K.to_dense())),
    ("`eigh()`, `svd()`", "`big_data`"): (lazily, _of(lambda K: K.eigh())),
    ("`root_decomposition()`", "`big_data`"): (lazily, _of(lambda K: K.root_decomposition().root.to_dense())),
    ("`cholesky()`", "`big_data`"): (lazily, _of(lambda K: K.add_jitter(0.1).cholesky())),
}


def measured(row: tuple[str, str], max_dense_bytes: int | None = None) -> str:
    context, run = OPERATIONS[row]
    kernel = ntk_kernel(max_dense_bytes)
    kernel(X[:5]).to_dense()  # the check of the network is made now
    with Largest() as largest, context():
        run(kernel)
    return largest.found


def page_rows() -> dict[tuple[str, str], str]:
    found = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {(what, under): dense for what, under, dense in found if dense in SIZES}


def test_the_page_lists_what_is_measured():
    assert page_rows().keys() == OPERATIONS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("row", OPERATIONS, ids=" ".join)
def test_what_is_written_down_is_what_the_page_says(row):
    dense = page_rows()[row]
    # A second instrument: what writes nothing down is never refused a K as small as that of the test set.
    limit = TESTS * TESTS * 8 - 1 if dense == "nothing" else None
    assert measured(row, limit) == dense


def test_the_instruments_see_what_is_written_down():
    with pytest.raises(nl.BudgetError):
        measured(("`to_dense()`, `covariance_matrix`", "`big_data`"), TESTS * TESTS * 8 - 1)
    with Largest() as largest:
        _ = X @ Z.mT
    assert largest.found == "N x test"
