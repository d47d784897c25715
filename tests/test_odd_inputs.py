"""Inputs and modules of kinds that few people have: the right answer, or one clear error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from oracle import defect, dense_jacobian
from torch import Tensor, nn

import ntk_lazy as nl

_EPS = torch.finfo(torch.float64).eps
_X = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


class _Spectral(nn.Module):
    """Filters in a basis of complex numbers, as Fourier layers do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(3, 4, dtype=torch.float64)
        self.filter = nn.Parameter(torch.randn(4, 2, dtype=torch.complex128))
        self.register_buffer("phase", torch.randn(2, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_real(self.inner(x).to(torch.complex128) @ self.filter * self.phase).flatten(1)


@pytest.mark.parametrize("engine", ["auto", "autodiff", "factors", "gram"])
@pytest.mark.parametrize("params", ["inner.*", lambda name, p: not p.is_complex()], ids=["pattern", "predicate"])
def test_complex_parameters_that_were_not_chosen_are_constants(params: Any, engine: str):
    module = _Spectral()
    rows = []
    for example in _X.split(1):
        for output in module(example).reshape(-1):
            gradients = torch.autograd.grad(output, list(module.inner.parameters()), retain_graph=True)
            rows.append(torch.cat([gradient.reshape(-1) for gradient in gradients]))
    J = torch.stack(rows)
    K = nl.ntk(module, _X, params=params, engine=engine)
    assert defect((K @ torch.eye(24, dtype=torch.float64)).detach(), J @ J.mT) < 1e3 * _EPS


@pytest.mark.parametrize("params", [None, "*", "filter"])
def test_complex_parameters_that_were_chosen_are_refused_with_the_cure(params: Any):
    with pytest.raises(nl.UnsupportedModuleError, match=r"'filter' is complex.*params=lambda"):
        nl.ntk(_Spectral(), _X, params=params)


@pytest.mark.parametrize("dtype", [np.longdouble, np.clongdouble, object, "U5", "datetime64[s]", np.uint32])
def test_arrays_of_numbers_that_torch_does_not_have_are_refused_with_the_cure(dtype: Any):
    array = np.ones((4, 3)).astype(dtype)
    with pytest.raises(nl.ShapeError, match=r"astype\('float64'\)"):
        nl.ntk(_network(), array)
    if dtype is np.longdouble:
        expected = nl.ntk(_network(), torch.ones(4, 3, dtype=torch.float64)).to_dense()
        assert torch.equal(nl.ntk(_network(), array.astype("float64")).to_dense(), expected)


def test_whole_numbers_for_a_network_of_real_ones_are_refused_with_the_cure():
    with pytest.raises(nl.ShapeError, match=r"x.to\(torch.float64\)"):
        nl.ntk(_network(), torch.ones(4, 3, dtype=torch.int64))


def test_tensors_whose_examples_cannot_be_sliced_are_refused_with_the_cure():
    ragged = torch.nested.nested_tensor([_X[:1], _X[1:]], layout=torch.jagged)
    with pytest.raises(nl.ShapeError, match="to_padded_tensor"):
        nl.ntk(_network(), ragged)
    for other in (_X.to_sparse(), _X.float().to_mkldnn()):
        with pytest.raises(nl.ShapeError, match="to_dense"):
            nl.ntk(_network(), other)


def test_an_exported_module_has_a_kernel_if_its_batch_may_change():
    module = _network()
    J = dense_jacobian(module, _X)
    shapes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(module, (_X,), dynamic_shapes=shapes)
    assert defect(nl.ntk(exported.module(), _X).to_dense().detach(), J @ J.mT) < 1e3 * _EPS
    with pytest.raises(nl.ArgumentError, match=r"model.module\(\)"):
        nl.ntk(exported, _X)
    fixed = torch.export.export(module, (_X,)).module()
    with pytest.raises(nl.UnsupportedModuleError, match="dynamic_shapes"):
        nl.ntk(fixed, _X)


class _OnGraph(nn.Module):
    """A layer of a graph network, whose rows are the nodes of one graph."""

    def __init__(self, num_nodes: int, *, is_dense: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 2, dtype=torch.float64)
        self.adjacency = torch.rand(num_nodes, num_nodes, dtype=torch.float64) if is_dense else None
        self.source = torch.arange(num_nodes)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear(x).tanh()
        if self.adjacency is not None:
            return self.adjacency @ hidden
        return torch.zeros_like(hidden).index_add(0, self.source.roll(1), hidden[self.source])


class _AsOne(nn.Module):
    """The cure."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.model(one) for one in x])


@pytest.mark.parametrize("num_nodes", [3, 6])
@pytest.mark.parametrize("is_dense", [True, False])
def test_a_network_on_a_graph_is_refused_with_a_cure_that_works(is_dense: bool, num_nodes: int):
    module, x = _OnGraph(num_nodes, is_dense=is_dense), _X[:num_nodes]
    with pytest.raises(nl.UnsupportedModuleError, match=r"nodes of one graph.*x.unsqueeze\(0\)"):
        nl.ntk(module, x)
    parameters, rows = list(module.parameters()), []
    for output in module(x).reshape(-1):
        gradients = torch.autograd.grad(output, parameters, retain_graph=True)
        rows.append(torch.cat([gradient.reshape(-1) for gradient in gradients]))
    J = torch.stack(rows)
    assert defect(nl.ntk(_AsOne(module), x.unsqueeze(0)).to_dense().detach(), J @ J.mT) < 1e3 * _EPS


def _raises(error: type[Exception]) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        raise error("of the user")

    return forward


@pytest.mark.parametrize("error", [IndexError, KeyError, AssertionError, RuntimeError])
def test_an_error_that_has_nothing_to_do_with_the_number_of_examples_comes_through(error: type[Exception]):
    module = _network()
    module.forward = _raises(error)
    with pytest.raises(error, match="of the user"):
        nl.ntk(module, _X)
