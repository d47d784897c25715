"""How many columns a call takes, and how many a Krylov space grows from."""

from __future__ import annotations

import time

from ntk_lazy.counts import DENSE_WIDTH, TYPICAL_KAPPA, WIDEST, derived_block_size, start_width
from ntk_lazy.eigen.options import LOBPCG, Dense, Solver
from ntk_lazy.eigen.product import Product
from ntk_lazy.eigen.random_columns import RandomColumns

_TIMED_COLUMNS = 8


def block_size(
    solver: Solver, num_wanted: int, *, num_outputs: int, product: Product, draw: RandomColumns
) -> tuple[int, int]:
    """Fill in the columns of a call and those of the start.

    A call of ``b`` columns takes ``alpha + beta b``. About ``1.75 k / b + 5`` calls are needed, so that the total is
    least at ``b = √(0.35 k alpha / beta)``; it is flat there, and a power of two is near enough.

    Cost: none, or for ``"timed"`` three calls of 1, 8 and 1 columns.
    """
    n = product.rows.total
    if isinstance(solver, Dense):
        width = min(n, solver.block_size or DENSE_WIDTH)
        return width, width
    if isinstance(solver, LOBPCG):
        guards = max(num_wanted // 4, num_outputs + 2) if solver.num_guards is None else solver.num_guards
        width = min(n, num_wanted + guards)
        return width, width
    if isinstance(solver.block_size, int):
        width = min(n, solver.block_size)
    else:
        kappa = _measured_kappa(product, draw) if solver.block_size == "timed" else TYPICAL_KAPPA
        derived = derived_block_size(num_wanted, kappa)
        width = min(n, max(derived, min(WIDEST, start_width(1, num_wanted, num_outputs))))
    return width, min(n, start_width(width, num_wanted, num_outputs))


def _measured_kappa(product: Product, draw: RandomColumns) -> float:
    """Time calls of eight columns and of one, after one that warms up whatever has to."""
    seconds = []
    for width in (1, min(_TIMED_COLUMNS, product.rows.total), 1):
        # Of columns of norm one, as those of a search: images say how large the operator is.
        block = draw(width) / product.rows.total**0.5
        began = time.perf_counter()
        product(block)  # reads a norm back at its end, so that nothing is still queued on a device
        seconds.append(time.perf_counter() - began)
    _, wide, narrow = seconds
    beta = max((wide - narrow) / (_TIMED_COLUMNS - 1), 1e-3 * narrow)
    return max(narrow - beta, 0.0) / beta
