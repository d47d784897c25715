"""Results survive a file, say what they are, and bound their errors."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from eigen_cases import Spectrum, Spy, hard_spectra, spectrum

from ntk_lazy.eigen import LOBPCG, Dense, EigenResult, Lanczos, Solver, eigsh
from ntk_lazy.eigen.bounds import error_bounds
from ntk_lazy.errors import ArgumentError

N, K = 150, 10
A = spectrum("power 1.5", lambda i: i**-1.5, N).matrix()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_saved_result_comes_back_whole(dtype: torch.dtype, tmp_path: Path) -> None:
    pairs = eigsh(A.to(dtype), K, solver=Lanczos(), verify="rigorous")
    pairs.save(tmp_path / "pairs.safetensors")
    back = EigenResult.load(tmp_path / "pairs.safetensors")
    for name in ("values", "vectors", "residual_norms", "converged"):
        assert torch.equal(getattr(pairs, name), getattr(back, name))
    assert torch.equal(pairs.bounds.angle, back.bounds.angle)
    assert torch.equal(pairs.bounds.value, back.bounds.value)
    assert pairs.bounds.space_angle == back.bounds.space_angle
    for name in ("status", "noise_floor", "norm", "completeness", "cost", "method", "rtol", "seed"):
        assert getattr(pairs, name) == getattr(back, name)
    assert str(pairs) == str(back)
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.safetensors"]


def test_a_result_without_pairs_can_be_saved(tmp_path: Path) -> None:
    empty = eigsh(A, K, solver=Dense(), max_products=3, on_unconverged="return")
    empty.save(tmp_path / "empty.safetensors")
    back = EigenResult.load(tmp_path / "empty.safetensors")
    assert back.vectors.shape == (N, 0)
    assert "no eigenpairs" in str(back)


def test_files_that_hold_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "pairs.safetensors"
    eigsh(A, K).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArgumentError, match="truncated"):
        EigenResult.load(path)
    header = json.dumps({"__metadata__": {"format": "pt"}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ArgumentError, match="does not hold eigenpairs"):
        EigenResult.load(path)
    with pytest.raises(FileNotFoundError):
        EigenResult.load(tmp_path / "nowhere")


def test_a_failed_save_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "pairs").mkdir()
    with pytest.raises(OSError, match="pairs"):
        eigsh(A, K).save(tmp_path / "pairs")
    assert [path.name for path in tmp_path.iterdir()] == ["pairs"]


@pytest.mark.parametrize("place", ["nowhere", "file"])
def test_a_save_into_no_folder_names_it(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError, match=rf"no such folder: .*{place}\. Make it"):
        eigsh(A, K).save(tmp_path / place / "pairs.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_words_of_a_result_name_what_matters() -> None:
    text = str(eigsh(A, K, solver=Lanczos(block_size=8)))
    for word in ("10 eigenpairs", "converged", "noise floor", "fast probe", "products", "block_size=8"):
        assert word in text
    assert "certain" in str(eigsh(A, K, solver=Dense()))
    assert "not checked" in str(eigsh(A, K, solver=Lanczos(), verify=False))


@pytest.mark.parametrize("solver", [Lanczos(block_size=4), LOBPCG(num_guards=2)], ids=repr)
@pytest.mark.parametrize("spectrum", hard_spectra(N), ids=str)
@pytest.mark.parametrize("rtol", [1e-1, 1e-3])
def test_bounds_hold(spectrum: Spectrum, solver: Solver, rtol: float) -> None:
    B = spectrum.matrix()
    pairs = eigsh(Spy(B), K, solver=solver, rtol=rtol)
    exact, U = torch.linalg.eigh(B)
    exact, U = exact.flip(0), U.flip(1)
    rounding = 100 * torch.finfo(torch.float64).eps * float(exact.abs().max())

    nearest = (pairs.values[:, None] - exact).abs().amin(dim=1)
    assert bool((nearest <= pairs.bounds.value + rounding).all())
    matched = (pairs.values - exact[:K]).abs()
    if float(matched.max()) > pairs.bounds.residual_norm + rounding:
        pytest.fail("values do not match one to one within the norm of all residuals")

    # An angle of less than one speaks of the eigenvalues that the residual of the pair cannot tell apart.
    for i in range(K):
        if pairs.bounds.angle[i] >= 1:
            continue
        near = (exact - pairs.values[i]).abs() <= cluster_radius(pairs, i) + rounding
        outside = pairs.vectors[:, i] - U[:, near] @ (U[:, near].mT @ pairs.vectors[:, i])
        assert float(outside.norm()) <= float(pairs.bounds.angle[i]) + 1e-7
    if pairs.bounds.space_angle < 1:
        sine = float(torch.linalg.matrix_norm(pairs.vectors - U[:, :K] @ (U[:, :K].mT @ pairs.vectors), 2))
        assert sine <= pairs.bounds.space_angle + 1e-7


def cluster_radius(pairs: EigenResult, i: int) -> float:
    """Reach from a value over its cluster: all values connected to it by overlapping intervals."""
    low = pairs.values - pairs.bounds.residual_norm
    high = pairs.values + pairs.bounds.residual_norm
    members = {i}
    while True:
        more = {j for j in range(K) for m in members if low[j] <= high[m] and low[m] <= high[j]}
        if more <= members:
            break
        members |= more
    reach = max(abs(float(pairs.values[j] - pairs.values[i])) for j in members)
    return reach + pairs.bounds.residual_norm


@pytest.mark.parametrize("solver", [Lanczos(), LOBPCG(), Dense()], ids=repr)
@pytest.mark.parametrize("spectrum", hard_spectra(N), ids=str)
def test_bounds_hold_to_rounding_where_residuals_are_rounding(spectrum: Spectrum, solver: Solver) -> None:
    B = spectrum.matrix()
    pairs = eigsh(Spy(B), K, solver=solver, rtol=1e-9, on_unconverged="return")
    exact = torch.tensor(sorted(np.linalg.eigvalsh(B.numpy()), reverse=True)[:K], dtype=torch.float64)
    assert bool(((pairs.values - exact).abs() <= pairs.bounds.value).all())
    if pairs.status == "converged":
        assert float(pairs.bounds.value.max()) <= 1e-9 * pairs.norm


def test_a_gap_sharpens_the_bound_of_a_value() -> None:
    values = torch.tensor([1.0, 0.5], dtype=torch.float64)
    residuals = torch.tensor([1e-3, 1e-3], dtype=torch.float64)
    bounds = error_bounds(values, residuals, next_value=0.1, noise=0.0)
    gaps = torch.tensor([1 - 0.501, 0.4], dtype=torch.float64)
    assert torch.allclose(bounds.value, 1e-6 / gaps)
    assert torch.allclose(bounds.angle, 1e-3 / gaps)
    unknown = error_bounds(values, residuals, next_value=float("inf"), noise=0.0)
    assert unknown.space_angle == 1
    assert float(unknown.value[1]) == 1e-3


def test_a_cluster_has_one_angle() -> None:
    values = torch.tensor([1.0, 0.9995, 0.2], dtype=torch.float64)
    residuals = torch.full((3,), 1e-3, dtype=torch.float64)
    bounds = error_bounds(values, residuals, next_value=0.1, noise=0.0)
    assert float(bounds.angle[0]) == float(bounds.angle[1]) == pytest.approx(2**0.5 * 1e-3 / (0.9995 - 0.201))
    assert float(bounds.value[0]) == 1e-3


def test_the_unexplained_share_is_bounded_from_above() -> None:
    pairs = eigsh(A, K, solver=Lanczos())
    trace = float(A.trace())
    best = 1 - float(torch.linalg.eigvalsh(A)[-K:].sum()) / trace
    assert best <= pairs.bounds.unexplained(pairs.values, trace) <= best + 1e-6
