"""The claims of the paper as measured quantities with pass rules, judged by what one study has measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, final

from ntk_lazy.study import rules
from ntk_lazy.study.evidence import Evidence

Verdict = Literal["pass", "fail", "not decided"]


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
        except rules.UndecidedError as why:
            table.append(Claim(name, statement, shown, "", "not decided", str(why)))
        else:
            table.append(Claim(name, statement, shown, measured, "pass" if passed else "fail"))
    return table


# name, claim, rule on a photograph, rule on the analytic target (None: not stated for it), judge
_ROWS: tuple[tuple[str, str, str, str | None, rules.Rule], ...] = (
    (
        "C1",
        "Top eigenvectors align with the target",
        "E(y,20) ≥ 0.85 at the end, and up by ≥ 0.3",
        "E(y,100) ≥ 0.88 at the end, ≤ 0.62 at the start",
        rules.aligns,
    ),
    ("C2", "200 vectors nearly span the target", "E(y,200) ≥ 0.95 at the end", None, rules.spans),
    (
        "C3",
        "Alignment is early",
        "≥ 60 % of the rise of E(y,20) in the first 1 % of steps, ≥ 80 % in 4 %",
        None,
        rules.is_early,
    ),
    (
        "C4",
        "The output lies in the top eigenspace throughout",
        "min over t of E(f, 0.1 N) ≥ 0.99",
        "min over t of E(f, 0.2 N) ≥ 0.97",
        rules.output_in_top,
    ),
    (
        "C5",
        "The same holds off the training set",
        "E(y,20) on test and training points within 0.05; 100 extended eigenfunctions hold ≥ 0.95 of the test target",
        None,
        rules.off_the_training_set,
    ),
    (
        "C6",
        "λ₁ climbs to 2N/δ and stays",
        "after warm-up δλ₁/N has mean in [1.8, 2.5], every snapshot in [1.6, 3.0]",
        "after warm-up δλ₁/N has mean in [1.8, 2.5], every snapshot in [1.6, 3.0]",
        rules.edge_of_stability,
    ),
    (
        "C7",
        "δλ₁ is conserved across halvings",
        "λ₁ ratio of late phases in [1.6, 2.2]; δλ₁/N back to ≥ 1.8",
        None,
        rules.is_conserved,
    ),
    (
        "C8",
        "The whole spectrum grows",
        "λ₁₀, λ₁₀₀ and trace never fall by more than 20 %; ≥ ×50, ×100, ×10 by the end of phase 1",
        None,
        rules.spectrum_grows,
    ),
    (
        "C9",
        "Decay spreads information over more eigenvectors",
        "E(y,20) down by 0.01 to 0.06, E(y,200) within 0.01, E(f,20) down by ≥ 0.02",
        None,
        rules.decay_spreads,
    ),
    (
        "C10",
        "The residual leaves the top eigenspace once off the edge",
        "E(m,20) ≥ 0.1 late in phase 1, ≤ 0.02 on the 500 steps behind the halving",
        "E(m,20) ≥ 0.1 late in phase 1, ≤ 0.15 on steps 500 to 1,000 behind the halving",
        rules.residual_leaves,
    ),
    (
        "C11",
        "First-order dynamics explain the change of the output",
        "median error ≤ 0.15 and cosine ≥ 0.98 in decayed phases",
        "median error ≤ 0.15 and cosine ≥ 0.98 in decayed phases",
        rules.first_order,
    ),
    (
        "C12",
        "Deeper networks align more",
        "E(y,20) rises by ≥ 0.03 from 2 to 3, 4, 6 layers at equal P",
        None,
        rules.deeper_aligns_more,
    ),
    (
        "C13",
        "The kernel moves fast, then slows",
        "S(K₀, K₃₀₀) ≥ 0.35; speed falls ≥ 100-fold from t ≤ 100 to the last phase",
        None,
        rules.kernel_slows,
    ),
    (
        "C14",
        "A lazy network does not align",
        "2 layers of width ≥ 1,000: S ≤ 0.2 throughout, E(y,20) moves < 0.1",
        None,
        rules.lazy_does_not_align,
    ),
    (
        "C15",
        "A random function is not aligned",
        "E(φ,k) within k/N ± 4 √(2k(N−k)/N³) for Gaussian φ and for shuffled labels, at the start",
        "E(φ,k) within k/N ± 4 √(2k(N−k)/N³) for Gaussian φ and for shuffled labels, at the start",
        rules.null_control,
    ),
    (
        "C16",
        "The gradient's spectral position falls",
        "≥ 3-fold from its peak to late phase 1; ≥ 50-fold on the 500 steps behind the halving",
        None,
        rules.position_falls,
    ),
    (
        "C17",
        "The plateau of λ₁ is ∝ 1/δ",
        "λ₁ plateau ratio for δ and δ/4 in [3, 5]",
        None,
        rules.plateau_is_inverse,
    ),
    (
        "C18",
        "Kernel-target alignment is no substitute: it orders networks differently",
        "of two snapshots one has E(y,20) higher by ≥ 0.01 and alignment lower by ≥ 10 %, beyond twice its error",
        None,
        rules.alignment_disagrees,
    ),
    (
        "C19",
        "Eigenfunctions go from low to high frequency, and so does the residual",
        "Spearman(i, mean frequency) ≥ 0.6 at both ends; residual ≈ 1× the target's frequency, then ≥ 3×",
        None,
        rules.frequency_order,
    ),
    (
        "C20",
        "Eigenfunctions look like the target",
        "at the end max |corr(v_i, y)| ≥ 0.5 (i ≤ 20); edge AUC ≥ 0.7 (i ≤ 5); corr(log‖∇f‖, |∇I|) ≥ 0.3",
        None,
        rules.looks_like_target,
    ),
)
