"""Every way of indexing the kernel gives what it gives on the dense matrix, lazily where that is a matrix."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ntk_lazy as nl

N, C = 7, 2
MASK = torch.tensor([True, False, True, True, False] * 3)[: N * C]
INDICES = {
    "int": 3,
    "negative int": -2,
    "numpy int": np.int64(5),
    "0-dim tensor": torch.tensor(4),
    "slice": slice(2, 9),
    "all": slice(None),
    "strided slice": slice(1, None, 3),
    "backward slice": slice(10, 2, -2),
    "reverse": slice(None, None, -1),
    "empty slice": slice(5, 5),
    "empty backward slice": slice(2, 5, -1),
    "slice past the end": slice(10, 99),
    "tensor": torch.tensor([5, 0, 13, 5]),
    "negative tensor": torch.tensor([-1, 2, -14]),
    "int32 tensor": torch.tensor([1, 2], dtype=torch.int32),
    "empty tensor": torch.empty(0, dtype=torch.long),
    "list": [3, 1],
    "range": range(2, 11, 4),
    "array": np.array([0, 6, 6]),
    "mask": MASK,
    "list mask": MASK.tolist(),
    "array mask": MASK.numpy(),
    "no row": torch.zeros(N * C, dtype=torch.bool),
}


@pytest.fixture(scope="module")
def kernel() -> nl.NTKLinearOperator:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, C)).double()
    return nl.ntk(net, torch.randn(N, 3, dtype=torch.float64)).detach()


@pytest.fixture(scope="module")
def dense(kernel) -> Tensor:
    return kernel.to_dense()


def _read(dense: Tensor, *index) -> Tensor:
    """What numpy reads, which has slices that run backward."""
    plain = [i.numpy() if isinstance(i, Tensor) else np.asarray(i) if isinstance(i, range | list) else i for i in index]
    return torch.from_numpy(np.array(dense.numpy()[tuple(plain)]))


def _same(lazy, expected: Tensor) -> None:
    found = lazy if isinstance(lazy, Tensor) else lazy.to_dense()
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, rtol=0, atol=1e-12 * N * C)


@pytest.mark.parametrize("name", INDICES)
def test_rows_and_columns_are_those_of_the_dense_kernel(kernel, dense, name):
    index = INDICES[name]
    expected = _read(dense, index)
    _same(kernel[index], expected)
    _same(kernel[..., index], _read(dense, ..., index))
    if expected.ndim == 2:
        assert isinstance(kernel[index], nl.NTKLinearOperator)
        V = torch.randn(N * C, 3, dtype=torch.float64)
        _same(kernel[index] @ V, expected @ V)


@pytest.mark.parametrize(("rows", "columns"), list(itertools.product(INDICES, INDICES)))
def test_two_indices_are_read_as_numpy_reads_them(kernel, dense, rows, columns):
    left, right = INDICES[rows], INDICES[columns]
    try:
        expected = _read(dense, left, right)
    except IndexError:
        with pytest.raises((IndexError, RuntimeError)):
            kernel[left, right]
    else:
        _same(kernel[left, right], expected)


@pytest.mark.parametrize("first", ["slice", "tensor", "mask", "strided slice", "backward slice"])
@pytest.mark.parametrize("second", ["int", "slice", "list", "reverse"])
def test_indices_compose(kernel, dense, first, second):
    once, twice = (
        INDICES[first],
        {"int": 1, "slice": slice(1, 3), "list": [1, 0], "reverse": slice(None, None, -1)}[second],
    )
    _same(kernel[once][twice], _read(_read(dense, once), twice))


def test_a_principal_part_stays_symmetric(kernel, dense):
    for index in (torch.tensor([4, 1, 9]), MASK, slice(2, 8)):
        part = kernel[index][:, index]
        assert part.is_symmetric
        assert nl.eigsh(part, 2).values[0] == pytest.approx(float(torch.linalg.eigvalsh(dense[index][:, index])[-1]))


def test_a_mask_of_the_whole_kernel_lists_its_entries(kernel, dense):
    mask = torch.rand(N * C, N * C, generator=torch.Generator().manual_seed(0)) > 0.7
    _same(kernel[mask], dense[mask])


@pytest.mark.parametrize(
    "index",
    [14, -15, torch.tensor([0, 14]), MASK[:5], (0, 0, 0), None, True, 1.5, "row", torch.tensor([0.5]), (..., ...)],
    ids=str,
)
def test_an_index_that_means_nothing_is_an_index_error(kernel, index):
    with pytest.raises(IndexError):
        kernel[index]
