"""At ties and zeros, where torch's modes of differentiation differ, products are with the gradients of reverse mode."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracle import dense_jacobian
from torch import Generator, Tensor, nn
from torch.nn import functional as F  # noqa: N812

import ntk_lazy as nl

N, TIED = 7, 5  # examples, and the first of those with ties: not among those that are checked


class Tied(nn.Module):
    """Two branches of equal weights: tied where the entries of an example are, and zero where these are zero."""

    def __init__(self, meet: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False)
        with torch.no_grad():
            self.right.weight.copy_(self.left.weight)
        self.slope = nn.Parameter(torch.tensor([0.2, 0.3, -0.4, 0.5]))
        self.last = nn.Linear(4, 2)
        self.meet = meet

    def forward(self, x: Tensor) -> Tensor:
        # Without ties the right branch sees the example in another order.
        other = torch.where(x[:, :1] == x[:, 1:2], x, x.flip(1))
        return self.last(self.meet(self.left(x), self.right(other), self.slope))


def examples() -> Tensor:
    """Draw seven examples, the last two of which have ties; the very last is zero."""
    x = torch.randn(N, 3, generator=Generator().manual_seed(0), dtype=torch.float64)
    x[TIED] = x[TIED, 0]
    x[TIED + 1] = 0.0
    return x


def _scattered(reduce: str, *, include_self: bool = False) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def meet(a: Tensor, b: Tensor, slope: Tensor) -> Tensor:
        places = torch.arange(8).remainder(4).expand(len(a), 8)
        both = torch.cat([a - b, b + 1] if reduce == "prod" else [a, b], 1)
        return slope * a.scatter_reduce(1, places, both, reduce, include_self=include_self)

    return meet


def _written(a: Tensor, b: Tensor, slope: Tensor) -> Tensor:
    """Each value where the order of the example says; where all are equal, all in one place."""
    places = (b > a.mean(1, keepdim=True)).long() + 2 * (b > b.mean(1, keepdim=True))
    return torch.zeros_like(a).scatter(1, places, a)


def _put(a: Tensor, b: Tensor, slope: Tensor) -> Tensor:
    y = slope * b
    y[torch.arange(len(a))[:, None], (a > b).long() + 2 * (a > 0)] = a
    return y


MEETINGS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "prelu": lambda a, b, s: F.prelu(a, s) + b,
    "prelu, one slope": lambda a, b, s: torch.prelu(a - b, s[:1]),
    "fmax": lambda a, b, s: torch.fmax(a, b),
    "fmin": lambda a, b, s: torch.fmin(a, b),
    "maximum": lambda a, b, s: torch.maximum(a, b),
    "minimum": lambda a, b, s: torch.minimum(a, b),
    "clamp by a tensor": lambda a, b, s: a.clamp(b, b + s.abs()),
    "clamp from below by a tensor": lambda a, b, s: torch.clamp(a, min=b),
    "clamp from above by a tensor": lambda a, b, s: a.clip(max=b),
    "clamp_min by a tensor": lambda a, b, s: a.clamp_min(b),
    "clamp by numbers": lambda a, b, s: (a - b).clamp(0, 1),
    "atan2": lambda a, b, s: torch.atan2(a, b),
    "scatter amax": _scattered("amax"),
    "scatter amin": _scattered("amin"),
    "scatter amax, with its own": _scattered("amax", include_self=True),
    "scatter prod": _scattered("prod"),
    "scatter mean": _scattered("mean"),
    "scatter to one place": _written,
    "put in one place": _put,
    "amax": lambda a, b, s: torch.cat([a, b], 1).amax(1, keepdim=True) * s,
    "max": lambda a, b, s: torch.stack([a, b]).max(0)[0] * s,
    "median": lambda a, b, s: torch.stack([a, b, a + b]).median(0)[0],
    "sort": lambda a, b, s: torch.cat([a, b], 1).sort(1)[0][:, ::2] * s,
    "topk": lambda a, b, s: torch.cat([a, b], 1).topk(4, 1)[0] * s,
    "max pool": lambda a, b, s: F.max_pool1d(torch.cat([a, b], 1).unsqueeze(1), 2).squeeze(1) * s,
    "abs": lambda a, b, s: (a - b).abs() + s * a,
    "relu": lambda a, b, s: (a - b).relu() + s * a,
    "leaky relu": lambda a, b, s: F.leaky_relu(a - b, 0.1) * s,
    "hardtanh": lambda a, b, s: F.hardtanh(a - b, 0, 1) * s,
    "norm": lambda a, b, s: (a - b).norm(dim=1, keepdim=True) * s,
    "maximum norm": lambda a, b, s: torch.linalg.vector_norm(torch.cat([a, b], 1), torch.inf, 1, True) * s,
    "normalise": lambda a, b, s: F.normalize(a - b, dim=1) * s,
}


@pytest.mark.parametrize("name", MEETINGS)
def test_products_are_those_of_reverse_mode_where_ties_come_after_the_examples_that_are_checked(name: str):
    torch.manual_seed(0)
    module, x = Tied(MEETINGS[name]).double(), examples()
    J = dense_jacobian(module, x)
    # Those with ties do have a say: their rows are not zero.
    assert bool(J.isfinite().all())
    assert float(J[2 * TIED :].abs().max()) > 0
    K = nl.ntk(module, x, engine="autodiff")
    V = torch.randn(len(J), 3, generator=Generator().manual_seed(1), dtype=torch.float64)
    for columns in (V, V[:, :1]):
        found, expected = (K @ columns).detach(), J @ (J.mT @ columns)
        assert float((found - expected).abs().max()) < 1e-12 * float((J @ J.mT).abs().max())


@pytest.mark.parametrize("name", ["fmax", "clamp by a tensor", "scatter amax", "scatter to one place"])
def test_the_operator_that_is_sent_to_reverse_mode_twice_is_named_with_its_module(name: str):
    module = nn.Sequential(nn.Linear(3, 3), Tied(MEETINGS[name])).double()
    note = nl.ntk(module, examples()).explain().preflight.derivatives.note
    assert note.startswith("'1' (Tied): no forward mode (forward and reverse mode disagree at ties on ")


@pytest.mark.parametrize(
    "meet",
    [
        lambda a, b, s: a.clamp(torch.zeros(4, dtype=a.dtype), torch.ones(4, dtype=a.dtype)) + s * b,
        lambda a, b, s: a.index_copy(1, torch.tensor([2, 0, 1, 3]), b) * s,
        lambda a, b, s: torch.zeros_like(a).scatter_add(1, (a > b).long(), a * s),
        _scattered("sum"),
    ],
    ids=["clamp by constants", "a permutation", "scatter_add", "scatter sum"],
)
def test_operators_that_have_no_ties_keep_forward_mode(meet: Callable[[Tensor, Tensor, Tensor], Tensor]):
    torch.manual_seed(0)
    K = nl.ntk(Tied(meet).double(), examples(), engine="autodiff")
    assert K.explain().preflight.derivatives.mode == "forward-over-reverse"
