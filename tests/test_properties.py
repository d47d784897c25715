"""What is true of every tangent kernel, on networks and points drawn by hypothesis."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Generator, Tensor, nn

import ntk_lazy as nl

pytestmark = pytest.mark.slow

EPS = torch.finfo(torch.float64).eps
ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU, "silu": nn.SiLU}


@dataclass(frozen=True)
class Problem:
    """A small network, points, an output mode and a chunk size."""

    widths: tuple[int, ...]
    activation: str
    num_points: int
    mode: str | int
    chunk_size: int | None
    seed: int

    def module(self) -> nn.Module:
        """Build the network in float64."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            layers: list[nn.Module] = []
            for width, following in zip(self.widths[:-1], self.widths[1:], strict=True):
                layers += [nn.Linear(width, following), ACTIVATIONS[self.activation]()]
            return nn.Sequential(*layers[:-1]).double()

    def normal(self, *shape: int, seed: int = 0) -> Tensor:
        """Draw standard normal numbers."""
        return torch.randn(shape, generator=Generator().manual_seed(self.seed + seed), dtype=torch.float64)

    def points(self, *, seed: int = 1) -> Tensor:
        """Draw the points."""
        return self.normal(self.num_points, self.widths[0], seed=seed)

    def kernel(self, x1: Tensor | None = None, x2: Tensor | None = None, **options: object) -> nl.NTKLinearOperator:
        """Make the kernel on the points, or on others."""
        options = {"outputs": self.mode, "chunk_size": self.chunk_size} | options
        return nl.ntk(self.module(), self.points() if x1 is None else x1, x2, **options)

    @property
    def rows_per_point(self) -> int:
        """Rows of K for one point."""
        return self.widths[-1] if self.mode == "full" else 1


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Draw a problem; shrinks to one linear layer, one point and one output."""
    widths = draw(st.lists(st.integers(1, 5), min_size=2, max_size=4))
    return Problem(
        widths=tuple(widths),
        activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
        num_points=draw(st.integers(1, 9)),
        mode=draw(st.sampled_from(["full", "trace", "sum", 0, -1])),
        chunk_size=draw(st.sampled_from([None, 1, 2, 3, 100])),
        seed=draw(st.integers(0, 2**16)),
    )


def assert_equal(found: Tensor, expected: Tensor, *, scale: float, size: int) -> None:
    """Compare up to rounding: each entry is a sum of ``size`` terms, of which the largest result is ``scale``."""
    assert found.shape == expected.shape
    bound = 100 * EPS * max(size, 1) * scale
    assert (found - expected).abs().max() <= bound


def largest(kernel: nl.NTKLinearOperator, *blocks: Tensor) -> float:
    """Bound the entries of products with blocks: ‖K‖ times the norms of the columns."""
    bound = float(kernel.diagonal().detach().sum())
    for block in blocks:
        bound *= float(block.norm(dim=0).max())
    return bound


uses_problems = given(problem=problems())


@uses_problems
def test_kernels_are_symmetric(problem: Problem):
    K = problem.kernel()
    U, V = problem.normal(K.shape[0], 2, seed=2), problem.normal(K.shape[0], 3, seed=3)
    assert_equal(U.mT @ (K @ V), (K @ U).mT @ V, scale=largest(K, U, V), size=K.num_params)


@uses_problems
def test_kernels_are_positive_semidefinite(problem: Problem):
    K = problem.kernel()
    smallest = torch.linalg.eigvalsh(K.to_dense()).min()
    assert smallest >= -100 * EPS * K.num_params * largest(K)


@uses_problems
def test_the_two_factors_are_adjoint(problem: Problem):
    K = problem.kernel()
    V, W = problem.normal(K.shape[0], 2, seed=2), problem.normal(K.num_features, 3, seed=3)
    left, right = V.mT @ K.jacobian_matmul(W), K.jacobian_rmatmul(V).mT @ W
    scale = largest(K) ** 0.5 * float(V.norm(dim=0).max() * W.norm(dim=0).max())
    assert_equal(left, right, scale=scale, size=K.num_features)


@uses_problems
def test_a_kernel_is_the_product_of_its_factors(problem: Problem):
    K = problem.kernel()
    V = problem.normal(K.shape[0], 2, seed=2)
    features = K.jacobian_rmatmul(V)
    assert_equal(K.jacobian_matmul(features), K @ V, scale=largest(K, V), size=K.num_features)
    assert_equal(K.half_gram(V), features.mT @ features, scale=largest(K, V, V), size=K.num_features)


@given(problem=problems(), a=st.floats(-3, 3), b=st.floats(-3, 3))
def test_products_are_linear(problem: Problem, a: float, b: float):
    K = problem.kernel()
    U, V = problem.normal(K.shape[0], 2, seed=2), problem.normal(K.shape[0], 2, seed=3)
    scale = 6 * largest(K) * float(U.norm() + V.norm())
    assert_equal(K @ (a * U + b * V), a * (K @ U) + b * (K @ V), scale=scale, size=K.num_params)


@given(problem=problems(), chunk_size=st.integers(1, 12), kilobytes=st.integers(200, 400), k=st.integers(1, 7))
def test_chunks_of_points_and_of_columns_do_not_matter(problem: Problem, chunk_size: int, kilobytes: int, k: int):
    K = problem.kernel(chunk_size=None)
    chunked = problem.kernel(chunk_size=chunk_size, memory_budget=1000 * kilobytes)
    V = problem.normal(K.shape[0], k, seed=2)
    assert_equal(chunked @ V, K @ V, scale=largest(K, V), size=K.num_params)
    by_column = torch.cat([K @ column for column in V.split(1, dim=1)], 1)
    assert_equal(by_column, K @ V, scale=largest(K, V), size=K.num_params)


@given(problem=problems(), data=st.data())
def test_permuted_points_permute_the_rows(problem: Problem, data: st.DataObject):
    order = torch.tensor(data.draw(st.permutations(range(problem.num_points))))
    rows = (order[:, None] * problem.rows_per_point + torch.arange(problem.rows_per_point)).reshape(-1)
    K = problem.kernel()
    permuted = K.at(problem.points()[order])
    V = problem.normal(K.shape[0], 2, seed=2)
    assert_equal(permuted @ V[rows], (K @ V)[rows], scale=largest(K, V), size=K.num_params)


@given(problem=problems(), data=st.data())
def test_kernels_of_groups_of_parameters_add_up(problem: Problem, data: st.DataObject):
    names = [name for name, _ in problem.module().named_parameters()]
    group = data.draw(st.sets(st.sampled_from(names), min_size=1))
    rest = [name for name in names if name not in group]
    K = problem.kernel()
    V = problem.normal(K.shape[0], 2, seed=2)
    total = sum(problem.kernel(params=part) @ V for part in (sorted(group), rest) if part)
    assert_equal(torch.as_tensor(total), K @ V, scale=largest(K, V), size=K.num_params)


@given(problem=problems(), num_others=st.integers(1, 5))
def test_the_kernel_of_a_union_is_made_of_the_kernels_of_its_parts(problem: Problem, num_others: int):
    x1, x2 = problem.points(), problem.normal(num_others, problem.widths[0], seed=9)
    K = problem.kernel(x1)
    union = K.at(torch.cat([x1, x2])).to_dense()
    top = torch.cat([K.to_dense(), K.at(x1, x2).to_dense()], 1)
    bottom = torch.cat([K.at(x2, x1).to_dense(), K.at(x2).to_dense()], 1)
    scale = float(union.diagonal().detach().sum())
    assert_equal(torch.cat([top, bottom]), union, scale=scale, size=K.num_params)


@uses_problems
def test_the_trace_is_the_sum_of_squared_gradient_norms(problem: Problem):
    module, mode = problem.module(), problem.mode
    total = 0.0
    for example in problem.points().split(1):
        outputs = module(example)[0]
        C = outputs.shape[0]
        scalars = {"full": outputs, "trace": outputs / C**0.5, "sum": outputs.sum(0, keepdim=True) / C**0.5}.get(
            str(mode), outputs[[mode]] if isinstance(mode, int) else outputs
        )
        for scalar in scalars:
            gradients = torch.autograd.grad(scalar, list(module.parameters()), retain_graph=True, allow_unused=True)
            total += sum(float(g.square().sum()) for g in gradients if g is not None)
    K = problem.kernel()
    assert_equal(K.diagonal().sum(), torch.tensor(total, dtype=torch.float64), scale=total, size=K.num_params)


@given(problem=problems(), factor=st.floats(0.01, 100))
def test_a_factor_scales_all_that_the_kernel_gives(problem: Problem, factor: float):
    K = problem.kernel()
    scaled = K * factor
    V = problem.normal(K.shape[0], 2, seed=2)
    scale = factor * largest(K, V)
    assert_equal(scaled @ V, factor * (K @ V), scale=scale, size=K.num_params)
    assert_equal(scaled.diagonal(), factor * K.diagonal(), scale=factor * largest(K), size=K.num_params)
    assert_equal(scaled.to_dense(), factor * K.to_dense(), scale=factor * largest(K), size=K.num_params)
    assert isinstance(scaled, nl.NTKLinearOperator)


def test_energies_and_eigenvalues_do_not_depend_on_the_order_of_the_points():
    problem = Problem(widths=(3, 5, 2), activation="tanh", num_points=7, mode="full", chunk_size=2, seed=1)
    forwards = torch.linalg.eigvalsh(problem.kernel().to_dense())
    backwards = torch.linalg.eigvalsh(problem.kernel(problem.points().flip(0)).to_dense())
    assert_equal(forwards, backwards, scale=float(forwards.detach().sum()), size=problem.kernel().num_params)


def test_a_linear_layer_has_the_kernel_of_its_inputs():
    x = torch.randn(6, 4, generator=Generator().manual_seed(0), dtype=torch.float64)
    K = nl.ntk(nn.Linear(4, 3).double(), x)
    expected = torch.kron(x @ x.mT + 1, torch.eye(3, dtype=torch.float64))
    assert_equal(K.to_dense(), expected, scale=float(expected.max()), size=5)
