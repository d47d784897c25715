"""Settings, picture, network and training of a study, each on its own."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from test_records import make_record
from tiny_study import TINY
from torch import nn

from ntk_lazy.errors import ArgumentError, DegenerateError, NonFiniteError, ShapeError
from ntk_lazy.study import display as display_module
from ntk_lazy.study import training as training_module
from ntk_lazy.study.config import PRESETS, StudyConfig, preset, read_toml
from ntk_lazy.study.display import describe, display_for
from ntk_lazy.study.network import build_network
from ntk_lazy.study.report import command_line
from ntk_lazy.study.run import run_study
from ntk_lazy.study.target import Target, grid_points, load_picture
from ntk_lazy.study.training import DivergedError, Training, read_tensors

EPS32 = torch.finfo(torch.float32).eps


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
        {"seed": -1},
        {"seed": 2**63},
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


def test_the_line_of_a_snapshot_judges_the_trusted_pairs_alone():
    assert "  3 pairs to 3e-04  " in describe(make_record())
    noisy = make_record(values=(3.0, 2.0, 1e-9), residual_norms=(3e-4, 4e-4, 1e-7))
    assert "  2 of 3 pairs to 2e-04  " in describe(noisy)
    assert "  1 of 3 pairs to 3e-05 (partial)  " in describe(
        make_record(converged=(True, False, True), status="partial")
    )
    assert "  3 pairs to 3e-05  " in describe(make_record(values=(3.0, 0.0, -1e-9), noise_floor=math.nan))
    for nothing in (make_record(converged=(False,) * 3), make_record(values=(0.0, 0.0, -1e-9))):
        assert "  0 of 3 pairs  " in describe(nothing)


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
