"""What couples the examples of a batch is refused, by whatever of them; what writes to a parameter harms it not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ntk_lazy as nl


class _Through(nn.Module):
    """A layer, and a function of its outputs for the whole batch."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(4, 6), nn.Linear(6, 2)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.hidden(x).tanh()))


def _first_come(h: Tensor) -> Tensor:
    """Two places for each of two experts: who comes later is left out."""
    chosen = (h[:, 0] > 0).long()
    place = torch.stack([(chosen[: i + 1] == chosen[i]).sum() for i in range(len(h))])
    return h * (place <= 2)[:, None]


def _best(h: Tensor) -> Tensor:
    """Each expert takes half of the examples, those that suit it best."""
    taken = torch.zeros(len(h), dtype=h.dtype)
    taken[h[:, 0].topk((len(h) + 1) // 2).indices] = 1
    return h * taken[:, None]


class _ClipsGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h: Tensor) -> Tensor:
        return h.clone()

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return g / g.norm()


COUPLED: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda h: h - h.mean(0),
    "largest": lambda h: h / h.abs().max(),
    "of the past": lambda h: h.cumsum(0),
    "of the future": lambda h: h.flip(0).cumsum(0).flip(0),
    "neighbours": lambda h: h + 0.1 * h.roll(1, 0),
    "place": lambda h: h * torch.linspace(1, 2, len(h), dtype=h.dtype)[:, None],
    "size": lambda h: h / len(h),
    "attention between examples": lambda h: (h @ h.mT).softmax(1) @ h,
    "first come, first served": _first_come,
    "the best are taken": _best,
    "rarely": lambda h: h + 1e-2 * torch.where(h[:1, :1] < h[1:2, :1], h.mean(0), 0) if len(h) > 1 else h,
    "in the gradient": _ClipsGradients.apply,
}


@pytest.mark.parametrize("name", COUPLED)
@pytest.mark.parametrize("seed", range(3))
def test_examples_that_depend_on_each_other_are_refused(name: str, seed: int):
    torch.manual_seed(seed)
    module, x = _Through(COUPLED[name]).double(), torch.randn(6, 4, dtype=torch.float64)
    if name == "first come, first served":
        with torch.no_grad():
            module.hidden.bias[0] = 9.0  # all of them want the same expert
    if name == "rarely":
        x[:2] = x[:2][module.hidden(x[:2])[:, 0].argsort()].clone()
    with pytest.raises(nl.UnsupportedModuleError, match="batch"):
        nl.ntk(module, x)


def test_independent_examples_are_not_refused_for_their_order():
    torch.manual_seed(0)
    module = _Through(lambda h: h.relu() + h.abs().max(1, keepdim=True).values).double()
    assert nl.ntk(module, torch.randn(6, 4, dtype=torch.float64)).shape == (12, 12)


def _under_no_grad(module: _Through) -> None:
    with torch.no_grad():
        module.head.weight.mul_(1.01)


def _by_copy(module: _Through) -> None:
    with torch.no_grad():
        module.head.weight.copy_(module.head.weight / module.head.weight.norm())


def _by_a_view(module: _Through) -> None:
    module.head.weight.detach()[0].clamp_(max=0.1)


def _by_a_list(module: _Through) -> None:
    with torch.no_grad():
        torch._foreach_mul_([module.hidden.weight, module.head.weight], 1.01)


def _as_a_result(module: _Through) -> None:
    with torch.no_grad():
        torch.add(module.head.bias, 1, out=module.head.weight.data[:, 0])


WRITES: dict[str, Callable[[_Through], None]] = {
    "under no_grad": _under_no_grad,
    "by .data": lambda module: module.head.weight.data.add_(1),
    "by a copy": _by_copy,
    "by a view": _by_a_view,
    "by a list": _by_a_list,
    "as a result": _as_a_result,
    "with a graph": lambda module: module.head.weight.mul_(1.01),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("params", [None, ["hidden.*"]], ids=["all parameters", "another parameter"])
@pytest.mark.parametrize("is_hidden", [False, True], ids=["plain", "in try"])
def test_a_parameter_that_is_written_to_is_refused_and_comes_back_unharmed(name: str, params, is_hidden: bool):
    class Writes(_Through):
        def forward(self, x: Tensor) -> Tensor:
            output = super().forward(x)
            try:
                WRITES[name](self)
            except Exception:
                if not is_hidden:
                    raise
            return output

    torch.manual_seed(0)
    module, x = Writes(lambda h: h), torch.randn(5, 4)
    before = [(p, p.detach().clone(), p._version) for p in module.parameters()]
    if name == "with a graph" and (is_hidden or params is not None):
        return  # autograd itself stops it, or there is no graph on this one
    with pytest.raises(nl.UnsupportedModuleError, match="writes to") as refusal:
        nl.ntk(module, x, params=params)
    if name != "with a graph":
        assert "'head" in str(refusal.value) or "'hidden" in str(refusal.value)
    for parameter, value, version in before:
        assert torch.equal(parameter, value)
        assert parameter._version == version
