"""Matrices L with ``K ≈ L Lᵀ``, kept while inputs and parameters of a kernel stay the same, whatever its scale."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from linear_operator.functions._root_decomposition import RootDecomposition
from linear_operator.operators import RootLinearOperator
from linear_operator.utils.memoize import add_to_cache
from torch import Tensor

from ntk_lazy.errors import ArgumentError, ShapeError
from ntk_lazy.linalg.nystrom import extended_root, nystrom_root
from ntk_lazy.linalg.random_pivots import pivoted_root
from ntk_lazy.model import FunctionalModel
from ntk_lazy.operator.deflation import root_of_pairs
from ntk_lazy.operator.entries import block, entries
from ntk_lazy.operator.job import column_costs
from ntk_lazy.precision import ieee_precision
from ntk_lazy.solves import COLUMNS_PER_RANK
from ntk_lazy.threads import exclusive


@ieee_precision()
def randomised_root(kernel: Any, rank: int, *, right_hand_sides: int = 1) -> Tensor | None:
    """Approximate K by ``L Lᵀ`` with L of shape ``(*batch, n, rank)``, detached; None under a negative scale.

    From columns of K where these cost less than a product with a random block: each time from the first one on. From
    that product where they do not, and then a root grows by what it has more.

    Args:
        kernel: K, an ``NTKLinearOperator``. The last root of its points and parameters is kept.
        rank: Columns of L.
        right_hand_sides: Of the solves that it is made for.

    Cost: see ``linalg.random_pivots`` and ``linalg.nystrom``.
    """
    scale = kernel.gramian.scale
    if scale is not None and not float(scale.detach()) > 0:
        return None
    root = kept_root(kernel)
    if root is None or root.shape[-1] != rank:
        unscaled, is_written = kernel.unscaled(), column_costs(kernel, right_hand_sides).is_written
        matmul = unscaled._matmul
        with torch.no_grad():
            if root is not None and root.shape[-1] < rank and not is_written:
                root = extended_root(matmul, root, rank)
            else:
                root = None
                kernel.settings.root.forget()  # before its successor is made
                root = (
                    _by_columns(unscaled, rank)
                    if is_written
                    else nystrom_root(matmul, kernel.shape, rank, dtype=kernel.dtype, device=kernel.device)
                )
        if not kernel.batch_shape:
            kernel.settings.root.keep(*_place(kernel), root)
    return _scaled(root, scale)


def _by_columns(kernel: Any, rank: int) -> Tensor:
    """Make a root of a kernel without a scale from its columns, within a series of them."""
    engine, side = kernel.gramian.engine, kernel.gramian.side1
    rows = torch.arange(side.num_rows, device=side.x.device)
    with exclusive(), engine.aside(math.ceil(COLUMNS_PER_RANK * rank)):
        diagonal = entries(engine, side, side, rows, rows)
        return pivoted_root(lambda which: block(engine, side, side.select(which)), diagonal, rank)


def kept_root(kernel: Any) -> Tensor | None:
    """Return the last randomised root, of whichever rank, of the kernel without its scale; None if there is none."""
    return None if kernel.batch_shape else kernel.settings.root.find(*_place(kernel))


def lanczos_root(operator: Any) -> Tensor:
    """Return a root of A by the process of Lanczos, as linear_operator makes it; see ``lanczos_inverse_root``."""
    return _lanczos(operator, None, inverse=False)[0]


def lanczos_inverse_root(operator: Any, initial_vectors: Tensor | None) -> Tensor:
    """Return a root of A^-1 by the process of Lanczos, as linear_operator makes it, and keep that of A beside it.

    linear_operator builds A anew and multiplies with that: here within a series of products, so that these share what
    they can.

    Args:
        operator: A, with a method ``linearised``.
        initial_vectors: Where the process starts; None for one random vector.

    Cost: ``max_root_decomposition_size`` products with as many columns as there are initial vectors.
    """
    roots, inverses = _lanczos(operator, initial_vectors, inverse=True)
    is_several = initial_vectors is not None and initial_vectors.shape[-1] > 1
    # Whoever appends rows to A needs both of one process.
    add_to_cache(operator, "root_decomposition", RootLinearOperator(roots[0] if is_several else roots))
    return inverses


@ieee_precision()
def keep_pairs(kernel: Any, values: Tensor, vectors: Tensor) -> None:
    """Check eigenpairs of K, and keep their root.

    Raises:
        ShapeError: Sizes, dtype or device that are not those of K; a kernel that is batched.
        ArgumentError: Values that are not positive, vectors that are not orthonormal, pairs that are not those of K; a
            kernel that is not square or has no positive scale.
    """
    scale = kernel.gramian.scale
    if kernel.batch_shape:
        raise ShapeError(f"pairs belong to one kernel; this is a batch of shape {tuple(kernel.batch_shape)}: index it.")
    if not kernel.is_symmetric or (scale is not None and not float(scale.detach()) > 0):
        raise ArgumentError("only a square kernel of one set of rows with a positive scale is solved with.")
    with torch.no_grad():
        root = root_of_pairs(kernel.detach()._matmul, kernel, values, vectors)
    kernel.settings.pairs.keep(*_place(kernel), root if scale is None else root / scale.detach().sqrt())


def root_of_kept_pairs(kernel: Any) -> Tensor | None:
    """Return the root that eigenpairs gave, shape ``(n, k)``; None if none were given."""
    root = kernel.settings.pairs.find(*_place(kernel)) if kernel.is_gram_matrix else None
    return None if root is None else _scaled(root, kernel.gramian.scale)


def known_norm(kernel: Any) -> float:
    """Return what a root that is kept shows of the largest eigenvalue of K, from below; 0 if there is none."""
    if not kernel.is_gram_matrix:
        return 0.0
    pairs = kernel.settings.pairs.find(*_place(kernel))
    root = kept_root(kernel) if pairs is None else pairs
    return 0.0 if root is None else float(_scaled(root[:, :1], kernel.gramian.scale).double().square().sum())


def _lanczos(operator: Any, initial_vectors: Tensor | None, *, inverse: bool) -> tuple[Tensor, Tensor]:
    size, tensors = operator._root_decomposition_size(), operator.representation()
    kind = operator.dtype, operator.device, operator.batch_shape, operator.matrix_shape
    # Not A itself, which keeps its root: the graph of the root would hold it, and never be freed.
    again = operator.representation_tree()(*tensors)
    with nullcontext() if operator.batch_shape else again.linearised(size):
        roots, inverses = RootDecomposition.apply(
            lambda *_: again, size, *kind, True, inverse, initial_vectors, *tensors
        )
    return roots, inverses


def _place(kernel: Any) -> tuple[FunctionalModel, Tensor, Tensor | None]:
    """What a kernel is known by."""
    gramian = kernel.gramian
    return gramian.engine.model, gramian.side1.x, gramian.side1.selected


def _scaled(root: Tensor, scale: Tensor | None) -> Tensor:
    return root if scale is None else root * scale.detach().sqrt()
