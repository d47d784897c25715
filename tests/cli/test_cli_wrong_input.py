"""Wrong input is one line and exit code 2, with nothing half-written."""

from __future__ import annotations

import re

import pytest
from commands import SPECTRUM, TINY, listing, replaced

from ntk_lazy.cli import main

LONG = "x" * 300  # no file system takes it

WRONG = {
    "data of too long a name": (replaced("--data", LONG), "--data: cannot read x+: .*too long"),
    "a target of too long a name": ([*SPECTRUM, "--target", LONG], "--target: cannot read x+: .*too long"),
    "weights of too long a name": ([*SPECTRUM, "--weights", LONG], "--weights: cannot read x+: .*too long"),
    "a folder of too long a name": (replaced("--out", LONG), "cannot write to x+: .*too long"),
    "a folder in one of too long a name": (replaced("--out", f"{LONG}/out"), "cannot write to x+/out: .*too long"),
    "a study of too long a name": (["study", *TINY, "--out", LONG], "cannot use the folder x+: .*too long"),
    "a report of too long a name": (["report", LONG], "cannot read x+"),
    "a configuration of too long a name": (["study", "--config", LONG, "--out", "out"], "cannot read .*too long"),
    "a picture of too long a name": (["study", "--image", LONG, "--out", "out"], "no picture"),
    "a folder in a file": (replaced("--out", "x.npy/out"), "cannot write to x.npy/out: .*Not a directory"),
    "a module that ends the process": (
        replaced("--model", "quits:build"),
        r"'quits': .*sys.exit\('no'\)",
    ),
    "a factory that ends the process": (replaced("--model", "mynet:ends"), r"mynet:ends\(\) failed: .*sys.exit\(0\)"),
    "labels of classes for a target": ([*SPECTRUM, "--target", "labels.npy"], r"labels of classes.*numpy.eye\(C\)"),
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
