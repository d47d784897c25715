"""How many eigenvalues a spectrum amounts to."""

from __future__ import annotations

from typing import Literal, get_args

from ntk_lazy.columns import Eigenpairs
from ntk_lazy.errors import ArgumentError, DegenerateError
from ntk_lazy.estimate.frobenius import frobenius_norm
from ntk_lazy.estimate.result import Estimate
from ntk_lazy.estimate.trace import trace as exact_trace
from ntk_lazy.products import Operator, rows_of

RankDefinition = Literal["participation", "trace", "stable"]


def effective_rank(
    A: Operator,
    *,
    definition: RankDefinition = "participation",
    pairs: Eigenpairs | None = None,
    trace: Estimate | None = None,
    frobenius: Estimate | None = None,
    num_samples: int = 16,
    seed: int = 0,
) -> Estimate:
    """Measure how many eigenvalues of equal size the spectrum amounts to; say which definition you report.

    Always ``1 ≤ stable ≤ trace ≤ participation ≤ rank``, ``trace`` the geometric mean of its neighbours; they lie far
    apart when one eigenvalue dominates.

    Args:
        A: Symmetric and positive semi-definite.
        definition: ``"participation"`` is ``(tr A)² / ‖A‖_F²``, ``"trace"`` is ``tr A / λ_1`` (intrinsic dimension),
            ``"stable"`` is ``‖A‖_F² / λ_1²``.
        pairs: Eigenpairs of A: λ_1 for the last two, a smaller error for the first and the last.
        trace: tr A if it is known; otherwise it comes from the diagonal.
        frobenius: ``‖A‖_F`` if it is known; otherwise it is estimated.
        num_samples: Random vectors of ``frobenius_norm``.
        seed: Of the random vectors.

    Returns:
        The rank with a standard error by propagation.

    Cost: that of ``trace`` and ``frobenius_norm``, where they are needed and not given.

    Raises:
        ArgumentError: The definition needs λ_1 and there are no pairs.
        DegenerateError: The operator is zero.

    Source: Roy and Vetterli, The effective rank (EUSIPCO 2007) for the idea; Tropp, An introduction to matrix
        concentration inequalities (2015), 7.1, intrinsic dimension; Rudelson and Vershynin, Sampling from large
        matrices (JACM 2007), stable (numerical) rank.
    """
    if definition not in get_args(RankDefinition):
        raise ArgumentError(f"definition={definition!r} is unknown. Choose from {', '.join(get_args(RankDefinition))}.")
    rows_of(A)
    if definition != "participation" and pairs is None:
        raise ArgumentError(f"definition={definition!r} needs λ_1: pass pairs=eigsh(A, 1), or more of them.")
    spent = 0
    total = norm = None
    if definition != "stable":
        total = exact_trace(A) if trace is None else trace
        spent += total.num_products if trace is None else 0
    if definition != "trace":
        norm = frobenius_norm(A, pairs=pairs, num_samples=num_samples, seed=seed) if frobenius is None else frobenius
        spent += norm.num_products if frobenius is None else 0
    return _ratio(total, norm, None if pairs is None else float(pairs.values[0]), definition, spent)


def _ratio(
    total: Estimate | None, norm: Estimate | None, largest: float | None, definition: str, spent: int
) -> Estimate:
    if definition == "participation":
        assert total is not None
        assert norm is not None
        if not norm.value > 0:
            raise DegenerateError("the operator is zero, and a zero operator has no effective rank.")
        value = (total.value / norm.value) ** 2
        relative = 2 * (total.relative_error**2 + norm.relative_error**2) ** 0.5
    else:
        assert largest is not None
        if not largest > 0:
            raise DegenerateError(f"λ_1 is {largest}, and an operator without a positive eigenvalue has no rank.")
        if definition == "trace":
            assert total is not None
            value, relative = total.value / largest, total.relative_error
        else:
            assert norm is not None
            value, relative = (norm.value / largest) ** 2, 2 * norm.relative_error
    return Estimate(value=value, standard_error=abs(value) * relative, num_products=spent)
