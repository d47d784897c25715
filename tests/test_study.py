"""A study ends as it should, also when it was interrupted, and its report needs nothing else."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import matplotlib as mpl
import pytest
import torch
from test_records import make_record
from tiny_study import TINY

from ntk_lazy.eigen import EigenResult
from ntk_lazy.errors import ArgumentError, DegenerateError
from ntk_lazy.study import run as run_module
from ntk_lazy.study.canvas import look
from ntk_lazy.study.claims import judge
from ntk_lazy.study.evidence import Evidence
from ntk_lazy.study.folder import StudyFolder
from ntk_lazy.study.report import write_report
from ntk_lazy.study.run import run_study
from ntk_lazy.study.target import Target
from ntk_lazy.study.training import read_tensors

EPS32 = torch.finfo(torch.float32).eps


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Evidence]:
    folder = tmp_path_factory.mktemp("study") / "tiny"
    return folder, run_study(TINY, folder)


class Interrupting:
    """A display that ends the process, as far as the study can tell, at its n-th word."""

    def __init__(self, *, after_words: int = 10**9, at_step: int = 10**9) -> None:
        self.words_left, self.at_step = after_words, at_step

    def say(self, text: str) -> None:
        self.words_left -= 1
        if self.words_left < 0:
            raise KeyboardInterrupt

    def progress(self, step: int, loss: float) -> None:
        if step >= self.at_step:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_study_leaves_all_its_snapshots_and_both_portraits(finished):
    folder, evidence = finished
    assert [r.step for r in evidence.records] == list(TINY.snapshot_steps())
    assert all(r.status == "converged" for r in evidence.records)
    assert evidence.is_finished
    assert (evidence.before.step, evidence.after.step) == (0, 120)
    assert len(evidence.losses[0]) == TINY.steps
    for record in evidence.records:
        assert record.scalars["lr"] == TINY.lr_at(record.step)
        assert (folder / record.vectors).is_file()


@pytest.mark.slow
def test_the_loss_of_a_record_is_that_of_the_training(finished):
    _, evidence = finished
    losses = dict(zip(evidence.losses[0].tolist(), evidence.losses[1].tolist(), strict=True))
    for record in evidence.records[:-1]:
        assert record.scalars["loss"] == pytest.approx(losses[record.step], rel=150 * EPS32)


@pytest.mark.slow
def test_a_portrait_equals_the_eigenvectors_on_the_training_points(finished):
    folder, evidence = finished
    target = Target.of(TINY)
    pairs = EigenResult.load(folder / evidence.records[-1].vectors)
    height, width = target.picture.shape
    column = ((target.train_x[:, 0].double() + 1) / 2 * width - 0.5).round().long()
    row = ((target.train_x[:, 1].double() + 1) / 2 * height - 0.5).round().long()
    functions = evidence.after.functions[:, row, column].mT
    # An extended vector is off by the relative residual of its pair.
    relative = (pairs.residual_norms / pairs.values)[: TINY.num_pictures].max()
    difference = functions - pairs.vectors[:, : TINY.num_pictures] * TINY.num_points**0.5
    assert float(difference.norm(dim=0).max()) <= (2 * float(relative) + 1e3 * EPS32) * TINY.num_points**0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    "interruption",
    [
        {"after_words": 0},
        {"after_words": 1},
        {"after_words": 2},
        {"after_words": 4},
        {"at_step": 30},
        {"at_step": 90},
    ],
    ids=str,
)
def test_an_interrupted_study_ends_as_an_uninterrupted_one(finished, tmp_path, monkeypatch, interruption):
    monkeypatch.setattr(run_module, "_CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(run_module, "_STEPS_BETWEEN_LOOKS", 7)
    folder, expected = finished
    with pytest.raises(KeyboardInterrupt):
        run_study(TINY, tmp_path / "out", display=Interrupting(**interruption))
    evidence = run_study(TINY, tmp_path / "out")
    whole = read_tensors(folder / "checkpoint.safetensors")[0]
    resumed = read_tensors(tmp_path / "out" / "checkpoint.safetensors")[0]
    for name, tensor in whole.items():
        assert torch.allclose(resumed[name], tensor, rtol=1e3 * EPS32, atol=1e3 * EPS32, equal_nan=True), name
    assert [r.step for r in evidence.records] == [r.step for r in expected.records]
    for mine, theirs in zip(evidence.records, expected.records, strict=True):
        # Eigenvalues are exact to the square of the relative residual, energies to the residual.
        assert mine.values == pytest.approx(theirs.values, rel=TINY.rtol**2 + 1e3 * EPS32)
        assert mine.energy("target", 10) == pytest.approx(theirs.energy("target", 10), abs=2 * TINY.rtol)
    assert torch.allclose(evidence.after.output, expected.after.output, atol=1e4 * EPS32)


@pytest.mark.slow
def test_pictures_that_cannot_be_drawn_do_not_end_a_study(tmp_path, monkeypatch):
    def fail(*arguments: object, **options: object) -> None:
        raise DegenerateError("nothing to see")

    monkeypatch.setattr(run_module, "draw_portrait", fail)
    evidence = run_study(TINY, tmp_path / "out")
    assert evidence.is_finished
    assert evidence.after is None
    assert {c.name: c.verdict for c in judge(evidence)}["C15"] == "not decided"
    write_report(evidence, StudyFolder(tmp_path / "out"))


@pytest.mark.slow
def test_a_folder_with_other_settings_is_refused_and_the_difference_named(finished):
    folder, _ = finished
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    with pytest.raises(ArgumentError, match=r"steps=120 .*here 121"):
        run_study(dataclasses.replace(TINY, steps=121), folder)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ArgumentError, match="not empty"):
        run_study(TINY, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.slow
def test_records_that_were_lost_behind_the_checkpoint_are_noticed(finished, tmp_path):
    folder, _ = finished
    for name in ("settings.json", "checkpoint.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(ArgumentError, match="lacks the snapshots"):
        run_study(TINY, tmp_path)


# The report.


@pytest.mark.slow
def test_a_report_needs_nothing_but_itself(finished):
    folder, evidence = finished
    html = write_report(evidence, StudyFolder(folder)).read_text()
    images = html.count("<img ")
    assert images == html.count('src="data:image/png;base64,') >= 9
    for outside in ("http://", "https://", "<script", "<link"):
        assert outside not in html
    assert html.count("<td><b>C") == len(judge(evidence)) == 20
    files = sorted((folder / "figures").iterdir())
    assert len(files) == images
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in files)
    table = json.loads((folder / "claims.json").read_text())
    assert [row["verdict"] for row in table] == [claim.verdict for claim in judge(evidence)]


@pytest.mark.slow
def test_an_unfinished_study_has_a_report_that_decides_nothing(finished, tmp_path):
    folder, _ = finished
    place = StudyFolder(tmp_path)
    (tmp_path / "settings.json").write_bytes((folder / "settings.json").read_bytes())
    lines = (folder / "spectrum.jsonl").read_text().splitlines(keepends=True)
    place.records.write_text("".join(lines[:3]) + lines[3][:50])
    (tmp_path / "vectors").symlink_to(folder / "vectors")
    evidence = Evidence.load(place)
    assert {claim.verdict for claim in judge(evidence)} == {"not decided"}
    assert "has not ended: 3 of 6" in write_report(evidence, place).read_text()


@pytest.mark.slow
def test_a_study_whose_solves_all_failed_still_has_a_report_that_says_so(tmp_path):
    place = StudyFolder(tmp_path)
    place.claim(TINY)
    failed = dataclasses.replace(
        make_record(), status="failed", message="MemoryError: <b>", values=(), residual_norms=(), converged=()
    )
    place.records.write_text("".join(dataclasses.replace(failed, step=s).to_json() + "\n" for s in TINY.snapshots))
    html = write_report(Evidence.load(place), place).read_text()
    assert "Step 40: no spectrum. MemoryError: &lt;b&gt;" in html


def test_drawing_leaves_the_settings_of_matplotlib_as_they_were():
    before = dict(mpl.rcParams)
    with look():
        assert mpl.rcParams["axes.grid"]
    assert dict(mpl.rcParams) == before
