"""A study ends as it should, also when it was interrupted, and its claims hold on a target with a known answer."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from test_records import make_record
from torch import nn

from ntk_lazy.eigen import EigenResult
from ntk_lazy.errors import ArgumentError, DegenerateError, NonFiniteError, ShapeError
from ntk_lazy.records import SpectrumRecord, read_records
from ntk_lazy.study import display as display_module
from ntk_lazy.study import run as run_module
from ntk_lazy.study import training as training_module
from ntk_lazy.study.canvas import look
from ntk_lazy.study.claims import judge
from ntk_lazy.study.config import PRESETS, StudyConfig, preset, read_toml
from ntk_lazy.study.display import describe, display_for
from ntk_lazy.study.evidence import Evidence
from ntk_lazy.study.folder import StudyFolder
from ntk_lazy.study.network import build_network
from ntk_lazy.study.report import command_line, write_report
from ntk_lazy.study.run import run_study
from ntk_lazy.study.target import Target, grid_points, load_picture
from ntk_lazy.study.training import DivergedError, Training, read_tensors

TINY = StudyConfig(
    image="analytic",
    num_points=150,
    num_test_points=60,
    num_layers=3,
    width=16,
    steps=120,
    halvings=(80,),
    num_pairs=30,
    num_pictures=2,
    snapshots=(0, 10, 40, 79, 100, 120),
)
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


# The settings.


def test_the_presets_are_those_of_the_paper_and_its_replication():
    assert sum(p.numel() for p in build_network(preset("demo")).parameters()) == 37_633
    assert sum(p.numel() for p in build_network(preset("analytic")).parameters()) == 16_897
    assert sum(p.numel() for p in build_network(preset("paper")).parameters()) == 264_193
    assert preset("claims").steps == 30_000
    assert len(preset("claims").halvings) == 2


@pytest.mark.parametrize("name", PRESETS)
def test_snapshots_rise_from_the_first_to_the_last_step_and_see_both_sides_of_each_halving(name):
    config = preset(name)
    steps = config.snapshot_steps()
    assert list(steps) == sorted(set(steps))
    assert (steps[0], steps[-1]) == (0, config.steps)
    for halving in config.halvings:
        assert halving - 1 in steps
        assert any(halving < step <= halving + 500 for step in steps)
    assert sum(config.warm_up <= step < config.halvings[0] for step in steps) >= 3


def test_the_learning_rate_is_halved_at_the_step_that_is_named():
    assert [TINY.lr_at(s) for s in (0, 79, 80, 120)] == [0.25, 0.25, 0.125, 0.125]


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_points": 0},
        {"lr": -1.0},
        {"lr": math.nan},
        {"rtol": math.inf},
        {"blur": -1.0},
        {"num_pairs": 151},
        {"num_pictures": 31},
        {"halvings": (80, 40)},
        {"halvings": (500,)},
        {"snapshots": (121,)},
        {"dtype": "float16"},
        {"negative_slope": 1.0},
        {"stepz": 3},
        {"steps": "many"},
        {"steps": True},
        {"halvings": [1.5]},
    ],
    ids=str,
)
def test_a_setting_that_no_study_can_have_is_refused_by_name(wrong):
    (name,) = wrong
    with pytest.raises(ArgumentError, match=name):
        StudyConfig.from_dict(wrong, base=TINY)


def test_settings_survive_json_and_toml(tmp_path):
    assert StudyConfig.from_dict(json.loads(json.dumps(TINY.to_dict()))) == TINY
    path = tmp_path / "study.toml"
    path.write_text('image = "china.jpg"\nlr = 1\nhalvings = [3, 5]\nsteps = 9\n')
    changed = StudyConfig.from_dict(read_toml(path))
    assert (changed.image, changed.lr, changed.halvings, changed.steps) == ("china.jpg", 1.0, (3, 5), 9)


def test_the_command_of_a_report_gives_the_settings_back():
    assert command_line(preset("claims")) == "ntk-lazy study --preset claims"
    changed = dataclasses.replace(preset("demo"), seed=4, halvings=(1, 2))
    assert command_line(changed) == "ntk-lazy study --preset demo --halvings 1 2 --seed 4"


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:99"])
def test_a_device_that_cannot_be_used_is_refused_before_anything_is_written(tmp_path, device):
    with pytest.raises(ArgumentError, match=device):
        run_study(dataclasses.replace(TINY, device=device), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_terminal_gets_a_bar_and_a_pipe_gets_lines(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, has_bar in ((Terminal(), True), (io.StringIO(), False)):
        with display_for(stream, total=10) as display:
            display.say("λ₁ [bold]")
            display.progress(10, 0.25)
        text = stream.getvalue()
        assert "λ₁ [bold]" in text
        assert ("10/10" in text and "loss 0.2500" in text) == has_bar
    monkeypatch.setattr(display_module, "_HAS_RICH", False)
    with display_for(plain := Terminal(), total=10) as display:
        display.say("λ₁ [bold]")
        display.progress(10, 0.25)
    assert plain.getvalue() == "λ₁ [bold]\n"
    assert describe(make_record(12, status="partial")).startswith("step      12")
    failed = make_record(3, status="failed", message="why", values=(), residual_norms=(), converged=())
    assert describe(failed) == "step       3  no spectrum: why"


# The picture, the network, the training.


def test_the_photograph_is_standardised_on_the_training_points_and_centred():
    target = Target.of(dataclasses.replace(preset("demo"), num_points=500, num_test_points=300, num_pairs=20))
    assert target.picture.shape == (427, 640)
    slack = 500 * EPS32
    assert float(target.train_y.mean()) == pytest.approx(0, abs=slack)
    assert float(target.train_y.std(correction=0)) == pytest.approx(1, abs=slack)
    points = grid_points((427, 640))
    assert np.allclose(points.mean(0), 0, atol=1e-12)
    assert points.min() > -1
    assert points.max() < 1
    together = torch.cat([target.train_x, target.test_x])
    assert len(torch.unique(together, dim=0)) == 800


def test_a_training_point_has_the_grey_value_of_its_pixel():
    target = Target.of(TINY)
    height, width = target.picture.shape
    column = ((target.train_x[:, 0].double() + 1) / 2 * width - 0.5).round().long()
    row = ((target.train_x[:, 1].double() + 1) / 2 * height - 0.5).round().long()
    assert torch.allclose(torch.from_numpy(target.picture)[row, column].float(), target.train_y[:, 0])


def test_the_coarse_picture_keeps_what_varies_slowly():
    x, y = grid_points((192, 288)).T
    target = dataclasses.replace(Target.of(TINY), picture=(np.sin(x) * y).reshape(192, 288))
    x, y = grid_points((64, 96)).T
    # The mean over a cell of half-width h differs from the value at its centre by less than h²/2 and the 3 × 3 filter
    # holds at the border what it would see beyond it, less than a whole cell.
    assert np.abs(target.coarse((64, 96)) - (np.sin(x) * y).reshape(64, 96)).max() < 2 / 64


@pytest.mark.parametrize(
    ("pixels", "error"),
    [
        (np.full((20, 20), 0.5), DegenerateError),
        (np.full((20, 20), np.nan), NonFiniteError),
        (np.zeros((3, 3)), ShapeError),
        (np.zeros(20), ShapeError),
        (np.random.default_rng(0).random((9, 9)), ArgumentError),
    ],
    ids=["constant", "nan", "small", "flat", "too few pixels"],
)
def test_a_picture_that_cannot_be_learned_is_refused(tmp_path, pixels, error):
    path = tmp_path / "picture.npy"
    np.save(path, pixels)
    with pytest.raises(error):
        Target.of(dataclasses.replace(TINY, image=str(path)))


def test_a_colour_file_is_read_as_its_luminance(tmp_path):
    pixels = np.zeros((20, 20, 3), dtype=np.uint8)
    pixels[..., 1] = 255
    np.save(tmp_path / "green.npy", pixels)
    assert load_picture(str(tmp_path / "green.npy")) == pytest.approx(np.full((20, 20), 0.587))


def test_a_new_network_is_positively_homogeneous_and_its_weights_have_the_variance_of_xavier():
    config = dataclasses.replace(TINY, width=400, dtype="float64")
    state = torch.get_rng_state()
    model = build_network(config)
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.randn(10, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(model(3 * x), 3 * model(x), rtol=1e-12)
    weight = model[2].weight
    assert isinstance(weight, nn.Parameter)
    # The variance of n samples is off by sqrt(2/n) of itself, and five of those are allowed.
    assert float(weight.detach().var()) == pytest.approx(2 / 800, rel=5 * (2 / weight.numel()) ** 0.5)


def test_training_takes_the_steps_of_gradient_descent():
    config = dataclasses.replace(TINY, dtype="float64", steps=30, halvings=(20,), snapshots=())
    target = Target.of(config)
    training = Training(build_network(config), target.train_x, target.train_y, config)
    training.advance_to(30)
    twin = build_network(config)
    optimiser = torch.optim.SGD(twin.parameters(), lr=config.lr)
    for step in range(30):
        for group in optimiser.param_groups:
            group["lr"] = 0.25 if step < 20 else 0.125
        optimiser.zero_grad()
        (nn.functional.mse_loss(twin(target.train_x), target.train_y) / 2).backward()
        optimiser.step()
    for mine, theirs in zip(training.model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-12)


def test_a_training_that_diverges_says_so():
    config = dataclasses.replace(TINY, lr=1e4)
    target = Target.of(config)
    training = Training(build_network(config), target.train_x, target.train_y, config)
    with pytest.raises(DivergedError, match="learning rate"):
        training.advance_to(120)


def test_a_checkpoint_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    target = Target.of(TINY)
    training = Training(build_network(TINY), target.train_x, target.train_y, TINY)
    path = tmp_path / "checkpoint.safetensors"
    training.save(path)
    before = path.read_bytes()

    def killed(tensors: object, file: Path, metadata: object) -> None:
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(training_module, "save_file", killed)
    training.advance_to(3)
    with pytest.raises(KeyboardInterrupt):
        training.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    target = Target.of(TINY)
    Training(build_network(TINY), target.train_x, target.train_y, TINY).save(tmp_path / "c.safetensors")
    other = dataclasses.replace(TINY, width=8)
    with pytest.raises(ArgumentError, match="does not fit"):
        Training(build_network(other), target.train_x, target.train_y, other).load(tmp_path / "c.safetensors")
    (tmp_path / "d.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ArgumentError, match="cannot read"):
        read_tensors(tmp_path / "d.safetensors")


# The whole.


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


# The claims.


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
