"""Whatever mode of torch a caller is in, a kernel is the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import gpytorch
import linear_operator
import pytest
import torch
from oracle import defect, dense_jacobian
from torch import Tensor, nn

import ntk_lazy as nl

_EPS = torch.finfo(torch.float64).eps
_ENGINES = ["autodiff", "factors", "gram"]


def _under(*contexts: Callable[[], AbstractContextManager[Any]]) -> Callable[[Callable[[], Any]], Any]:
    def run(job: Callable[[], Any]) -> Any:
        if not contexts:
            return job()
        with contexts[0]():
            return _under(*contexts[1:])(job)

    return run


class _Within(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, job: Callable[[], None]) -> Tensor:
        job()
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _in_a_function(job: Callable[[], Any]) -> Any:
    found: list[Any] = []
    _Within.apply(torch.ones(1, requires_grad=True), lambda: found.append(job()))
    return found[0]


_MODES: dict[str, Callable[[Callable[[], Any]], Any]] = {
    "no_grad": _under(torch.no_grad),
    "inference_mode": _under(torch.inference_mode),
    "inference_mode, enable_grad": _under(torch.inference_mode, torch.enable_grad),
    "inference_mode(False) in no_grad": _under(torch.no_grad, lambda: torch.inference_mode(False)),
    "set_grad_enabled(False)": _under(lambda: torch.set_grad_enabled(False)),
    "a Function": _in_a_function,
    "another default device": _under(lambda: torch.device("meta")),
}


class _Network(nn.Sequential):
    """Keeps a table in an attribute, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))
        self.table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = x.new_ones(2).cumsum(0)
        return super().forward(x) * self.table


def _network() -> nn.Module:
    torch.manual_seed(0)
    return _Network().double()


_X = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
_V = torch.randn(10, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def _dense(rows: Tensor) -> Tensor:
    J = dense_jacobian(_network(), rows)
    return J @ J.mT


def _solved(K: Any, V: Tensor) -> Tensor:
    noise = torch.full((), 0.5, dtype=torch.float64, device="cpu")
    with (
        linear_operator.settings.max_cholesky_size(1),
        linear_operator.settings.cg_tolerance(1e-10),
        linear_operator.settings.min_preconditioning_size(1),
    ):
        return K.add_diagonal(noise).solve(V)


# What is read off a kernel, and off the same kernel written down.
_JOBS: dict[str, tuple[Callable[[Any, Tensor], Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "a product": (lambda K, V: K @ V, lambda D, V: D @ V),
    "a product with a vector": (lambda K, V: K @ V[:, 0], lambda D, V: D @ V[:, 0]),
    "a transposed product": (lambda K, V: (K.mT * 2.0) @ V, lambda D, V: 2 * D @ V),
    "a series of products": (
        lambda K, V: _under(lambda: K.linearised(9))(lambda: (K @ V, K @ V)[1]),
        lambda D, V: D @ V,
    ),
    "the diagonal": (lambda K, V: K.diagonal(), lambda D, V: D.diagonal()),
    "all entries": (lambda K, V: K.to_dense(), lambda D, V: D),
    "a row": (lambda K, V: K[3], lambda D, V: D[3]),
    "a block": (lambda K, V: K[1:4, [0, 7]].to_dense(), lambda D, V: D[1:4, [0, 7]]),
    "a product of a part": (lambda K, V: K[[8, 2, 1]] @ V, lambda D, V: D[[8, 2, 1]] @ V),
    "a quadratic form": (lambda K, V: K.half_gram(V), lambda D, V: V.mT @ D @ V),
    "a solution": (_solved, lambda D, V: torch.linalg.solve(D + 0.5 * torch.eye(10, dtype=D.dtype), V)),
    "eigenvalues": (lambda K, V: nl.eigsh(K, 3, rtol=1e-8).values, lambda D, V: torch.linalg.eigvalsh(D).flip(0)[:3]),
    "an alignment": (
        lambda K, V: nl.relative_energy(nl.eigsh(K, 10, rtol=1e-8), V)[-1],
        lambda D, V: torch.ones(()),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "engine"), [*((mode, "auto") for mode in _MODES), *(("inference_mode", engine) for engine in _ENGINES)]
)
def test_a_kernel_is_the_same_in_every_mode_wherever_it_and_its_operands_were_made(mode: str, engine: str):
    expected = _dense(_X)
    module = _network()
    with torch.inference_mode():
        inputs, operands = _X.clone(), _V.clone()
        within = nl.ntk(module, inputs, engine=engine)
    for K, V in ((nl.ntk(module, _X, engine=engine), operands), (within, _V)):
        for name, (job, of_dense) in _JOBS.items():
            found = torch.as_tensor(_MODES[mode](lambda K=K, V=V, job=job: job(K, V))).detach()
            # Solutions and eigenpairs are asked for to 1e-8 and better; the condition number is below 1e3.
            tolerance = 1e-6 if name in ("a solution", "eigenvalues", "an alignment") else 1e3 * _EPS
            assert defect(found, of_dense(expected, _V)) < tolerance, name
            assert not found.is_inference(), name


def test_a_network_that_was_called_in_inference_mode_has_its_kernel():
    module = _network()
    with torch.inference_mode():
        module(_X)
        assert module.table.is_inference()
        K = nl.ntk(module, _X)
    assert defect(K.to_dense().detach(), _dense(_X)) < 1e3 * _EPS
    assert module.table.is_inference()


def test_parameters_that_were_made_in_inference_mode_are_refused_with_a_cure_that_works():
    with torch.inference_mode():
        module = _network()
        with pytest.raises(nl.UnsupportedModuleError, match=r"'0.weight'.*deepcopy"):
            nl.ntk(module, _X)
        assert "deepcopy" in str(nl.doctor(module, _X))
    cured = copy.deepcopy(module)
    assert defect(nl.ntk(cured, _X).to_dense().detach(), _dense(_X)) < 1e3 * _EPS


def test_only_the_chosen_parameters_have_to_be_ordinary():
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
    with torch.inference_mode():
        module.append(nn.Linear(4, 2))
    module.double()
    J = dense_jacobian(copy.deepcopy(module), _X, names=["0.weight", "0.bias"])
    assert defect(nl.ntk(module, _X, params="0.*").to_dense().detach(), J @ J.mT) < 1e3 * _EPS


class _Regression(gpytorch.models.ExactGP):
    def __init__(self, x: Tensor, y: Tensor, likelihood: Any) -> None:
        super().__init__(x, y, likelihood)
        self.mean_module = gpytorch.means.ZeroMean()
        self.covar_module = gpytorch.kernels.ScaleKernel(nl.gp.NTKKernel(_network(), outputs=0))

    def forward(self, x: Tensor) -> Any:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


@pytest.mark.slow
@pytest.mark.parametrize("setting", [nullcontext, nl.gp.big_data], ids=["exact", "big data"])
def test_predictions_in_inference_mode_are_those_outside_and_training_goes_on_after(setting):
    def predict(mode: Callable[[], AbstractContextManager[Any]]) -> tuple[Tensor, Tensor, Any]:
        likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
        model = _Regression(_X, _X.sin().sum(1), likelihood).double().eval()
        with mode(), setting():
            found = likelihood.eval()(model(_X[:2] + 0.1))
            return found.mean.detach().clone(), found.variance.detach().clone(), model

    mean, variance, _ = predict(nullcontext)
    inferred_mean, inferred_variance, model = predict(torch.inference_mode)
    assert defect(inferred_mean, mean) < 1e5 * _EPS
    assert defect(inferred_variance, variance) < 1e5 * _EPS
    model.train(), model.likelihood.train()
    loss = -gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)(model(_X), _X.sin().sum(1))
    loss.backward()
    assert model.covar_module.raw_outputscale.grad.abs() > 0


def test_a_tracker_records_the_same_in_inference_mode():
    module, records = _network(), []
    tracker = nl.SpectrumTracker(_X, k=3)
    for step, mode in enumerate((nullcontext, torch.inference_mode)):
        with mode():
            records.append(tracker.record(module, step=step))
    assert records[1].values == pytest.approx(records[0].values, rel=1e-6)
    assert records[1].status == "converged"
