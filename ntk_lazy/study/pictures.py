"""Images of a study: target, output and residual, eigenfunctions, kernel slices, and their frequencies."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from ntk_lazy.study.canvas import ACCENT, FUNCTION_COLOURS, WARM, new_figure
from ntk_lazy.study.portrait import SLICE_POINT, Portrait
from ntk_lazy.study.target import Picture, Target

_COLUMNS = 3


def learning(before: Portrait, after: Portrait, target: Target) -> Figure:
    """Draw target and training points, and output and residual at the start and at the end."""
    picture = target.picture
    figure, axes = new_figure(4.9, 2, 3)
    span = float(np.quantile(np.abs(picture), 0.995))
    for row, portrait in zip(axes, (before, after), strict=True):
        output = portrait.output.double().numpy()
        grey = _show(row[1], output, span, colours="gray", title=f"output f, step {portrait.step:,}")
        red = _show(row[2], output - picture, span, title=f"residual f − y, step {portrait.step:,}")
    _show(axes[0, 0], picture, span, colours="gray", title="target y")
    height, width = picture.shape
    columns, rows = (target.train_x.double().cpu().numpy().T + 1) / 2 * np.array([[width], [height]]) - 0.5
    # On a tint, because the points are anything from black to white.
    axes[1, 0].imshow(np.full((height, width, 3), (0.62, 0.70, 0.79)))
    _bare(axes[1, 0], f"the {len(rows):,} training points")
    values = target.train_y.reshape(-1).double().cpu().numpy()
    axes[1, 0].scatter(columns, rows, c=values, s=3, cmap="gray", vmin=-span, vmax=span, linewidths=0)
    figure.colorbar(grey, ax=axes[:, :2], shrink=0.6, aspect=30, location="bottom", label="grey value, standardised")
    figure.colorbar(red, ax=axes[:, 2:], shrink=0.9, aspect=16, location="bottom", label="residual")
    return figure


def eigenfunctions(portrait: Portrait) -> Figure:
    """Draw the first eigenfunctions on every pixel, each with its eigenvalue and residual."""
    count = len(portrait.functions)
    rows = -(-count // _COLUMNS)
    figure, axes = new_figure(2.35 * rows + 0.5, rows, _COLUMNS)
    image = None
    for index, panel in enumerate(axes.flat):
        if index >= count:
            panel.set_axis_off()
            continue
        function = portrait.functions[index].double().numpy()
        # The sign of an eigenvector is arbitrary: brighter than the mean at most of its weight.
        sign = np.sign(np.sum(function**3)) or 1.0
        value, residual = float(portrait.values[index]), float(portrait.relative_residuals[index])
        title = f"ψ$_{{{index + 1}}}$   λ = {value:.3g}   residual {residual:.0e}"
        image = _show(panel, sign * function, 3.0, title=title)
    if image is not None:
        figure.colorbar(
            image, ax=axes, shrink=0.5, aspect=40, location="bottom", label="ψ, mean square 1 over the training points"
        )
    return figure


def frequencies(before: Portrait, after: Portrait) -> Figure:
    """Draw radial power spectra, and the mean frequency of eigenfunctions over their index."""
    figure, axes = new_figure(3.9, 1, 3)
    names = ("target", "output", "residual")
    for panel, portrait in zip(axes[0, :2], (before, after), strict=True):
        rings = np.arange(portrait.spectra.shape[1])
        for row, name in enumerate(names):
            power = portrait.spectra[row].numpy()
            panel.plot(
                rings[1:], power[1:], color=FUNCTION_COLOURS[name], label=name, linestyle="--" if row == 0 else "-"
            )
        for row, shade in zip(range(3, portrait.spectra.shape[0]), np.linspace(0.75, 0.3, 6), strict=False):
            label = "eigenfunctions 1, 2, …" if row == 3 else None
            panel.plot(
                rings[1:],
                portrait.spectra[row].numpy()[1:],
                color=ACCENT,
                alpha=shade * 0.5,
                linewidth=0.9,
                label=label,
            )
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_ylim(1e-6, 1)
        panel.set_xlabel("frequency  (cycles per width)")
        panel.set_title(f"Radial power, step {portrait.step:,}")
    axes[0, 0].set_ylabel("share of power in a ring")
    last = axes[0, 2]
    for portrait, colour in ((before, WARM), (after, ACCENT)):
        index = np.arange(1, len(portrait.mean_frequencies) + 1)
        label = f"step {portrait.step:,}, Spearman {portrait.frequency_order:.2f}"
        last.plot(index, portrait.mean_frequencies.numpy(), ".", color=colour, label=label)
    last.set_title("Frequency of eigenfunctions")
    last.set_xlabel("index  i")
    last.set_ylabel("mean frequency of ψᵢ")
    last.legend(loc="lower right", handletextpad=0.1, borderaxespad=0.1)
    last.set_ylim(0, None)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower left", ncols=4)
    return figure


def kernels(before: Portrait, after: Portrait) -> Figure:
    """Draw K(x0, ·) and the gradient norm over the picture, at the start and at the end."""
    figure, axes = new_figure(5.2, 2, 2)
    for row, portrait in zip(axes, (before, after), strict=True):
        slice_ = portrait.kernel_slice.double().numpy()
        span = float(np.abs(slice_).max())
        image = _show(row[0], slice_, span, title=f"kernel slice K(x₀, ·), step {portrait.step:,}")
        height, width = slice_.shape
        row[0].plot(
            (SLICE_POINT[0] + 1) / 2 * width - 0.5,
            (SLICE_POINT[1] + 1) / 2 * height - 0.5,
            "o",
            mfc="none",
            mec="black",
        )
        figure.colorbar(image, ax=row[0], shrink=0.85)
        norms = portrait.gradient_norms.double().numpy()
        image = row[1].imshow(norms, cmap="magma", vmin=0, interpolation="nearest")
        _bare(row[1], f"gradient norm ‖∇$_θ$ f(x)‖, step {portrait.step:,}")
        figure.colorbar(image, ax=row[1], shrink=0.85)
    return figure


def _show(axes: Axes, picture: Picture, span: float, *, title: str, colours: str = "RdBu_r") -> AxesImage:
    image = axes.imshow(picture, cmap=colours, vmin=-span, vmax=span, interpolation="nearest")
    _bare(axes, title)
    return image


def _bare(axes: Axes, title: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(title, fontsize=9.5, fontweight="normal", loc="left")
