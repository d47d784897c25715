"""``eigsh``: the largest eigenpairs of a symmetric operator, certified."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Literal

import numpy as np
from torch import Tensor

from ntk_lazy.counts import (
    LARGEST_DENSE,
    NUM_FRESH,
    derived_block_size,
    prefers_dense,
    start_width,
    typical_products,
)
from ntk_lazy.eigen.arguments import (
    as_seed,
    as_tolerance,
    check_choices,
    check_counts,
    check_progress,
    check_solver,
)
from ntk_lazy.eigen.block_size import block_size
from ntk_lazy.eigen.contract import Linearised, SymmetricOperator, as_symmetric_operator, way_to_write_down
from ntk_lazy.eigen.dense import DenseSpectrum
from ntk_lazy.eigen.driver import Search, Task
from ntk_lazy.eigen.iteration import Iteration
from ntk_lazy.eigen.lanczos import BlockKrylov
from ntk_lazy.eigen.lobpcg import LocallyOptimal
from ntk_lazy.eigen.options import LOBPCG, Dense, Lanczos, Solver
from ntk_lazy.eigen.product import Product
from ntk_lazy.eigen.progress import Callback, progress_display
from ntk_lazy.eigen.random_columns import RandomColumns
from ntk_lazy.eigen.result import EigenResult
from ntk_lazy.eigen.start import check_start, start_block
from ntk_lazy.eigen.verify import Verify
from ntk_lazy.eigen.write_down import MOST_CHECKS, WriteDown
from ntk_lazy.errors import ArgumentError, NotConvergedError
from ntk_lazy.linalg.largest_pairs import check_size
from ntk_lazy.precision import ieee_precision

_HOPELESS = 20  # times what a search usually takes
_CHEAP_BASIS = 512  # vectors whose projection is solved in a tenth of a second
_CHECKS = 64  # products that certification may add to those of a dense matrix, and then some


@ieee_precision()
def eigsh(  # noqa: PLR0913 - the public signature is fixed by the design
    A: object,
    k: int,
    *,
    solver: Literal["auto"] | Solver = "auto",
    rtol: float = 1e-3,
    start: Tensor | EigenResult | None = None,
    seed: int = 0,
    max_products: int | None = None,
    verify: Verify = "fast",
    on_unconverged: Literal["raise", "return"] = "raise",
    progress: bool | Callback = False,
) -> EigenResult:
    """Find the ``k`` largest eigenvalues of a symmetric operator and their vectors, and say how sure that is.

    "Largest" is meant with sign. The operator is scaled by its measured norm, so that no threshold is absolute.

    Args:
        A: A symmetric tensor or array of NumPy, a sparse one of torch or SciPy, a square ``LinearOperator`` of
            linear_operator or SciPy, or a ``SymmetricOperator``; float32 or float64.
        k: Number of pairs, at most the number of rows.
        solver: ``Lanczos(...)``, ``LOBPCG(...)``, ``Dense()``, or ``"auto"``: ``Dense`` where it costs no more
            products than ``Lanczos`` or the operator is small; else ``Lanczos``, which up to 20,000 rows gives way to
            ``Dense`` before more than about ``1.2 n`` products are spent.
        rtol: ``‖A v − λ v‖ <= rtol · |λ|`` for each pair. Values below the noise floor of the arithmetic cannot
            meet it and are tested against the noise floor (``EigenResult.is_below_noise`` names them).
        start: Shape ``(n, s)``, any ``s``, or an earlier result: where to begin. Random columns are always
            added. Worth 5 to 35 % of the products between neighbouring checkpoints.
        seed: Of all random columns. Same seed, same result.
        max_products: Most products to spend; None: 20 times what a search usually takes, for ``"auto"`` at most
            about ``1.2 n``.
        verify: ``"fast"`` looks for missed eigenvalues with 16 to 48 products, ``"rigorous"`` gives a probability
            (about 50 products), False does not look.
        on_unconverged: Whether a set that is not complete is raised or returned. It is never called converged.
        progress: True for a line on standard error, or a function of a ``SolveState``.

    Returns:
        The pairs, with residuals, bounds and cost.

    Cost: about ``1.75 k + 5 b`` products in blocks of ``b`` to ``rtol = 1e-3`` for ``Lanczos``, the probe, and for
        certification ``k`` products (``k <= b``) or at most 8 plus those in doubt; about ``2 k + 8 b`` long vectors.

    Raises:
        ArgumentError: An argument or an operator that no search makes sense for; its subclasses ``ShapeError`` and
            ``NonFiniteError`` say what is wrong with a shape or a number.
        NotConvergedError: The search ended early; ``.result`` holds what was found.

    Source: Musco and Musco, NeurIPS 2015, block Krylov iteration for low-rank approximation; Golub and Underwood
        1977, block Lanczos.
    """
    operator = as_symmetric_operator(A)
    n = operator.rows.total
    k = int(k) if isinstance(k, np.integer) else k
    check_counts(k, n, max_products=max_products)
    check_choices(verify, on_unconverged)
    check_solver(solver)
    check_progress(progress)
    rtol, seed = as_tolerance(rtol), as_seed(seed)
    draw = RandomColumns(operator.rows, seed=seed, dtype=operator.dtype, device=operator.device)
    check_start(start, draw=draw)
    num_outputs = _num_outputs(operator)
    chosen = _automatic(k, n, num_outputs) if solver == "auto" else solver
    expected = typical_products(k, num_outputs)
    if isinstance(chosen, Dense):
        check_size(n)
        expected = n if way_to_write_down(operator) is None else MOST_CHECKS
    limit = max_products or _generous_limit(chosen, n, expected, rtol, is_free=solver == "auto")
    product = Product(operator, max_products=limit)
    kept = A.linearised(round(expected)) if isinstance(A, Linearised) else nullcontext()
    with kept:
        widths = block_size(chosen, k, num_outputs=num_outputs, product=product, draw=draw)
        method, name = _build(chosen, product, draw, k=k, widths=widths, start=start, rtol=rtol)
        task = Task(
            num_wanted=k,
            rtol=rtol,
            seed=seed,
            verify=verify,
            fresh_width=0 if isinstance(chosen, Dense) else widths[0],
            method=name,
        )
        may_write = solver == "auto" and n <= LARGEST_DENSE
        way_out = WriteDown(product, k, expected) if may_write else None
        with progress_display(progress, num_wanted=k) as callback:
            result = Search(task, product, method, draw, callback, way_out=way_out).run()
    if result.status != "converged" and on_unconverged == "raise":
        raise NotConvergedError(_explain(result, k, n, limit), result=result)
    return result


def _automatic(k: int, n: int, num_outputs: int) -> Solver:
    """Choose the cheaper solver; one that may end by writing the matrix down restarts late, as that loses products."""
    if prefers_dense(k, n, num_outputs):
        return Dense()
    if n > LARGEST_DENSE:
        return Lanczos()
    width = start_width(derived_block_size(k), k, num_outputs)
    return Lanczos(max_basis=min(n, max(_default_basis(k, width), _CHEAP_BASIS)))


def _default_basis(k: int, width: int) -> int:
    return 3 * k + 10 * width


def _generous_limit(solver: Solver, n: int, typical: float, rtol: float, *, is_free: bool) -> int:
    """Choose the products after which a search is hopeless."""
    hopeless = _HOPELESS * math.ceil(typical)
    if isinstance(solver, Dense):
        return n + _CHECKS
    if is_free:
        # A search that writes the matrix down sees to it itself; one that cannot is not to spend more than that.
        return 2 * n + _CHECKS if n <= LARGEST_DENSE else min(hopeless, math.ceil(1.2 * n))
    if isinstance(solver, LOBPCG):
        # It remembers three blocks, so that each digit costs as much as the last: twice the products of Lanczos for the
        # first three, and so on. After ten times what all entries cost it goes on only where that is very little.
        digits = max(1.0, -math.log10(rtol) / 3)
        return max(hopeless, min(math.ceil(2 * digits * hopeless), 10 * n))
    return hopeless


def _num_outputs(operator: SymmetricOperator) -> int:
    """Outputs of the model behind the operator, where it knows: eigenvalues come in clusters of so many."""
    known = getattr(operator, "num_outputs", 1)
    return known if isinstance(known, int) and known > 0 else 1


def _build(
    solver: Solver,
    product: Product,
    draw: RandomColumns,
    *,
    k: int,
    widths: tuple[int, int],
    start: Tensor | EigenResult | None,
    rtol: float,
) -> tuple[Iteration, str]:
    """Make the method that the options describe, and say in words which it is."""
    n = product.rows.total
    width, first = widths
    if isinstance(solver, Dense):
        dense = DenseSpectrum(product, num_wanted=k, block_size=width, matrix=product.written_down())
        return dense, f"Dense(block_size={width})"
    if isinstance(solver, LOBPCG):
        block = start_block(start, width=width, draw=draw)
        method = LocallyOptimal(product, draw, start=block, num_wanted=k, rtol=rtol)
        return method, f"LOBPCG(num_guards={width - k})"
    max_basis = min(n, solver.max_basis or _default_basis(k, first))
    least = min(n, k + max(1, k // 8) + 2 * max(first, NUM_FRESH + 1))
    if max_basis < least:
        raise ArgumentError(
            f"max_basis is {max_basis}; {k} pairs in blocks of {width} need at least {least} vectors to restart."
        )
    block = start_block(start, width=first, draw=draw)
    options = {"block_size": width, "max_basis": max_basis}
    krylov = BlockKrylov(product, draw, start=block, num_wanted=k, rtol=rtol, **options)
    return krylov, f"Lanczos(block_size={width}, max_basis={max_basis})"


def _explain(result: EigenResult, k: int, n: int, limit: int) -> str:
    """Say what is missing and what would help."""
    found = int(result.converged.sum())
    head = f"{found} of {k} eigenpairs met rtol = {result.rtol:.0e} after {result.cost.columns} products"
    if result.status == "max_products":
        dense = f" solver=Dense() takes {n} products." if limit > n and not result.method.startswith("Dense") else ""
        return (
            f"{head}; max_products = {limit} left no room to go on. Raise it, or loosen rtol.{dense} "
            "The pairs found so far are in .result."
        )
    return (
        f"{head}; the residuals of the others are rounding of its {result.vectors.dtype} products and will not "
        "fall further. Use a float64 model, a larger rtol or a smaller k; all pairs are in .result."
    )
