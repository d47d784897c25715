"""How many products a search for eigenpairs takes: known before it starts, and before an engine is chosen for it."""

from __future__ import annotations

import math

from ntk_lazy.errors import ArgumentError

TYPICAL_KAPPA = 8.0  # cost of starting a block call, in columns, where it is not measured
WIDEST = 64  # what a number of outputs alone can ask for
NUM_FRESH = 2
"""Random columns added to any start: a block inside an invariant subspace could never leave it."""
LARGEST_DENSE = 20_000  # rows of a matrix that is written down without being asked to; in float64 it takes 3.2 GB
DENSE_WIDTH = 256  # columns of a product that writes a matrix down
_NARROWEST = 8
_SMALL = 256  # rows at which LAPACK beats any iteration


def check_count(count: object, name: str) -> None:
    """Raise ArgumentError unless it is a whole number of at least 1."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ArgumentError(f"{name} must be a whole number of at least 1, not {count!r}.")


def derived_block_size(num_wanted: int, kappa: float = TYPICAL_KAPPA) -> int:
    """Round ``√(0.35 k kappa)`` to a power of two between 8 and 64.

    A search should not depend on which engine won on predicted seconds, so ``kappa`` is one number for all. On one CPU
    thread, for 20 and 200 pairs of kernels with 2,000 and 10,000 rows, the width was within 4 % of the best of 8 to 64
    where K is kept. From factors, where a column costs the same in any block, half of it took 6 to 11 % less at 200.
    """
    best = math.sqrt(0.35 * num_wanted * kappa)
    nearest = 2.0 ** round(math.log2(max(best, _NARROWEST)))
    return int(min(WIDEST, nearest))


def start_width(block_size: int, num_wanted: int, num_outputs: int) -> int:
    """Choose the columns that a Krylov space grows from.

    A space cannot hold more copies of an eigenvalue than it has start columns, and one that grows from a single
    column needs luck even for simple ones: in a plateau it passed over one of the ten largest in 7 of 80 runs,
    and in none with two columns.
    """
    copies = min(num_outputs, num_wanted)
    return max(block_size, NUM_FRESH, copies + 2 if copies > 1 else 1)


def typical_products(num_wanted: int, num_outputs: int) -> float:
    """Say what a Krylov search with the default block size takes."""
    width = max(derived_block_size(num_wanted), start_width(1, num_wanted, num_outputs))
    return 1.75 * num_wanted + 5 * width


def prefers_dense(num_wanted: int, num_rows: int, num_outputs: int) -> bool:
    """Say whether a matrix is better written down for its eigenpairs: it costs no more products, or is small."""
    is_dear = typical_products(num_wanted, num_outputs) >= num_rows or num_wanted > num_rows / 4
    return num_rows <= _SMALL or (is_dear and num_rows <= LARGEST_DENSE)


def typical_calls(num_wanted: int, num_rows: int, num_outputs: int) -> tuple[int, int]:
    """Say in how many columns, and how many times, a search with the default solver multiplies."""
    if prefers_dense(num_wanted, num_rows, num_outputs):
        width = min(num_rows, DENSE_WIDTH)
        return width, math.ceil(num_rows / width)
    width = max(derived_block_size(num_wanted), start_width(1, num_wanted, num_outputs))
    return width, math.ceil(typical_products(num_wanted, num_outputs) / width)
