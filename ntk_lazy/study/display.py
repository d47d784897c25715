"""What a study says while it runs: a bar where there is a terminal, plain lines where there is none."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO, final

from ntk_lazy.records import SpectrumRecord
from ntk_lazy.study.pipe import abandon

try:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
except ImportError:  # pragma: no cover - rich is a part of the extra, but a bar is no reason to fail
    _HAS_RICH = False
else:
    _HAS_RICH = True


class Display(Protocol):
    """Where a study reports to. What it does never changes a result."""

    def say(self, text: str) -> None:
        """Show one line that stays."""

    def progress(self, step: int, loss: float) -> None:
        """Show how far the training is."""


@final
class Silent:
    """Say nothing."""

    def say(self, text: str) -> None:
        """Pass over it."""

    def progress(self, step: int, loss: float) -> None:
        """Pass over it."""


@final
class Lines:
    """Plain lines, for logs and pipes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def say(self, text: str) -> None:
        """Write the line; a reader that has gone away, or a full disk behind a pipe, is no reason to end a study."""
        try:
            print(text, file=self._stream, flush=True)
        except OSError:
            abandon(self._stream)

    def progress(self, step: int, loss: float) -> None:
        """Pass over it: a snapshot's line says as much."""


@contextmanager
def display_for(stream: TextIO | None = None, *, total: int) -> Iterator[Display]:
    """Choose the display that fits the stream, standard output by default."""
    stream = sys.stdout if stream is None else stream
    if not (_HAS_RICH and stream.isatty()):
        yield Lines(stream)
        return
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=stream, highlight=False)) as bar:
        yield _Bar(bar, bar.add_task("training", total=total, loss=""))


class _Bar:
    """A rich bar below the lines."""

    def __init__(self, bar: Progress, task: object) -> None:
        self._bar, self._task = bar, task

    def say(self, text: str) -> None:
        self._bar.console.print(text, markup=False, soft_wrap=True)

    def progress(self, step: int, loss: float) -> None:
        self._bar.update(self._task, completed=step, loss=f"loss {loss:.4f}")  # type: ignore[arg-type]


def describe(record: SpectrumRecord) -> str:
    """Put a snapshot into one line."""
    if not record.is_usable:
        return f"step {record.step:>7,}  no spectrum: {record.message}"
    parts = [
        f"step {record.step:>7,}",
        f"loss {record.scalar('loss'):.4f}",
        f"λ₁ {record.values[0]:.3g}",
        f"δλ₁/N {record.scalar('stability'):.2f}",
        *(
            f"E({s},{k}) {record.energy(n, k):.3f}"
            for s, n in zip("yfm", _FUNCTIONS, strict=True)
            for k in _shown(record)
        ),
        _pairs(record) + ("" if record.status == "converged" else f" ({record.status})"),
        f"{record.cost.get('record_seconds', 0):.1f} s",
    ]
    return "  ".join(parts)


_FUNCTIONS = ("target", "output", "residual")


def _pairs(record: SpectrumRecord) -> str:
    """Say how good the trusted pairs are: beyond them a value is rounding, and so is what is relative to it."""
    trusted, found = record.num_trusted, len(record.values)
    text = f"{found} pairs" if trusted == found else f"{trusted} of {found} pairs"
    # Values above a noise floor are positive, but the floor of a damaged record may be unknown.
    pairs = zip(record.residual_norms[:trusted], record.values[:trusted], strict=True)
    shares = [residual / value for residual, value in pairs if value > 0]
    return f"{text} to {max(shares):.0e}" if shares else text


def _shown(record: SpectrumRecord) -> tuple[int, ...]:
    return (min(20, len(record.values)),)
