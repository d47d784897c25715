"""Command lines that tests run, on the files of the ``workplace``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

TINY = ["--preset", "analytic", "--num-points", "80", "--num-test-points", "20", "--num-layers", "2", "--width", "8"]
TINY += ["--steps", "20", "--halvings", "10", "--num-pairs", "10", "--num-pictures", "1", "--snapshots", "9"]
SPECTRUM = ["spectrum", "--model", "mynet:build", "--data", "x.npy", "-k", "5", "--out", "out"]


def replaced(option: str, value: str) -> list[str]:
    arguments = list(SPECTRUM)
    arguments[arguments.index(option) + 1] = value
    return arguments


def run_process(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ntk_lazy.cli", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=120)


def trained() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))


def data(name: str) -> Tensor:
    return torch.from_numpy(np.load(name))


def listing(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if "__pycache__" not in p.parts}
