"""What a step of gradient descent does to the outputs, to first order, mode by mode.

With ``g = ∂L/∂f`` on all rows, a step of size δ changes the outputs by ``−δ K g``. For squared errors ``g`` is a
factor times the residual ``m = f − y``; that factor depends on how the loss is reduced, and is written down once,
in ``loss_factor``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from jaxtyping import Float64
from torch import Tensor

from ntk_lazy.columns import Eigenpairs, as_columns, as_directions, check_pairs, check_tensor, span_of
from ntk_lazy.errors import ArgumentError, DegenerateError, ShapeError
from ntk_lazy.linalg import column_norms, gram
from ntk_lazy.precision import ieee_precision
from ntk_lazy.products import Operator, check_operator, multiply, quadratic_form, rows_of

LossReduction = Literal["half_mean", "mean", "half_sum", "sum"]

# Shares above 1 by this much are explained by residuals; more says that pairs and kernel do not belong together.
_SHARE_SLACK = 1e-2


def loss_factor(reduction: LossReduction, *, num_examples: int, num_outputs: int) -> float:
    """Return c in ``∂L/∂f = c (f − y)``.

    Args:
        reduction: ``"half_mean"`` is ``L = 1/(2N) Σ (f−y)²``, the convention of the paper, and also fits any loss
            ``1/N Σ_i ℓ_i`` whose derivatives ``∂ℓ_i/∂f_i`` stand in for the residual. ``"mean"`` is torch's
            ``MSELoss()``, the mean over all N·C entries. ``"half_sum"`` is ``1/2 Σ (f−y)²``, and fits a residual
            that is already ``∂L/∂f``. ``"sum"`` is ``MSELoss(reduction="sum")``.
        num_examples: N.
        num_outputs: C; only ``"mean"`` asks for it.

    Raises:
        ArgumentError: The reduction is unknown, or a count is not positive.
    """
    if reduction not in get_args(LossReduction):
        raise ArgumentError(f"reduction={reduction!r} is unknown. Choose from {', '.join(get_args(LossReduction))}.")
    if num_examples < 1 or num_outputs < 1:
        raise ArgumentError(f"a loss over {num_examples} examples with {num_outputs} outputs has no terms.")
    factors = {
        "half_mean": 1 / num_examples,
        "mean": 2 / (num_examples * num_outputs),
        "half_sum": 1.0,
        "sum": 2.0,
    }
    return factors[reduction]


@dataclass(frozen=True, kw_only=True)
class Stability:
    """Where full-batch gradient descent stands relative to the edge of stability.

    Attributes:
        value: ``S = δ c λ_1``, with c from ``loss_factor``: δ λ_1 / N in the convention of the paper.
        bound: S at which the top mode neither grows nor shrinks under a constant kernel; always 2.
        largest_eigenvalue: λ_1.
        critical_eigenvalue: λ_1 at the bound, ``2/(δ c)``: 2N/δ in the convention of the paper.
    """

    value: float
    bound: float
    largest_eigenvalue: float
    critical_eigenvalue: float

    @property
    def is_stable(self) -> bool:
        """Whether the value lies below the bound."""
        return self.value < self.bound


def stability(
    pairs: Eigenpairs | float,
    lr: float,
    *,
    num_examples: int,
    num_outputs: int | None = None,
    reduction: LossReduction = "half_mean",
) -> Stability:
    """Compare the learning rate with the largest one that the kernel allows.

    Args:
        pairs: An ``EigenResult``, or λ_1 itself. Of the un-normalised kernel ``J Jᵀ``.
        lr: δ, the step of full-batch gradient descent; for momentum or Adam the bound is another one.
        num_examples: N, the examples that the loss runs over: those of the training set, not of other probes.
        num_outputs: C. By default the rows of the pairs for each example; with λ_1 alone, ``"mean"`` needs it.
        reduction: How the loss is reduced, see ``loss_factor``: it moves the critical eigenvalue by 2 or by C.

    Raises:
        ShapeError: The rows of the pairs are no multiple of ``num_examples``.
        ArgumentError: A learning rate or an eigenvalue that is negative or not finite; C is needed and missing; neither
            pairs nor a number.

    Source: Kopitkov and Indelman, Neural Spectrum Alignment (ICANN 2020); Cohen et al., Gradient descent on neural
        networks typically occurs at the edge of stability (ICLR 2021): λ_1/N is the sharpness 2/δ is compared to.
    """
    _check_lr(lr)
    if isinstance(pairs, Eigenpairs):
        largest = float(pairs.values[0])
        num_rows = pairs.vectors.shape[0]
        if num_outputs is None:
            if num_examples < 1 or num_rows % num_examples:
                raise ShapeError(f"{num_rows} rows are not {num_examples} examples with the same number of outputs.")
            num_outputs = num_rows // num_examples
    else:
        largest = _number(pairs)
        if num_outputs is None and reduction == "mean":
            raise ArgumentError("reduction='mean' divides by N * C: give num_outputs=C along with λ_1.")
    if not (math.isfinite(largest) and largest >= 0):
        raise ArgumentError(f"the largest eigenvalue {largest} of a kernel must be finite and not negative.")
    factor = loss_factor(reduction, num_examples=num_examples, num_outputs=num_outputs or 1)
    return Stability(
        value=lr * factor * largest,
        bound=2.0,
        largest_eigenvalue=largest,
        critical_eigenvalue=2.0 / (lr * factor),
    )


@ieee_precision()
def first_order_step(
    K: Operator,
    residual: Tensor,
    lr: float,
    *,
    reduction: LossReduction = "half_mean",
    num_examples: int | None = None,
) -> Tensor:
    """Predict the change of the outputs over one step of full-batch gradient descent, to first order in δ.

    Args:
        K: The kernel on the training points, or rectangular: rows where the change is wanted, columns where the loss
            is taken. Exact for ``outputs="full"``.
        residual: ``f − y`` on the columns of K before the step: ``(n,)``, ``(N, C)``, or ``(n, c)``. For another
            loss see ``loss_factor``.
        lr: δ.
        reduction: How the loss is reduced.
        num_examples: N; by default what the kernel says, or else the first dimension of the residual.

    Returns:
        ``−δ c K m`` with the columns of the residual, in the dtype of K: ``(n,)``, ``(N, C)`` or ``(n, c)``.

    Cost: one product for each column.

    Raises:
        ArgumentError: The residual is no tensor, or K does not multiply.
        ShapeError: The residual does not fit the kernel.
        NonFiniteError: The residual or the product is not finite.

    Source: Kopitkov and Indelman, Neural Spectrum Alignment (ICANN 2020), first-order dynamics.
    """
    _check_lr(lr)
    num_columns = _shape(K)[1]
    m = as_columns(residual, num_columns, name="residual")
    step = -lr * _factor(K, residual, num_columns, reduction, num_examples) * multiply(K, m)
    if residual.shape[0] == num_columns and residual.ndim <= 2:
        return step.reshape(step.shape[0], *residual.shape[1:])
    return step.reshape(-1, *residual.shape[1:])


@dataclass(frozen=True, kw_only=True)
class FirstOrderError:
    """How far a predicted change of the outputs is from the one that happened.

    Attributes:
        error: ``‖actual − predicted‖ / ‖actual‖``; 0.1 says that 90 % are explained.
        cosine: Of the angle between the two.
        norm_ratio: ``‖predicted‖ / ‖actual‖``.
    """

    error: float
    cosine: float
    norm_ratio: float


def first_order_error(actual: Tensor, predicted: Tensor) -> FirstOrderError:
    """Compare a predicted change of the outputs with the one that happened.

    Args:
        actual: ``f_{t+1} − f_t``, any shape.
        predicted: What ``first_order_step`` returned, as many entries in the same order.

    Raises:
        ArgumentError: One is no tensor.
        ShapeError: The two have different numbers of entries.
        NonFiniteError: One holds a NaN or an infinity.
        DegenerateError: One of them is zero, so that the ratio or the angle is not defined.

    Source: Kopitkov and Indelman, Neural Spectrum Alignment (ICANN 2020), error of the first-order dynamics.
    """
    check_tensor(actual, name="actual")
    check_tensor(predicted, name="predicted")
    if actual.numel() != predicted.numel():
        raise ShapeError(f"actual has {actual.numel()} entries and predicted {predicted.numel()}; they must agree.")
    happened = as_columns(actual, actual.numel(), name="actual").cpu()
    said = as_columns(predicted, actual.numel(), name="predicted").cpu()
    scale = happened.abs().max()
    if scale == 0 or said.abs().max() == 0:
        raise DegenerateError("a change that is zero everywhere has no direction and no relative error.")
    happened, said = happened / scale, said / scale
    norm, norm_said = happened.norm().item(), said.norm().item()
    cosine = (happened / norm * (said / norm_said)).sum().item()
    return FirstOrderError(
        error=(happened - said).norm().item() / norm,
        cosine=max(-1.0, min(1.0, cosine)),
        norm_ratio=norm_said / norm,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class InformationFlow:
    """What one step moves along each eigenvector, float64 on the CPU.

    Attributes:
        coefficients: ``c_i = v_iᵀ m``, shape ``(k,)``, or ``(k, c)`` for c columns.
        steps: ``−δ c λ_i c_i``, the motion of the outputs along v_i, shaped alike.
        speeds: ``1 − |1 − δ c λ_i|``, the fraction of the residual along v_i that one step removes, shape ``(k,)``:
            1 is fastest; negative means that it grows.
        loss_share: Share of the first-order decrease of the loss that the first 1 … k modes carry, shape ``(k,)``.
        motion_share: Share of the squared motion of the outputs, shape ``(k,)``.
        loss_decrease: First-order decrease of the loss over the step, ``δ ‖∂L/∂θ‖²``, all modes.
    """

    coefficients: Float64[Tensor, "k ..."]
    steps: Float64[Tensor, "k ..."]
    speeds: Float64[Tensor, " k"]
    loss_share: Float64[Tensor, " k"]
    motion_share: Float64[Tensor, " k"]
    loss_decrease: float


@ieee_precision()
def information_flow(
    pairs: Eigenpairs,
    residual: Tensor,
    lr: float,
    *,
    kernel: Operator,
    reduction: LossReduction = "half_mean",
    num_examples: int | None = None,
) -> InformationFlow:
    """Split one step of gradient descent into the eigenvectors of the kernel.

    Args:
        pairs: Eigenpairs of the kernel.
        residual: ``f − y`` before the step: ``(n,)``, ``(N, C)``, or ``(n, c)``; see ``loss_factor`` for other losses.
        lr: δ.
        kernel: The kernel that the pairs belong to; the shares are relative to what it does to the whole residual.
        reduction: How the loss is reduced.
        num_examples: N; by default what the kernel says, or else the first dimension of the residual.

    Cost: one product and one half product for each column, ``2 n k c`` flops.

    Raises:
        ShapeError: The residual or the kernel does not fit the pairs.
        NonFiniteError: The residual or the product is not finite.
        DegenerateError: The residual is zero, or the kernel moves nothing along it.
        ArgumentError: The pairs carry more than the whole: they belong to another kernel. The residual is no tensor,
            the kernel does not multiply, or the pairs are none.

    Source: Kopitkov and Indelman, Neural Spectrum Alignment (ICANN 2020), spectral form of the dynamics.
    """
    _check_lr(lr)
    check_pairs(pairs)
    V, rows = span_of(pairs, name="pairs"), rows_of(kernel, name="kernel")
    if V.shape[0] != rows.local:
        raise ShapeError(f"the pairs have {V.shape[0]} rows and the kernel has {rows.local}.")
    direction = as_directions(residual, V.shape[0], name="residual")
    scale = as_columns(residual, V.shape[0], name="residual").abs().max().item()
    rate = lr * _factor(kernel, residual, V.shape[0], reduction, num_examples)
    product = multiply(kernel, direction)
    form = quadratic_form(kernel, direction, rows).trace().item()
    motion = column_norms(product, rows=rows).square().sum().item()
    if not (form > 0 and motion > 0):
        raise DegenerateError("the kernel moves nothing along the residual, so that there is nothing to share out.")
    c = gram(V, direction.to(V.device), rows=rows)
    values = pairs.values.double().cpu()
    squares = c.square().sum(1)
    loss_share = (values * squares).cumsum(0) / form
    motion_share = (values.square() * squares).cumsum(0) / motion
    if not max(loss_share[-1], motion_share[-1]) <= 1 + _SHARE_SLACK:
        raise ArgumentError(
            f"the pairs carry {max(loss_share[-1], motion_share[-1]):.2f} of what the kernel does to the residual, "
            "more than all of it. Compute them again for this kernel and these parameters."
        )
    coefficients = (c * scale).squeeze(1)
    steps = -rate * values.reshape(-1, *[1] * (coefficients.ndim - 1)) * coefficients
    return InformationFlow(
        coefficients=coefficients,
        steps=steps,
        speeds=1 - (1 - rate * values).abs(),
        loss_share=loss_share.clamp(max=1.0),
        motion_share=motion_share.clamp(max=1.0),
        loss_decrease=rate * rate / lr * form * scale**2,
    )


def _check_lr(lr: float) -> None:
    if not (math.isfinite(lr) and lr > 0):
        raise ArgumentError(f"lr={lr} must be a positive number.")


def _number(largest: Any) -> float:
    """Read λ_1, of any kind of number."""
    try:
        return float(largest)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(
            f"pairs is of type {type(largest).__name__}. Pass the EigenResult that eigsh returned, or λ_1 as a number."
        ) from error


def _shape(K: Operator) -> tuple[int, int]:
    check_operator(K, name="K")
    shape = getattr(K, "shape", None)
    if shape is None:
        return (rows_of(K).local,) * 2
    if len(shape) != 2:
        raise ShapeError(f"a single operator is needed, not a batch of shape {tuple(shape)}.")
    return int(shape[0]), int(shape[1])


def _factor(
    K: Operator, residual: Tensor, num_columns: int, reduction: LossReduction, num_examples: int | None
) -> float:
    """Return the factor of the loss for the examples behind the columns of K."""
    if num_examples is None:
        known = getattr(K, "num_examples", None)
        if known is not None:
            # The operator counts the examples of its rows; its columns have as many rows for each example.
            num_examples = num_columns * int(known) // _shape(K)[0]
        else:
            num_examples = residual.shape[0] if residual.numel() == num_columns else num_columns
    if num_examples < 1 or residual.numel() % num_examples:
        raise ShapeError(
            f"a residual of shape {tuple(residual.shape)} is not {num_examples} examples with as many outputs each. "
            "Give num_examples."
        )
    return loss_factor(reduction, num_examples=num_examples, num_outputs=residual.numel() // num_examples)
