"""What ``eigsh`` refuses before a product is spent; whoever keeps its settings for later asks here as well."""

from __future__ import annotations

from typing import Any

import numpy as np

from ntk_lazy.eigen.options import Solver
from ntk_lazy.errors import ArgumentError


def check_counts(k: Any, n: int, *, max_products: Any) -> None:
    """Refuse numbers of pairs and of products that cannot be meant."""
    if not isinstance(k, int) or isinstance(k, bool) or not 1 <= k <= n:
        raise ArgumentError(f"k is {k!r}; an operator with {n} rows has 1 to {n} eigenpairs.")
    if max_products is not None and (not isinstance(max_products, int) or max_products < 1):
        raise ArgumentError(
            f"max_products is {max_products!r}; it is a count, and nothing can be found without a product."
        )


def check_choices(verify: Any, on_unconverged: Any) -> None:
    """Refuse names that do not exist."""
    if verify is not False and verify not in ("fast", "rigorous"):
        raise ArgumentError(f"verify is {verify!r}; it is 'fast', 'rigorous' or False.")
    if on_unconverged not in ("raise", "return"):
        raise ArgumentError(f"on_unconverged is {on_unconverged!r}; it is 'raise' or 'return'.")


def check_solver(solver: Any) -> None:
    """Refuse what is neither ``"auto"`` nor the options of a solver."""
    if not isinstance(solver, Solver) and not (isinstance(solver, str) and solver == "auto"):
        raise ArgumentError(f"solver is {solver!r}; it is 'auto', Lanczos(...), LOBPCG(...) or Dense(...).")


def check_progress(progress: Any) -> None:
    """Refuse what can be neither switched on nor called."""
    if not isinstance(progress, bool) and not callable(progress):
        raise ArgumentError(f"progress is {progress!r}; it is True, False or a function of a SolveState.")


def as_tolerance(rtol: Any) -> float:
    """Read a relative tolerance; a number of NumPy is one.

    Raises:
        ArgumentError: Not a number between 0 and 1.
    """
    if not isinstance(rtol, float | np.floating) or not 0 < rtol < 1:
        raise ArgumentError(f"rtol is {rtol!r}; it is relative to each eigenvalue and lies between 0 and 1.")
    return float(rtol)


def as_seed(seed: Any) -> int:
    """Read a seed, of either sign; an integer of NumPy is one.

    Raises:
        ArgumentError: Not an integer.
    """
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool):
        raise ArgumentError(f"seed is {seed!r}; it is an integer, the same one for the same result.")
    return int(seed)
