"""Modules that change themselves when they are called."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Any

import pytest
import torch
from oracle import defect
from torch import Tensor, nn

import ntk_lazy as nl

_EPS = torch.finfo(torch.float64).eps


class _Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.is_ready = False

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.change(self.first(x).tanh())
        self.is_ready = True
        return self.second(hidden)

    def change(self, hidden: Tensor) -> Tensor:
        return hidden


class _InstallsHooks(_Base):
    """As transformers do to collect hidden states, which are a part of the output."""

    def forward(self, x: Tensor) -> Tensor:
        self.collected: list[Tensor] = []
        if not self.is_ready:
            self.first.register_forward_hook(lambda module, args, output: self.collected.append(output))
            self.second.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
            self.second.register_full_backward_hook(lambda module, given, returned: None)
        return super().forward(x) + sum(hidden.sum(1, keepdim=True) for hidden in self.collected)


class _BuildsABuffer(_Base):
    def change(self, hidden: Tensor) -> Tensor:
        if not self.is_ready:
            self.register_buffer("mask", torch.arange(4, dtype=hidden.dtype), persistent=False)
        return hidden * self.mask


class _FillsContainers(_Base):
    def __init__(self) -> None:
        super().__init__()
        self.by_size: dict[int, Tensor] = {}
        self.log, self.sizes, self.last = OrderedDict(b=1, a=2), {3}, deque([0], maxlen=2)
        self.nested = {"deep": ([1], "unused")}

    def change(self, hidden: Tensor) -> Tensor:
        self.log.move_to_end("b")
        self.sizes.add(hidden.shape[1])
        self.last.append(hidden)
        self.nested["deep"][0].append(hidden)
        if hidden.shape[1] not in self.by_size:
            self.by_size[hidden.shape[1]] = hidden.new_ones(4).cumsum(0)
        return hidden * self.by_size[hidden.shape[1]]


class _WritesToItsClass(_Base):
    num_calls = 0
    tables: dict[str, Tensor] = {}  # noqa: RUF012  (a state of the class is meant)

    def change(self, hidden: Tensor) -> Tensor:
        type(self).num_calls += 1
        type(self).latest = hidden
        self.tables["latest"] = hidden
        return hidden.sin()


class _AddsASubmodule(_Base):
    def change(self, hidden: Tensor) -> Tensor:
        if not self.is_ready:
            self.activation = nn.Softplus()
        return self.activation(hidden)


class _Plain:
    """An object that is no module."""


class _KeepsState(_Base):
    def __init__(self) -> None:
        super().__init__()
        self.state, self.unlisted = _Plain(), [nn.Tanh()]
        self.state.seen = []

    def change(self, hidden: Tensor) -> Tensor:
        self.state.seen.append(hidden)
        self.state.latest = self.unlisted[0].latest = hidden
        return self.unlisted[0](hidden)


class _TakesThingsAway(_Base):
    def __init__(self) -> None:
        super().__init__()
        self.spare = 1.0
        self.handle = self.first.register_forward_hook(lambda module, args, output: None)

    def change(self, hidden: Tensor) -> Tensor:
        if not self.is_ready:
            self.handle.remove()
            del self.spare
            self.change = lambda hidden: hidden
        return hidden


class _WritesInPlace(_Base):
    """Into a buffer behind the back of autograd, and into tensors that are in no list."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))
        self.scratch = [torch.zeros(8, 4, dtype=torch.float64)]

    def change(self, hidden: Tensor) -> Tensor:
        self.count.data.add_(1)
        self.scratch[0][: hidden.shape[0]] = hidden.detach()
        return hidden


_CHANGING = [
    *(_InstallsHooks, _BuildsABuffer, _FillsContainers, _WritesToItsClass, _AddsASubmodule, _KeepsState),
    *(_TakesThingsAway, _WritesInPlace),
]


def _contents(value: Any) -> object:
    """What can be seen of a value: its identity, and what it contains."""
    if isinstance(value, Tensor):
        return id(value), value.tolist(), value.requires_grad
    if isinstance(value, dict):
        return id(value), [(key, _contents(inner)) for key, inner in value.items() if inner is not value]
    if isinstance(value, list | tuple | deque | set):
        return id(value), [_contents(inner) for inner in value]
    return (id(value), _contents(vars(value))) if isinstance(value, _Plain) else id(value)


def _picture(module: nn.Module) -> object:
    everything = [*module.modules(), *getattr(module, "unlisted", [])]
    own = [{name: _contents(value) for name, value in vars(type(module)).items()}]
    return [{name: _contents(value) for name, value in vars(inner).items()} for inner in everything] + own


def _made(kind: type[nn.Module], *, is_called: bool) -> nn.Module:
    torch.manual_seed(0)
    module = kind().double()
    if is_called:
        with torch.no_grad():
            module(_X)
    return module


_X = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def _dense(module: nn.Module) -> Tensor:
    """By autograd on the module itself, which may not be copied."""
    parameters, rows = list(module.parameters()), []
    for example in _X.split(1):
        for output in module(example).reshape(-1):
            gradients = torch.autograd.grad(output, parameters, retain_graph=True)
            rows.append(torch.cat([gradient.reshape(-1) for gradient in gradients]))
    J = torch.stack(rows)
    return J @ J.mT


@pytest.mark.parametrize("is_called", [False, True], ids=["new", "called"])
@pytest.mark.parametrize("kind", _CHANGING)
def test_a_module_that_changes_itself_has_its_kernel_twice_and_stays_as_it_was(kind: type[nn.Module], is_called: bool):
    module = _made(kind, is_called=is_called)
    before, found = _picture(module), []
    for engine in ("auto", "autodiff"):
        K = nl.ntk(module, _X, engine=engine)
        found += [K.to_dense().detach(), (K @ torch.eye(10, dtype=torch.float64)).detach(), K[2].detach()]
        assert _picture(module) == before
    expected = _dense(_made(kind, is_called=True))
    for part in found:
        assert defect(part, expected if part.ndim == 2 else expected[2]) < 1e3 * _EPS


class _MakesAParameter(_Base):
    def change(self, hidden: Tensor) -> Tensor:
        if not self.is_ready:
            self.scale = nn.Parameter(hidden.new_ones(4))
        return hidden * self.scale


class _InitialisesAParameter(_Base):
    """From its first batch, as activation normalisation does."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(4))

    def change(self, hidden: Tensor) -> Tensor:
        if not self.is_ready:
            self.shift.data.copy_(hidden.detach().mean(0))
        return hidden - self.shift


class _InitialisesAnAttribute(_Base):
    def change(self, hidden: Tensor) -> Tensor:
        if not self.is_ready:
            self.scale = float(hidden.detach().std())
        return hidden / self.scale


class _BeginsOtherwise(_Base):
    def change(self, hidden: Tensor) -> Tensor:
        return hidden if self.is_ready else 2 * hidden


@pytest.mark.parametrize(
    "kind",
    [_MakesAParameter, _InitialisesAParameter, _InitialisesAnAttribute, _BeginsOtherwise],
    ids=lambda k: k.__name__,
)
def test_a_module_whose_first_call_is_another_is_refused_until_it_was_called(kind: type[nn.Module]):
    module = _made(kind, is_called=False)
    before = _picture(module)
    with pytest.raises(nl.UnsupportedModuleError, match=r"first call.*Call it once"):
        nl.ntk(module, _X)
    assert _picture(module) == before
    with torch.no_grad():
        module(_X)
    assert defect(nl.ntk(module, _X).to_dense().detach(), _dense(module)) < 1e3 * _EPS


def test_a_module_that_returns_something_else_at_each_call_is_refused():
    class Counts(_Base):
        def change(self, hidden: Tensor) -> Tensor:
            self.num_calls = getattr(self, "num_calls", 0) + 1
            return hidden * self.num_calls

    with pytest.raises(nl.UnsupportedModuleError, match="keeps state"):
        nl.ntk(_made(Counts, is_called=False), _X)


class _WithoutLength(tuple):
    """A tuple that refuses to tell its length, as the irreducible representations of e3nn do."""

    __slots__ = ()

    def __len__(self) -> int:
        raise NotImplementedError


def test_a_tuple_that_has_no_length_may_lie_in_a_module():
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    module.kind = _WithoutLength((1, -1))
    x = torch.randn(4, 3, dtype=torch.float64)
    kernel = nl.ntk(module, x).detach()
    assert torch.equal(kernel @ torch.zeros(8, 1, dtype=torch.float64), torch.zeros(8, 1, dtype=torch.float64))
    assert isinstance(module.kind, _WithoutLength)
