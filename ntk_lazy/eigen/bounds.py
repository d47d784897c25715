"""How far computed eigenpairs may be from true ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ErrorBounds:
    """Bounds that follow from residuals; those with a gap hold if no value was missed.

    Attributes:
        value: ``(k,)``: some eigenvalue lies this near. The residual norm, or its square over the gap where that
            is smaller (Kato-Temple), plus the measured rounding of a product and that of the small eigenproblem.
        angle: ``(k,)``: sine of the angle between a vector and the eigenspace of its *cluster*, the values that
            its residual cannot tell apart; 1 where nothing can be said (Davis-Kahan).
        space_angle: The same for the span of all vectors: whether the choice of ``k`` cuts a cluster shows here.
        residual_norm: ``‖A X − X Λ‖``: as many eigenvalues as pairs match these values one to one within it
            (Kahan).
    """

    value: Float64[Tensor, " k"]
    angle: Float64[Tensor, " k"]
    space_angle: float
    residual_norm: float

    def times(self, scale: float) -> ErrorBounds:
        """The bounds for the same operator times a positive number."""
        return replace(self, value=self.value * scale, residual_norm=self.residual_norm * scale)

    def unexplained(self, values: Float64[Tensor, " k"], trace: float) -> float:
        """Bound the share of the trace that the best approximation of this rank leaves out.

        Ritz values lie below the eigenvalues they stand for, so that their sum is a lower bound of the best
        possible; valid for a positive semi-definite operator and its exact trace.
        """
        return max(0.0, 1.0 - float(values.sum()) / trace)


def error_bounds(
    values: Float64[Tensor, " k"],
    residual_norms: Float64[Tensor, " k"],
    *,
    next_value: float,
    noise: float,
) -> ErrorBounds:
    """Bound the errors of the ``k`` largest pairs.

    Args:
        values: Descending.
        residual_norms: Of the same pairs.
        next_value: An upper estimate of the first eigenvalue that is not among them: its Ritz value plus its
            residual norm; minus infinity when there is none, infinity when nothing is known of it.
        noise: Norm of the rounding of a product, and of what follows it.

    Returns:
        Bounds on values and angles.

    Source: Parlett, The Symmetric Eigenvalue Problem, 4.5.1 (residual), 10.5.1 (Kahan), 11.7.1 (gap);
        Davis and Kahan, SIAM J. Numer. Anal. 7 (1970), the sin Θ theorem.
    """
    k = values.numel()
    reach = residual_norms + noise
    first = _cluster_starts(values, reach)
    value, angle = reach.clone(), torch.ones(k, dtype=torch.float64)
    if k == 0:
        return ErrorBounds(value=value, angle=angle, space_angle=1.0, residual_norm=0.0)
    for begin, end in zip(first, [*first[1:], k], strict=True):
        above = float(values[begin - 1] - reach[begin - 1]) if begin else float("inf")
        below = float(values[end] + reach[end]) if end < k else next_value
        gap = min(above - float(values[begin]), float(values[end - 1]) - below)
        if gap <= 0:
            continue
        norm = float(reach[begin:end].square().sum().sqrt())
        angle[begin:end] = min(1.0, norm / gap)
        if end - begin == 1:
            value[begin] = min(norm, norm * norm / gap + noise)
    total = float(residual_norms.square().sum().sqrt())
    gap = float(values[-1]) - next_value
    space = min(1.0, total / gap) if gap > 0 else 1.0
    return ErrorBounds(value=value, angle=angle, space_angle=space, residual_norm=total)


def _cluster_starts(values: Tensor, reach: Tensor) -> list[int]:
    """Index of the first member of every cluster: neighbours whose intervals meet belong together."""
    lower = values - reach
    upper = values + reach
    later = range(1, values.numel())
    return [0, *(i for i in later if float(lower[:i].min()) > float(upper[i:].max()))]
