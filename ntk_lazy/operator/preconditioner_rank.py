"""How many columns a Nyström preconditioner gets: as the settings say, or as many as pay."""

from __future__ import annotations

from typing import Any, final

import torch
from linear_operator import settings
from torch import Tensor

from ntk_lazy.operator.job import column_costs, kept_spectrum
from ntk_lazy.operator.roots import kept_root
from ntk_lazy.solves import MOST_RTOL, Solve, cheapest_rank

_SHARE = 0.5  # of the memory budget
_BLOCKS = 5  # of n rows and as many columns: three while the root is made; later it, its scaled self and a gradient


@final
class chosen_rank(settings._feature_flag):  # type: ignore[misc]  # noqa: N801  (named as settings are)
    """Whether tangent kernels choose the rank of their preconditioner, unless ``max_preconditioner_size`` is 0.

    The rank with which the predicted solves take the least, with all that makes and applies the preconditioner. One
    that was made before, for other noise or scale, goes on, and makes way for a larger one where that pays.
    """


def preconditioner_rank(kernel: Any, diagonal: Tensor, *, right_hand_sides: int, num_solves: int) -> int:
    """Return the rank of the preconditioner of ``K + D``; 0 for none.

    Args:
        kernel: K, an ``NTKLinearOperator``.
        diagonal: That of D.
        right_hand_sides: Of a solve.
        num_solves: That are to come, with other noise and scale.

    Cost: where it is chosen, at the first time the eigenvalues of K between 512 to 2,048 rows; then some milliseconds.
    """
    n = kernel.shape[-1]
    fixed = min(int(settings.max_preconditioner_size.value()), n)
    if not fixed or n < settings.min_preconditioning_size.value():
        return 0
    noise = float(diagonal.detach().double().mean())
    if chosen_rank.off() or not kernel.is_gram_matrix or not noise > 0:
        return fixed
    room = int(_SHARE * kernel.settings.memory_budget) // (_BLOCKS * kernel.dtype.itemsize * n)
    rtol = max(float(settings.cg_tolerance.value()), torch.finfo(kernel.dtype).eps)
    job = Solve(
        noise=noise, right_hand_sides=max(right_hand_sides, 1), rtol=min(rtol, MOST_RTOL), num_solves=num_solves
    )
    root = kept_root(kernel)
    known = 0 if root is None else root.shape[-1]
    costs = column_costs(kernel, job.right_hand_sides)
    return cheapest_rank(job, kept_spectrum(kernel), kernel.dtype, most=min(n, room), known=known, costs=costs)
