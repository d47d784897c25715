"""Both halves of a product with a layer's weight are those of its rows, whichever of its factors is scaled."""

from __future__ import annotations

import pytest
import torch

from ntk_lazy.engines.uses import Outer, Rows
from ntk_lazy.engines.uses.contraction import scales_input

EXAMPLES, COLUMNS = 7, 5
EPS = torch.finfo(torch.float64).eps


@pytest.mark.parametrize("is_transposed", [True, False])
@pytest.mark.parametrize(("o", "i"), [(6, 2), (2, 6), (4, 4), (1, 3), (3, 1)])
@pytest.mark.parametrize("S", [1, 3, 200])
@pytest.mark.parametrize("q", [1, 2])
def test_products_with_a_weight_are_those_of_its_rows(q: int, S: int, o: int, i: int, is_transposed: bool):
    torch.manual_seed(0)
    A, G = torch.randn(EXAMPLES, S, i).double(), torch.randn(q, EXAMPLES, S, o).double()
    use = Outer(A, G, is_transposed=is_transposed)
    rows = torch.einsum("qbso,bsi->bqoi" if is_transposed else "qbso,bsi->bqio", G, A).flatten(2)
    V, W = torch.randn(EXAMPLES, q, COLUMNS).double(), torch.randn(COLUMNS, o * i).double()
    pulled, pushed = torch.ones(COLUMNS, o * i).double(), torch.ones(EXAMPLES, q, COLUMNS).double()
    use.pull(V, pulled)
    use.push(W, pushed)
    close = {"rtol": 0, "atol": 100 * EPS * S * float(rows.abs().max())}
    torch.testing.assert_close(use.rows(), rows, **close)
    torch.testing.assert_close(pulled - 1, torch.einsum("bqk,bqp->kp", V, rows), **close)
    torch.testing.assert_close(pushed - 1, torch.einsum("bqp,kp->bqk", rows, W), **close)


def test_the_narrower_factor_is_scaled():
    assert scales_input(1, o=128, i=8)
    assert not scales_input(1, o=1, i=128)
    # With several outputs the input would be copied for each of them.
    assert not scales_input(2, o=128, i=8)


def test_sums_of_small_parameters_over_many_examples_lose_nothing():
    # More examples than go into one piece; float32 would lose what is small beside the first one.
    n = 100_000
    R, V, W = torch.ones(n, 1, 3), torch.full((n, 1, 1), 1e-4), torch.zeros(1, 3)
    V[0] = 1e3
    Rows(R).pull(V, W)
    exact = torch.full_like(W, float(V.double().sum()))
    torch.testing.assert_close(W, exact, rtol=2 * torch.finfo(torch.float32).eps, atol=0)
