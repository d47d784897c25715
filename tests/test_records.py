"""Records survive the disk, a killed process, and numbers that JSON does not know."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from full_disk import no_file_beyond
from hypothesis import given
from hypothesis import strategies as st

from ntk_lazy.errors import ArgumentError
from ntk_lazy.records import Provenance, SpectrumRecord, append_record, read_records, versions

PROVENANCE = Provenance(versions={"torch": "2"}, seed=3, probes="abc", num_examples=5, device="cpu", dtype="float32")
NUMBERS = st.floats(allow_nan=True, allow_infinity=True)


def make_record(step: int = 0, **changes: object) -> SpectrumRecord:
    record = SpectrumRecord(
        step=step,
        status="converged",
        message="converged; completeness: fast",
        num_rows=5,
        values=(3.0, 2.0, 1.0),
        residual_norms=(1e-4, 2e-4, 3e-4),
        converged=(True, True, True),
        noise_floor=1e-6,
        energies={"target": (0.25, 0.5, 0.75)},
        scalars={"loss": 0.1},
        errors={"trace": 0.5},
        cost={"columns": 12.0},
        vectors="vectors/step-00000000.safetensors",
        provenance=PROVENANCE,
    )
    return dataclasses.replace(record, **changes)


def test_a_record_comes_back_from_its_line_as_it_was():
    record = make_record(step=7)
    line = record.to_json()
    assert "\n" not in line
    assert SpectrumRecord.from_json(line) == record


@given(values=st.lists(NUMBERS, max_size=5), loss=NUMBERS)
def test_any_number_survives_as_strict_json(values: list[float], loss: float):
    record = make_record(values=tuple(values), scalars={"loss": loss})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads(record.to_json(), parse_constant=refuse)
    back = SpectrumRecord.from_json(record.to_json())
    for before, after in zip((*values, loss), (*back.values, back.scalars["loss"]), strict=True):
        assert after == before if math.isfinite(before) else math.isnan(after)


@pytest.mark.parametrize("cut", [1, 10, 200])
def test_an_unfinished_last_line_is_passed_over_and_cut_off_by_the_next_record(tmp_path, cut):
    path = tmp_path / "spectrum.jsonl"
    for step in (0, 1, 2):
        append_record(path, make_record(step))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert [r.step for r in read_records(path)] == [0, 1]
    append_record(path, make_record(3))
    assert read_records(path) == [make_record(0), make_record(1), make_record(3)]


def test_a_process_killed_in_its_first_line_leaves_a_file_that_can_be_used(tmp_path):
    path = tmp_path / "spectrum.jsonl"
    path.write_text('{"format": 1, "st')
    assert read_records(path) == []
    append_record(path, make_record())
    assert read_records(path) == [make_record()]


def test_a_damaged_line_in_the_middle_is_an_error_that_shows_it(tmp_path):
    path = tmp_path / "spectrum.jsonl"
    path.write_text(f"{make_record().to_json()}\nnonsense\n{make_record(1).to_json()}\n")
    with pytest.raises(ArgumentError, match="nonsense"):
        read_records(path)


@pytest.mark.parametrize("line", ["[]", "{}", "null", '{"step": 1}', '{"provenance": 3}'])
def test_a_line_that_is_json_but_no_record_is_an_error(line):
    with pytest.raises(ArgumentError, match="not a spectrum record"):
        SpectrumRecord.from_json(line)


def test_a_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ArgumentError, match=r"none\.jsonl"):
        read_records(tmp_path / "none.jsonl")


def test_fields_of_a_later_version_are_passed_over():
    data = json.loads(make_record().to_json())
    data["invented_later"] = 1
    data["provenance"]["invented_later"] = 2
    assert SpectrumRecord.from_json(json.dumps(data)) == make_record()


@pytest.mark.parametrize(
    ("changes", "trusted"),
    [
        ({}, 3),
        ({"converged": (True, False, True)}, 1),
        ({"values": (3.0, 2.0, 1e-9)}, 2),
        ({"values": (), "residual_norms": (), "converged": ()}, 0),
    ],
)
def test_pairs_are_trusted_up_to_the_first_that_failed_or_is_noise(changes, trusted):
    assert make_record(**changes).num_trusted == trusted


def test_an_energy_beyond_the_pairs_is_not_a_number():
    record = make_record()
    assert record.energy("target", 3) == 0.75
    assert math.isnan(record.energy("target", 4))
    assert math.isnan(record.energy("target", 0))
    assert math.isnan(record.energy("residual", 1))


def test_the_versions_name_what_computed_the_numbers():
    assert {"python", "torch", "linear_operator"} <= versions().keys()


def test_a_line_that_finds_no_room_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "spectrum.jsonl"
    append_record(path, make_record(0))
    before = path.read_bytes()
    for room in (len(before), len(before) + 100):
        with no_file_beyond(room), pytest.raises(OSError, match="too large"):
            append_record(path, make_record(1))
        assert path.read_bytes() == before
    append_record(path, make_record(2))
    assert [r.step for r in read_records(path)] == [0, 2]


def test_of_several_records_of_one_step_the_last_with_a_spectrum_is_read(tmp_path):
    path = tmp_path / "spectrum.jsonl"
    empty = {"status": "failed", "values": (), "residual_norms": (), "converged": ()}
    lines = [
        make_record(0, message="first"),
        make_record(0, message="second"),
        make_record(1, message="good"),
        make_record(1, message="bad", **empty),
        make_record(2, message="bad", **empty),
        make_record(2, message="worse", **empty),
        make_record(0, message="third"),
    ]
    for line in lines:
        append_record(path, line)
    assert [(r.step, r.message) for r in read_records(path)] == [(1, "good"), (2, "worse"), (0, "third")]


def test_reasons_of_failures_survive_and_old_records_have_none():
    record = make_record(failures={"stability": "lr=0"})
    assert SpectrumRecord.from_json(record.to_json()) == record
    more = dataclasses.replace(record, failures={"stability": "lr=0", "loss": "it is nan", "critical": "lr=0"})
    assert more.failures_in_words == "lr=0 (stability, critical); it is nan (loss)"
    assert make_record().failures_in_words == ""
    data = json.loads(make_record().to_json())
    del data["failures"]
    assert SpectrumRecord.from_json(json.dumps(data)).failures == {}
