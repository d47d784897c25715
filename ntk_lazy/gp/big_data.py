"""Settings of GPyTorch under which nothing of size N x N is written down."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from gpytorch import settings

from ntk_lazy.counts import check_count
from ntk_lazy.errors import ArgumentError
from ntk_lazy.operator.preconditioner_rank import chosen_rank

_OTHERS_RANK = 100  # of kernels that do not choose
_TINY = {dtype: torch.finfo(dtype).tiny for dtype in (torch.float32, torch.float64)}


@contextmanager
def big_data(
    *,
    rtol: float = 1e-2,
    prediction_rtol: float = 1e-4,
    rank: int | None = None,
    variance_rank: int = 100,
    probes: int = 10,
    max_steps: int = 1000,
) -> Iterator[None]:
    """Train and predict by products alone, within the context.

    GPyTorch goes by size on its own: up to 800 rows it factorises K, and up to 512 it writes slices down. Beyond, its
    default tolerance for training is 1, at which a solve stops after ten steps whatever came out.

    Args:
        rtol: Of the solves in training, relative residual of each right-hand side.
        prediction_rtol: Of the solves that predictions use.
        rank: Of the preconditioner; 0 for none. None chooses, for tangent kernels: as many columns as pay in ten solves
            while training, or in one, and fit half of the kernel's memory budget. Other kernels
            then take 100.
        variance_rank: Of the root that predictive variances are made from (``fast_pred_var``); 0 to solve for each, and
            100 for other roots of few columns, such as those of fantasies.
        probes: Random vectors that the log determinant is estimated with.
        max_steps: Of conjugate gradients, most.

    Raises:
        ArgumentError: A tolerance that is not between 0 and 1, or a count that is none.
    """
    for name, value in (("rtol", rtol), ("prediction_rtol", prediction_rtol)):
        if not (isinstance(value, int | float) and 0 < value < 1):
            raise ArgumentError(f"{name} must be between 0 and 1, not {value!r}.")
    for name, count in (("probes", probes), ("max_steps", max_steps)):
        check_count(count, name)
    fixed_rank = _OTHERS_RANK if rank is None else rank
    for name, count in (("rank", fixed_rank), ("variance_rank", variance_rank)):
        if count != 0:
            check_count(count, name)
    with ExitStack() as stack:
        for setting in (
            # BoTorch turns these off for the whole process.
            settings.fast_computations(covar_root_decomposition=True, log_prob=True, solves=True),
            settings.max_cholesky_size(0),
            settings.max_eager_kernel_size(0),
            settings.cg_tolerance(rtol),
            settings.eval_cg_tolerance(prediction_rtol),
            settings.max_cg_iterations(max_steps),
            chosen_rank(rank is None),
            settings.max_preconditioner_size(fixed_rank),
            settings.min_preconditioning_size(1),
            settings.num_trace_samples(probes),
            settings.max_root_decomposition_size(variance_rank or _OTHERS_RANK),
            settings.fast_pred_var(variance_rank > 0),
            # GPyTorch rounds variances up to 1e-10 and 1e-6, in whatever units: what is left is not to be negative.
            settings.min_variance(float_value=_TINY[torch.float32], double_value=_TINY[torch.float64]),
        ):
            stack.enter_context(setting)
        yield
