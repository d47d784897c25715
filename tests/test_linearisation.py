"""Both ways of multiplying with J agree with autograd, at the parameters they are given and not at the module's own."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from case import Case
from oracle import defect, dense_jacobian, quadratic_form_gradients
from torch import Generator, Tensor
from zoo import RIGHT

import ntk_lazy as nl
from ntk_lazy.engines.linearisation import DoubleReverse, ForwardOverReverse, Linearisation

SHIFTED = ["tanh", "tied weights", "lstm", "weight norm", "checkpoint", "checkpoint first", "batch norm, eval"]
# Torch's own second derivative of weight normalisation is wrong, so that it is no oracle: differences are.
NO_ORACLE = {"weight norm", "weight norm, by hook"}
ONCE_DIFFERENTIABLE = {"differentiable once", "embedding bag"}
TWICE_DIFFERENTIABLE = [
    case
    for case in RIGHT
    if case.params is None and case.dtype == torch.float64 and case.name not in NO_ORACLE | ONCE_DIFFERENTIABLE
]
WITHOUT_FORWARD_MODE = {"checkpoint", "checkpoint first"}


def named(name: str) -> Case:
    """Find a case."""
    (case,) = [case for case in RIGHT if case.name == name]
    return case


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Draw standard normal numbers."""
    return torch.randn(shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", SHIFTED)
@pytest.mark.parametrize("way", [ForwardOverReverse, DoubleReverse])
def test_products_are_with_the_parameters_given_even_where_activations_are_recomputed(
    name: str, way: type[Linearisation]
):
    if way is ForwardOverReverse and name in WITHOUT_FORWARD_MODE:
        way = DoubleReverse
    case = named(name)
    module, x = case.module(), case.inputs(3)
    model = nl.FunctionalModel.from_module(module, output_fn=case.output_fn)
    moved = {n: p.detach() + 0.3 * normal(*p.shape, seed=i) for i, (n, p) in enumerate(model.params.items())}
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for name_, parameter in twin.named_parameters():
            parameter.copy_(moved[name_])
    J = dense_jacobian(twin, x, output_fn=case.output_fn)
    chunk = way(replace(model, params=moved), x)
    num_outputs = J.shape[0] // 3
    U = normal(2, 3, num_outputs, seed=50)
    W = normal(2, J.shape[1], seed=51)
    sizes = [p.numel() for p in moved.values()]
    parts = {n: w.reshape(2, *p.shape) for (n, p), w in zip(moved.items(), W.split(sizes, dim=1), strict=True)}
    with torch.no_grad():
        pulled, pushed = chunk.pull(U), chunk.push(parts)
    assert defect(torch.cat([g.reshape(2, -1) for g in pulled.values()], 1), U.reshape(2, -1) @ J) < case.tolerance
    assert defect(pushed.reshape(2, -1), W @ J.mT) < case.tolerance


@pytest.mark.parametrize("case", TWICE_DIFFERENTIABLE, ids=str)
def test_gradients_of_a_quadratic_form_equal_those_through_the_dense_jacobian(case: Case):
    module, x = case.module().requires_grad_(True), case.inputs(3)
    K = nl.ntk(module, x, output_fn=case.output_fn, chunk_size=2)
    u, v = normal(K.shape[0], 2, seed=1), normal(K.shape[0], 2, seed=2)
    expected = quadratic_form_gradients(module, x, u, v, output_fn=case.output_fn)
    scale = max(float(g.abs().max()) for g in expected)
    dense = (u * (K.to_dense() @ v)).sum()
    for form in ((u * (K @ v)).sum(), dense):
        found = torch.autograd.grad(form, list(module.parameters()), allow_unused=True)
        for (name, parameter), g, e in zip(module.named_parameters(), found, expected, strict=True):
            difference = (torch.zeros_like(parameter) if g is None else g) - e
            assert float(difference.abs().max()) <= case.tolerance * scale, name


@pytest.mark.parametrize("name", sorted(ONCE_DIFFERENTIABLE))
@pytest.mark.parametrize("engine", ["auto", "autodiff", "factors", "gram"])
def test_a_gradient_that_would_lack_a_part_is_refused(name: str, engine: str):
    case = named(name)
    module, x = case.module().requires_grad_(True), case.inputs(3)
    K = nl.ntk(module, x, engine=engine)
    weight = next(module.parameters())
    for value in ((K @ normal(K.shape[0], 1)).sum(), K.to_dense().sum(), K.diagonal().sum(), K[0, 1]):
        with pytest.raises(nl.UnsupportedModuleError, match="differentiable itself"):
            torch.autograd.grad(value, weight)


@pytest.mark.parametrize("name", ["tanh", "weight norm", "weight norm, by hook", "layer norm", "encoder layer, train"])
def test_gradients_of_a_quadratic_form_equal_central_differences(name: str):
    case = named(name)
    module, x = case.module(), case.inputs(3)
    K = nl.ntk(module, x, output_fn=case.output_fn, chunk_size=2)
    u, v = normal(K.shape[0], 2, seed=1), normal(K.shape[0], 2, seed=2)
    gradients = torch.autograd.grad((u * (K @ v)).sum(), list(module.parameters()), allow_unused=True)
    direction = [normal(*p.shape, seed=7 + i) for i, p in enumerate(module.parameters())]
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True) if g is not None)

    def form(step: float) -> float:
        twin = copy.deepcopy(module)
        with torch.no_grad():
            for parameter, d in zip(twin.parameters(), direction, strict=True):
                parameter.add_(step * d)
        J = dense_jacobian(twin, x, output_fn=case.output_fn)
        return float((u * (J @ (J.mT @ v))).sum())

    h = 1e-4
    # Truncation of order h² = 1e-8 times third derivatives, rounding of order eps / h = 2e-12.
    assert slope == pytest.approx((form(h) - form(-h)) / (2 * h), rel=1e-4)
