"""Show how far a solve is, without touching it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SolveState:
    """Where a solve is after a block call.

    Attributes:
        block_calls: Calls so far.
        columns: Products so far.
        num_wanted: Pairs asked for.
        num_converged: Pairs among them that meet the tolerance.
        values: The Ritz values, largest first, at most ``num_wanted``.
        residual_norms: Their residual norms.
        seconds: Wall time so far.
    """

    block_calls: int
    columns: int
    num_wanted: int
    num_converged: int
    values: tuple[float, ...]
    residual_norms: tuple[float, ...]
    seconds: float


Callback = Callable[[SolveState], object]


class ProgressLine:
    """One line on standard error, rewritten after every block call."""

    def __call__(self, state: SolveState) -> None:
        """Rewrite the line; end it when all pairs are there."""
        is_done = state.num_converged >= state.num_wanted
        sys.stderr.write(f"\r{describe(state)}" + ("\n" if is_done else ""))
        sys.stderr.flush()


def describe(state: SolveState) -> str:
    """Put a state into words."""
    top = f"{state.values[0]:.4e}" if state.values else "none yet"
    return (
        f"eigsh: {state.num_converged}/{state.num_wanted} pairs, {state.columns} products in "
        f"{state.block_calls} calls, largest value {top}, {state.seconds:.1f} s"
    )


def progress_callback(progress: bool | Callback) -> Callback | None:
    """Choose who is told about the progress."""
    if callable(progress):
        return progress
    return ProgressLine() if progress else None
