"""Models that differentiate in their forward pass (physics-informed, Hamiltonian, meta-learned) have the right K."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracle import defect, dense_jacobian, quadratic_form_gradients
from torch import Generator, Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn import functional as F  # noqa: N812

import ntk_lazy as nl
from ntk_lazy.engines.live_bytes import LiveBytes

ENGINES = ["autodiff", "factors", "gram"]  # of which "auto" takes one
Rule = Callable[["_Network", Tensor], Tensor]


class _Network(nn.Module):
    """A network of two numbers, and an output that is made of its derivatives."""

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.u = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1))
        self.rule = rule

    def scalar(self, point: Tensor) -> Tensor:
        return self.u(point.unsqueeze(0)).squeeze()

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(self, x)


def _stateless(net: _Network, x: Tensor) -> Tensor:
    params = dict(net.u.named_parameters())
    return vmap(grad(lambda point: functional_call(net.u, params, (point.unsqueeze(0),)).squeeze()))(x)


def _hamiltonian(net: _Network, x: Tensor) -> Tensor:
    position, momentum = vmap(grad(net.scalar))(x).chunk(2, 1)
    return torch.cat([momentum, -position], 1)


def _laplacian(net: _Network, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_(True)
    u = net.u(x)
    (slope,) = torch.autograd.grad(u, x, torch.ones_like(u), create_graph=True)
    second = [torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)]
    return torch.stack(second).sum(0) + u.squeeze(1).square()


def _in_place(net: _Network, x: Tensor) -> Tensor:
    x.requires_grad_(True)
    u = net.u(x)
    return torch.cat([u, torch.autograd.grad(u.sum(), x, create_graph=True)[0]], 1)


def _inner_step(net: _Network, x: Tensor) -> Tensor:
    w = list(net.u.parameters())
    loss = net.u(torch.ones(3, 2, dtype=x.dtype)).square().mean()
    w = [p - 0.1 * g for p, g in zip(w, torch.autograd.grad(loss, w, create_graph=True), strict=True)]
    return F.linear(F.linear(x, w[0], w[1]).tanh(), w[2], w[3])


def _by_itself(net: _Network, x: Tensor) -> Tensor:
    with torch.enable_grad():
        return _in_place(net, x.detach().clone())


TRANSFORMS: dict[str, Rule] = {
    "grad": lambda net, x: vmap(grad(net.scalar))(x),
    "vjp": lambda net, x: vjp(net.u, x)[1](torch.ones(x.shape[0], 1, dtype=x.dtype))[0],
    "jvp": lambda net, x: jvp(net.u, (x,), (torch.ones_like(x),))[1],
    "jacrev": lambda net, x: vmap(jacrev(net.scalar))(x),
    "jacfwd": lambda net, x: vmap(jacfwd(net.scalar))(x),
    "hessian": lambda net, x: vmap(lambda point: hessian(net.scalar)(point).trace() + net.scalar(point))(x),
    "hessian, one by one": lambda net, x: torch.stack([hessian(net.scalar)(point).flatten() for point in x]),
    "vmap": lambda net, x: vmap(net.scalar)(x),
    "stateless": _stateless,
    "hamiltonian": _hamiltonian,
}
AUTOGRAD: dict[str, Rule] = {
    "laplacian": _laplacian,
    "in place": _in_place,
    "inner step": _inner_step,
    "by itself": _by_itself,
}


def _example(rule: Rule) -> tuple[_Network, Tensor]:
    torch.manual_seed(0)
    return _Network(rule).double(), torch.randn(6, 2, generator=Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", [*TRANSFORMS, *AUTOGRAD])
def test_kernels_equal_those_of_the_dense_jacobian(name: str, engine: str):
    net, x = _example((TRANSFORMS | AUTOGRAD)[name])
    J = dense_jacobian(net, x)
    K = nl.ntk(net, x, engine=engine, chunk_size=4)
    V = torch.randn(J.shape[0], 3, generator=Generator().manual_seed(2), dtype=torch.float64)
    dense = J @ J.mT
    assert defect(K.detach() @ V, dense @ V) < 1e-10
    assert defect(K.detach().to_dense(), dense) < 1e-10
    assert defect(K.detach().diagonal(), dense.diagonal()) < 1e-10
    assert defect(K.jacobian_rmatmul(V), J.mT @ V) < 1e-10
    assert not x.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grad", "hamiltonian", "laplacian", "inner step"])
def test_gradients_of_a_quadratic_form_are_those_of_the_dense_jacobian(name: str):
    net, x = _example((TRANSFORMS | AUTOGRAD)[name])
    K = nl.ntk(net, x)
    U, V = torch.randn(2, K.shape[0], 2, generator=Generator().manual_seed(3), dtype=torch.float64)
    expected = quadratic_form_gradients(net, x, U, V)
    found = torch.autograd.grad((U * (K @ V)).sum(), list(net.parameters()), allow_unused=True)
    scale = max(float(g.abs().max()) for g in expected)
    for g, e in zip(found, expected, strict=True):
        assert float(((torch.zeros_like(e) if g is None else g) - e).abs().max()) <= 1e-10 * scale


@pytest.mark.slow
@pytest.mark.parametrize("name", AUTOGRAD)
def test_outputs_and_second_sets_of_points_need_no_graph_of_the_caller(name: str):
    net, x = _example(AUTOGRAD[name])
    with torch.no_grad():
        K = nl.ntk(net, x[:4], x[4:])
        J = dense_jacobian_with_graph(net, x)
        rows = J.shape[0] // 6 * 4
        assert defect(K.to_dense(), J[:rows] @ J[rows:].mT) < 1e-10
        target = torch.ones(6, J.shape[0] // 6, dtype=torch.float64)
        record = nl.SpectrumTracker(x, k=2).record(net, 0, lr=0.1, target=target)
    values = torch.linalg.eigvalsh(J @ J.mT).flip(0)
    assert record.status == "converged"
    assert record.values == pytest.approx(values[:2].tolist(), rel=1e-8)
    assert {"output", "residual"} <= record.energies.keys()


def dense_jacobian_with_graph(net: nn.Module, x: Tensor) -> Tensor:
    """The oracle takes the grad mode of its caller."""
    with torch.enable_grad():
        return dense_jacobian(net, x)


def test_bytes_that_a_graph_keeps_are_counted_through_transforms():
    net, x = _example(TRANSFORMS["grad"])
    with LiveBytes((x, *net.parameters())) as live:
        output = net(x)
    held = live.total
    assert held >= 6 * 6 * 8  # the tanh of each example at least
    del output
    assert live.total == 0
