"""Curves of a study: eigenvalues, energies, scalars, and how well the pairs are known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ntk_lazy.records import SpectrumRecord
from ntk_lazy.study import findings
from ntk_lazy.study.canvas import ACCENT, INK, MUTED, WARM, graded, log_axis, new_figure, steps_axis
from ntk_lazy.study.evidence import Evidence

INDICES = (1, 5, 10, 20, 50, 100, 200, 500, 1000)
_SHARES = (1, 5, 20, 50, 100, 200, 500, 1000)
_NAMES = {"target": "target  E(y, k)", "output": "output  E(f, k)", "residual": "residual  E(m, k)"}


def eigenvalues(evidence: Evidence) -> Figure:
    """Draw λ_i over time under the bound 2N/δ, and δλ₁/N around 2."""
    config, records = evidence.config, evidence.usable
    figure, axes = new_figure(6.4, 2, 1, sharex=True, height_ratios=[2.1, 1])
    upper, lower = axes[:, 0]
    steps = np.array([r.step for r in records])
    curves = {i: np.array([_value(r, i) for r in records]) for i in INDICES}
    indices = [i for i, values in curves.items() if np.isfinite(values).any()]
    for i, colour in zip(indices, graded(len(indices)), strict=True):
        values = curves[i]
        upper.plot(steps, values, "o-", color=colour)
        last = np.flatnonzero(np.isfinite(values))[-1]
        upper.annotate(
            f"λ$_{{{i}}}$", (steps[last], values[last]), (6, 0), textcoords="offset points", color=colour, va="center"
        )
    edges = np.array([*[s for s, _ in config.phases], config.steps])
    bounds = [2 * config.num_points / config.lr_at(s) for s, _ in config.phases]
    upper.stairs(bounds, edges, baseline=None, color=WARM, linestyle="--", linewidth=1.6, label="stability bound 2N/δ")
    upper.set_yscale("log")
    upper.set_ylabel("eigenvalue of  K = J Jᵀ")
    upper.set_title(findings.edge_title(evidence))
    upper.legend(loc="best")
    steps_axis(upper, config, label=False)
    lower.axhspan(1.8, 2.5, color=WARM, alpha=0.10, linewidth=0, label="claim C6: mean in [1.8, 2.5]")
    lower.axhline(2, color=WARM, linestyle="--")
    lower.plot(*evidence.curve("stability"), "o-", color=INK)
    lower.set_ylabel("δ λ₁ / N")
    lower.set_ylim(0, None)
    lower.legend(loc="best")
    steps_axis(lower, config)
    return figure


def energies_over_time(evidence: Evidence) -> Figure:
    """Draw E(φ, k) over time for several k."""
    figure, axes = new_figure(7.4, 3, 1, sharex=True)
    shares = _available(evidence, _SHARES)
    for panel, (name, title) in zip(axes[:, 0], _NAMES.items(), strict=True):
        for k, colour in zip(shares, graded(len(shares)), strict=True):
            points = [(r.step, r.energy(name, k)) for r in evidence.usable if k <= r.num_trusted]
            panel.plot([p[0] for p in points], [p[1] for p in points], "o-", color=colour, label=f"k = {k}")
        panel.set_title(title)
        panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        panel.set_ylabel("relative energy")
        panel.set_ylim(-0.03, 1.03)
        steps_axis(panel, evidence.config, label=panel is axes[-1, 0])
    if shares:
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(shares))
    return figure


def energies_over_index(evidence: Evidence) -> Figure:
    """Draw E(φ, k) over k at several steps."""
    chosen = _milestones(evidence)
    figure, axes = new_figure(3.6, 1, 3, sharey=True)
    for panel, (name, title) in zip(axes[0], _NAMES.items(), strict=True):
        for record, colour in zip(chosen, graded(len(chosen), name="plasma"), strict=True):
            curve = np.array(record.energies.get(name, ()))
            trusted = min(record.num_trusted, len(curve))
            index = np.arange(1, len(curve) + 1)
            panel.plot(index[:trusted], curve[:trusted], color=colour, label=f"step {record.step:,}")
            panel.plot(index[trusted:], curve[trusted:], color=colour, linestyle=":")
        panel.set_xscale("log")
        panel.set_title(title)
        panel.set_xlabel("number of eigenvectors  k")
        panel.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        panel.set_ylim(-0.03, 1.03)
    axes[0, 0].set_ylabel("relative energy in the top k")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(chosen))
    return figure


def spectra(evidence: Evidence) -> Figure:
    """Draw λ_i over i at several steps, and what each pair's residual is."""
    chosen = _milestones(evidence)
    figure, axes = new_figure(3.9, 1, 2)
    left, right = axes[0]
    for record, colour in zip(chosen, graded(len(chosen), name="plasma"), strict=True):
        values, residuals = np.array(record.values), np.array(record.residual_norms)
        index = np.arange(1, len(values) + 1)
        above = ~np.array(record.is_below_noise)
        left.plot(index[above], values[above], color=colour, label=f"step {record.step:,}")
        if values[0] > 0:
            left.axhline(record.noise_floor * values[0], color=colour, linestyle=":", linewidth=1)
        # What lies below the floor is no eigenvalue, and has no relative residual.
        above &= values > 0
        right.plot(index[above], residuals[above] / values[above], color=colour)
    for panel in (left, right):
        if np.isfinite(panel.dataLim.minposy):
            panel.set_xscale("log")
            panel.set_yscale("log")
        panel.set_xlabel("index  i")
    left.set_title("Spectrum above the measured noise floor  (dotted)")
    left.set_ylabel("eigenvalue  λᵢ")
    right.axhline(evidence.config.rtol, color=WARM, linestyle="--", label="tolerance")
    right.set_title("Residual of each pair")
    right.set_ylabel("‖K vᵢ − λᵢ vᵢ‖ / λᵢ")
    right.legend(loc="lower right")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(chosen))
    return figure


def scalars(evidence: Evidence) -> Figure:
    """Draw loss, trace, effective rank, spectral position, kernel-target alignment and the first-order error."""
    figure, axes = new_figure(6.6, 3, 2, sharex=True)
    panels: list[tuple[str, str, str, Callable[[Axes], object]]] = [
        ("loss", "Training loss", "1/(2N) Σ (f − y)²", log_axis),
        ("trace", "Trace of K", "tr K", log_axis),
        ("effective_rank", "Effective rank", "(tr K)² / ‖K‖²", lambda a: a.set_ylim(0, None)),
        ("spectral_position", "Spectral position of the gradient", "χ", log_axis),
        ("kernel_target_alignment", "Kernel-target alignment", "yᵀKy / (‖K‖ ‖y‖²)", lambda a: a.set_ylim(0, None)),
        (
            "first_order_error",
            "First-order error  (dashed: rule of C11)",
            "relative error",
            lambda a: a.set_ylim(0, None),
        ),
    ]
    for panel, (name, title, label, finish) in zip(axes.flat, panels, strict=True):
        if name == "loss" and evidence.losses is not None:
            panel.plot(*evidence.losses, color=MUTED, linewidth=0.8)
        steps, values = evidence.curve(name)
        panel.plot(steps, values, "o-", color=ACCENT)
        deviations = [r.errors.get(name, 0.0) for r in evidence.usable if r.step in set(steps.tolist())]
        if any(deviations):
            panel.errorbar(steps, values, yerr=2 * np.array(deviations), fmt="none", ecolor=MUTED, capsize=2)
        panel.set_title(title)
        panel.set_ylabel(label)
        finish(panel)
        steps_axis(panel, evidence.config, label=False)
    axes.flat[5].axhline(0.15, color=WARM, linestyle="--")
    figure.supxlabel("training step  (square-root scale; dotted: δ halved)", fontsize=9.5)
    return figure


def _value(record: SpectrumRecord, i: int) -> float:
    """Return λ_i, or NaN where there is none that can be told from zero."""
    known = i <= len(record.values) and record.values[i - 1] > 0 and not record.is_below_noise[i - 1]
    return record.values[i - 1] if known else np.nan


def _available(evidence: Evidence, wanted: tuple[int, ...]) -> list[int]:
    most = max(r.num_trusted for r in evidence.usable)
    return [k for k in wanted if k <= most]


def _milestones(evidence: Evidence) -> list[SpectrumRecord]:
    """Choose the first record, two early ones, the end of each of at most three phases, and the last."""
    ends = [end - 1 for _, end in evidence.config.phases[:-1]]
    ends = [ends[i] for i in sorted({0, len(ends) - 1})] if ends else []
    steps = dict.fromkeys([0, 100, 1_000, *ends, evidence.config.steps])
    found = [r for s in sorted(steps) if (r := evidence.at(s)) is not None]
    return found or list(evidence.usable[-1:])
