"""Kernels of models with tables that are looked up: right, and never as wide as the table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import defect, dense_jacobian
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ntk_lazy as nl


class _Words(nn.Module):
    """The mean of what is looked up, through a layer; or logits over the same table."""

    def __init__(self, num_tokens: int, width: int, *, is_tied: bool = False, padding: int | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(num_tokens, width, padding_idx=padding)
        self.head = nn.Linear(width, num_tokens if is_tied else 2)
        if is_tied:
            self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(tokens).cumsum(1)).mean(1))


class _TwoTexts(nn.Module):
    """One table for two texts of an example."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(500, 3), nn.Linear(3, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        first, second = tokens.split([2, 3], 1)
        return self.head(torch.tanh(self.table(first)).mean(1) * self.table(second).sum(1))


MODELS = {
    "rare": (lambda: _Words(4000, 3), 4000),
    "padded": (lambda: _Words(4000, 3, padding=1), 4000),
    "frequent": (lambda: _Words(200, 3), 12),
    "small": (lambda: _Words(9, 3), 9),
    "tied": (lambda: _Words(7, 3, is_tied=True), 7),
    "two texts": (_TwoTexts, 500),
}


class _LargestTensor(TorchDispatchMode):
    """Remembers the largest result of an operation, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.num_bytes = max([self.num_bytes, *sizes])
        return result


def _texts(count: int, num_tokens: int) -> Tensor:
    """Draw texts in which some tokens are frequent and most are rare."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(count, 5, generator=generator, dtype=torch.float64) ** 4
    return (drawn * num_tokens).long()


@pytest.mark.parametrize("engine", ["factors", "gram", "auto"])
@pytest.mark.parametrize("name", MODELS)
def test_entries_and_tiles_of_tables_equal_those_of_rows_by_autograd(name: str, engine: str):
    build, num_tokens = MODELS[name]
    torch.manual_seed(0)
    module, x = build().double(), _texts(9, num_tokens)
    J = dense_jacobian(module, x)
    dense, n = J @ J.mT, J.shape[0]
    # A budget of a few rows of J, so that they come in parts.
    K = nl.ntk(module, x, engine=engine, memory_budget=40 * J.shape[1] * 8 + 200_000).detach()
    rows, cols = torch.tensor([0, n - 1, 3, 3, n // 2]), torch.tensor([n - 1, 0, 3, n // 2, 1])
    assert defect(K.to_dense(max_dense_bytes=10**9), dense) < 1e-12
    assert defect(K.diagonal(), dense.diagonal()) < 1e-12
    assert float((K[rows, cols] - dense[rows, cols]).abs().max()) < 1e-12 * float(dense.abs().max())
    assert defect(K[rows].to_dense(), dense[rows]) < 1e-12
    R = nl.ntk(module, x[:4], x[2:], engine=engine).detach()
    blocks = [J.unflatten(0, (9, -1))[part].flatten(0, 1) for part in (slice(0, 4), slice(2, 9))]
    assert defect(R.to_dense(), blocks[0] @ blocks[1].mT) < 1e-12


@pytest.mark.parametrize(
    "read", [lambda K: K.diagonal(), nl.trace, lambda K: K[torch.arange(400), torch.arange(400) + 1]]
)
def test_no_row_as_wide_as_a_table_is_held(read: Any):
    module = _Words(50_000, 4)
    x = torch.randint(0, 50_000, (400, 5), generator=torch.Generator().manual_seed(0))
    budget = 4_000_000  # five rows of the table
    K = nl.ntk(module, x, memory_budget=budget).detach()
    with _LargestTensor() as largest:
        read(K)
    assert largest.num_bytes <= budget
