"""What goes wrong around a training costs numbers that say why, and neither the training nor what was measured."""

from __future__ import annotations

import math

import pytest
import torch
from full_disk import no_file_beyond
from test_tracker import N, make_data, make_model
from torch import Tensor, nn

from ntk_lazy.eigen import EigenResult
from ntk_lazy.errors import ArgumentError
from ntk_lazy.records import read_records
from ntk_lazy.tracker import SpectrumTracker


def spoiled(y: Tensor, value: float) -> Tensor:
    y = y.clone()
    y[3] = value
    return y


STABILITY = {"stability", "critical_eigenvalue"}
FIRST_ORDER = {"first_order_error", "first_order_cosine"}
OF_A_BAD_TARGET = {"energies.target", "energies.residual", "loss", "kernel_target_alignment", "spectral_position"}
SETBACKS = {
    "a rate of zero": ({"lr": 0}, STABILITY | FIRST_ORDER, "lr=0"),
    "a rate below zero": ({"lr": -0.1}, STABILITY | FIRST_ORDER, "lr=-0.1"),
    "a rate that is a NaN": ({"lr": math.nan}, STABILITY | FIRST_ORDER, "lr=nan"),
    "a NaN in the target": ({"target": spoiled(make_data()[1], math.nan)}, OF_A_BAD_TARGET | FIRST_ORDER, "row 3"),
    "an infinity in the target": (
        {"target": spoiled(make_data()[1], math.inf)},
        OF_A_BAD_TARGET | FIRST_ORDER,
        "row 3",
    ),
}


@pytest.mark.parametrize("case", SETBACKS)
def test_one_number_that_cannot_be_measured_costs_no_other(case, tmp_path):
    changes, missing, reason = SETBACKS[case]
    model, (x, y) = make_model(), make_data()
    given = {"lr": 0.1, "target": y}
    usual = SpectrumTracker(x, k=3).record(model, 0, **given)
    record = SpectrumTracker(x, k=3, folder=tmp_path).record(model, 0, **(given | changes))
    assert read_records(tmp_path / "spectrum.jsonl")[0].failures == record.failures
    assert record.status == "converged"
    assert record.failures.keys() == missing
    assert usual.failures == {}
    assert any(reason in words for words in record.failures.values())
    assert reason in record.message
    energies = {name.removeprefix("energies.") for name in missing}
    assert record.energies.keys() == usual.energies.keys() - energies
    assert record.scalars.keys() == usual.scalars.keys() - missing
    for name in record.scalars.keys() - {"lr"}:
        assert record.scalars[name] == usual.scalars[name], name


def test_a_kernel_that_is_zero_costs_what_has_no_angle_with_it():
    model, (x, y) = make_model(), make_data()
    with torch.no_grad():
        model[2].weight.zero_()  # nothing before the last layer reaches the output
    record = SpectrumTracker(x, k=3, params="0.*").record(model, 0, lr=0.1, target=y)
    assert record.values == (0.0, 0.0, 0.0)
    assert record.num_trusted == 0
    assert (record.scalars["trace"], record.scalars["stability"]) == (0.0, 0.0)
    assert record.scalars["loss"] > 0
    assert record.failures.keys() == {"effective_rank", "kernel_target_alignment", "spectral_position"} | FIRST_ORDER


@pytest.mark.parametrize("message", ["DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."])
@pytest.mark.parametrize("place", ["ntk_lazy.tracker.ntk", "ntk_lazy.tracker.eigsh", "ntk_lazy.measures.trace"])
def test_a_machine_without_memory_costs_numbers_and_not_the_training(place, message, monkeypatch):
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError(message)

    model, (x, y) = make_model(), make_data()
    tracker = SpectrumTracker(x, k=3)
    with monkeypatch.context() as patch:
        patch.setattr(place, fail)
        record = tracker.record(model, 0, lr=0.1, target=y)
    assert record.status == ("converged" if place.endswith("trace") else "failed")
    assert "DefaultCPUAllocator" in record.failures["trace" if place.endswith("trace") else "pairs"]
    assert ("loss" in record.scalars) == (place != "ntk_lazy.tracker.ntk")
    assert tracker.record(model, 1, lr=0.1, target=y).failures == {}
    with monkeypatch.context() as patch:
        patch.setattr(place, lambda *a, **o: (_ for _ in ()).throw(RuntimeError("mine")).send(None))
        with pytest.raises(RuntimeError, match="mine"):
            tracker.record(model, 2, lr=0.1, target=y)


@pytest.mark.parametrize("lr", ["fast", [0.1, 0.2], 1j])
def test_a_rate_that_is_no_number_is_refused_before_anything_is_recorded(lr):
    tracker = SpectrumTracker(make_data()[0], k=2)
    with pytest.raises(ArgumentError, match="lr must be a number"):
        tracker.record(make_model(), 0, lr=lr)
    assert tracker.records == []


def test_a_full_disk_keeps_records_in_memory_and_they_are_written_when_there_is_room(tmp_path, caplog):
    model, (x, y) = make_model(), make_data()
    tracker = SpectrumTracker(x, k=3, folder=tmp_path, keep_vectors=True)
    first = tracker.record(model, 0, target=y)
    path = tmp_path / "spectrum.jsonl"
    before = path.read_bytes()
    with no_file_beyond(len(before)):
        lost = [tracker.record(model, step, target=y) for step in (1, 2)]
    assert path.read_bytes() == before
    assert tracker.unsaved == tuple(lost)
    assert "kept in memory: step 1, 2" in caplog.text
    last = tracker.record(model, 3, target=y)
    assert tracker.unsaved == ()
    assert read_records(path) == [first, *lost, last] == tracker.records
    assert [r.scalars["loss"] for r in lost] == [first.scalars["loss"]] * 2


def test_pairs_that_find_no_room_are_named_in_the_record(tmp_path):
    model, (x, _) = make_model(), make_data()
    tracker = SpectrumTracker(x, k=3, folder=tmp_path, keep_vectors=True)
    with no_file_beyond(100):
        record = tracker.record(model, 0)
    assert record.vectors is None
    assert "OSError" in record.failures["vectors"]
    assert list((tmp_path / "vectors").iterdir()) == []
    assert tracker.record(model, 1).vectors is not None
    assert [r.step for r in read_records(tmp_path / "spectrum.jsonl")] == [0, 1]


def test_a_folder_that_was_taken_away_costs_no_record(tmp_path):
    model, (x, _) = make_model(), make_data()
    tracker = SpectrumTracker(x, k=3, folder=tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    record = tracker.record(model, 0)
    assert tracker.unsaved == (record,)
    (tmp_path / "elsewhere").rename(tmp_path / "out")
    tracker.record(model, 1)
    assert [r.step for r in read_records(tmp_path / "out" / "spectrum.jsonl")] == [0, 1]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-40]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-400] + b"\xff" * 400),
        lambda path: path.unlink() or path.mkdir(),
    ],
    ids=["deleted", "truncated", "empty", "overwritten", "a folder"],
)
def test_vectors_that_cannot_be_read_only_cost_the_warm_start(damage, tmp_path, caplog):
    model, (x, _) = make_model(), make_data()
    tracker = SpectrumTracker(x, k=3, folder=tmp_path, keep_vectors=True)
    kept = [tracker.record(model, step) for step in (0, 1)]
    damage(tmp_path / kept[1].vectors)
    again = SpectrumTracker(x, k=3, folder=tmp_path, keep_vectors=True)
    assert "the pairs of step 1" in caplog.text
    assert torch.equal(again.pairs.vectors, EigenResult.load(tmp_path / kept[0].vectors).vectors)
    assert again.record(model, 2).values == pytest.approx(kept[0].values, rel=1e-6)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize(
    "kind", [lambda y: y, Tensor.numpy, Tensor.tolist, Tensor.int], ids=["long", "array", "list", "int"]
)
def test_labels_of_classes_are_refused_as_a_target_and_their_one_hot_code_is_not(outputs, kind):
    x, _ = make_data()
    labels = torch.arange(N) % 3
    tracker = SpectrumTracker(x, k=2)
    with pytest.raises(ArgumentError, match="one_hot"):
        tracker.record(make_model(outputs), 0, target=kind(labels))
    assert tracker.records == []
    code = nn.functional.one_hot(labels, 3)
    assert "loss" in tracker.record(make_model(3), 0, target=code).scalars
    assert "loss" in tracker.record(make_model(1), 1, target=labels == 1).scalars
