"""Both routes of the matrix product round like float32, on every layout that engines pass."""

import pytest
import torch

from ntk_lazy.engines.rates import _measured
from ntk_lazy.gemm import _fastest, add_gram_, by_blas, by_onednn, times_transposed
from ntk_lazy.precision import ieee_precision

SHAPES = [
    (1, 1, 1),
    (300, 256, 70),
    (1024, 3, 500),
    (1, 4096, 300),
    (700, 512, 1),
    (129, 1025, 33),
    (2000, 700, 11),
    (11, 700, 2000),
]


def bound(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    """Rounding of a float32 sum of i terms, in whatever order."""
    return (A.shape[1] + 2) ** 0.5 * 2 * torch.finfo(A.dtype).eps * (A.double().abs() @ B.double().abs().mT)


@pytest.mark.parametrize("route", [by_blas, by_onednn])
@pytest.mark.parametrize("layout", ["plain", "turned", "sliced"])
@pytest.mark.parametrize(("m", "i", "n"), SHAPES)
def test_routes_agree_with_float64(route, layout, m, i, n):
    if route is by_onednn and not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    A, B = torch.randn(m, i), torch.randn(n, i)
    if layout == "turned":
        A, B = A.mT.contiguous().mT, B.mT.contiguous().mT
    elif layout == "sliced":
        A, B = torch.randn(2 * m, i + 3)[::2, 3:], torch.randn(n, 2 * i)[:, ::2]
    with torch.no_grad(), ieee_precision():
        found = route(A, B)
    assert ((found - A.double() @ B.double().mT).abs() <= bound(A, B)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "i", "n"), [*SHAPES, (0, 4, 5), (5, 0, 4), (2000, 300, 300)])
def test_products_and_sums_agree_with_float64(dtype, m, i, n):
    A, B = torch.randn(m, i, dtype=dtype), torch.randn(n, i, dtype=dtype)
    with torch.no_grad():
        found = times_transposed(A, B)
        W, D = torch.randn(n, i, dtype=dtype), torch.randn(m, n, dtype=dtype)
        total = W.clone()
        add_gram_(total, D, A)
    assert found.dtype == dtype
    assert ((found - A.double() @ B.double().mT).abs() <= bound(A, B)).all()
    allowed = bound(D.mT, A.mT) + 2 * torch.finfo(dtype).eps * W.abs()
    assert ((total - W - D.double().mT @ A.double()).abs() <= 2 * allowed).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_of_batches_are_those_of_their_matrices(dtype):
    A, B = torch.randn(3, 200, 90, dtype=dtype), torch.randn(3, 70, 90, dtype=dtype)
    for found, one, two in zip(times_transposed(A, B), A, B, strict=True):
        assert ((found - one.double() @ two.double().mT).abs() <= bound(one, two)).all()
    for found, one in zip(times_transposed(A, B[0]), A, strict=True):  # one matrix for all of a batch
        assert ((found - one.double() @ B[0].double().mT).abs() <= bound(one, B[0])).all()


# Taken when this file is read, before any test is given a machine.
def test_the_machine_that_is_there_is_measured_once():
    for shape in ((True, True), (True, False), (False, True), (False, False)):
        assert _fastest(*shape, torch.get_num_threads()) in (by_blas, by_onednn)
    for dtype in (torch.float32, torch.float64):
        found = _measured("cpu", dtype, torch.get_num_threads())
        assert found.flops > 0
        assert found.bytes > 0
        assert _measured("cpu", dtype, torch.get_num_threads()) is found
