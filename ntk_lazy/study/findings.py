"""What the figures of one study show, in sentences that follow from its numbers; each has its rule."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable

from ntk_lazy.records import SpectrumRecord
from ntk_lazy.study.evidence import Evidence
from ntk_lazy.study.portrait import Portrait

# The edge of stability is where the mean of claim C6 begins, and a snapshot is at it where one of C6 may lie.
AT_THE_EDGE = 1.8
EDGE_BAND = (1.6, 3.0)
ENERGY_INDEX = 20
_MOVED = 1.1
_CHANGED = 0.02
_SOUNDS_HIGHER = 1.2
_ORDERED = 0.6
_RESEMBLES = 0.5
_DETECTS = 0.7


def learned(evidence: Evidence) -> str:
    """Say how the training loss went."""
    steps, losses = evidence.curve("loss")
    if len(losses) < 2:
        return ""
    word = "fell" if losses[-1] < losses[0] else "rose" if losses[-1] > losses[0] else "stayed"
    return f"The training loss {word} from {losses[0]:.3g} to {losses[-1]:.3g} in {steps[-1] - steps[0]:,} steps."


def edge(evidence: Evidence) -> str:
    """Say whether the largest eigenvalue met the bound of the first learning rate that it could, and what it did there.

    Rule: met by the first snapshot with δλ₁/N ≥ 1.8; stayed if all others of that phase behind it lie in [1.6, 3.0].
    """
    met, behind = _meeting(evidence)
    if met is None:
        peak = _peak(evidence)
        if peak is None:
            return ""
        return f"λ₁ stayed below that bound: δλ₁/N was at most {peak.scalar('stability'):.2f}, at step {peak.step:,}."
    text = f"λ₁ was at that bound at step {met.step:,}, with δλ₁/N = {met.scalar('stability'):.2f}"
    if not behind:
        return f"{text}, the last snapshot with that δ."
    values = [r.scalar("stability") for r in behind]
    stayed = "stayed there" if _inside(values) else "did not stay there"
    return f"{text}, and {stayed}: δλ₁/N lay between {min(values):.2f} and {max(values):.2f} as long as δ was the same."


def edge_title(evidence: Evidence) -> str:
    """Say the same as ``edge`` in a title."""
    met, behind = _meeting(evidence)
    if met is None:
        peak = _peak(evidence)
        if peak is None:
            return "Eigenvalues"
        return f"λ₁ stays below the stability bound: δλ₁/N ≤ {peak.scalar('stability'):.2f}"
    if not behind:
        return "λ₁ comes to the stability bound"
    stays = _inside(r.scalar("stability") for r in behind)
    return f"λ₁ comes to the stability bound and {'stays' if stays else 'does not stay'}"


def others_grew(evidence: Evidence, indices: Iterable[int]) -> str:
    """Say how many of the other eigenvalues grew between the first and the last snapshot, above the noise in both."""
    if len(evidence.usable) < 2:
        return ""
    first, last = evidence.usable[0], evidence.usable[-1]
    known = min(_num_above_noise(first), _num_above_noise(last))
    ratios = [last.values[i - 1] / first.values[i - 1] for i in indices if 1 < i <= known]
    if not ratios:
        return ""
    grew = sum(r > 1 for r in ratios)
    low, high = (f"{r:.3g}" for r in (min(ratios), max(ratios)))
    span = f"×{low}" if low == high else f"×{low} to ×{high}"
    if grew == len(ratios):
        return f"The others that are drawn grew: {span}."
    if grew == 0:
        return f"The others that are drawn did not grow: {span}."
    return f"Of the others that are drawn {grew} of {len(ratios)} grew: {span}."


def halvings(evidence: Evidence) -> str:
    """Say what the largest eigenvalue did when the bound doubled: it set off again if it grew by a tenth or more."""
    growth = []
    for halving, (start, end) in zip(evidence.config.halvings, evidence.config.phases[1:], strict=True):
        before = evidence.between(0, halving)
        inside = evidence.between(start + 1, end + 1 if end == evidence.config.steps else end)
        if before and inside and before[-1].values[0] > 0:
            growth.append((halving, inside[-1].values[0] / before[-1].values[0]))
    if not growth:
        return ""
    each = ", ".join(f"×{ratio:.2f} by the end of the phase from step {halving:,} on" for halving, ratio in growth)
    started = sum(ratio >= _MOVED for _, ratio in growth)
    if started == len(growth):
        return f"When δ was halved, the bound doubled and λ₁ set off again: {each}."
    if started == 0:
        return f"When δ was halved, the bound doubled and λ₁ did not follow: {each}."
    return f"When δ was halved, the bound doubled and λ₁ did not always follow: {each}."


def alignment(evidence: Evidence) -> str:
    """Say how the energies in the top of the spectrum changed; a change counts from 0.02 on."""
    k = min((min(r.num_trusted, ENERGY_INDEX) for r in evidence.usable), default=0)
    parts = []
    for name, words in (("target", "the target"), ("output", "the output"), ("residual", "the residual")):
        values = list(evidence.energy_curve(name, k)[1]) if k else []
        if len(values) < 2:
            continue
        change = values[-1] - values[0]
        word = "rose" if change >= _CHANGED else "fell" if change <= -_CHANGED else "stayed"
        parts.append(f"that of {words} {word}, {values[0]:.0%} → {values[-1]:.0%}")
    if not parts:
        return ""
    of = "the first eigenvector" if k == 1 else f"the first {k} eigenvectors"
    return f"From the first to the last snapshot the share in {of} changed so: {'; '.join(parts)}."


def eigenfunctions(before: Portrait, after: Portrait) -> str:
    """Say whether eigenfunctions look like the picture, by the thresholds of claim C20."""
    known = len(after.mean_frequencies)
    likes = "one" if after.target_correlation >= _RESEMBLES else "none"
    detects = "one" if after.edge_auc >= _DETECTS else "none"
    return (
        f"After it {likes} of the first {min(known, 20)} resembles the target (largest |correlation| "
        f"{before.target_correlation:.2f} → {after.target_correlation:.2f}), and {detects} of the first "
        f"{min(known, 5)} finds the edges of the picture (largest area under the ROC curve {before.edge_auc:.2f} → "
        f"{after.edge_auc:.2f}, where 0.5 is chance)."
    )


def frequencies(before: Portrait, after: Portrait) -> str:
    """Say whether eigenfunctions are ordered by frequency, and where the residual went."""
    orders = (before.frequency_order, after.frequency_order)
    numbers = f"Spearman correlation of index and frequency {orders[0]:.2f} before and {orders[1]:.2f} after training"
    if min(orders) >= _ORDERED:
        order = f"Eigenfunctions are ordered from low to high frequency ({numbers})."
    elif max(orders) <= -_ORDERED:
        order = f"Eigenfunctions are ordered from high to low frequency ({numbers})."
    elif any(map(math.isnan, orders)):
        order = "There are too few eigenfunctions to see an order among them."
    else:
        order = f"Eigenfunctions have no order in frequency that would hold at both ends ({numbers})."
    first, last, target = before.residual_frequency, after.residual_frequency, after.target_frequency
    word = "rose" if last >= _SOUNDS_HIGHER * first else "fell" if first >= _SOUNDS_HIGHER * last else "stayed"
    return (
        f"{order} The mean frequency of the residual {word}, {first:.1f} → {last:.1f} cycles per width; that of the "
        f"target is {target:.1f}."
    )


def certainty(evidence: Evidence) -> str:
    """Say how many snapshots hold pairs that are not certified or cannot be told from zero."""
    doubtful = [r for r in evidence.usable if r.num_trusted < len(r.values)]
    count = len(evidence.usable)
    if not doubtful:
        return f"All pairs of all {count} snapshots passed their test and lie above the noise floor."
    fewest = min(doubtful, key=lambda r: r.num_trusted)
    return (
        f"In {len(doubtful)} of {count} snapshots not all pairs passed their test and lie above the noise floor; at "
        f"step {fewest.step:,} the first {fewest.num_trusted} of {len(fewest.values)} do. What lies below the noise "
        "floor is rounding, and not drawn as an eigenvalue."
    )


def _num_above_noise(record: SpectrumRecord) -> int:
    return len(list(itertools.takewhile(lambda is_below: not is_below, record.is_below_noise)))


def _inside(values: Iterable[float]) -> bool:
    return all(EDGE_BAND[0] <= v <= EDGE_BAND[1] for v in values)


def _measured(evidence: Evidence) -> list[SpectrumRecord]:
    return [r for r in evidence.usable if math.isfinite(r.scalar("stability"))]


def _peak(evidence: Evidence) -> SpectrumRecord | None:
    return max(_measured(evidence), key=lambda r: r.scalar("stability"), default=None)


def _meeting(evidence: Evidence) -> tuple[SpectrumRecord | None, list[SpectrumRecord]]:
    """Find the first snapshot at the bound, and those behind it with the same learning rate."""
    records = _measured(evidence)
    met = next((r for r in records if r.scalar("stability") >= AT_THE_EDGE), None)
    if met is None:
        return None, []
    same = evidence.config.lr_at(met.step)
    return met, [r for r in records if r.step > met.step and evidence.config.lr_at(r.step) == same]
