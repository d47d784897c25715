"""``ntk-lazy study`` writes what it says, goes on where it was stopped, and says in a line why it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
from commands import TINY, listing
from full_disk import no_file_beyond
from test_folder_lock import another_process

from ntk_lazy.cli import main
from ntk_lazy.records import read_records


@pytest.mark.slow
def test_a_study_of_one_layer_whose_reader_goes_away_is_finished(workplace):
    # One layer: a kernel of rank three, so that most of its values are rounding, for the figures too.
    arguments = ["study", *TINY, "--num-layers", "1", "--out", "out"]
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "ntk_lazy.cli", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
        code = process.wait(timeout=120)
    assert (code, err) == (0, b"")
    assert (workplace / "out" / "report.html").is_file()


@pytest.mark.slow
def test_a_study_writes_its_report_and_its_command_resumes_it(workplace, monkeypatch, capsys):
    assert main(["study", *TINY, "--out", "out"]) == 0
    out = capsys.readouterr().out
    assert "report: out/report.html" in out
    assert out.count("step ") >= 4
    assert "C11" in out
    records = (workplace / "out" / "spectrum.jsonl").read_bytes()
    (workplace / "out" / "report.html").unlink()
    assert main(["report", "out", "--compare", "out"]) == 0
    assert (workplace / "out" / "report.html").is_file()
    assert "report: out/report.html" in capsys.readouterr().out
    monkeypatch.setattr("ntk_lazy.study.report.write_report", lambda evidence, folder: folder.report)
    assert main(["study", *TINY, "--out", "out"]) == 0
    assert "resumed at step 20" in capsys.readouterr().out
    assert (workplace / "out" / "spectrum.jsonl").read_bytes() == records
    assert main(["study", *TINY, "--seed", "1", "--out", "out"]) == 2
    assert "seed=0 (here 1)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_study_that_was_killed_is_gone_on_with(workplace, monkeypatch, capsys):
    arguments = ["study", *TINY, "--out", "out"]
    arguments[arguments.index("--steps") + 1] = "3000"
    command = [sys.executable, "-m", "ntk_lazy.cli", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    records = workplace / "out" / "spectrum.jsonl"
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while not (records.exists() and len(read_records(records)) >= 2):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
        process.communicate()
    before = read_records(records)
    assert before[-1].step < 3_000
    monkeypatch.setattr("ntk_lazy.study.report.write_report", lambda evidence, folder: folder.report)
    assert main(arguments) == 0
    assert "resumed at step" in capsys.readouterr().out
    after = read_records(records)
    assert after[: len(before)] == before
    assert [r.step for r in after] == [0, 9, 3_000]
    assert not list((workplace / "out").glob("*.tmp"))


@pytest.mark.slow
def test_flags_override_the_file_and_the_file_overrides_the_preset(workplace, capsys):
    (workplace / "mine.toml").write_text('preset = "analytic"\nsteps = 4\nhalvings = []\nwidth = 4\nseed = 7\n')
    small = ["--num-points", "40", "--num-test-points", "10", "--num-pairs", "3", "--num-pictures", "1"]
    assert main(["study", "--config", "mine.toml", *small, "--snapshots", "1", "--width", "5"]) == 0
    assert "study in runs/analytic-7" in capsys.readouterr().out
    settings = (workplace / "runs" / "analytic-7" / "settings.json").read_text()
    for expected in ('"image": "analytic"', '"steps": 4', '"width": 5', '"seed": 7', '"num_pairs": 3'):
        assert expected in settings


def test_a_missing_extra_is_one_line_that_names_the_cure(workplace, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert main(["study", "--out", "out"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "pip install 'ntk-lazy[study]'" in err
    assert not (workplace / "out").exists()


def test_ctrl_c_ends_a_study_with_130_and_says_how_to_go_on(workplace, monkeypatch, capsys):
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ntk_lazy.study.run.run_study", interrupted)
    assert main(["study", *TINY, "--out", "out"]) == 130
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "same command" in err


@pytest.mark.slow
def test_a_study_on_a_full_disk_judges_what_it_measured_and_its_command_goes_on_when_there_is_room(
    workplace, monkeypatch, capsys
):
    with no_file_beyond(2_000):
        assert main(["study", *TINY, "--out", "out"]) == 1
    out, err = capsys.readouterr()
    assert out.count("no room to write this snapshot") == 3
    assert "C11  pass" in out or "C11  fail" in out
    assert err.count("\n") == 1
    assert "the report cannot be written" in err
    assert "the snapshot of step 20" in err
    assert not (workplace / "out" / "checkpoint.safetensors").exists()
    monkeypatch.setattr("ntk_lazy.study.report.write_report", lambda evidence, folder: folder.report)
    assert main(["study", *TINY, "--out", "out"]) == 0
    assert [r.step for r in read_records(workplace / "out" / "spectrum.jsonl")] == [0, 9, 20]


@pytest.mark.slow
def test_pairs_of_a_study_that_cannot_be_read_cost_neither_its_resumption_nor_its_report(
    workplace, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        patch.setattr("ntk_lazy.study.report.write_report", lambda evidence, folder: folder.report)
        assert main(["study", *TINY, "--out", "out"]) == 0
    _, second, third = sorted((workplace / "out" / "vectors").iterdir())
    second.write_bytes(second.read_bytes()[:-10])
    third.unlink()
    lines = (workplace / "out" / "spectrum.jsonl").read_text()
    # As two studies at once would once have left them.
    (workplace / "out" / "spectrum.jsonl").write_text(lines + lines)
    assert main(["report", "out"]) == 0
    monkeypatch.setattr("ntk_lazy.study.report.write_report", lambda evidence, folder: folder.report)
    assert main(["study", *TINY, "--out", "out"]) == 0
    assert capsys.readouterr().err == ""


def test_a_second_study_in_a_folder_is_refused_by_the_number_of_the_first_and_writes_nothing(workplace, capsys):
    (workplace / "out").mkdir()
    with another_process(workplace / "out") as other:
        before = listing(workplace)
        assert main(["study", *TINY, "--out", "out"]) == 2
        assert listing(workplace) == before
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"in use by process {other.pid}" in err
