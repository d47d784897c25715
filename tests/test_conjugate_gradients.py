"""Conjugate gradients reach the residual that was asked for in any unit, and say where rounding ends them."""

from __future__ import annotations

import pytest
import torch
from linear_operator.utils import linear_cg
from linear_operator.utils.warnings import NumericalWarning
from torch import Generator, Tensor

from ntk_lazy.linalg.conjugate_gradients import FROM_ROUNDING, Map, Preconditioner, conjugate_gradients
from ntk_lazy.linalg.nystrom import nystrom_root

N = 80


def matrix(power: float, *, batch: tuple[int, ...] = (), size: int = N) -> Tensor:
    """A symmetric matrix with eigenvalues ``i^-power``."""
    generator = torch.Generator().manual_seed(int(10 * power))
    Q = torch.linalg.qr(torch.randn(*batch, size, size, generator=generator, dtype=torch.float64))[0]
    values = torch.arange(1, size + 1, dtype=torch.float64) ** -power
    return (Q * values) @ Q.mT


def block(k: int, *, batch: tuple[int, ...] = ()) -> Tensor:
    return torch.randn(*batch, N, k, generator=Generator().manual_seed(k), dtype=torch.float64)


@pytest.mark.parametrize("unit", [1e-12, 1e-4, 1.0, 1e9])
@pytest.mark.parametrize("power", [0.5, 2.0, 3.0])
def test_solves_reach_the_tolerance_in_any_unit(power: float, unit: float):
    A, B = unit * (matrix(power) + 1e-3 * torch.eye(N, dtype=torch.float64)), block(4)
    found = conjugate_gradients(lambda V: A @ V, B, rtol=1e-6, max_steps=1000)
    true = (B - A @ found.X).norm(dim=0) / B.norm(dim=0)
    assert (true <= 1e-6).all()
    torch.testing.assert_close(found.residuals[0], true, rtol=1e-3, atol=1e-9)


def test_another_unit_takes_the_same_steps_where_linear_operator_does_not_arrive():
    A, B, unit = matrix(3.0) + 1e-3 * torch.eye(N, dtype=torch.float64), block(1), 2.0**-35
    counts = [
        conjugate_gradients(lambda V, u=u: u * (A @ V), B, rtol=1e-6, max_steps=500).num_products for u in (1.0, unit)
    ]
    assert counts[0] == counts[1]
    with pytest.warns(NumericalWarning, match="larger than the tolerance"):
        U = linear_cg(lambda V: unit * (A @ V), B, tolerance=1e-6, max_iter=500)
    assert (B - unit * (A @ U)).norm() / B.norm() > 1e-3


def test_columns_that_are_done_are_multiplied_no_more():
    A = torch.diag(torch.cat([torch.ones(N // 2), torch.linspace(1, 1e4, N // 2)]).double())
    B = torch.zeros(N, 3, dtype=torch.float64)
    B[0, 0] = 1  # an eigenvector: one step
    B[:, 1] = 1
    products = []

    def matmul(V: Tensor) -> Tensor:
        products.append(V.shape[-1])
        return A @ V

    found = conjugate_gradients(matmul, B, rtol=1e-8, max_steps=500)
    assert products[:2] == [2, 1]
    assert products[-1] == 2  # all of them, once, for the residuals
    assert sum(products) == found.num_products
    assert (found.X[:, 2] == 0).all()
    assert found.residuals[0, 2] == 0


def test_rounding_that_hides_the_residual_is_noticed():
    A = (matrix(4.0) + 1e-7 * torch.eye(N, dtype=torch.float64)).float()
    B = block(2).float()
    found = conjugate_gradients(lambda V: A @ V, B, rtol=1e-7, max_steps=2000)
    true = (B.double() - A.double() @ found.X.double()).norm(dim=0) / B.double().norm(dim=0)
    assert (true > 1e-7).any()  # float32 cannot do it
    assert (found.residuals[0] > 1e-7).any()  # and it is said
    assert (found.residuals[0] < 10 * true + 1e-5).all()


def _turned(A: Tensor) -> Map:
    order = torch.randperm(A.shape[1], generator=Generator().manual_seed(3))
    return lambda V: A[:, order] @ V[order]


def _by_blocks(A: Tensor) -> Map:
    return lambda V: sum(a @ v for a, v in zip(A.split(64, 1), V.split(64), strict=True))


def _in_float64(A: Tensor) -> Map:
    return lambda V: (A.double() @ V.double()).float()


def _one_by_one(A: Tensor) -> Map:
    """Sums of one term after another round at each: a normal number in all, three times as large to be on that side."""

    def product(V: Tensor) -> Tensor:
        # The same for the same vectors.
        generator = Generator().manual_seed(int(1e4 * V.abs().sum().log2().nan_to_num(0, 0, 0)) % 2**31)
        exact = A.double() @ V.double()
        size = 3 * torch.finfo(A.dtype).eps * (A.double().square() @ V.double().square()).sqrt()
        return (exact + size * torch.randn(exact.shape, generator=generator, dtype=torch.float64)).float()

    return product


# Products as other processors make them: their sums are in another order, or in longer registers, or in none.
KERNELS = {
    "of this processor": lambda A: lambda V: A @ V,
    "in another order": _turned,
    "by blocks": _by_blocks,
    "in float64": _in_float64,
    "one by one": _one_by_one,
}


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("power", "noise"), [(1.0, 1e-4), (2.0, 1e-6), (3.0, 3e-7), (4.0, 1e-6)])
def test_few_steps_are_taken_beyond_what_rounding_allows(power: float, noise: float, kernel: str):
    n, rtol = 300, 1e-7  # of which no float32 solution knows anything
    A = (matrix(power, size=n) + noise * torch.eye(n, dtype=torch.float64)).float()
    B = torch.randn(n, 2, generator=Generator().manual_seed(0))
    matmul = KERNELS[kernel](A)
    found = conjugate_gradients(matmul, B, rtol=rtol, max_steps=10_000)
    exact = A.double() @ found.X.double()
    true = (B.double() - exact).norm(dim=0) / B.double().norm(dim=0)
    assert (true > rtol).all()
    # What a product with these solutions is off by, of several that round anew: along few directions where few
    # eigenvalues dominate, so that a sample is a normal number and may be small. Of eight the largest is exceeded four
    # times over by one in 4,000.
    samples = [unit * matmul(found.X / unit).double() - exact for unit in (1.0, 3.0, 5.0, 7.0)]
    rounding = float(torch.stack(samples).norm(dim=1).max() / B.double().norm(dim=0).min())
    assert ((found.residuals[0] - true).abs() <= 4 * rounding).all()
    # Ten times the rounding that the solver sees, which is the difference of two products.
    assert (found.residuals <= 2 * FROM_ROUNDING * rounding).all()
    # At most one round more of as many steps, and a few products that measure: beside a solve which asks for no more
    # than twice the residual that came out, and so sees nothing of rounding.
    least = conjugate_gradients(matmul, B, rtol=float(2 * found.residuals.max()), max_steps=10_000)
    assert found.num_products <= 2.5 * least.num_products


def test_what_a_later_round_makes_worse_is_not_taken():
    A, B, calls = torch.diag(torch.tensor([1.0, 2.0, 4.0]).double()), torch.ones(3, 1).double(), []

    def matmul(V: Tensor) -> Tensor:
        calls.append(V)
        if len(calls) <= 3:  # steps, after which the recurrence is done
            return A @ V
        # It is measured, in four units, to be off by a tenth of B; then nothing is right any more.
        return A @ V - 0.1 * A @ V if len(calls) <= 7 else -A @ V

    found = conjugate_gradients(matmul, B, rtol=1e-6, max_steps=100)
    assert len(calls) > 7
    torch.testing.assert_close(found.residuals, torch.full((1, 1), 0.1).double())
    torch.testing.assert_close(A @ found.X, B)


def test_a_norm_that_steps_do_not_show_can_be_given():
    n, noise = 600, 3e-7
    values = torch.arange(1, n + 1, dtype=torch.float64) ** -3.0
    Q = torch.linalg.qr(torch.randn(n, n, generator=Generator().manual_seed(1), dtype=torch.float64))[0]
    A, B = ((Q * (values + noise)) @ Q.mT).float(), torch.randn(n, 1, generator=Generator().manual_seed(0))
    # Knows the first 20 directions, so that steps have next to nothing of the largest.
    inverse = ((Q / (torch.where(torch.arange(n) < 20, values, values[20]) + noise)) @ Q.mT).float()
    counts = [
        conjugate_gradients(
            lambda V: A @ V, B, rtol=1e-6, max_steps=10_000, preconditioner=Preconditioner(lambda V: inverse @ V, norm)
        ).num_products
        for norm in (0.0, 1.0)
    ]
    assert counts[1] < counts[0]


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-6), (torch.float32, 1e-2)])
def test_nothing_is_measured_in_between_where_rounding_does_not_matter(dtype: torch.dtype, rtol: float):
    A, products = (matrix(2.0) + 1e-3 * torch.eye(N, dtype=torch.float64)).to(dtype), []

    def matmul(V: Tensor) -> Tensor:
        products.append(V.shape[-1])
        return A @ V

    found = conjugate_gradients(matmul, block(1).to(dtype), rtol=rtol, max_steps=1000)
    assert (found.residuals <= rtol).all()
    assert (found.rounding == 0).all()
    # One product is that of the residual.
    again = conjugate_gradients(matmul, block(1).to(dtype), rtol=rtol, max_steps=len(products) - 1)
    assert (again.residuals <= rtol).all()


def test_batches_are_solved_each_by_itself():
    A, B = matrix(2.0, batch=(3,)) + 1e-2 * torch.eye(N, dtype=torch.float64), block(2, batch=(3,))
    found = conjugate_gradients(lambda V: A @ V, B, rtol=1e-10, max_steps=500)
    torch.testing.assert_close(found.X, torch.linalg.solve(A, B), rtol=1e-6, atol=1e-6)


def logarithms(A: Tensor, P: Tensor, b: Tensor, T: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``e1ᵀ log(T) e1``, and ``cᵀ log(P^(-1/2) A P^(-1/2)) c / cᵀc`` with ``c = P^(-1/2) b``."""
    theta, Y = torch.linalg.eigh(T)
    values, vectors = torch.linalg.eigh(P)
    half = (vectors * values**-0.5) @ vectors.mT
    inner, S = torch.linalg.eigh(half @ A @ half)
    weights = (S.mT @ half @ b) ** 2
    return (Y[0] ** 2 * theta.log()).sum(), (weights * inner.log()).sum() / weights.sum()


@pytest.mark.parametrize("is_preconditioned", [False, True])
def test_lanczos_matrices_give_log_determinants(is_preconditioned: bool):
    A, B = matrix(2.0) + 1e-2 * torch.eye(N, dtype=torch.float64), block(4)
    L = nystrom_root(lambda V: A @ V, A.shape, 10, dtype=A.dtype, device=A.device)
    M = L @ L.mT + 1e-2 * torch.eye(N, dtype=torch.float64)
    P = M if is_preconditioned else torch.eye(N, dtype=torch.float64)
    found = conjugate_gradients(
        lambda V: A @ V,
        B,
        rtol=1e-12,
        max_steps=200,
        preconditioner=Preconditioner(lambda V: torch.linalg.solve(P, V)),
        num_tridiagonal=3,
        tridiagonal_steps=N,
    )
    for column in range(3):
        quadrature, exact = logarithms(A, P, B[:, column], found.tridiagonal[column])
        torch.testing.assert_close(quadrature, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rtol", [0.5, 1e-2, 1e-4])
@pytest.mark.parametrize("power", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("is_preconditioned", [False, True])
def test_a_lanczos_matrix_ends_where_its_log_determinant_is_right(
    power: float, rtol: float, *, is_preconditioned: bool
):
    n, noise = 300, 1e-3
    K = matrix(power, size=n)
    A = K + noise * torch.eye(n, dtype=torch.float64)
    B = torch.randn(n, 5, generator=Generator().manual_seed(1), dtype=torch.float64)
    B[:, 1] = 0  # a column that is done before it begins
    M = torch.eye(n, dtype=torch.float64)
    if is_preconditioned:
        L = nystrom_root(lambda V: K @ V, K.shape, 20, dtype=K.dtype, device=K.device)
        M = L @ L.mT + noise * M
        # As probes of log determinants are drawn: in the norm of the preconditioner no direction is missed.
        B = torch.linalg.cholesky(M) @ B
    found = conjugate_gradients(
        lambda V: A @ V,
        B,
        rtol=rtol,
        max_steps=n,
        preconditioner=Preconditioner(lambda V: torch.linalg.solve(M, V)),
        num_tridiagonal=4,
        tridiagonal_steps=n,
    )
    for column in (0, 2, 3):
        quadrature, exact = logarithms(A, M, B[:, column], found.tridiagonal[column])
        # Half the square of the residual at which it ended, which is that or less, whatever the solve asks for.
        assert abs(quadrature - exact) <= min(rtol, 1e-2) ** 2 / 2 + 1e-12
    # It goes on no longer than its columns have to.
    assert found.tridiagonal.shape[-1] < n // 2


def test_a_matrix_that_ends_early_goes_on_as_the_identity():
    A = torch.eye(N, dtype=torch.float64)
    A[0, 0] = 4
    B = torch.zeros(N, 2, dtype=torch.float64)
    B[0, 0] = B[:, 1] = 1
    found = conjugate_gradients(
        lambda V: A @ V, B, rtol=1e-3, max_steps=9, num_tridiagonal=2, tridiagonal_steps=9, min_steps=9
    )
    first = found.tridiagonal[0]
    assert first[0, 0] == 4
    assert torch.equal(first[1:, 1:], torch.eye(len(first) - 1, dtype=torch.float64))
    values, vectors = torch.linalg.eigh(found.tridiagonal[1])
    is_wrong = ((values - 1).abs() > 1e-10) & ((values - 4).abs() > 1e-10)
    assert (vectors[0, is_wrong].abs() < 1e-10).all()  # of rounding, and without weight
