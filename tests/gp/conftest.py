"""What tests of Gaussian processes count."""

from __future__ import annotations

import pytest
from torch import Tensor

from ntk_lazy.operator.ntk_linear_operator import NTKLinearOperator


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Columns of each product with K."""
    found, matmul = [], NTKLinearOperator._matmul

    def spy(self: NTKLinearOperator, rhs: Tensor) -> Tensor:
        found.append(rhs.shape[-1] if rhs.ndim > 1 else 1)
        return matmul(self, rhs)

    monkeypatch.setattr(NTKLinearOperator, "_matmul", spy)
    return found
