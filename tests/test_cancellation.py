"""Where large terms cancel, rounding is that of the terms: it is not taken for coupling, and hides no coupling."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from oracle import defect, dense_jacobian
from torch import Tensor, nn

import ntk_lazy as nl
from ntk_lazy.engines.perturbed import MeasuredRounding

Coupling = Callable[[Tensor], Tensor | float]


class Residual(nn.Module):
    """What a network is off from a target that it has all but reached; the terms are of size 100."""

    def __init__(self, gap: float, couple: Coupling = lambda terms: 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))
        self.target = copy.deepcopy(self.net).requires_grad_(False)
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.add_(gap * torch.randn_like(parameter))
        self.couple = couple

    def forward(self, x: Tensor) -> Tensor:
        terms = 100 * self.net(x)
        return terms - 100 * self.target(x) + self.couple(terms)


class DifferenceQuotient(nn.Module):
    """A second derivative by central differences: the rounding of u, divided by h²."""

    def __init__(self, step: float) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 1))
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        h = self.step
        return (self.net(x + h) - 2 * self.net(x) + self.net(x - h)) / h**2


class Poisson(nn.Module):
    """Residual of u'' = -π² sin(πx) within, and 100 u at the ends, by an autograd that runs inside forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 128), nn.Tanh(), nn.Linear(128, 1))
        with torch.no_grad():
            self.net[0].weight.mul_(4)
            self.net[0].bias.mul_(4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().clone().requires_grad_()
            u = self.net(x)
            (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
            (curvature,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        at_end = x.detach().abs() > 0.999
        return torch.where(at_end, 100 * u, curvature + math.pi**2 * torch.sin(math.pi * x.detach()))


def residual(gap: float, dtype: torch.dtype, couple: Coupling = lambda terms: 0.0) -> tuple[Residual, Tensor]:
    """Make the difference, and eight examples."""
    torch.manual_seed(0)
    return Residual(gap, couple).to(dtype), torch.randn(8, 6, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("engine", ["autodiff", "factors", "gram"])
@pytest.mark.parametrize(
    ("dtype", "gap"),
    [(torch.float64, 1e-9), (torch.float64, 0.0), (torch.float32, 1e-6)],
)
def test_outputs_that_cancel_have_the_kernel_of_their_terms(dtype: torch.dtype, gap: float, engine: str):
    module, x = residual(gap, dtype)
    names = [name for name, _ in module.net.named_parameters(prefix="net")]
    J = dense_jacobian(module, x, names=names)
    K = nl.ntk(module, x, params="net.*", engine=engine)
    assert defect(K.to_dense().detach(), J @ J.mT) < 1e3 * torch.finfo(dtype).eps


@pytest.mark.parametrize(("dtype", "step"), [(torch.float64, 1e-4), (torch.float32, 3e-2)])
def test_rounding_that_is_divided_by_a_small_step_is_no_coupling(dtype: torch.dtype, step: float):
    torch.manual_seed(0)
    module, x = DifferenceQuotient(step).to(dtype), torch.linspace(-1, 1, 9, dtype=dtype).unsqueeze(1)
    J = dense_jacobian(module, x)
    # Gradients of u are of order one, as those of the curvature are.
    assert defect(nl.ntk(module, x).to_dense().detach(), J @ J.mT) < 1e2 * torch.finfo(dtype).eps / step**2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_natural_gradient_loop_on_a_poisson_equation_runs_to_rounding(dtype: torch.dtype):
    torch.manual_seed(0)
    module, x = Poisson().to(dtype), torch.linspace(-1, 1, 16, dtype=dtype).unsqueeze(1)
    sizes = []
    for _ in range(12):
        r = module(x).detach()
        sizes.append(float(r.norm()))
        K = nl.ntk(module, x)
        dense = K.to_dense().detach().double()
        dense.diagonal().add_(1e-10 * dense.diagonal().mean())
        step = K.jacobian_rmatmul(torch.linalg.solve(dense, r.double()).to(dtype)).reshape(-1)
        nn.utils.vector_to_parameters(
            nn.utils.parameters_to_vector(module.parameters()).detach() - step, module.parameters()
        )
    # The terms are up to 100 at the ends and 10 within.
    assert min(sizes) < 1e3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("gap", [1e-3, 1e-9, 0.0])
@pytest.mark.parametrize(
    "couple",
    [
        lambda terms: 1e-6 * terms.mean(0),
        lambda terms: 1e-6 * (terms.mean(0) - terms.mean(0).detach()),
        lambda terms: 1e-6 * terms.roll(1, 0),
        lambda terms: 1e-6 * terms.detach().abs().max(),
    ],
    ids=["mean", "gradient of the mean", "neighbour", "scale of the batch"],
)
def test_coupling_by_a_millionth_of_the_terms_is_found(gap: float, couple: Coupling):
    module, x = residual(gap, torch.float64, couple)
    with pytest.raises(nl.UnsupportedModuleError, match="example"):
        nl.ntk(module, x, params="net.*")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_random_models_are_refused_where_outputs_cancel(dtype: torch.dtype):
    module, x = residual(0.0, dtype, lambda terms: 1e-3 * terms * torch.bernoulli(torch.full_like(terms, 0.5)))
    with pytest.raises(nl.UnsupportedModuleError, match="random"):
        nl.ntk(module, x, params="net.*")


def test_a_decision_that_rounding_would_turn_over_does_not_hide_coupling():
    class Routed(nn.Module):
        """Two experts that are equally good: which one is taken hangs on a tie."""

        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(3, 1) for _ in range(2)])
            self.gate = nn.Parameter(torch.full((2,), 0.3))

        def forward(self, x: Tensor) -> Tensor:
            chosen = int(self.gate.softmax(0).argmax())
            return self.experts[chosen](x) + 1e-4 * x.mean(0, keepdim=True).sum()

    torch.manual_seed(0)
    with pytest.raises(nl.UnsupportedModuleError, match="example"):
        nl.ntk(Routed().double(), torch.randn(4, 3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_measure_of_rounding_is_above_what_happens_and_far_below_the_terms(dtype: torch.dtype):
    module, x = residual(0.0, torch.float64)
    with torch.no_grad():
        for p, q in zip(module.net.parameters(), module.target.parameters(), strict=True):
            q.copy_(p.copy_(p.float()))
        exact = 100 * module.net(x.float().double())
    low = copy.deepcopy(module).to(dtype)
    with torch.no_grad():
        happened = float((100 * low.net(x.float().to(dtype)).double() - exact).abs().max())
        model = nl.FunctionalModel.from_module(low)
        measured = MeasuredRounding(model, x.to(dtype), coarsest=dtype).outputs
    assert happened < measured < 3e3 * torch.finfo(dtype).eps * 100
