"""Lazy equals dense on every module of the zoo, and what must be refused is refused by name."""

from __future__ import annotations

import pytest
import torch
from case import Case
from oracle import defect, dense_jacobian, dense_kernel
from torch import Generator
from zoo import REFUSED, RIGHT
from zoo_kernels import N, checked, columns, jacobian, kernel, make

import ntk_lazy as nl

SIZES = (1, 5, 17)
CHUNKS = (1, 4)
right = pytest.mark.parametrize("case", RIGHT, ids=str)


def num_outputs(case: Case) -> int:
    """Count the outputs of one example."""
    return jacobian(case, 1).shape[0]


@right
@pytest.mark.parametrize("n", SIZES)
def test_products_equal_those_of_the_dense_kernel(case: Case, n: int):
    J = jacobian(case, n)
    # One example is checked by itself; more are checked by the same four.
    K = make(case, 1) if n == 1 else checked(case).at(case.inputs(n))
    assert K.shape == (J.shape[0], J.shape[0])
    assert K.num_params == J.shape[1]
    for k in (1, 3):
        V = columns(K.shape[-1], k, K.dtype)
        assert defect(K @ V, J @ (J.mT @ V.double())) < case.tolerance


@right
@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_every_chunking_gives_the_same_product(case: Case, chunk_size: int):
    J = jacobian(case)
    K = kernel(case, chunk_size=chunk_size)
    V = columns(K.shape[-1], 4, K.dtype)
    assert defect(K @ V, J @ (J.mT @ V.double())) < case.tolerance


@right
def test_factors_multiply_like_the_jacobian(case: Case):
    J = jacobian(case)
    K = kernel(case, chunk_size=2)
    V = columns(K.shape[-1], 3, K.dtype)
    W = torch.randn(J.shape[1], 3, generator=Generator().manual_seed(0), dtype=torch.float64).to(K.dtype)
    assert defect(K.jacobian_rmatmul(V), J.mT @ V.double()) < case.tolerance
    assert defect(K.jacobian_matmul(W), J @ W.double()) < case.tolerance
    assert defect(K.half_gram(V), V.double().mT @ J @ J.mT @ V.double()) < case.tolerance


@right
def test_diagonal_dense_and_entries_equal_those_of_the_dense_kernel(case: Case):
    J = jacobian(case)
    dense = J @ J.mT
    K = kernel(case, chunk_size=2)
    n = dense.shape[0]
    assert defect(K.diagonal(), dense.diagonal()) < case.tolerance
    assert defect(K.to_dense(), dense) < case.tolerance
    rows = torch.tensor([0, n - 1, n // 2, 0])
    cols = torch.tensor([n - 1, 0, n // 2, 1])
    scale = dense.abs().max()
    assert defect(K[rows, cols], dense[rows, cols]) < case.tolerance * float(scale / dense[rows, cols].abs().max())
    assert defect(K[rows].to_dense(), dense[rows]) < case.tolerance
    assert defect(K[1:, :-1].to_dense(), dense[1:, :-1]) < case.tolerance
    assert defect(
        K[::2, ::2] @ torch.ones(len(range(0, n, 2)), 1, dtype=K.dtype), dense[::2, ::2].sum(1, keepdim=True)
    ) < (case.tolerance)


@right
@pytest.mark.parametrize("outputs", ["trace", "sum", -1])
def test_every_output_mode_equals_its_dense_formula(case: Case, outputs: str | int):
    J = jacobian(case)
    dense = dense_kernel(J, J, num_outputs(case), outputs)
    K = kernel(case, chunk_size=2, outputs=outputs)
    V = columns(K.shape[-1], 2, K.dtype)
    assert K.shape == (N, N)
    assert defect(K @ V, dense @ V.double()) < case.tolerance
    assert defect(K.diagonal(), dense.diagonal()) < case.tolerance
    assert defect(K.to_dense(), dense) < case.tolerance


@right
def test_rectangular_kernels_and_kernels_at_other_points_equal_the_dense_ones(case: Case):
    J1, J2 = jacobian(case), jacobian(case, 3, seed=1)
    others = case.inputs(3, seed=1)
    K = kernel(case, chunk_size=2).at(case.inputs(N), others)
    V = columns(K.shape[-1], 2, K.dtype)
    assert defect(K @ V, J1 @ (J2.mT @ V.double())) < case.tolerance
    assert defect(K.mT.to_dense(), J2 @ J1.mT) < case.tolerance
    assert defect(kernel(case, chunk_size=2).at(others).to_dense(), J2 @ J2.mT) < case.tolerance


@pytest.mark.parametrize("case", REFUSED, ids=str)
@pytest.mark.parametrize("n", [2, 5])
def test_what_has_no_kernel_is_refused_with_its_name_and_a_cure(case: Case, n: int):
    with pytest.raises(case.error) as refusal:
        make(case, n)
    message = str(refusal.value)
    for word in case.says:
        assert word in message
    assert len(message) > 40  # a sentence and a cure, not a code


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("batch norm, train", "eval()"),
        ("batch norm of images, train", "eval()"),
        ("batch norm, untracked", "track_running_stats"),
        ("dropout, train", "eval()"),
    ],
)
def test_one_example_is_enough_to_refuse_a_module_that_is_known(name: str, cure: str):
    (case,) = [case for case in REFUSED if case.name == name]
    with pytest.raises(case.error) as refusal:
        make(case, 1)
    assert cure in str(refusal.value)


def test_equal_examples_do_not_hide_what_couples_them():
    (case,) = [case for case in REFUSED if case.name == "batch mean"]
    x = case.inputs(1).expand(4, -1).clone()
    with pytest.raises(nl.UnsupportedModuleError, match="batch"):
        nl.ntk(case.module(), x)


def test_padding_is_left_out_of_the_kernel_even_if_the_first_examples_have_none():
    (case,) = [case for case in RIGHT if case.name == "embedding, padding_idx"]
    module, x = case.module(), case.inputs(8)
    x[:4, 0] = 3
    J = dense_jacobian(module, x)
    V = torch.randn(J.shape[0], 2, generator=Generator().manual_seed(0), dtype=torch.float64)
    assert defect(nl.ntk(module, x) @ V, J @ (J.mT @ V)) < case.tolerance


@pytest.mark.gpu
@right
def test_products_on_a_gpu_equal_those_of_the_dense_kernel(case: Case):
    J = jacobian(case)
    params = None if case.params is None else list(case.params)
    K = nl.ntk(case.module().cuda(), case.inputs(N).cuda(), params=params, output_fn=case.output_fn, chunk_size=2)
    V = columns(K.shape[-1], 3, K.dtype)
    dense = J @ J.mT
    assert defect((K @ V.cuda()).cpu(), dense @ V.double()) < case.tolerance
    assert defect(K.diagonal().cpu(), dense.diagonal()) < case.tolerance
