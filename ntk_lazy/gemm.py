"""The matrix product of float32 blocks on CPUs, by the faster of two routes that torch carries.

The BLAS of a torch wheel is not always the fastest product in it: on AMD processors MKL stays with AVX2, where oneDNN,
which torch uses for linear layers in bfloat16, reaches one and a half to two and a half times its rate in plain
float32, and with few columns, where a product should cost no more than reading the matrix, three times. Which route is
faster is measured once in a process for each kind of shape, and a route that is not accurate is never used.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import TypeAlias

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ntk_lazy.precision import ieee_precision

Route: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # from A and B to A Bᵀ

_LEAST_WORK = 1 << 20  # multiplications from which the overhead of choosing does not show
_NARROW = 32  # columns up to which a product is bound by memory
_REPEATS = 5
_CHECKED_ROWS = 64  # of a product that is compared with float64
_PIECE_BYTES = 2 << 20  # of each of two copies: they stay in cache, and are small beside any budget


def times_transposed(A: Float[Tensor, "*#batch m i"], B: Float[Tensor, "*#batch n i"]) -> Float[Tensor, "*#batch m n"]:
    """Return ``A Bᵀ``; builds no graph."""
    return _route(A, B, is_tall=False)(A, B)


def add_gram_(W: Float[Tensor, "n i"], D: Float[Tensor, "m n"], A: Float[Tensor, "m i"]) -> None:
    """Add ``Dᵀ A`` to W in place; builds no graph."""
    route = _route(D.mT, A.mT, is_tall=True)
    if route is by_blas:
        W.addmm_(D.mT, A)
    else:
        W.add_(route(D.mT, A.mT))


def times_transposed_in_float64(A: Float[Tensor, "m i"], B: Float[Tensor, "n i"]) -> Float64[Tensor, "m n"]:
    """Return ``A Bᵀ`` of long rows, summed in float64 by pieces, so that no float64 copy of a block is held."""
    total = torch.zeros(A.shape[0], B.shape[0], dtype=torch.float64, device=A.device)
    size = max(1, _PIECE_BYTES // (8 * max(A.shape[0], 1)))
    for begin in range(0, A.shape[1], size):
        total.addmm_(A[:, begin : begin + size].double(), B[:, begin : begin + size].double().mT)
    return total


def by_blas(A: Tensor, B: Tensor) -> Tensor:
    """Multiply by the product that ``@`` takes."""
    return A @ B.mT


def by_onednn(A: Tensor, B: Tensor) -> Tensor:
    """Multiply by oneDNN's product; float32 on CPUs."""
    # A few rows are copied; the numbers of each must then lie side by side.
    A = A.contiguous() if A.shape[0] <= _NARROW else _dense(A)
    return torch.ops.mkldnn._linear_pointwise(A, _dense(B), None, "none", [], "")


def _dense(A: Tensor) -> Tensor:
    """Copy what has gaps between its rows or columns: oneDNN would multiply it a hundred times slower."""
    return A if A.is_contiguous() or A.mT.is_contiguous() else A.contiguous()


def _route(A: Tensor, B: Tensor, *, is_tall: bool) -> Route:
    is_candidate = A.dtype == torch.float32 and A.device.type == "cpu" and A.ndim == B.ndim == 2
    if not is_candidate or A.numel() * B.shape[0] < _LEAST_WORK:
        return by_blas
    return _fastest(is_tall, min(A.shape[0], B.shape[0]) <= _NARROW, torch.get_num_threads())


@cache
def _fastest(is_tall: bool, is_narrow: bool, num_threads: int) -> Route:
    """Time both routes on a product like those of layers, long sums or short ones, or with few columns.

    Cost: below 50 ms, and 8 MB.
    """
    left, right = (torch.arange(size * 1024, dtype=torch.float32).sin_().view(1024, size) for size in (512, 256))
    few = left[:, : _NARROW // 2]
    if is_tall:
        A, B = (few if is_narrow else left).mT, (left if is_narrow else right).mT
    else:
        A, B = (left, few.mT.contiguous()) if is_narrow else (right, left[:, :256].contiguous())
    with torch.no_grad(), ieee_precision():
        accurate = [route for route in (by_blas, by_onednn) if _is_accurate(route, A, B)]
        return min(accurate, key=lambda route: _seconds(route, A, B), default=by_blas)


def _is_accurate(route: Route, A: Tensor, B: Tensor) -> bool:
    """Whether a route is there, and rounds like float32: bfloat16 is off by a thousand times more than this allows."""
    A = A[:_CHECKED_ROWS]
    try:
        found = route(A, B)[:, :_CHECKED_ROWS]
    except (AttributeError, NotImplementedError, RuntimeError):
        return False  # another build of torch
    one, other = A.double(), B[:_CHECKED_ROWS].mT.double()
    exact, size = one @ other, one.abs() @ other.abs()
    return bool(((found - exact).abs() <= A.shape[1] ** 0.5 * torch.finfo(A.dtype).eps * size).all())


def _seconds(route: Route, A: Tensor, B: Tensor) -> float:
    best = float("inf")
    for _ in range(_REPEATS):
        began = time.perf_counter()
        route(A, B)
        best = min(best, time.perf_counter() - began)
    return best
