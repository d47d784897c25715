"""The claims of the paper as measured quantities with pass rules, judged by what one study has measured."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean, median
from typing import Literal, final

from ntk_lazy.study.config import MIN_STEPS_FOR_EARLY_CLAIM
from ntk_lazy.study.evidence import Evidence

Verdict = Literal["pass", "fail", "not decided"]

_LONG_PHASE = 5_000


@final
@dataclass(frozen=True)
class Claim:
    """One row of the table.

    Attributes:
        name: C1 to C20.
        statement: What is claimed, in words.
        rule: The quantity and when it passes.
        measured: What this study found, or nothing.
        verdict: ``"pass"``, ``"fail"`` or ``"not decided"``.
        reason: Why a row is not decided.
    """

    name: str
    statement: str
    rule: str
    measured: str
    verdict: Verdict
    reason: str = ""


@final
class _UndecidedError(Exception):
    """This study cannot decide the row; the message says what it would take."""


_Finding = tuple[str, bool]
_Judge = Callable[[Evidence], _Finding]


def judge(evidence: Evidence) -> list[Claim]:
    """Judge every row of the table; a row that this study cannot decide says what it would take."""
    analytic = evidence.config.image == "analytic"
    table = []
    for name, statement, rule, analytic_rule, decide in _ROWS:
        if analytic and analytic_rule is None:
            table.append(Claim(name, statement, rule, "", "not decided", "stated for a photograph"))
            continue
        shown = analytic_rule if analytic and analytic_rule else rule
        if not evidence.is_finished:
            table.append(Claim(name, statement, shown, "", "not decided", "this study has not ended"))
            continue
        try:
            measured, passed = decide(evidence)
        except _UndecidedError as why:
            table.append(Claim(name, statement, shown, "", "not decided", str(why)))
        else:
            table.append(Claim(name, statement, shown, measured, "pass" if passed else "fail"))
    return table


def _need(*values: float) -> None:
    """Refuse to judge numbers that were not measured: a NaN would fail the claim and not the measurement."""
    if not all(math.isfinite(v) for v in values):
        raise _UndecidedError("needs snapshots that are missing or failed")


def _energy_at(evidence: Evidence, step: int, name: str, k: int) -> float:
    record = evidence.at(step)
    value = math.nan if record is None else record.energy(name, k)
    if record is not None and k > len(record.values):
        raise _UndecidedError(f"needs num_pairs >= {k}")
    _need(value)
    return value


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    if not found:
        raise _UndecidedError("needs snapshots in a part of training that has none")
    _need(*found)
    return fmean(found)


def _first_halving(evidence: Evidence) -> int:
    if not evidence.config.halvings:
        raise _UndecidedError("needs a halving of the learning rate")
    return evidence.config.halvings[0]


def _two_halvings(evidence: Evidence) -> None:
    phases = evidence.config.phases
    if len(phases) < 3 or phases[1][1] - phases[1][0] < _LONG_PHASE:
        raise _UndecidedError("needs two halvings, so that a halved rate meets its edge: preset claims")


def _aligns(evidence: Evidence) -> _Finding:
    k = 100 if evidence.config.image == "analytic" else 20
    start = _energy_at(evidence, 0, "target", k)
    end = _energy_at(evidence, evidence.config.steps, "target", k)
    passed = end >= 0.88 and start <= 0.62 if k == 100 else end >= 0.85 and end >= start + 0.3
    return f"{start:.3f} → {end:.3f}", passed


def _spans(evidence: Evidence) -> _Finding:
    start = _energy_at(evidence, 0, "target", 200)
    end = _energy_at(evidence, evidence.config.steps, "target", 200)
    return f"{start:.3f} → {end:.3f}", end >= 0.95


def _is_early(evidence: Evidence) -> _Finding:
    steps = evidence.config.steps
    if steps < MIN_STEPS_FOR_EARLY_CLAIM:
        raise _UndecidedError(f"needs at least {MIN_STEPS_FOR_EARLY_CLAIM:,} steps: preset claims")
    start, one, four, end = (_energy_at(evidence, s, "target", 20) for s in (0, steps // 100, steps // 25, steps))
    shares = ((one - start) / (end - start), (four - start) / (end - start))
    return f"{shares[0]:.0%} after 1 %, {shares[1]:.0%} after 4 %", shares[0] >= 0.6 and shares[1] >= 0.8


def _output_in_top(evidence: Evidence) -> _Finding:
    share, least = (0.2, 0.97) if evidence.config.image == "analytic" else (0.1, 0.99)
    wanted = round(share * evidence.config.num_points)
    k = min(wanted, evidence.config.num_pairs)
    lowest = min((r.energy("output", k) for r in evidence.usable), default=math.nan)
    _need(lowest)
    if k < wanted and lowest < least:
        raise _UndecidedError(f"needs num_pairs >= {wanted}; with {k} at least {lowest:.4f}")
    return f"min over {len(evidence.usable)} snapshots, k = {k}: {lowest:.4f}", lowest >= least


def _off_the_training_set(evidence: Evidence) -> _Finding:
    if evidence.after is None or len(evidence.after.test_energy) < 100:
        raise _UndecidedError("needs the finished study with 100 pairs")
    test = evidence.after.test_energy
    gap = abs(float(test[19]) - _energy_at(evidence, evidence.config.steps, "target", 20))
    return f"difference {gap:.3f}; {float(test[99]):.3f}", gap <= 0.05 and float(test[99]) >= 0.95


def _edge_of_stability(evidence: Evidence) -> _Finding:
    end = evidence.config.phases[0][1]
    values = [r.scalar("stability") for r in evidence.between(evidence.config.warm_up, end)]
    mean = _mean(values)
    inside = all(1.6 <= v <= 3.0 for v in values)
    return f"mean {mean:.2f}, range {min(values):.2f} to {max(values):.2f}", 1.8 <= mean <= 2.5 and inside


def _is_conserved(evidence: Evidence) -> _Finding:
    _two_halvings(evidence)
    first, second = (_mean(r.values[0] for r in evidence.late(p)) for p in (0, 1))
    returned = max((r.scalar("stability") for r in evidence.late(1)), default=math.nan)
    _need(returned)
    return f"ratio {second / first:.2f}; back to {returned:.2f}", 1.6 <= second / first <= 2.2 and returned >= 1.8


def _spectrum_grows(evidence: Evidence) -> _Finding:
    end = evidence.config.phases[0][1] - 1
    at_end = evidence.at(end)
    if evidence.first is None or at_end is None or len(at_end.values) < 100:
        raise _UndecidedError("needs 100 pairs at the first and the last step of phase 1")
    series = [(r.values[9], r.values[99], r.scalar("trace")) for r in evidence.usable]
    _need(*(v for row in series for v in row))
    falls = min(b / a for old, new in itertools.pairwise(series) for a, b in zip(old, new, strict=True))
    first, last = series[0], (at_end.values[9], at_end.values[99], at_end.scalar("trace"))
    growth = [b / a for a, b in zip(first, last, strict=True)]
    passed = falls >= 0.8 and all(g >= least for g, least in zip(growth, (50, 100, 10), strict=True))
    return f"×{growth[0]:.0f}, ×{growth[1]:.0f}, ×{growth[2]:.0f}; smallest step ×{falls:.2f}", passed


def _decay_spreads(evidence: Evidence) -> _Finding:
    _two_halvings(evidence)
    change = {}
    for name, k in (("target", 20), ("target", 200), ("output", 20)):
        first, second = (_mean(r.energy(name, k) for r in evidence.late(p)) for p in (0, 1))
        change[name, k] = second - first
    y20, y200, f20 = change.values()
    text = f"E(y,20) {y20:+.3f}, E(y,200) {y200:+.3f}, E(f,20) {f20:+.3f}"
    return text, -0.06 <= y20 <= -0.01 and abs(y200) <= 0.01 and f20 <= -0.02


def _residual_leaves(evidence: Evidence) -> _Finding:
    halving = _first_halving(evidence)
    analytic = evidence.config.image == "analytic"
    window = (500, 1_001, 0.15) if analytic else (1, 501, 0.02)
    before = _mean(r.energy("residual", 20) for r in evidence.late(0))
    behind = evidence.between(halving + window[0], halving + window[1])
    after = _mean(r.energy("residual", 20) for r in behind)
    return f"{before:.3f} → {after:.4f}", after <= window[2] and before >= 0.1


def _first_order(evidence: Evidence) -> _Finding:
    behind = evidence.between(_first_halving(evidence) + 1, evidence.config.steps + 1)
    errors = [r.scalar("first_order_error") for r in behind]
    cosines = [r.scalar("first_order_cosine") for r in behind]
    _mean(errors + cosines)
    error, cosine = median(errors), median(cosines)
    return f"median error {error:.3f}, cosine {cosine:.4f}", error <= 0.15 and cosine >= 0.98


def _other_runs(what: str) -> _Judge:
    def decide(evidence: Evidence) -> _Finding:
        raise _UndecidedError(f"needs other runs: {what}")

    return decide


def _kernel_slows(evidence: Evidence) -> _Finding:
    start = evidence.config.phases[-1][0]
    distance = next((m.from_start for m in evidence.movement if m.step == 300), math.nan)
    early = max((m.velocity for m in evidence.movement if m.step <= 100), default=math.nan)
    late = min((m.velocity for m in evidence.movement if m.step > start), default=math.nan)
    _need(early, late, distance)
    text = f"S(K₀, K₃₀₀) = {distance:.2f}; {early:.1e} → {late:.1e} per step"
    return text, distance >= 0.35 and early >= 100 * late


def _null_control(evidence: Evidence) -> _Finding:
    if evidence.before is None:
        raise _UndecidedError("needs the portrait of the first network")
    n, k = evidence.config.num_points, evidence.config.num_pairs
    allowed = 4 * math.sqrt(2 * k * (n - k) / n**3)
    gaussian, shuffled = (float(v) for v in evidence.before.null_energy)
    text = f"k/N = {k / n:.3f} ± {allowed:.3f}; Gaussian {gaussian:.3f}, shuffled {shuffled:.3f}"
    return text, max(abs(gaussian - k / n), abs(shuffled - k / n)) <= allowed


def _position_falls(evidence: Evidence) -> _Finding:
    halving = _first_halving(evidence)
    peak = max((r.scalar("spectral_position") for r in evidence.between(0, halving)), default=math.nan)
    edge = _mean(r.scalar("spectral_position") for r in evidence.late(0))
    after = _mean(r.scalar("spectral_position") for r in evidence.between(halving + 1, halving + 501))
    _need(peak)
    return f"{peak:.3f} → {edge:.3f} → {after:.1e}", peak >= 3 * edge and edge >= 50 * after


def _alignment_declines(evidence: Evidence) -> _Finding:
    curve = [(r.scalar("kernel_target_alignment"), r) for r in evidence.usable]
    _need(*(value for value, _ in curve))
    if not curve:
        raise _UndecidedError("needs snapshots")
    peak, at_peak = max(curve, key=lambda pair: pair[0])
    behind = [r for _, r in curve if r.step >= at_peak.step]
    kept = min(r.energy("target", 20) for r in behind)
    _need(kept)
    text = f"peak {peak:.3f} at step {at_peak.step:,}, end {curve[-1][0]:.3f}; E(y,20) ≥ {kept:.3f}"
    return text, curve[-1][0] <= 0.9 * peak and kept >= 0.85


def _frequency_order(evidence: Evidence) -> _Finding:
    if evidence.before is None or evidence.after is None:
        raise _UndecidedError("needs the finished study")
    before, after = evidence.before, evidence.after
    ratios = [p.residual_frequency / p.target_frequency for p in (before, after)]
    text = (
        f"Spearman {before.frequency_order:.2f}, {after.frequency_order:.2f}; "
        f"residual {ratios[0]:.1f}× → {ratios[1]:.1f}× the target"
    )
    ordered = min(before.frequency_order, after.frequency_order) >= 0.6
    return text, ordered and 0.7 <= ratios[0] <= 1.4 and ratios[1] >= 3


def _looks_like_target(evidence: Evidence) -> _Finding:
    if evidence.before is None or evidence.after is None:
        raise _UndecidedError("needs the finished study")
    parts = [(p.target_correlation, p.edge_auc, p.gradient_correlation) for p in (evidence.before, evidence.after)]
    text = "; ".join(f"{a:.2f} → {b:.2f}" for a, b in zip(*parts, strict=True))
    return text, parts[1][0] >= 0.5 and parts[1][1] >= 0.7 and parts[1][2] >= 0.3


# name, claim, rule on a photograph, rule on the analytic target (None: not stated for it), judge
_ROWS: tuple[tuple[str, str, str, str | None, _Judge], ...] = (
    (
        "C1",
        "Top eigenvectors align with the target",
        "E(y,20) ≥ 0.85 at the end, and up by ≥ 0.3",
        "E(y,100) ≥ 0.88 at the end, ≤ 0.62 at the start",
        _aligns,
    ),
    ("C2", "200 vectors nearly span the target", "E(y,200) ≥ 0.95 at the end", None, _spans),
    (
        "C3",
        "Alignment is early",
        "≥ 60 % of the rise of E(y,20) in the first 1 % of steps, ≥ 80 % in 4 %",
        None,
        _is_early,
    ),
    (
        "C4",
        "The output lies in the top eigenspace throughout",
        "min over t of E(f, 0.1 N) ≥ 0.99",
        "min over t of E(f, 0.2 N) ≥ 0.97",
        _output_in_top,
    ),
    (
        "C5",
        "The same holds off the training set",
        "E(y,20) on test and training points within 0.05; 100 extended eigenfunctions hold ≥ 0.95 of the test target",
        None,
        _off_the_training_set,
    ),
    (
        "C6",
        "λ₁ climbs to 2N/δ and stays",
        "after warm-up δλ₁/N has mean in [1.8, 2.5], every snapshot in [1.6, 3.0]",
        "after warm-up δλ₁/N has mean in [1.8, 2.5], every snapshot in [1.6, 3.0]",
        _edge_of_stability,
    ),
    (
        "C7",
        "δλ₁ is conserved across halvings",
        "λ₁ ratio of late phases in [1.6, 2.2]; δλ₁/N back to ≥ 1.8",
        None,
        _is_conserved,
    ),
    (
        "C8",
        "The whole spectrum grows",
        "λ₁₀, λ₁₀₀ and trace never fall by more than 20 %; ≥ ×50, ×100, ×10 by the end of phase 1",
        None,
        _spectrum_grows,
    ),
    (
        "C9",
        "Decay spreads information over more eigenvectors",
        "E(y,20) down by 0.01 to 0.06, E(y,200) within 0.01, E(f,20) down by ≥ 0.02",
        None,
        _decay_spreads,
    ),
    (
        "C10",
        "The residual leaves the top eigenspace once off the edge",
        "E(m,20) ≥ 0.1 late in phase 1, ≤ 0.02 on the 500 steps behind the halving",
        "E(m,20) ≥ 0.1 late in phase 1, ≤ 0.15 on steps 500 to 1,000 behind the halving",
        _residual_leaves,
    ),
    (
        "C11",
        "First-order dynamics explain the change of the output",
        "median error ≤ 0.15 and cosine ≥ 0.98 in decayed phases",
        "median error ≤ 0.15 and cosine ≥ 0.98 in decayed phases",
        _first_order,
    ),
    (
        "C12",
        "Deeper networks align more",
        "E(y,20) rises by ≥ 0.03 from 2 to 3, 4, 6 layers at equal P",
        None,
        _other_runs("2, 3 and 4 layers with as many parameters"),
    ),
    (
        "C13",
        "The kernel moves fast, then slows",
        "S(K₀, K₃₀₀) ≥ 0.35; speed falls ≥ 100-fold from t ≤ 100 to the last phase",
        None,
        _kernel_slows,
    ),
    (
        "C14",
        "A lazy network does not align",
        "wide, 2 layers: S ≤ 0.2, E(y,20) moves < 0.1",
        None,
        _other_runs("2 wide layers"),
    ),
    (
        "C15",
        "A random function is not aligned",
        "E(φ,k) within k/N ± 4 √(2k(N−k)/N³) for Gaussian φ and for shuffled labels, at the start",
        "E(φ,k) within k/N ± 4 √(2k(N−k)/N³) for Gaussian φ and for shuffled labels, at the start",
        _null_control,
    ),
    (
        "C16",
        "The gradient's spectral position falls",
        "≥ 3-fold from its peak to late phase 1; ≥ 50-fold on the 500 steps behind the halving",
        None,
        _position_falls,
    ),
    (
        "C17",
        "The plateau of λ₁ is ∝ 1/δ",
        "λ₁ plateau ratio for δ and δ/4 in [3, 5]",
        None,
        _other_runs("a quarter of lr"),
    ),
    (
        "C18",
        "Kernel-target alignment is no substitute",
        "it peaks and falls by ≥ 10 % while E(y,20) stays ≥ 0.85",
        None,
        _alignment_declines,
    ),
    (
        "C19",
        "Eigenfunctions go from low to high frequency, and so does the residual",
        "Spearman(i, mean frequency) ≥ 0.6 at both ends; residual ≈ 1× the target's frequency, then ≥ 3×",
        None,
        _frequency_order,
    ),
    (
        "C20",
        "Eigenfunctions look like the target",
        "at the end max |corr(v_i, y)| ≥ 0.5 (i ≤ 20); edge AUC ≥ 0.7 (i ≤ 5); corr(log‖∇f‖, |∇I|) ≥ 0.3",
        None,
        _looks_like_target,
    ),
)
