"""The look that all figures of a report share: size, type, colours, and the axis of training steps."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

from ntk_lazy.study.config import StudyConfig

WIDTH = 9.0
INK, MUTED, ACCENT, WARM = "#1b2530", "#6b7684", "#1f5fa8", "#c4512d"
FUNCTION_COLOURS = {"target": "#1b2530", "output": "#1f5fa8", "residual": "#c4512d"}
_DPI = 150
_LOOK: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e8ec",
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.markersize": 3.5,
    "figure.facecolor": "white",
}


@contextmanager
def look() -> Iterator[None]:
    """Draw with the settings of the report, and leave those of the process as they were."""
    with mpl.rc_context(_LOOK):
        yield


def new_figure(height: float, rows: int, columns: int, **grid: Any) -> tuple[Figure, Any]:
    """Make a figure of the width of a page, in inches, and its axes; no window system is touched."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **grid)
    return figure, axes


def as_png(figure: Figure) -> bytes:
    """Render a figure."""
    buffer = io.BytesIO()
    # Without the date and the version of matplotlib, equal figures are equal files.
    figure.savefig(buffer, dpi=_DPI, format="png", metadata={"Software": None})
    return buffer.getvalue()


def steps_axis(axes: Axes, config: StudyConfig, *, label: bool = True) -> None:
    """Make the horizontal axis one of training steps, wide where the kernel is fast, with the halvings marked.

    The square root shows both the first hundred steps and the phases behind a halving; a logarithm would
    press the latter into a line.
    """
    axes.set_xscale("function", functions=(_root, np.square))
    axes.set_xlim(0, config.steps * 1.01)
    axes.set_xticks(_ticks(config.steps))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.minorticks_off()
    for halving in config.halvings:
        axes.axvline(halving, color=MUTED, linewidth=1.1, linestyle=(0, (1.5, 1.5)), zorder=1)
    if label:
        axes.set_xlabel("training step  (square-root scale; dotted: δ halved)")


def log_axis(axes: Axes) -> None:
    """Make the vertical axis logarithmic, with enough labels where it spans less than three decades.

    An axis without a positive number, such as that of a kernel that is zero, stays as it is.
    """
    if not np.isfinite(axes.dataLim.minposy):
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < low * 1e3:
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def graded(count: int, *, name: str = "viridis") -> list[tuple[float, float, float, float]]:
    """Return colours for an ordered family of lines, dark to light, none too light for white paper."""
    return [tuple(c) for c in mpl.colormaps[name](np.linspace(0.0, 0.82, count))]


def some(items: Sequence[int], count: int) -> list[int]:
    """Choose at most ``count`` of a sequence, both ends included, evenly."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _root(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.sqrt(np.clip(values, 0, None))


def _ticks(steps: int) -> list[float]:
    """Choose round steps that are apart on the square-root scale."""
    chosen = [0.0]
    candidates = [m * 10.0**e for e in range(1, 8) for m in (1, 2, 4, 6)]
    for tick in candidates:
        if tick <= steps and np.sqrt(tick / steps) - np.sqrt(chosen[-1] / steps) > 0.11:
            chosen.append(tick)
    return chosen
