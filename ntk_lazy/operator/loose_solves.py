"""What is said of solves that stop before they are right: because nobody asked for more, or could not."""

from __future__ import annotations

import warnings

from linear_operator import settings
from linear_operator.utils.warnings import NumericalWarning

from ntk_lazy.linalg.conjugate_gradients import FROM_ROUNDING

_LOOSE = 0.01  # of predictions, by default; of training it is 1, at which ten steps are taken whatever came out


class LooseSolveWarning(UserWarning):
    """A Gaussian process beyond ``max_cholesky_size`` rows solves at tolerances that were meant for other kernels."""


def hint_at_loose_solves() -> None:
    """Warn where GPyTorch's own tolerances are in force; not within ``big_data``, nor where a smaller one was set."""
    # A setting of 0 says that whoever set it knows of products.
    if settings.max_cholesky_size.value() > 0 and settings.cg_tolerance.value() >= _LOOSE:
        warnings.warn(
            "beyond max_cholesky_size rows (800, unless set otherwise) GPyTorch solves by conjugate gradients, and its "
            "default tolerances are 1 in training and 0.01 in predictions: variances were 0.9 to 2.2 times the right "
            "ones. Train and predict within `with ntk_lazy.gp.big_data():`, or set cg_tolerance and eval_cg_tolerance "
            "yourself.",
            LooseSolveWarning,
            stacklevel=2,
        )


def warn_of_residual(worst: float, tolerance: float, max_steps: int, *, rounding: float = 0.0) -> None:
    """Warn of the largest relative residual, if it is above the tolerance."""
    if worst <= tolerance:
        return
    cure = (
        "That is what rounding leaves of it: use a float64 model"
        if worst <= FROM_ROUNDING * rounding
        else "Raise max_cg_iterations or max_preconditioner_size, use a float64 model"
    )
    warnings.warn(
        f"conjugate gradients ended with a relative residual of {worst:.1e}, where {tolerance:.1e} was asked for, "
        f"after at most {max_steps} steps. {cure}, or ask for less (cg_tolerance, eval_cg_tolerance).",
        NumericalWarning,
        stacklevel=3,
    )
