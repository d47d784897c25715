"""K is made by handing a module other tensors in the place of its parameters: all of them, or it is refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import defect
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

import ntk_lazy as nl

_EPS = torch.finfo(torch.float64).eps
_X = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
_GLOBAL: dict[str, Tensor] = {}


class _Kept(nn.Module):
    """Uses its weight by name, and once more as ``get`` finds it in what ``keep`` has put away."""

    def __init__(self, keep: Callable[[_Kept], Any], get: Callable[[_Kept], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
        self.head = nn.Linear(4, 2, dtype=torch.float64)
        self.__dict__["kept"] = keep(self)
        self.get = get

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x @ self.get(self)).tanh() + x @ self.weight)


class _Holder:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def method(self) -> Tensor:
        return self.tensor


class _Slots:
    __slots__ = ("tensor",)

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _unregistered(module: _Kept) -> list[nn.Module]:
    inner = nn.Linear(4, 3, dtype=torch.float64)
    inner.weight = module.weight
    return [inner]


def _with_class_attribute(module: _Kept) -> None:
    _Kept.shared = (0, module.weight)


def _closure(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor


_EXCHANGED: dict[str, tuple[Callable[[_Kept], Any], Callable[[_Kept], Tensor]]] = {
    "attribute": (lambda m: m.weight, lambda m: m.kept),
    "list": (lambda m: [m.weight], lambda m: m.kept[0]),
    "nested": (lambda m: {"a": {"b": (1, m.head.weight, m.weight)}}, lambda m: m.kept["a"]["b"][2]),
    "closure": (lambda m: _closure(m.weight), lambda m: m.kept()),
    "default argument": (lambda m: lambda w=m.weight: w, lambda m: m.kept()),
    "partial": (lambda m: functools.partial(torch.mul, m.weight), lambda m: m.kept(2.0)),
    "object": (lambda m: _Holder(m.weight), lambda m: m.kept.tensor),
    "bound method": (lambda m: _Holder(m.weight).method, lambda m: m.kept()),
    "module in a list": (_unregistered, lambda m: m.kept[0].weight),
    "class attribute": (_with_class_attribute, lambda m: m.shared[1]),
    "view": (lambda m: m.weight.view(4, 3), lambda m: m.kept.reshape(3, 4)),
    "slice of a view": (lambda m: [m.weight.T[1:3]], lambda m: m.weight * m.kept[0].sum()),
    "constant": (lambda m: m.weight.detach(), lambda m: m.weight * m.kept),
    "shape alone": (lambda m: _Slots(m.weight), lambda m: m.weight + torch.ones_like(m.kept.tensor)),
}
_REFUSED = {
    "global": (lambda m: _GLOBAL.update(weight=m.weight), lambda m: _GLOBAL["weight"]),
    "slots": (lambda m: _Slots(m.weight), lambda m: m.kept.tensor),
    "function": (lambda m: 2 * m.weight, lambda m: m.kept),
    "used-up function": (lambda m: m.weight.sin(), lambda m: m.kept),
}


def _dense(function: Callable[[Tensor], Tensor], parameters: list[Tensor]) -> Tensor:
    """By autograd on the module itself: nothing is exchanged, and nothing copied."""
    rows = []
    for example in _X.split(1):
        for output in function(example).reshape(-1):
            gradients = torch.autograd.grad(output, parameters, retain_graph=True, allow_unused=True)
            pairs = zip(parameters, gradients, strict=True)
            rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in pairs]))
    J = torch.stack(rows)
    return J @ J.mT


@pytest.mark.parametrize("engine", ["auto", "autodiff"])
@pytest.mark.parametrize("way", _EXCHANGED)
def test_a_parameter_counts_however_the_forward_pass_finds_it(way: str, engine: str):
    module = _Kept(*_EXCHANGED[way])
    parameters, kept = list(module.parameters()), module.kept
    K = nl.ntk(module, _X, engine=engine)
    found = [K.to_dense().detach(), (K @ torch.eye(8, dtype=torch.float64)).detach()]
    for part in found:
        assert defect(part, _dense(module, parameters)) < 1e3 * _EPS
    assert module.kept is kept
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))


@pytest.mark.parametrize("way", _REFUSED)
def test_a_parameter_that_cannot_be_exchanged_is_refused_by_name(way: str):
    module = _Kept(*_REFUSED[way])
    if way == "used-up function":
        module(_X).sum().backward()
    if way in ("global", "slots"):
        module.weight.requires_grad_(False)
    before = [p.requires_grad for p in module.parameters()]
    with pytest.raises(nl.UnsupportedModuleError, match="'weight' by another way"):
        nl.ntk(module, _X)
    assert "'weight' by another way" in str(nl.doctor(module, _X))
    assert [p.requires_grad for p in module.parameters()] == before
    # What does not count is not looked for.
    K = nl.ntk(module, _X, params="head.*")
    assert K.num_params == 10


def test_output_functions_may_use_parameters():
    module = _Kept(lambda m: None, lambda m: m.weight)
    J = _dense(lambda x: module(x) * module.weight.sum(), list(module.parameters()))
    K = nl.ntk(module, _X, output_fn=lambda output: output * module.weight.sum())
    assert defect(K.to_dense().detach(), J) < 1e3 * _EPS


def test_a_function_that_uses_a_tensor_of_the_mapping_without_taking_it_from_there_is_refused():
    weight, shift = torch.randn(3, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)

    def affine(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return x @ weight + params["shift"]

    with pytest.raises(nl.UnsupportedModuleError, match=r"'weight' by another way.*the mapping"):
        nl.ntk(affine, _X, params={"weight": weight, "shift": shift})
    assert nl.ntk(affine, _X, params={"shift": shift}).num_params == 2


class _Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ModuleList(nn.Linear(3, 2, dtype=torch.float64) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        params, _ = stack_module_state(list(self.members))
        return torch.vmap(lambda one: functional_call(self.members[0], one, (x,)))(params).mean(0)


class _PassesThrough(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


@pytest.mark.parametrize(
    ("module", "x"),
    [(_Stacked(), _X), (_PassesThrough(3, 2, dtype=torch.float64), _X.clone().requires_grad_())],
    ids=["stacked", "inputs"],
)
def test_a_kernel_of_zeros_is_refused_whatever_else_asks_for_a_gradient(module: nn.Module, x: Tensor):
    with pytest.raises(nl.UnsupportedModuleError, match="no parameter that was chosen reaches the output"):
        nl.ntk(module, x)
