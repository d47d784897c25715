"""Operators and arguments that nothing good can come of are refused by name; errors of the user arrive as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from check_solution import check_solution
from eigen_cases import Spy, haar, spectrum
from linear_operator.operators import DenseLinearOperator, MatmulLinearOperator
from torch import Tensor

from ntk_lazy.eigen import LOBPCG, Dense, EigenResult, Lanczos, Solver, eigsh
from ntk_lazy.errors import ArgumentError, NonFiniteError, NotConvergedError, ShapeError

N, K = 300, 6
A = spectrum("power 1.5", lambda i: i**-1.5, N).matrix()
SOLVERS = [Lanczos(block_size=8), LOBPCG(), Dense(block_size=50)]


def spoil(entry: float, at_call: int) -> Callable[[int, Tensor, Tensor], Tensor]:
    def tamper(call: int, V: Tensor, image: Tensor) -> Tensor:
        if call == at_call:
            image[17, 0] = entry
        return image

    return tamper


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("entry", [float("nan"), float("inf")])
def test_a_product_that_is_not_finite_is_named_with_its_call(entry: float, solver: Solver) -> None:
    with pytest.raises(NonFiniteError, match="block call 3"):
        eigsh(Spy(A, tamper=spoil(entry, 3)), K, solver=solver)


@pytest.mark.parametrize("entry", [float("nan"), float("-inf")])
def test_a_matrix_that_is_not_finite_is_refused_before_a_product(entry: float) -> None:
    B = A.clone()
    B[3, 4] = B[4, 3] = entry
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        eigsh(B, K)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_nonsymmetric_operator_is_refused(dtype: torch.dtype, solver: Solver) -> None:
    skewed = (A + 1e-3 * haar(N, seed=3)).to(dtype)
    with pytest.raises(ArgumentError, match="not symmetric"):
        eigsh(Spy(skewed), K, solver=solver)
    with pytest.raises(ArgumentError, match="not symmetric"):
        eigsh(skewed, K, solver=solver)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_an_operator_that_changes_between_calls_is_refused(solver: Solver) -> None:
    generator = torch.Generator().manual_seed(0)

    def dropout(call: int, V: Tensor, image: Tensor) -> Tensor:
        keep = (torch.rand(N, 1, generator=generator, dtype=V.dtype) > 0.1).to(V.dtype)
        return keep * (A @ (keep * V))

    with pytest.raises(ArgumentError, match=r"not deterministic|not symmetric"):
        eigsh(Spy(A, tamper=dropout), K, solver=solver)


@pytest.mark.parametrize(
    "answer",
    [
        lambda call, V, image: image[:-1],
        lambda call, V, image: image[:, :1],
        lambda call, V, image: image.float(),
        lambda call, V, image: image.numpy(),
        lambda call, V, image: None,
    ],
    ids=["fewer rows", "one column", "another dtype", "an array", "nothing"],
)
def test_a_product_of_another_kind_is_refused(answer: Callable[[int, Tensor, Tensor], object]) -> None:
    with pytest.raises(ShapeError, match="product"):
        eigsh(Spy(A, tamper=answer), K)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_an_operator_may_overwrite_its_input_and_return_its_own_memory(solver: Solver) -> None:
    kept: dict[int, Tensor] = {}

    def reckless(call: int, V: Tensor, image: Tensor) -> Tensor:
        V.fill_(float("nan"))
        own = kept.setdefault(image.shape[1], torch.empty_like(image))
        return own.copy_(image)

    check_solution(eigsh(Spy(A, tamper=reckless), K, solver=solver), A, K)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_the_identity_may_return_its_input(solver: Solver) -> None:
    identity = torch.eye(N, dtype=torch.float64)
    check_solution(eigsh(Spy(identity, tamper=lambda call, V, image: V), K, solver=solver), identity, K)


@pytest.mark.parametrize("error", [ZeroDivisionError("mine"), KeyboardInterrupt()], ids=repr)
def test_an_error_of_the_operator_arrives_as_it_is(error: BaseException) -> None:
    def fail(call: int, V: Tensor, image: Tensor) -> Tensor:
        if call == 3:
            raise error
        return image

    with pytest.raises(type(error)) as caught:
        eigsh(Spy(A, tamper=fail), K, solver=Lanczos())
    assert caught.value is error


@pytest.mark.parametrize(
    ("B", "error", "message"),
    [
        (torch.zeros(4, 5), ShapeError, "square"),
        (torch.zeros(2, 4, 4), ShapeError, "batch"),
        (torch.zeros(4), ShapeError, "square"),
        (torch.zeros(0, 0), ShapeError, "no rows"),
        (torch.eye(4, dtype=torch.int64), ShapeError, "dtype"),
        (torch.eye(4, dtype=torch.float16), ShapeError, "dtype"),
        (torch.eye(4, dtype=torch.complex64), ShapeError, "dtype"),
        (MatmulLinearOperator(torch.ones(4, 2), torch.ones(2, 5)), ShapeError, "square"),
        (DenseLinearOperator(torch.zeros(2, 4, 4)), ShapeError, "batch"),
        ([[1.0]], ArgumentError, "list"),
    ],
    ids=lambda value: None,
)
def test_what_is_no_symmetric_matrix_is_refused(B: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        eigsh(B, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"k": N + 1}, f"1 to {N}"),
        ({"k": 2.0}, "k is 2.0"),
        ({"k": True}, "k is True"),
        ({"rtol": 0.0}, "rtol"),
        ({"rtol": 1.0}, "rtol"),
        ({"rtol": float("nan")}, "rtol"),
        ({"rtol": "a"}, "rtol is 'a'"),
        ({"rtol": None}, "rtol is None"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"seed": None}, "seed is None"),
        ({"progress": "x"}, "progress is 'x'"),
        ({"progress": None}, "progress is None"),
        ({"max_products": 0}, "max_products"),
        ({"verify": "slow"}, "verify"),
        ({"verify": True}, "verify"),
        ({"on_unconverged": "ignore"}, "on_unconverged"),
        ({"solver": "arpack"}, "solver"),
        ({"solver": Lanczos(max_basis=10, block_size=8)}, "max_basis"),
    ],
    ids=str,
)
def test_an_argument_that_cannot_be_meant_costs_no_product(arguments: dict[str, object], message: str) -> None:
    spy = Spy(A)
    with pytest.raises(ArgumentError, match=message):
        eigsh(spy, **({"k": K, "solver": Lanczos()} | arguments))  # type: ignore[arg-type]
    assert spy.widths == []


@pytest.mark.parametrize("solver", [*SOLVERS, Lanczos(block_size="timed")], ids=repr)
@pytest.mark.parametrize(
    ("start", "message"),
    [
        (torch.zeros(N + 1, 2), rf"shape \({N + 1}, 2\)"),
        (torch.zeros(N), rf"shape \({N},\)"),
        (torch.zeros(N, 2).fill_(float("nan")), "NaN"),
        (np.zeros((N, 2)), "from_numpy"),
    ],
    ids=["other rows", "one dimension", "NaN", "an array"],
)
def test_a_start_that_cannot_be_meant_is_refused_by_every_solver(start: object, message: str, solver: Solver) -> None:
    spy = Spy(A)
    with pytest.raises(ArgumentError, match=message):
        eigsh(spy, K, solver=solver, start=start)  # type: ignore[arg-type]
    assert spy.widths == []


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    expected = eigsh(A, K, seed=3, rtol=0.25)
    pairs = eigsh(A, np.int64(K), seed=np.int64(3), rtol=np.float32(0.25))
    assert torch.equal(pairs.vectors, expected.vectors)
    pairs.save(tmp_path / "pairs.safetensors")
    assert EigenResult.load(tmp_path / "pairs.safetensors").seed == 3


@pytest.mark.parametrize(
    "build",
    [
        lambda: Lanczos(block_size=0),
        lambda: Lanczos(block_size="fast"),  # type: ignore[arg-type]
        lambda: Lanczos(block_size=True),
        lambda: Lanczos(max_basis=-1),
        lambda: LOBPCG(num_guards=-1),
        lambda: LOBPCG(num_guards=1.5),  # type: ignore[arg-type]
        lambda: LOBPCG(num_guards=True),
        lambda: Dense(block_size=0),
    ],
)
def test_options_check_themselves(build: Callable[[], Solver]) -> None:
    with pytest.raises(ArgumentError):
        build()


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("limit", [1, 8, 30, 50, 70])
def test_spent_products_end_the_search_with_what_was_found(limit: int, solver: Solver) -> None:
    B = spectrum("flat", lambda i: 1 - i / (2 * N), N).matrix()
    spy = Spy(B)
    with pytest.raises(NotConvergedError, match="max_products") as caught:
        eigsh(spy, K, solver=solver, max_products=limit)
    pairs = caught.value.result
    assert sum(spy.widths) == pairs.cost.columns <= limit
    assert pairs.status == "max_products"
    assert pairs.values.shape[0] == pairs.vectors.shape[1] == pairs.converged.shape[0] <= K
    assert str(pairs)
    residuals = (B @ pairs.vectors - pairs.vectors * pairs.values).norm(dim=0)
    assert bool((residuals <= 1.01 * pairs.residual_norms + 1e-13).all())
    returned = eigsh(Spy(B), K, solver=solver, max_products=limit, on_unconverged="return")
    assert torch.equal(returned.values, pairs.values)
