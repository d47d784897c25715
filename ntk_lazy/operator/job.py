"""What a plan is asked to plan for, in products: of any kernel, a search of its eigenpairs, or a solve with it."""

from __future__ import annotations

from typing import Any

import torch

from ntk_lazy.counts import check_count, typical_calls
from ntk_lazy.engines.contract import Engine
from ntk_lazy.errors import ArgumentError
from ntk_lazy.linalg.random_pivots import MOST_AT_ONCE
from ntk_lazy.plan import Job
from ntk_lazy.solves import TYPICAL_STEPS, ColumnCosts, PredictedSolve, Solve, Spectrum, num_sampled_rows

_LEAST_EXAMPLES = 16  # in a sample, where each has very many outputs


def job_of(kernel: Any, num_columns: int, num_products: int, eigenpairs: int | None, solve: Solve | None) -> Job:
    """Turn the arguments of ``explain`` into products.

    Raises:
        ArgumentError: Numbers below 1, two jobs at once, or a job that this kernel cannot do.
    """
    check_count(num_columns, "num_columns")
    check_count(num_products, "num_products")
    if eigenpairs is None and solve is None:
        return Job(num_columns, num_products)
    if eigenpairs is not None and solve is not None:
        raise ArgumentError("explain plans one job at a time: give it eigenpairs or solve, not both.")
    name, n = "solve" if eigenpairs is None else "eigenpairs", kernel.shape[-1]
    # A negative scale leaves eigenpairs; conjugate gradients need K to be positive.
    if not (kernel.is_gram_matrix if eigenpairs is None else kernel.is_symmetric and not kernel.batch_shape):
        raise ArgumentError(
            f"{name} needs one symmetric kernel, but this one, of shape {tuple(kernel.shape)}, has two sets of points, "
            "batch dimensions or a negative scale. Plan for one of them, or for products with num_columns."
        )
    if eigenpairs is not None:
        check_count(eigenpairs, "eigenpairs")
        if eigenpairs > n:
            raise ArgumentError(f"eigenpairs is {eigenpairs}, but the kernel has {n} rows and no more pairs than that.")
        return Job(*typical_calls(eigenpairs, n, n // max(kernel.num_examples, 1)), eigenpairs=eigenpairs)
    if not isinstance(solve, Solve):
        raise ArgumentError(f"solve must be a Solve, such as Solve(noise=0.1), not {solve!r}.")
    if solve.rank > n:
        raise ArgumentError(f"rank is {solve.rank}, but the kernel has {n} rows.")
    costs = column_costs(kernel, solve.right_hand_sides)
    predicted = PredictedSolve.of(solve, kept_spectrum(kernel), kernel.dtype, costs)
    return Job(solve.right_hand_sides, predicted.num_products, solve=predicted)


def column_costs(kernel: Any, right_hand_sides: int) -> ColumnCosts:
    """Predict what else is done with columns in a solve, beside the products of conjugate gradients."""
    if kernel.batch_shape:
        return ColumnCosts()
    engine: Engine = kernel.gramian.engine
    return engine.column_costs(
        kernel.num_examples, written=MOST_AT_ONCE, multiplied=max(right_hand_sides, 1), calls=TYPICAL_STEPS
    )


def kept_spectrum(kernel: Any) -> Spectrum:
    """Return ``sampled_spectrum``, made once while parameters and inputs stay the same, whatever the scale."""
    gramian = kernel.gramian
    scale, rows = gramian.scale, gramian.side1
    unscaled = kernel.unscaled()
    found = kernel.settings.spectrum.get(
        gramian.engine.model, rows.x, rows.selected, None, lambda: sampled_spectrum(unscaled)
    )
    return found if scale is None else Spectrum(found.values * float(scale.detach()), found.counts)


def sampled_spectrum(kernel: Any) -> Spectrum:
    """Estimate all eigenvalues of a square kernel from those of some of its rows and columns.

    These are all rows of some random examples: with random rows, nearly every example would be differentiated. The
    draw is always the same, so that a plan is.

    Cost: K between these rows, written down: less than one product at the sizes where products are long.
    """
    n = kernel.shape[-1]
    size = num_sampled_rows(n)
    generator, outputs = torch.Generator().manual_seed(0), max(1, n // max(kernel.num_examples, 1))
    groups = torch.randperm(-(-n // outputs), generator=generator)[: max(_LEAST_EXAMPLES, size // outputs)]
    rows = (groups.unsqueeze(1) * outputs + torch.arange(outputs)).reshape(-1)
    rows = rows[rows < n]
    chosen = torch.randperm(len(rows), generator=generator)[:size]
    rows = rows[chosen].sort().values.to(kernel.device)
    with torch.no_grad():
        limit = len(rows) ** 2 * kernel.dtype.itemsize
        sample = kernel.detach()._getitem(rows, rows).to_dense(max_dense_bytes=limit)
    return Spectrum.of_sample(torch.linalg.eigvalsh(sample.to("cpu", torch.float64)), n)
