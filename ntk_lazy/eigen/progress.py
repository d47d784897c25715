"""Show how far a solve is, without touching it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec


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


@contextmanager
def progress_display(progress: bool | Callback, *, num_wanted: int) -> Iterator[Callback | None]:
    """Choose who is told about the progress, and clear up after them.

    True shows a bar on standard error if ``rich`` is there, else one plain line that is rewritten.
    """
    if callable(progress):
        yield progress
    elif not progress:
        yield None
    elif find_spec("rich") is None:
        try:
            yield _rewrite_line
        finally:
            sys.stderr.write("\n")
    else:
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True)) as bar:
            row = bar.add_task("eigsh", total=num_wanted)
            yield lambda state: bar.update(row, completed=state.num_converged, description=describe(state))


def _rewrite_line(state: SolveState) -> None:
    """Write over the last line."""
    sys.stderr.write(f"\r{describe(state)}")
    sys.stderr.flush()


def describe(state: SolveState) -> str:
    """Put a state into words."""
    top = f"{state.values[0]:.4e}" if state.values else "none yet"
    return (
        f"eigsh: {state.num_converged}/{state.num_wanted} pairs, {state.columns} products in "
        f"{state.block_calls} calls, largest value {top}, {state.seconds:.1f} s"
    )
