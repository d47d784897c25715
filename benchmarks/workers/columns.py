"""Products with the operator that a search takes, here and in PRIMME, on the spectra of the tests."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "eigen"))
from eigen_cases import Spy, study_spectra

import ntk_lazy as nl

_RTOL = 1e-3


def count(python: str | None, *, n: int = 1000, k: int = 100) -> Iterator[dict[str, Any]]:
    """Count on each spectrum; PRIMME by the interpreter of its environment, told what no user knows."""
    for spectrum in study_spectra(n):
        A = spectrum.matrix()
        pairs = nl.eigsh(Spy(A), k, solver=nl.Lanczos(block_size=16), rtol=_RTOL)
        exact = torch.linalg.eigvalsh(A).flip(0)[:k]
        assert float(((pairs.values - exact) / exact).abs().max()) < _RTOL, "a wrong set"
        row = {"spectrum": spectrum.name, "search": pairs.cost.search_columns, "all": pairs.cost.columns}
        if python is not None:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "matrix.npy"
                np.save(path, A.numpy())
                worker = [python, str(Path(__file__).parent / "with_primme.py")]
                tol = _RTOL * float(exact[-1] / exact[0])
                done = subprocess.run([*worker, path, str(k), str(tol)], capture_output=True, text=True, check=True)
            row |= json.loads(done.stdout.splitlines()[-1])
        print(row, flush=True)
        yield row
