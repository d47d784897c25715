"""Tall blocks: sums in float64, factors that undo what was done, orthonormality to rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ntk_lazy.linalg import Basis, combine, gram, orthonormalise, rayleigh_ritz, subtract_
from ntk_lazy.rows import Rows

N = 400
ROWS = Rows(N)
DTYPES = [torch.float32, torch.float64]


class Draw:
    """Random columns; counts how many were asked for."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.dtype = dtype
        self.num_drawn = 0

    def __call__(self, k: int) -> Tensor:
        self.num_drawn += k
        return torch.randn(N, k, generator=self.generator, dtype=torch.float64).to(self.dtype)


def blocks(dtype: torch.dtype, V: Tensor) -> dict[str, tuple[Tensor, int]]:
    """Name blocks of 12 columns with the rank that they add to a basis."""
    draw = Draw(torch.float64)
    random = draw(12)
    graded = random @ torch.diag(10.0 ** -torch.arange(12, dtype=torch.float64)) @ torch.linalg.qr(draw(12)[:12]).Q
    copies = random.clone()
    copies[:, 3], copies[:, 7] = copies[:, 5], 0
    inside = V.double() @ random[: V.shape[1]]
    table = {
        "random": (random, 12),
        "tiny": (1e-25 * random, 12),
        "huge": (1e25 * random, 12),
        "graded": (graded, 12),
        "copies": (copies, 10),
        "zero": (0 * random, 0),
        "constant": (torch.ones_like(random), 1),
        "in the basis": (inside, 0),
        "almost in the basis": (inside + 1e-4 * random, 12),
        "columns of very different size": (random * 10.0 ** -torch.arange(12, dtype=torch.float64), 12),
    }
    return {name: (block.to(dtype), rank) for name, (block, rank) in table.items()}


NAMES = list(blocks(torch.float64, torch.zeros(N, 30, dtype=torch.float64)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_block_is_split_into_its_part_in_the_basis_and_new_orthonormal_columns(name: str, dtype: torch.dtype) -> None:
    draw = Draw(dtype)
    V = orthonormalise(draw(30), [], rows=ROWS, width=30, draw=draw).Q
    W, rank = blocks(dtype, V)[name]
    before = W.double()
    made = orthonormalise(W.clone(), [V[:, :10], V[:, 10:]], rows=ROWS, width=12, draw=draw)
    both = torch.cat([V, made.Q], dim=1).double()
    eps = torch.finfo(dtype).eps
    assert made.Q.shape == (N, 12)
    assert float((both.mT @ both - torch.eye(42)).abs().max()) <= 8 * eps
    rebuilt = V.double() @ made.C + made.Q.double() @ made.R
    size = before.norm(dim=0)
    assert bool(((rebuilt - before).norm(dim=0) <= 64 * eps * size).all())
    assert bool((made.R[12 - made.num_random :] == 0).all())
    assert 12 - made.num_random == rank


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_full_space_has_no_room_for_more(dtype: torch.dtype) -> None:
    draw = Draw(dtype)
    V = orthonormalise(draw(395), [], rows=ROWS, width=395, draw=draw).Q
    made = orthonormalise(draw(20), [V], rows=ROWS, width=20, draw=draw)
    everything = torch.cat([V, made.Q], dim=1).double()
    assert made.Q.shape[1] == 5
    assert float((everything.mT @ everything - torch.eye(N)).abs().max()) <= 8 * torch.finfo(dtype).eps


@given(n=st.integers(1, 60), a=st.integers(0, 5), b=st.integers(1, 5), tile=st.integers(1, 400), seed=st.integers(0, 9))
def test_tiles_do_not_change_sums(n: int, a: int, b: int, tile: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    X, Y = torch.randn(n, a, generator=generator), torch.randn(n, b, generator=generator)
    S = torch.randn(a, b, generator=generator, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ntk_lazy.linalg.tiles.TILE_BYTES", tile)
        assert torch.allclose(gram(X, Y, rows=Rows(n)), X.double().mT @ Y.double(), rtol=1e-12, atol=1e-12)
        # Rounded to float32 at the end: two neighbours, if a tile is added up in another order.
        allowed = torch.finfo(X.dtype).eps * (X.double().abs() @ S.abs())
        assert ((combine(X, S) - (X.double() @ S).float()).abs() <= allowed).all()
        expected = (Y.double() - X.double() @ S).float()
        subtract_(Y, X, S)
        assert torch.allclose(Y, expected, rtol=1e-6, atol=1e-6)


def test_gram_matrices_of_float32_are_summed_in_float64() -> None:
    X = torch.full((100_000, 1), 1.0 + 2.0**-20)
    exact = 100_000 * (1.0 + 2.0**-20) ** 2
    assert float(gram(X, rows=Rows(100_000))[0, 0]) == pytest.approx(exact, rel=1e-10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_basis_knows_its_gram_matrix_however_it_changed(dtype: torch.dtype) -> None:
    draw = Draw(dtype)
    basis = Basis(ROWS, dtype=dtype, device="cpu", capacity=3)
    for width in (2, 5, 1, 0, 9):
        basis.append(draw(width))
    before = basis.block.double().clone()
    turn = torch.linalg.qr(torch.randn(4, 4, generator=draw.generator, dtype=torch.float64)).Q
    basis.rotate_tail_(13, turn)
    before = torch.cat([before[:, :13], before[:, 13:] @ turn], dim=1)
    S = torch.randn(17, 6, generator=draw.generator, dtype=torch.float64)
    basis.rotate_(S)
    eps = torch.finfo(dtype).eps
    assert basis.size == 6
    assert torch.allclose(basis.block.double(), before @ S, rtol=0, atol=100 * eps)
    exact = basis.block.double().mT @ basis.block.double()
    assert torch.allclose(basis.gram_matrix, exact, rtol=1e-10, atol=1e-10)


def test_values_of_a_skewed_basis_are_those_of_the_operator() -> None:
    generator = torch.Generator().manual_seed(1)
    V = torch.randn(50, 50, generator=generator, dtype=torch.float64) + 20 * torch.eye(50, dtype=torch.float64)
    exact = torch.linspace(1, 0, 50, dtype=torch.float64)
    theta, Y = rayleigh_ritz(V.mT @ torch.diag(exact) @ V, V.mT @ V)
    assert torch.allclose(theta, exact, atol=1e-12)
    assert torch.allclose(Y.mT @ (V.mT @ V) @ Y, torch.eye(50, dtype=torch.float64), atol=1e-12)
