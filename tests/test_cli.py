"""The command line does what its help says, and wrong input is one line and exit code 2, with nothing half-written."""

from __future__ import annotations

import io
import os
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import dense_jacobian
from safetensors.torch import save_file
from torch import Tensor, nn

from ntk_lazy import tracker as tracker_module
from ntk_lazy.cli import main
from ntk_lazy.cli.main import build_parser
from ntk_lazy.eigen import EigenResult
from ntk_lazy.records import read_records

MODEL = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))

def linear():
    torch.manual_seed(0)
    return nn.Linear(3, 1)

def broken():
    raise ValueError("no\\nluck")

def number():
    return 3

def batch_coupled():
    return nn.Sequential(nn.Linear(3, 4), Centred())

class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)

answer = 42
"""
TINY = ["--preset", "analytic", "--num-points", "80", "--num-test-points", "20", "--num-layers", "2", "--width", "8"]
TINY += ["--steps", "20", "--halvings", "10", "--num-pairs", "10", "--num-pictures", "1", "--snapshots", "9"]


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a model, weights and data; what was imported from it is forgotten after."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mynet.py").write_text(MODEL)
    generator = np.random.default_rng(0)
    np.save("x.npy", generator.normal(size=(30, 3)))
    np.save("y.npy", generator.normal(size=(30, 2)))
    np.save("short.npy", generator.normal(size=(7, 2)))
    np.save("wide.npy", generator.normal(size=(30, 5)))
    bad = generator.normal(size=(30, 3))
    bad[4, 1] = np.nan
    np.save("nan.npy", bad)
    np.save("words.npy", np.array(["a", "b"]))
    np.save("empty.npy", np.zeros((0, 3)))
    (tmp_path / "text.npy").write_text("not an array")
    save_file(trained().state_dict(), "w.safetensors")
    save_file({"0.weight": torch.zeros(2, 2)}, "other.safetensors")
    torch.save(trained(), "module.pt")
    torch.save({"model": trained().state_dict(), "epoch": 3}, "checkpoint.pt")
    torch.save(torch.zeros(3), "tensor.pt")
    torch.save(trained().state_dict(), "state.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "state.pt").read_bytes()[:500])
    (tmp_path / "empty.pt").touch()
    (tmp_path / "array.pickle").write_bytes(pickle.dumps({"0.weight": np.ones(2)}))
    (tmp_path / "bad.safetensors").write_text("nonsense")
    (tmp_path / "unknown.toml").write_text("stepz = 3\n")
    (tmp_path / "type.toml").write_text('steps = "many"\n')
    (tmp_path / "syntax.toml").write_text("steps = = 3\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    monkeypatch.delitem(sys.modules, "mynet", raising=False)
    yield tmp_path
    sys.modules.pop("mynet", None)


def trained() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))


def data(name: str) -> Tensor:
    return torch.from_numpy(np.load(name))


def listing(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if "__pycache__" not in p.parts}


SPECTRUM = ["spectrum", "--model", "mynet:build", "--data", "x.npy", "-k", "5", "--out", "out"]


def replaced(option: str, value: str) -> list[str]:
    arguments = list(SPECTRUM)
    arguments[arguments.index(option) + 1] = value
    return arguments


WRONG = {
    "no such data": (replaced("--data", "none.npy"), "none.npy"),
    "data that are text": (replaced("--data", "text.npy"), "text.npy"),
    "data that are words": (replaced("--data", "words.npy"), "words.npy"),
    "data that are a folder": (replaced("--data", "full"), "full is a folder"),
    "data that are pickled": (replaced("--data", "module.pt"), "module.pt is not"),
    "data without examples": (replaced("--data", "empty.npy"), "empty.npy"),
    "data with a NaN": (replaced("--data", "nan.npy"), r"\(4, 1\)"),
    "data of the wrong shape": (replaced("--data", "wide.npy"), r"\(30, 5\)"),
    "a target of the wrong length": ([*SPECTRUM, "--target", "short.npy"], r"\(7, 2\)"),
    "a target of the wrong width": ([*SPECTRUM, "--target", "x.npy"], r"\(30, 3\)"),
    "a target with a NaN": ([*SPECTRUM, "--target", "nan.npy"], "NaN"),
    "no such module": (replaced("--model", "nonet:build"), "nonet"),
    "no such factory": (replaced("--model", "mynet:build2"), "build2"),
    "the file of a module": (replaced("--model", "./mynet.py:build"), "write mynet:build"),
    "a module in a folder": (replaced("--model", "sub/mynet.py:build"), "write sub.mynet:build"),
    "a module elsewhere": (replaced("--model", "../nets/mynet.py:build"), r"in the folder ../nets, write mynet:build"),
    "no factory at all": (replaced("--model", "mynet"), "factory"),
    "a factory that fails": (replaced("--model", "mynet:broken"), r"mynet:broken\(\) failed: no luck"),
    "a factory of numbers": (replaced("--model", "mynet:number"), "int"),
    "a number for a factory": (replaced("--model", "mynet:answer"), "int"),
    "a model without a kernel": (replaced("--model", "mynet:batch_coupled"), "other examples|batch|coupled"),
    "no such weights": ([*SPECTRUM, "--weights", "none.safetensors"], "none.safetensors"),
    "damaged weights": ([*SPECTRUM, "--weights", "bad.safetensors"], "bad.safetensors"),
    "weights that are a whole module": ([*SPECTRUM, "--weights", "module.pt"], "whole module.*state_dict"),
    "weights that are an array": ([*SPECTRUM, "--weights", "x.npy"], "npy array.*state_dict"),
    "weights that are text": ([*SPECTRUM, "--weights", "text.npy"], "neither a torch file.*state_dict"),
    "weights that are empty": ([*SPECTRUM, "--weights", "empty.pt"], "is empty.*state_dict"),
    "weights that are a pickle": ([*SPECTRUM, "--weights", "array.pickle"], "other objects.*state_dict"),
    "weights cut short": ([*SPECTRUM, "--weights", "cut.pt"], "is not a state dict.*damaged.*state_dict"),
    "weights in a checkpoint": ([*SPECTRUM, "--weights", "checkpoint.pt"], "'model' is a .*may be one.*state_dict"),
    "damaged weights that name their cure": ([*SPECTRUM, "--weights", "bad.safetensors"], "save_file.*state_dict"),
    "weights that are one tensor": ([*SPECTRUM, "--weights", "tensor.pt"], "holds a Tensor.*state_dict"),
    "weights that are a folder": ([*SPECTRUM, "--weights", "full"], "full is a folder"),
    "weights of another model": ([*SPECTRUM, "--weights", "other.safetensors"], "do not fit"),
    "no pairs": (replaced("-k", "0"), "k must be"),
    "more pairs than rows": (replaced("-k", "61"), "61.*60 rows"),
    "more pairs than rows of one output": ([*replaced("-k", "31"), "--outputs", "1"], "31.*30 rows"),
    "a learning rate of zero": ([*SPECTRUM, "--lr", "0"], "--lr must be positive"),
    "a learning rate below zero": ([*SPECTRUM, "--lr", "-1"], "--lr must be positive"),
    "a learning rate that is no number": ([*SPECTRUM, "--lr", "nan"], "--lr must be positive"),
    "a seed below zero": ([*SPECTRUM, "--seed", "-1"], "seed must lie"),
    "a seed that is too large": ([*SPECTRUM, "--seed", str(2**63)], "seed must lie"),
    "a study with a seed below zero": (["study", *TINY, "--seed", "-1", "--out", "out"], "seed must lie"),
    "a study with too large a seed": (["study", *TINY, "--seed", str(10**30), "--out", "out"], "seed must lie"),
    "pairs that are no number": (replaced("-k", "ten"), "ten"),
    "an unknown output": ([*SPECTRUM, "--outputs", "some"], "some"),
    "an output too many": ([*SPECTRUM, "--outputs", "2"], "outputs=2"),
    "an unknown parameter": ([*SPECTRUM, "--params", "7.weight"], "7.weight"),
    "an unknown device": ([*SPECTRUM, "--device", "abacus"], "abacus"),
    "an unknown solver": ([*SPECTRUM, "--solver", "magic"], "magic"),
    "a tolerance below zero": ([*SPECTRUM, "--rtol", "-1"], "rtol"),
    "a budget that is no number": ([*SPECTRUM, "--memory-budget", "lots"], "lots"),
    "a folder that is in use": (replaced("--out", "full"), "full"),
    "a missing option": (SPECTRUM[:-2], "--out"),
    "an unknown command": (["spectre"], "spectre"),
    "no command": ([], "COMMAND"),
    "an unknown preset": (["study", "--preset", "demmo", "--out", "out"], "demmo"),
    "no such configuration": (["study", "--config", "none.toml", "--out", "out"], "none.toml"),
    "an unknown key": (["study", "--config", "unknown.toml", "--out", "out"], "stepz.*steps"),
    "a key of the wrong type": (["study", "--config", "type.toml", "--out", "out"], "steps"),
    "a file that is not TOML": (["study", "--config", "syntax.toml", "--out", "out"], "syntax.toml"),
    "a flag of the wrong type": (["study", "--steps", "many", "--out", "out"], "many"),
    "a setting out of range": (["study", "--lr", "-1", "--out", "out"], "lr"),
    "no such picture": (["study", "--image", "none.png", "--out", "out"], "none.png"),
    "a study in a used folder": (["study", *TINY, "--out", "full"], "full"),
    "a study in a file": (["study", *TINY, "--out", "mynet.py"], "mynet.py"),
    "a report of nothing": (["report", "nowhere"], "nowhere"),
    "a report of something else": (["report", "full"], "not the folder of a study"),
    "explaining no columns": (["explain", "--model", "mynet:build", "--data", "x.npy", "-k", "0"], "-k"),
    "explaining no noise": (["explain", "--model", "mynet:build", "--data", "x.npy", "--noise", "0"], "noise"),
    "explaining a tolerance of no solve": (
        ["explain", "--model", "mynet:build", "--data", "x.npy", "--rtol", "0.1"],
        "--noise",
    ),
    "explaining no pairs": (["explain", "--model", "mynet:build", "--data", "x.npy", "--pairs", "0"], "eigenpairs"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_exit_code_two_and_leaves_nothing_behind(case, workplace, capsys):
    arguments, expected = WRONG[case]
    before = listing(workplace)
    try:
        code = main(arguments)
    except SystemExit as exit_:  # argparse leaves by itself
        code = exit_.code
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert "error: " in err
    assert re.search(expected, err), err
    for word in ("\x1b", "weights_only", "allow_pickle", "Traceback"):
        assert word not in err
    assert not re.search(r"\b[A-Z]\w*Error\b", err), err
    assert listing(workplace) == before


def run_process(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ntk_lazy.cli", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=120)


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


@pytest.mark.slow
def test_a_study_writes_its_report_and_its_command_resumes_it(workplace, monkeypatch, capsys):
    assert main(["study", *TINY, "--out", "out"]) == 0
    out = capsys.readouterr().out
    assert "report: out/report.html" in out
    assert out.count("step ") >= 4
    assert "C11" in out
    records = (workplace / "out" / "spectrum.jsonl").read_bytes()
    (workplace / "out" / "report.html").unlink()
    assert main(["report", "out"]) == 0
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
