"""What a report says follows from what was measured: each sentence, in each of its cases."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from synthetic_study import CLAIMS, at, portrait, study

from ntk_lazy.study import figures, findings
from ntk_lazy.study.canvas import as_png, look
from ntk_lazy.study.evidence import Evidence
from ntk_lazy.study.sections import sections_of

LAST = CLAIMS.steps
EVERY = range(LAST + 1)
LAZY = {s: {"stability": 0.25 if s < 10_000 else 0.1} for s in EVERY}


def flat(evidence: Evidence) -> Evidence:
    """The same study with a kernel that is zero."""
    zero = {"values": (0.0,) * 200, "residual_norms": (0.0,) * 200}
    return dataclasses.replace(evidence, records=tuple(dataclasses.replace(r, **zero) for r in evidence.records))


def noisy(evidence: Evidence, known: int) -> Evidence:
    """The same study with nothing but rounding behind the first values."""
    return dataclasses.replace(
        evidence,
        records=tuple(
            dataclasses.replace(r, values=r.values[:known] + (1e-8 * r.values[0],) * (200 - known))
            for r in evidence.records
        ),
    )


EDGE = {
    "below": (LAZY, "stayed below that bound: δλ₁/N was at most 0.25, at step 0", "stays below the stability bound"),
    "stays": ({}, "was at that bound at step 300, .* and stayed there", "comes to the stability bound and stays"),
    "leaves": ({6_000: {"stability": 1.0}}, "did not stay there: δλ₁/N lay between 1.00 and", "and does not stay"),
    "overshoots": ({6_000: {"stability": 4.0}}, "did not stay there: .* and 4.00", "and does not stay"),
    "at last": (
        LAZY | {LAST: {"stability": 1.9}},
        "at step 30,000, with δλ₁/N = 1.90, the last snapshot",
        "comes to the stability bound$",
    ),
    "unknown": ({s: {"stability": float("nan")} for s in EVERY}, "^$", "^Eigenvalues$"),
}


@pytest.mark.parametrize("case", EDGE)
def test_what_is_said_of_the_edge_of_stability_was_seen(case):
    change, sentence, title = EDGE[case]
    evidence = study({})
    scalars = [{**r.scalars, **change.get(r.step, {})} for r in evidence.records]
    records = (dataclasses.replace(r, scalars=s) for r, s in zip(evidence.records, scalars, strict=True))
    evidence = dataclasses.replace(evidence, records=tuple(records))
    assert_says(findings.edge(evidence), sentence)
    assert_says(findings.edge_title(evidence), title)


def assert_says(text: str, pattern: str) -> None:
    assert re.search(pattern, text), text


@pytest.mark.parametrize(
    ("late", "last", "expected"),
    [(2.0, 1.9, "set off again: ×2.00 .*, ×1.90"), (1.0, 0.5, "did not follow"), (2.0, 1.0, "did not always follow")],
)
def test_what_is_said_of_a_halving_is_what_the_largest_eigenvalue_did(late, last, expected):
    change = at(range(10_001, 20_000), stability=late) | at(range(20_000, LAST + 1), stability=last)
    assert_says(findings.halvings(study(change)), expected)
    unhalved = dataclasses.replace(CLAIMS, halvings=())
    assert findings.halvings(study(config=unhalved)) == ""


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ({}, "The others that are drawn grew: ×301 to ×376"),
        ({"λ10": 20.0, "λ100": 0.2}, "did not grow: ×0.5 to ×0.8"),
        ({"λ10": 20.0}, "Of the others that are drawn [1-9] of [1-9] grew: ×0.5 to ×376"),
    ],
)
def test_what_is_said_of_the_other_eigenvalues_is_what_they_did(end, expected):
    assert_says(findings.others_grew(study({LAST: end}), figures.INDICES), expected)
    assert findings.others_grew(noisy(study({LAST: end}), 1), figures.INDICES) == ""


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ({"y20": 0.9}, "the target rose, 43% → 90%"),
        ({"y20": 0.3}, "the target fell, 43% → 30%"),
        ({"y20": 0.44}, "the target stayed, 43% → 44%"),
        ({"f20": 0.5}, "the output fell, 96% → 50%"),
    ],
)
def test_what_is_said_of_energies_is_what_they_did(end, expected):
    evidence = study({LAST: end})
    assert_says(findings.alignment(evidence), expected)
    assert "in the first 20 eigenvectors" in findings.alignment(evidence)
    assert "in the first 7 eigenvectors" in findings.alignment(noisy(evidence, 7))
    assert findings.alignment(flat(evidence)) == ""


def test_what_is_said_of_pictures_is_what_they_show():
    after = portrait(LAST)
    assert_says(
        findings.eigenfunctions(portrait(0), after), "one of the first 20 resembles .* one of the first 5 finds"
    )
    for change in ({"target_correlation": 0.4}, {"edge_auc": 0.6}):
        assert "none of the first" in findings.eigenfunctions(portrait(0), portrait(LAST, **change))
    for order, words in ((0.9, "from low to high"), (-0.9, "from high to low"), (0.1, "no order")):
        text = findings.frequencies(portrait(0, frequency_order=order), portrait(LAST, frequency_order=order))
        assert words in text
    assert "too few" in findings.frequencies(portrait(0, frequency_order=float("nan")), after)
    for frequency, words in ((8.0, "rose, 2.0 → 8.0"), (1.0, "fell, 2.0 → 1.0"), (2.1, "stayed, 2.0 → 2.1")):
        assert words in findings.frequencies(portrait(0), portrait(LAST, residual_frequency=frequency))


def test_what_is_said_of_the_pairs_counts_those_that_are_known():
    evidence = study()
    count = len(evidence.records)
    assert f"All pairs of all {count} snapshots" in findings.certainty(evidence)
    assert f"In {count} of {count} snapshots not all" in findings.certainty(noisy(evidence, 30))
    assert "the first 30 of 200 do" in findings.certainty(noisy(evidence, 30))


@pytest.mark.parametrize(("end", "word"), [(0.1, "fell"), (0.9, "rose"), (0.5, "stayed")])
def test_what_is_said_of_the_loss_is_what_it_did(end, word):
    assert f"The training loss {word} from 0.5 to {end}" in findings.learned(study({LAST: {"loss": end}}))


def test_no_text_of_a_lazy_study_says_that_it_is_at_the_edge():
    evidence = dataclasses.replace(study(LAZY), before=None, after=None)
    text = " ".join(section.text for section in sections_of(evidence))
    assert "stayed below that bound" in text
    for claim in ("climbs", "stays there", "set off again", "at that bound"):
        assert claim not in text


def drawn(figure: object, panel: int) -> np.ndarray:
    """All heights of the lines in one panel but for horizontal ones."""
    heights = [np.asarray(line.get_ydata(), dtype=float) for line in figure.axes[panel].lines]
    return np.concatenate([h for h in heights if len(h) > 2] or [np.zeros(0)])


@pytest.mark.slow
@pytest.mark.parametrize("known", [1, 7, 200])
def test_a_value_below_the_noise_floor_is_not_drawn_as_an_eigenvalue(known):
    evidence = noisy(study(), known)
    floor = min(r.noise_floor * r.values[0] for r in evidence.records)
    with look():
        for figure in (figures.eigenvalues(evidence), figures.spectra(evidence)):
            heights = drawn(figure, 0)
            assert known == 1 or len(heights)
            assert not (heights <= floor).any()
        over_time = figures.energies_over_time(evidence)
        labels = {line.get_label() for line in over_time.axes[0].lines}
        assert ("k = 20" in labels) == (known >= 20)


@pytest.mark.slow
def test_a_study_of_a_kernel_that_is_zero_has_figures():
    evidence = flat(study())
    with look():
        for draw in (figures.eigenvalues, figures.spectra, figures.energies_over_time, figures.energies_over_index):
            assert as_png(draw(evidence))
        assert as_png(figures.scalars(evidence))
