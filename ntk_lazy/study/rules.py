"""What decides each claim: the quantity, and whether it passes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from statistics import fmean, median
from typing import TypeAlias, final

from ntk_lazy.study.config import MIN_STEPS_FOR_EARLY_CLAIM
from ntk_lazy.study.evidence import Evidence

_LONG_PHASE = 5_000
_DEPTHS = (2, 3, 4, 6)
_SAME_SIZE = 0.05
_WIDE = 1_000

Finding: TypeAlias = tuple[str, bool]
Rule: TypeAlias = Callable[[Evidence], Finding]


@final
class UndecidedError(Exception):
    """This study cannot decide the row; the message says what it would take."""


def _need(*values: float) -> None:
    """Refuse to judge numbers that were not measured: a NaN would fail the claim and not the measurement."""
    if not all(math.isfinite(v) for v in values):
        raise UndecidedError("needs snapshots that are missing or failed")


def _energy_at(evidence: Evidence, step: int, name: str, k: int) -> float:
    record = evidence.at(step)
    value = math.nan if record is None else record.energy(name, k)
    if record is not None and k > len(record.values):
        raise UndecidedError(f"needs num_pairs >= {k}")
    _need(value)
    return value


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    if not found:
        raise UndecidedError("needs snapshots in a part of training that has none")
    _need(*found)
    return fmean(found)


def _first_halving(evidence: Evidence) -> int:
    if not evidence.config.halvings:
        raise UndecidedError("needs a halving of the learning rate")
    return evidence.config.halvings[0]


def _two_halvings(evidence: Evidence) -> None:
    phases = evidence.config.phases
    if len(phases) < 3 or phases[1][1] - phases[1][0] < _LONG_PHASE:
        raise UndecidedError("needs two halvings, so that a halved rate meets its edge: preset claims")


def aligns(evidence: Evidence) -> Finding:
    """C1: the top eigenvectors align with the target."""
    k = 100 if evidence.config.image == "analytic" else 20
    start = _energy_at(evidence, 0, "target", k)
    end = _energy_at(evidence, evidence.config.steps, "target", k)
    passed = end >= 0.88 and start <= 0.62 if k == 100 else end >= 0.85 and end >= start + 0.3
    return f"{start:.3f} → {end:.3f}", passed


def spans(evidence: Evidence) -> Finding:
    """C2: 200 vectors nearly span it."""
    start = _energy_at(evidence, 0, "target", 200)
    end = _energy_at(evidence, evidence.config.steps, "target", 200)
    return f"{start:.3f} → {end:.3f}", end >= 0.95


def is_early(evidence: Evidence) -> Finding:
    """C3: they align early."""
    steps = evidence.config.steps
    if steps < MIN_STEPS_FOR_EARLY_CLAIM:
        raise UndecidedError(f"needs at least {MIN_STEPS_FOR_EARLY_CLAIM:,} steps: preset claims")
    start, one, four, end = (_energy_at(evidence, s, "target", 20) for s in (0, steps // 100, steps // 25, steps))
    shares = ((one - start) / (end - start), (four - start) / (end - start))
    return f"{shares[0]:.0%} after 1 %, {shares[1]:.0%} after 4 %", shares[0] >= 0.6 and shares[1] >= 0.8


def output_in_top(evidence: Evidence) -> Finding:
    """C4: the output lies in the top eigenspace throughout."""
    share, least = (0.2, 0.97) if evidence.config.image == "analytic" else (0.1, 0.99)
    wanted = round(share * evidence.config.num_points)
    k = min(wanted, evidence.config.num_pairs)
    lowest = min((r.energy("output", k) for r in evidence.usable), default=math.nan)
    _need(lowest)
    if k < wanted and lowest < least:
        raise UndecidedError(f"needs num_pairs >= {wanted}; with {k} at least {lowest:.4f}")
    return f"min over {len(evidence.usable)} snapshots, k = {k}: {lowest:.4f}", lowest >= least


def off_the_training_set(evidence: Evidence) -> Finding:
    """C5: the same holds off the training set."""
    if evidence.after is None or len(evidence.after.test_energy) < 100:
        raise UndecidedError("needs the finished study with 100 pairs")
    test = evidence.after.test_energy
    gap = abs(float(test[19]) - _energy_at(evidence, evidence.config.steps, "target", 20))
    return f"difference {gap:.3f}; {float(test[99]):.3f}", gap <= 0.05 and float(test[99]) >= 0.95


def edge_of_stability(evidence: Evidence) -> Finding:
    """C6: lambda_1 climbs to 2N/delta and stays."""
    end = evidence.config.phases[0][1]
    values = [r.scalar("stability") for r in evidence.between(evidence.config.warm_up, end)]
    mean = _mean(values)
    inside = all(1.6 <= v <= 3.0 for v in values)
    return f"mean {mean:.2f}, range {min(values):.2f} to {max(values):.2f}", 1.8 <= mean <= 2.5 and inside


def is_conserved(evidence: Evidence) -> Finding:
    """C7: delta lambda_1 is conserved across halvings."""
    _two_halvings(evidence)
    first, second = (_mean(r.values[0] for r in evidence.late(p)) for p in (0, 1))
    returned = max((r.scalar("stability") for r in evidence.late(1)), default=math.nan)
    _need(returned)
    return f"ratio {second / first:.2f}; back to {returned:.2f}", 1.6 <= second / first <= 2.2 and returned >= 1.8


def spectrum_grows(evidence: Evidence) -> Finding:
    """C8: the whole spectrum grows."""
    end = evidence.config.phases[0][1] - 1
    at_end = evidence.at(end)
    if evidence.first is None or at_end is None or len(at_end.values) < 100:
        raise UndecidedError("needs 100 pairs at the first and the last step of phase 1")
    series = [(r.values[9], r.values[99], r.scalar("trace")) for r in evidence.usable]
    _need(*(v for row in series for v in row))
    falls = min(b / a for old, new in itertools.pairwise(series) for a, b in zip(old, new, strict=True))
    first, last = series[0], (at_end.values[9], at_end.values[99], at_end.scalar("trace"))
    growth = [b / a for a, b in zip(first, last, strict=True)]
    passed = falls >= 0.8 and all(g >= least for g, least in zip(growth, (50, 100, 10), strict=True))
    return f"×{growth[0]:.0f}, ×{growth[1]:.0f}, ×{growth[2]:.0f}; smallest step ×{falls:.2f}", passed


def decay_spreads(evidence: Evidence) -> Finding:
    """C9: decay spreads information over more eigenvectors."""
    _two_halvings(evidence)
    change = {}
    for name, k in (("target", 20), ("target", 200), ("output", 20)):
        first, second = (_mean(r.energy(name, k) for r in evidence.late(p)) for p in (0, 1))
        change[name, k] = second - first
    y20, y200, f20 = change.values()
    text = f"E(y,20) {y20:+.3f}, E(y,200) {y200:+.3f}, E(f,20) {f20:+.3f}"
    return text, -0.06 <= y20 <= -0.01 and abs(y200) <= 0.01 and f20 <= -0.02


def residual_leaves(evidence: Evidence) -> Finding:
    """C10: the residual leaves the top eigenspace off the edge."""
    halving = _first_halving(evidence)
    analytic = evidence.config.image == "analytic"
    window = (500, 1_001, 0.15) if analytic else (1, 501, 0.02)
    before = _mean(r.energy("residual", 20) for r in evidence.late(0))
    behind = evidence.between(halving + window[0], halving + window[1])
    after = _mean(r.energy("residual", 20) for r in behind)
    return f"{before:.3f} → {after:.4f}", after <= window[2] and before >= 0.1


def first_order(evidence: Evidence) -> Finding:
    """C11: first-order dynamics explain the change of the output."""
    behind = evidence.between(_first_halving(evidence) + 1, evidence.config.steps + 1)
    errors = [r.scalar("first_order_error") for r in behind]
    cosines = [r.scalar("first_order_cosine") for r in behind]
    _mean(errors + cosines)
    error, cosine = median(errors), median(cosines)
    return f"median error {error:.3f}, cosine {cosine:.4f}", error <= 0.15 and cosine >= 0.98


def deeper_aligns_more(evidence: Evidence) -> Finding:
    """C12: at equal P and steps, deeper networks align more."""
    config = evidence.config
    found: dict[int, Evidence] = {}
    for run in _runs(evidence):
        same_size = abs(run.config.num_parameters / config.num_parameters - 1) <= _SAME_SIZE
        if same_size and run.config.is_like(config, but=("num_layers", "width")):
            found.setdefault(run.config.num_layers, run)
    if not found.keys() >= set(_DEPTHS):
        raise UndecidedError("needs other runs: 2, 3, 4 and 6 layers with as many parameters")
    energies = [_energy_at(found[depth], config.steps, "target", 20) for depth in _DEPTHS]
    text = ", ".join(f"{depth} layers {energy:.3f}" for depth, energy in zip(_DEPTHS, energies, strict=True))
    return text, all(deeper >= flatter + 0.03 for flatter, deeper in itertools.pairwise(energies))


def lazy_does_not_align(evidence: Evidence) -> Finding:
    """C14: a wide network of two layers is lazy, and does not align."""
    run = next((r for r in _runs(evidence) if r.config.num_layers == 2 and r.config.width >= _WIDE), None)
    if run is None:
        raise UndecidedError(f"needs other runs: 2 layers of width {_WIDE:,} or more")
    start, end = (_energy_at(run, step, "target", 20) for step in (0, run.config.steps))
    turned = max((m.from_start for m in run.movement), default=math.nan)
    _need(turned)
    return f"S at most {turned:.2f}; E(y,20) {start:.3f} → {end:.3f}", turned <= 0.2 and abs(end - start) < 0.1


def plateau_is_inverse(evidence: Evidence) -> Finding:
    """C17: the plateau of lambda_1 is inversely proportional to the learning rate."""
    config = evidence.config
    like = [r for r in _runs(evidence) if r.config.is_like(config, but=("lr",))]
    pairs = [(a, b) for a in like for b in like if math.isclose(a.config.lr, 4 * b.config.lr)]
    if not pairs:
        raise UndecidedError("needs other runs: a quarter of lr")
    fast, slow = (_mean(r.values[0] for r in run.late(0)) for run in pairs[0])
    return f"λ₁ {fast:.3g} and {slow:.3g}: ratio {slow / fast:.2f}", 3 <= slow / fast <= 5


def _runs(evidence: Evidence) -> list[Evidence]:
    return [evidence, *(other for other in evidence.others if other.is_finished)]


def kernel_slows(evidence: Evidence) -> Finding:
    """C13: the kernel moves fast, then slows."""
    start = evidence.config.phases[-1][0]
    distance = next((m.from_start for m in evidence.movement if m.step == 300), math.nan)
    early = max((m.velocity for m in evidence.movement if m.step <= 100), default=math.nan)
    late = min((m.velocity for m in evidence.movement if m.step > start), default=math.nan)
    _need(early, late, distance)
    text = f"S(K₀, K₃₀₀) = {distance:.2f}; {early:.1e} → {late:.1e} per step"
    return text, distance >= 0.35 and early >= 100 * late


def null_control(evidence: Evidence) -> Finding:
    """C15: a random function is not aligned."""
    if evidence.before is None:
        raise UndecidedError("needs the portrait of the first network")
    n, k = evidence.config.num_points, evidence.config.num_pairs
    allowed = 4 * math.sqrt(2 * k * (n - k) / n**3)
    gaussian, shuffled = (float(v) for v in evidence.before.null_energy)
    text = f"k/N = {k / n:.3f} ± {allowed:.3f}; Gaussian {gaussian:.3f}, shuffled {shuffled:.3f}"
    return text, max(abs(gaussian - k / n), abs(shuffled - k / n)) <= allowed


def position_falls(evidence: Evidence) -> Finding:
    """C16: the spectral position of the gradient falls."""
    halving = _first_halving(evidence)
    peak = max((r.scalar("spectral_position") for r in evidence.between(0, halving)), default=math.nan)
    edge = _mean(r.scalar("spectral_position") for r in evidence.late(0))
    after = _mean(r.scalar("spectral_position") for r in evidence.between(halving + 1, halving + 501))
    _need(peak)
    return f"{peak:.3f} → {edge:.3f} → {after:.1e}", peak >= 3 * edge and edge >= 50 * after


def alignment_disagrees(evidence: Evidence) -> Finding:
    """C18: kernel-target alignment orders checkpoints differently."""
    name = "kernel_target_alignment"
    curve = [(r.energy("target", 20), r.scalar(name), r.errors.get(name, 0.0), r.step) for r in evidence.usable]
    _need(*(v for point in curve for v in point[:2]))
    if len(curve) < 2:
        raise UndecidedError("needs snapshots")
    apart, worst = 0, (1.0, "")
    for a, b in itertools.combinations(sorted(curve), 2):  # b holds as much of the target or more
        ratio = b[1] / a[1] if a[1] > 0 else math.inf
        if b[0] >= a[0] + 0.01 and ratio <= 0.9 and a[1] - b[1] > 2 * math.hypot(a[2], b[2]):
            apart += 1
            energies, values = f"{a[0]:.3f} → {b[0]:.3f}", f"{a[1]:.3f} → {b[1]:.3f}"
            worst = min(worst, (ratio, f"; from step {a[3]:,} to {b[3]:,} E(y,20) {energies}, alignment {values}"))
    count = math.comb(len(curve), 2)
    return f"{apart} of {count} pairs of snapshots are ordered oppositely{worst[1]}", apart > 0


def frequency_order(evidence: Evidence) -> Finding:
    """C19: from low to high frequency."""
    if evidence.before is None or evidence.after is None:
        raise UndecidedError("needs the finished study")
    before, after = evidence.before, evidence.after
    ratios = [p.residual_frequency / p.target_frequency for p in (before, after)]
    text = (
        f"Spearman {before.frequency_order:.2f}, {after.frequency_order:.2f}; "
        f"residual {ratios[0]:.1f}× → {ratios[1]:.1f}× the target"
    )
    ordered = min(before.frequency_order, after.frequency_order) >= 0.6
    return text, ordered and 0.7 <= ratios[0] <= 1.4 and ratios[1] >= 3


def looks_like_target(evidence: Evidence) -> Finding:
    """C20: eigenfunctions look like the target."""
    if evidence.before is None or evidence.after is None:
        raise UndecidedError("needs the finished study")
    parts = [(p.target_correlation, p.edge_auc, p.gradient_correlation) for p in (evidence.before, evidence.after)]
    text = "; ".join(f"{a:.2f} → {b:.2f}" for a, b in zip(*parts, strict=True))
    return text, parts[1][0] >= 0.5 and parts[1][1] >= 0.7 and parts[1][2] >= 0.3
