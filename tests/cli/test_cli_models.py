"""The commands about a model and its data do what their help says."""

from __future__ import annotations

import io
import re
import sys

import numpy as np
import pytest
import torch
from commands import SPECTRUM, data, listing, replaced, run_process, trained
from full_disk import no_file_beyond
from oracle import dense_jacobian
from torch import nn

from ntk_lazy import tracker as tracker_module
from ntk_lazy.cli import main
from ntk_lazy.cli.main import build_parser
from ntk_lazy.eigen import EigenResult
from ntk_lazy.records import read_records


@pytest.mark.slow
def test_a_process_finds_the_model_in_its_working_directory_and_writes_what_it_says(workplace):
    done = run_process(*SPECTRUM, "--weights", "w.safetensors", "--target", "y.npy", "--lr", "0.1", cwd=workplace)
    assert (done.returncode, done.stderr) == (0, "")
    J = dense_jacobian(trained(), data("x.npy"))
    values, vectors = torch.linalg.eigh(J @ J.mT)
    (record,) = read_records(workplace / "out" / "spectrum.jsonl")
    eps = 60 * torch.finfo(torch.float32).eps
    assert record.values == pytest.approx(values.flip(0)[:5].tolist(), rel=1e-6 + eps)
    energy = (vectors.flip(1)[:, :5].mT @ data("y.npy").reshape(-1)).square().sum() / data("y.npy").square().sum()
    assert record.energy("target", 5) == pytest.approx(float(energy), abs=2e-3)
    assert record.scalars["stability"] == pytest.approx(0.1 * float(values[-1]) / 30, rel=1e-5)
    kept = EigenResult.load(workplace / "out" / record.vectors)
    assert kept.vectors.shape == (60, 5)
    assert "5 eigenpairs of 60 rows: converged" in done.stdout
    assert "written to out" in done.stdout


@pytest.mark.slow
def test_a_process_that_fails_shows_no_traceback(workplace):
    done = run_process(*replaced("--data", "nan.npy"), cwd=workplace)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("ntk-lazy: error: ")
    assert "Traceback" not in done.stderr


def test_an_empty_folder_may_be_written_to(workplace):
    (workplace / "out").mkdir()
    assert main(SPECTRUM) == 0
    assert {p.name for p in (workplace / "out").iterdir()} == {"spectrum.jsonl", "vectors"}


def test_parameters_and_outputs_are_chosen(workplace, capsys):
    assert main([*SPECTRUM, "--outputs", "1", "--params", "2.*"]) == 0
    (record,) = read_records(workplace / "out" / "spectrum.jsonl")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))
    J = dense_jacobian(model, data("x.npy").float(), names=["2.weight", "2.bias"])[1::2]
    expected = torch.linalg.eigvalsh(J @ J.mT).flip(0)[:5]
    assert record.values == pytest.approx(expected.tolist(), rel=1e-5)


def test_a_torch_file_of_weights_says_what_safetensors_say(workplace):
    for name, out in (("state.pt", "a"), ("w.safetensors", "b")):
        assert main([*replaced("--out", out), "--weights", name]) == 0
    first, second = (read_records(workplace / out / "spectrum.jsonl")[0] for out in "ab")
    assert first.values == second.values


def test_without_a_number_of_pairs_there_are_no_more_than_rows(workplace, capsys):
    arguments = [a for a in SPECTRUM if a not in ("-k", "5")]
    assert main([*arguments, "--outputs", "1"]) in (0, 1)
    (record,) = read_records(workplace / "out" / "spectrum.jsonl")
    assert len(record.values) == 30


def test_what_could_not_be_measured_is_printed_with_its_reason(workplace, capsys):
    np.save("zeros.npy", np.zeros((30, 2)))
    assert main([*SPECTRUM, "--target", "zeros.npy"]) == 0
    out = capsys.readouterr().out
    assert "not measured: the target is zero (energies.target, kernel_target_alignment)\n" in out
    assert "energy of the output" in out


def test_values_below_the_noise_floor_are_marked(workplace, capsys):
    # One linear layer on three features and a constant: the kernel of one output has four values, the rest is rounding.
    assert main([*replaced("--model", "mynet:linear"), "-k", "10", "--solver", "dense"]) in (0, 1)
    rows = re.findall(r"^ +(\d+) +-?\d\.\d+e\S+ +\S+( +rounding)?$", capsys.readouterr().out, re.MULTILINE)
    assert {int(i): bool(mark) for i, mark in rows} == {1: False, 2: False, 3: False, 5: True, 10: True}


def test_a_partial_result_is_written_and_said_in_one_line_with_exit_code_one(workplace, monkeypatch, capsys):
    solve = tracker_module.eigsh
    monkeypatch.setattr(tracker_module, "eigsh", lambda *a, **o: solve(*a, **{**o, "max_products": 12}))
    assert main([*SPECTRUM, "--solver", "lanczos", "--rtol", "1e-12"]) == 1
    (record,) = read_records(workplace / "out" / "spectrum.jsonl")
    err = capsys.readouterr().err
    assert record.status == "partial"
    assert err.count("\n") == 1
    assert f"partial result: {sum(record.converged)} of 5 pairs" in err


def test_a_solve_that_fails_is_one_line_with_exit_code_one_and_leaves_nothing_behind(workplace, monkeypatch, capsys):
    def fail(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError("no memory\nis left")

    monkeypatch.setattr(tracker_module, "eigsh", fail)
    before = listing(workplace)
    assert main(SPECTRUM) == 1
    assert capsys.readouterr().err == "ntk-lazy: error: the solve failed: no memory is left\n"
    assert listing(workplace) == before


class Deaf(io.StringIO):
    """A stream whose reader has gone away."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_output_that_nobody_reads_ends_quietly_with_its_work_done(workplace, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Deaf())
    assert main(SPECTRUM) == 141
    assert capsys.readouterr().err == ""
    assert (workplace / "out" / "spectrum.jsonl").is_file()


def test_a_standard_output_without_room_is_one_line_with_exit_code_one_and_the_work_is_done(
    workplace, monkeypatch, capsys
):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(SPECTRUM) == 1
    assert capsys.readouterr().err == "ntk-lazy: error: cannot write to standard output: No space left on device\n"
    assert len(read_records(workplace / "out" / "spectrum.jsonl")) == 1


@pytest.mark.parametrize("room", [0, 1_000])
def test_a_spectrum_that_finds_no_room_is_printed_and_one_line_says_why_it_is_not_there(workplace, capsys, room):
    before = listing(workplace)
    with no_file_beyond(room):
        assert main(SPECTRUM) == 1
    out, err = capsys.readouterr()
    assert "5 eigenpairs of 60 rows: converged" in out
    assert "written to" not in out
    assert err.count("\n") == 1
    assert err.startswith("ntk-lazy: error: nothing could be written to out (")
    assert listing(workplace) == before


def test_a_model_that_ends_the_process_does_not_pass_for_success(workplace, capsys):
    for command in ("spectrum", "doctor"):
        out = ["--out", "out"] if command == "spectrum" else []
        assert main([command, "--model", "mynet:ends_late", "--data", "x.npy", *out]) == 1
        assert capsys.readouterr() == ("", "ntk-lazy: error: the model called sys.exit()\n")
    assert not (workplace / "out").exists()


def test_explain_says_what_a_product_would_take_and_multiplies_nothing(workplace, capsys):
    assert main(["explain", "--model", "mynet:build", "--data", "x.npy", "-k", "20"]) == 0
    out = capsys.readouterr().out
    assert "P = 98" in out
    assert "20 columns" in out
    assert main(["explain", "--model", "mynet:build", "--data", "x.npy", "--pairs", "10"]) == 0
    assert "eigsh(K, 10): about 1 product of 60 columns" in capsys.readouterr().out
    solve = ["--noise", "0.1", "--rank", "5", "-k", "2"]
    assert main(["explain", "--model", "mynet:build", "--data", "x.npy", *solve]) == 0
    assert "(K + 0.1 I) X = B, 2 right-hand sides, rtol = 0.01" in capsys.readouterr().out


def test_doctor_calls_a_model_ready_or_names_the_problem(workplace, capsys):
    assert main(["doctor", "--model", "mynet:build", "--data", "x.npy"]) == 0
    assert "ready" in capsys.readouterr().out
    assert main(["doctor", "--model", "mynet:batch_coupled", "--data", "x.npy"]) == 1
    assert "no kernel" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["study", "spectrum", "explain", "doctor", "report"])
def test_the_help_of_each_command_holds_a_worked_example_that_parses(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    examples = [line.split()[1:] for line in text.splitlines() if line.strip().startswith(f"ntk-lazy {command}")]
    assert examples
    for words in examples:
        assert build_parser().parse_args(words).run
