"""Gradients with ``create_graph=True``: right when they are differentiated again, or an error; never a part of them."""

from __future__ import annotations

from collections.abc import Callable

import gpytorch
import pytest
import torch
from linear_operator import settings
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ntk_lazy as nl
from ntk_lazy.errors import SecondDerivativeError

WAYS = [(engine, "full") for engine in ("auto", "autodiff", "factors", "gram")]
WAYS += [("auto", outputs) for outputs in ("trace", "sum", 1)]


class _Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(checkpoint(lambda h: torch.tanh(self.first(h)), x, use_reentrant=False))


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)).double()


def _rows(module: nn.Module, x: Tensor) -> Tensor:
    """Return J, shape ``(N, C, P)``, with the graph of plain reverse mode on one example at a time."""
    parameters, rows = list(module.parameters()), []
    for example in x.split(1):
        for output in module(example).reshape(-1):
            found = torch.autograd.grad(output, parameters, create_graph=True, allow_unused=True)
            parts = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
            rows.append(torch.cat([part.reshape(-1) for part in parts]))
    return torch.stack(rows).unflatten(0, (len(x), -1))


def _dense(one: Tensor, other: Tensor, outputs: str | int) -> Tensor:
    if outputs == "full":
        return one.flatten(0, 1) @ other.flatten(0, 1).mT
    if outputs == "trace":
        return torch.einsum("icp,jcp->ij", one, other) / one.shape[1]
    one, other = ((t.sum(1) / t.shape[1] ** 0.5 if outputs == "sum" else t[:, outputs]) for t in (one, other))
    return one @ other.mT


def _penalty(value: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    """Return the value, the squared norm of its gradient, and the gradient of that."""
    found = torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)
    squares = torch.stack([g.square().sum() for g in found if g is not None]).sum()
    second = torch.autograd.grad(squares, leaves, allow_unused=True, retain_graph=True)
    return [
        value.detach(),
        squares.detach(),
        *(torch.zeros_like(p) if g is None else g for p, g in zip(leaves, second, strict=True)),
    ]


def _assert_same(found: Tensor, expected: Tensor, leaves: list[Tensor]) -> None:
    both = [_penalty(value, leaves) for value in (found, expected)]
    largest = max(float(part.abs().max()) for part in both[1][2:])
    for one, other in zip(*both, strict=True):
        # Third derivatives and a solve with a condition below 1e4: eight digits of sixteen are left in any case.
        assert float((one - other).abs().max()) <= 1e-8 * max(largest, float(other.abs().max()))


@pytest.mark.parametrize(("engine", "outputs"), WAYS)
def test_a_gradient_penalty_is_that_of_a_kernel_made_by_plain_reverse_mode(engine: str, outputs: str | int):
    module = _network()
    x, z = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (3, 2))
    scale, noise = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.7, 0.3))
    K, R = (nl.ntk(module, *points, outputs=outputs, engine=engine) * scale for points in ((x,), (x, z)))
    J, H = _rows(module, x), _rows(module, z)
    dense, thin = _dense(J, J, outputs) * scale, _dense(J, H, outputs) * scale
    V = torch.randn(len(dense), 2, dtype=torch.float64, requires_grad=True)
    w = torch.randn(thin.shape[1], dtype=torch.float64, requires_grad=True)
    leaves = [x, z, scale, noise, V, w, *module.parameters()]
    rows, cols = torch.tensor([2, 0, 2]), torch.tensor([1, 1, 0])
    noisy = dense + noise * torch.eye(len(dense), dtype=torch.float64)
    _assert_same((K @ V).square().sum(), (dense @ V).square().sum(), leaves)
    _assert_same((R @ w).square().sum(), (thin @ w).square().sum(), leaves)
    _assert_same(K.to_dense().square().sum(), dense.square().sum(), leaves)
    _assert_same(K.diagonal().square().sum(), dense.diagonal().square().sum(), leaves)
    _assert_same(R[rows, cols].square().sum(), thin[rows, cols].square().sum(), leaves)
    _assert_same(K[1].square().sum(), dense[1].square().sum(), leaves)
    _assert_same((K.add_diagonal(noise) @ V).square().sum(), (noisy @ V).square().sum(), leaves)
    solution = torch.linalg.solve(noisy, V)
    _assert_same(K.add_diagonal(noise).solve(V).square().sum(), solution.square().sum(), leaves)
    _assert_same(K.add_diagonal(noise).solve(V, V.mT).square().sum(), (V.mT @ solution).square().sum(), leaves)


def test_a_gradient_penalty_of_a_batch_of_kernels_is_the_sum_over_its_members():
    module = _network()
    x = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    V = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    J = [_rows(module, each) for each in x]
    dense = torch.stack([_dense(rows, rows, "full") for rows in J])
    leaves = [x, V, *module.parameters()]
    _assert_same((nl.ntk(module, x, input_dims=1) @ V).square().sum(), (dense @ V).square().sum(), leaves)


def test_a_gradient_penalty_through_activation_checkpointing_is_right():
    torch.manual_seed(0)
    module = _Checkpointed().double()
    x = torch.randn(3, 3, dtype=torch.float64)
    V = torch.randn(6, 2, dtype=torch.float64)
    J = _rows(module, x)
    leaves = list(module.parameters())
    _assert_same((nl.ntk(module, x) @ V).square().sum(), (_dense(J, J, "full") @ V).square().sum(), leaves)


def test_solves_by_iterations_are_differentiable_twice():
    module = _network()
    x, V = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.randn(8, 1, dtype=torch.float64)
    J = _rows(module, x)
    noisy = _dense(J, J, "full") + 0.5 * torch.eye(8, dtype=torch.float64)
    leaves = [x, *module.parameters()]
    with settings.max_cholesky_size(0), settings.cg_tolerance(1e-13), settings.max_preconditioner_size(0):
        found = nl.ntk(module, x).add_diagonal(torch.tensor(0.5, dtype=torch.float64)).solve(V).square().sum()
        _assert_same(found, torch.linalg.solve(noisy, V).square().sum(), leaves)


def test_a_gradient_penalty_reaches_a_network_through_a_gaussian_process():
    module, x = _network(), torch.randn(3, 3, dtype=torch.float64)
    y = torch.randn(3, 2, dtype=torch.float64)
    kernel = gpytorch.kernels.ScaleKernel(nl.gp.NTKKernel(module, trainable=True)).double()
    J = _rows(module, x)
    dense = kernel.outputscale * _dense(J, J, "full")
    leaves = [*module.parameters(), kernel.raw_outputscale]
    _assert_same(kernel(x).to_dense().square().sum(), dense.square().sum(), leaves)
    normal = gpytorch.distributions.MultitaskMultivariateNormal(torch.zeros_like(y), kernel(x).add_jitter(0.5))
    noisy = dense + 0.5 * torch.eye(6, dtype=torch.float64)
    expected = torch.distributions.MultivariateNormal(torch.zeros(6, dtype=torch.float64), noisy)
    _assert_same(normal.log_prob(y), expected.log_prob(y.flatten()), leaves)


@pytest.mark.parametrize("is_fixed", [False, True], ids=["network", "noise"])
@pytest.mark.parametrize(
    "read",
    [
        lambda K, V: torch.stack(K.inv_quad_logdet(V, logdet=True)).sum(),
        lambda K, V: K.inv_quad(V),
        lambda K, V: K.logdet(),
        lambda K, V: K.sqrt_inv_matmul(V).square().sum(),
        lambda K, V: K.root_decomposition(method="lanczos").root.to_dense().square().sum(),
    ],
    ids=["likelihood", "quadratic form", "log determinant", "inverse root", "root"],
)
def test_what_is_differentiable_once_raises_when_it_is_differentiated_twice(
    read: Callable[[object, Tensor], Tensor], is_fixed: bool
):
    module = _network().requires_grad_(not is_fixed)
    noise = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    x, V = torch.randn(3, 3, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64, requires_grad=True)
    leaves = [noise, V, *(p for p in module.parameters() if p.requires_grad)]
    with settings.max_cholesky_size(0), settings.max_root_decomposition_size(6):
        K = nl.ntk(module, x)
        first = torch.autograd.grad(read(K.add_diagonal(noise), V), leaves, allow_unused=True)
        assert any(g is not None and g.any() for g in first)
        with pytest.raises(SecondDerivativeError, match="differentiated again"):
            _penalty(read(K.add_diagonal(noise), V), leaves)


def test_pivoted_factors_and_sums_of_kernels_raise_when_they_are_differentiated_twice():
    module, x, V = _network(), torch.randn(3, 3, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64)
    leaves = list(module.parameters())
    K = nl.ntk(module, x)
    for value in (K.pivoted_cholesky(3).square().sum(), ((K + nl.ntk(module, 2 * x)) @ V).square().sum()):
        with pytest.raises(SecondDerivativeError, match="differentiated again"):
            _penalty(value, leaves)
