"""What an error about memory says can be relied on, and what was asked for stays within the budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ntk_lazy as nl

ENGINES = ("auto", "autodiff", "factors", "gram")
MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "layers": lambda: (nn.Sequential(nn.Linear(3, 20), nn.Tanh(), nn.Linear(20, 2)), torch.randn(6, 3)),
    "table": lambda: (Table(), torch.randint(0, 500, (6, 4))),
    "not all covered": lambda: (Bent(), torch.randn(6, 3)),
}
JOBS: dict[str, Callable[[Any, Tensor], object]] = {
    "product": lambda K, V: K @ V,
    "half_gram": lambda K, V: K.half_gram(V),
    "jacobian_matmul": lambda K, V: K.jacobian_matmul(torch.ones(K.num_features, 3)),
    "jacobian_rmatmul": lambda K, V: K.jacobian_rmatmul(V),
    "diagonal": lambda K, V: K.diagonal(),
    "entries": lambda K, V: K[torch.arange(len(V)), torch.arange(len(V)).flip(0)],
    "to_dense": lambda K, V: K.to_dense(),
    "layer_energies": lambda K, V: nl.layer_energies(V, K),
}


class Table(nn.Module):
    """Looks tokens up."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(500, 6), nn.Linear(6, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(tokens)).mean(1))


class Bent(nn.Module):
    """A parameter that no rule of a layer fits."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.bend = nn.Linear(3, 20), nn.Parameter(torch.randn(20, 20))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.sin(self.bend) * self.layer(x)[:, None]).sum(2)[:, :2]


def _case(model: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    module, x = MODELS[model]()
    return module, x, torch.randn(2 * len(x), 3)


@pytest.mark.parametrize(
    ("model", "job"), [("layers", job) for job in JOBS] + [("table", "product"), ("not all covered", "product")]
)
@pytest.mark.parametrize("engine", ENGINES)
def test_the_budget_that_an_error_names_is_the_least_that_works(model: str, engine: str, job: str):
    module, x, V = _case(model)

    def run(budget: int) -> None:
        JOBS[job](nl.ntk(module, x, engine=engine, memory_budget=budget, max_dense_bytes=2**30).detach(), V)

    with pytest.raises(nl.BudgetError, match="Raise memory_budget") as caught:
        run(1000)
    least = caught.value.requested_bytes
    assert f"{least:,}" in str(caught.value)
    with pytest.raises(nl.BudgetError):
        run(least - 1)
    run(least)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_budget_that_a_gradient_names_is_enough(engine: str):
    module, x, V = _case("layers")
    budget = 1000
    # The product first, which the gradient is of.
    for _ in range(2):
        with pytest.raises(nl.BudgetError) as caught:
            (nl.ntk(module, x, engine=engine, memory_budget=budget) @ V).square().sum().backward()
        budget = caught.value.requested_bytes
    (nl.ntk(module, x, engine=engine, memory_budget=budget) @ V).square().sum().backward()


@pytest.mark.parametrize("engine", ["autodiff", "factors", "gram"])
def test_of_a_chunk_that_does_not_fit_the_largest_that_does_is_named(engine: str):
    module, x, V = _case("layers")

    def run(chunk_size: int, budget: int) -> None:
        nl.ntk(module, x, engine=engine, memory_budget=budget, chunk_size=chunk_size).detach() @ V

    with pytest.raises(nl.BudgetError) as caught:
        run(1, 1000)
    budget = 2 * caught.value.requested_bytes
    with pytest.raises(nl.BudgetError, match="use a chunk of") as caught:
        run(6, budget)
    largest = caught.value.largest_chunk
    assert 1 <= largest < 6
    run(largest, budget)
    with pytest.raises(nl.BudgetError):
        run(largest + 1, budget)


@pytest.mark.parametrize("engine", ["autodiff", "factors"])
def test_columns_make_room_for_a_chunk_that_was_asked_for(engine: str):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 300), nn.Tanh(), nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 1))
    x = torch.randn(400, 3)
    free, tight = (
        nl.ntk(module, x, engine=engine, memory_budget=budget, chunk_size=100).explain(200)
        for budget in (4_000_000_000, 30_000_000)
    )
    assert free.chunks.examples == tight.chunks.examples == 100
    assert tight.chunks.columns < free.chunks.columns
    assert tight.predicted_bytes <= 30_000_000
