"""Where the commands are run."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import trained
from safetensors.torch import save_file

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

def ends():
    raise SystemExit(0)

def ends_late():
    return Ending()

class Ending(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls > 1:
            raise SystemExit
        return self.layer(x)

class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)

answer = 42
"""


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
    np.save("labels.npy", np.arange(30) % 2)
    (tmp_path / "quits.py").write_text("import sys; sys.exit('no')")
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
    for name in ("mynet", "quits"):
        sys.modules.pop(name, None)
