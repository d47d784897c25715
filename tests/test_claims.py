"""A claim passes where its rule is met and fails where it is broken, and on a target with a known answer all pass."""

from __future__ import annotations

import dataclasses
import math

import pytest
from test_records import make_record

from ntk_lazy.records import SpectrumRecord, read_records
from ntk_lazy.study.claims import judge
from ntk_lazy.study.config import preset
from ntk_lazy.study.evidence import Evidence
from ntk_lazy.study.folder import StudyFolder
from ntk_lazy.study.run import run_study


def evidence_with(change: dict[int, dict[str, float]]) -> Evidence:
    """Fabricate a demo study that satisfies the rules on energies and scalars, then change some of its numbers."""
    config = preset("demo")
    records = []
    for step in config.snapshot_steps():
        before_halving = step < config.halvings[0]
        numbers = {
            "target": 0.4 if step == 0 else 0.9,
            "output": 0.995,
            "residual": 0.2 if before_halving else 0.01,
            "stability": 2.0 if before_halving else 1.2,
            "first_order_error": 0.4 if before_halving else 0.1,
            "first_order_cosine": 0.9 if before_halving else 0.99,
        }
        numbers |= change.get(step, {})
        curves = {n: (numbers.pop(n),) * 200 for n in ("target", "output", "residual")}
        records.append(
            make_record(
                step,
                values=(1.0,) * 200,
                residual_norms=(1e-5,) * 200,
                converged=(True,) * 200,
                energies=curves,
                scalars=numbers,
            )
        )
    return Evidence(config, tuple(records))


def verdict(evidence: Evidence, name: str) -> str:
    return next(c.verdict for c in judge(evidence) if c.name == name)


DECIDED = ("C1", "C4", "C6", "C10", "C11")


def test_claims_hold_where_their_rules_are_met():
    evidence = evidence_with({})
    assert [verdict(evidence, name) for name in DECIDED] == ["pass"] * 5


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("C1", {6_000: {"target": 0.84}}),
        ("C1", {0: {"target": 0.61}}),
        ("C4", {300: {"output": 0.989}}),
        ("C6", {3_000: {"stability": 1.5}}),
        ("C6", {s: {"stability": 2.6} for s in (1_000, 2_400, 3_000, 3_600, 3_999)}),
        ("C10", {s: {"residual": 0.03} for s in (4_100, 4_250, 4_500)}),
        ("C10", {s: {"residual": 0.05} for s in (2_400, 3_000, 3_600, 3_999)}),
        ("C11", {s: {"first_order_error": 0.2} for s in range(4_000, 6_001)}),
        ("C11", {s: {"first_order_cosine": 0.97} for s in range(4_000, 6_001)}),
    ],
)
def test_a_claim_fails_where_its_rule_is_broken_and_the_others_do_not(name, change):
    evidence = evidence_with(change)
    assert verdict(evidence, name) == "fail"
    assert all(verdict(evidence, other) == "pass" for other in DECIDED if other != name)


@pytest.mark.parametrize("name", ["C3", "C7", "C9", "C12", "C14", "C17"])
def test_a_row_that_a_run_cannot_decide_says_what_it_would_take(name):
    claim = next(c for c in judge(evidence_with({})) if c.name == name)
    assert claim.verdict == "not decided"
    assert claim.reason.startswith("needs ")
    assert claim.measured == ""


def test_a_number_that_was_not_measured_decides_nothing():
    assert verdict(evidence_with({3_000: {"stability": math.nan}}), "C6") == "not decided"


def failed_at(evidence: Evidence, step: int) -> Evidence:
    def spoil(record: SpectrumRecord) -> SpectrumRecord:
        if record.step != step:
            return record
        return dataclasses.replace(record, status="failed", values=(), energies={}, scalars={})

    return dataclasses.replace(evidence, records=tuple(map(spoil, evidence.records)))


def test_a_failed_last_snapshot_decides_nothing_about_the_end():
    assert verdict(failed_at(evidence_with({}), 6_000), "C1") == "not decided"


@pytest.mark.slow
def test_the_claims_of_the_paper_hold_on_the_analytic_target(tmp_path):
    steps = (0, 100, 300, 1_000, 1_200, 1_500, 1_800, 1_999, 2_600, 2_750, 2_900, 3_000)
    config = dataclasses.replace(preset("analytic"), snapshots=steps, num_pictures=1)
    evidence = run_study(config, tmp_path / "analytic")
    table = {c.name: c for c in judge(evidence)}
    assert {n: (table[n].verdict, table[n].measured) for n in (*DECIDED, "C15")} == {
        n: ("pass", table[n].measured) for n in (*DECIDED, "C15")
    }
    assert [r.step for r in read_records(StudyFolder(tmp_path / "analytic").records)] == list(steps)
