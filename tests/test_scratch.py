"""What does not fit the budget is kept in files, changes no result, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracle import defect, dense_jacobian
from torch import Generator, Tensor, nn

import ntk_lazy as nl
from ntk_lazy.engines.factor_store import FactorStore
from ntk_lazy.engines.scratch import Scratch

N = 120


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.Tanh(), nn.Conv2d(8, 8, 3, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(128, 2)
    ).double()


def inputs(n: int = N) -> Tensor:
    return torch.randn(n, 2, 8, 8, generator=Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of what is put into files."""
    shapes = []
    empty = Scratch.empty

    def spy(self: Scratch, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        shapes.append(shape)
        return empty(self, shape, dtype)

    monkeypatch.setattr(Scratch, "empty", spy)
    return shapes


@pytest.mark.parametrize("engine", ["factors", "gram"])
def test_products_from_files_are_those_from_memory(tmp_path: Path, kept: list, engine: str):
    model, x, others = network(), inputs(), inputs(7)
    J, J2 = dense_jacobian(model, x), dense_jacobian(model, others)
    # Too little for the factors of all examples, and for K: 460 kB.
    options = {"engine": engine, "memory_budget": 800_000, "max_dense_bytes": 10**6}
    K = nl.ntk(model, x, scratch=tmp_path, **options)
    V = torch.randn(2 * N, 3, dtype=torch.float64)
    expected = J @ (J.mT @ V)
    assert defect(K @ V, expected) < 1e-12
    with K.linearised(100):
        assert defect(K @ V, expected) < 1e-12
        count = len(kept)
        assert count > 0
        assert defect(K @ V[:, :1], expected[:, :1]) < 1e-12
        assert defect(K.half_gram(V), V.mT @ expected) < 1e-12
        assert engine != "gram" or (2 * N, 2 * N) in kept
        if engine == "gram":
            assert len(kept) == count  # K is there
        assert not list(tmp_path.iterdir())  # without a name from the start
    assert defect(K.to_dense(), J @ J.mT) < 1e-12
    rectangular = nl.ntk(model, x, others, scratch=tmp_path, **options)
    assert defect(rectangular @ V[:14], J @ (J2.mT @ V[:14])) < 1e-12


def test_factors_in_files_are_captured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    captured = []
    capture = FactorStore.capture

    def spy(self: FactorStore, x: Tensor, **options: object):
        captured.append(x.shape[0])
        return capture(self, x, **options)

    monkeypatch.setattr(FactorStore, "capture", spy)
    x, V = inputs(), torch.randn(2 * N, 3, dtype=torch.float64)
    for scratch, expected in ((None, 4), (tmp_path, 1)):
        captured.clear()
        K = nl.ntk(network(), x, engine="factors", memory_budget=800_000, scratch=scratch)
        with K.linearised(6):
            _ = K @ V, K @ V
        assert len(captured) == expected


def test_what_fits_the_budget_stays_in_memory(tmp_path: Path, kept: list):
    K = nl.ntk(network(), inputs(), engine="factors", scratch=tmp_path)
    _ = K @ torch.ones(2 * N, 1, dtype=torch.float64)
    assert not kept


def test_the_plan_says_what_is_in_files(tmp_path: Path):
    K = nl.ntk(network(), inputs(), memory_budget=800_000, max_dense_bytes=10**6, scratch=tmp_path)
    how = {way.engine: way.how for way in K.explain(8, 20).alternatives}
    assert "scratch" in how["factors"]
    assert "scratch" in how["gram"]


def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    K = nl.ntk(network(), inputs(), engine="factors", memory_budget=800_000, scratch=tmp_path)
    with pytest.raises(nl.BudgetError, match="do not fit the scratch folder"):
        _ = K @ torch.ones(2 * N, 1, dtype=torch.float64)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(nl.ArgumentError, match="not a folder that can be written to"):
        nl.ntk(network(), inputs(), scratch=tmp_path / "missing")
    with pytest.raises(nl.ArgumentError, match="for products on the CPU"):
        Scratch.at(tmp_path, torch.device("cuda"))
