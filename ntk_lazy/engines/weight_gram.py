"""``JᵀJ``: the Gram matrix of the columns of J, where these are fewer than its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from ntk_lazy.engines.chunks import slack, slices
from ntk_lazy.engines.contract import Engine
from ntk_lazy.engines.planned import Alternative, PlannedEngine
from ntk_lazy.engines.rates import machine_rates
from ntk_lazy.precision import ieee_precision
from ntk_lazy.solves import PredictedSolve

WEIGHTS = "weights"
"""Name of this way of solving among the alternatives of a plan."""
_COPIES = 3  # the matrix, what is added to its diagonal, and the factor
_BLOCK = 512  # columns at a time: what is left of the diagonal is not multiplied
_ROWS_SHARE = 0.25  # of the budget: rows of J
_SHARE_OF_RATE = {"gram": 0.6, "factor": 0.4}


@final
@dataclass(eq=False)
class WeightGram:
    """``JᵀJ``, or ``Jᵀ diag(v) J``, in float64, with its last Cholesky factor.

    Attributes:
        matrix: On the device of J; what is below the diagonal is not meant.
    """

    matrix: Float64[Tensor, "features features"]
    _factor: tuple[float, Tensor | None] | None = None

    @classmethod
    @ieee_precision()
    def of(cls, engine: Engine, x: Tensor, v: Float[Tensor, " all_rows"] | None) -> WeightGram:
        """Add it up over chunks of examples.

        Args:
            engine: Makes the rows of J.
            x: Examples.
            v: Weights of the rows, not negative; None for ones.

        Cost: the rows of J once, and ``n F²`` operations in float64.
        """
        size, r = engine.num_features, engine.layout.rows_per_example
        matrix = torch.zeros(size, size, dtype=torch.float64, device=engine.model.device)
        for examples in _chunks(engine, x.shape[0]):
            with torch.no_grad():
                J = engine.rows(x[examples]).reshape(-1, size).double()
                if v is not None:
                    J *= v[examples.start * r : examples.stop * r].double().sqrt().unsqueeze(1)
                for columns in slices(size, _BLOCK):
                    matrix[: columns.stop, columns].addmm_(J[:, : columns.stop].mT, J[:, columns])
        return cls(matrix)

    @property
    def trace(self) -> float:
        """Sum of its eigenvalues."""
        return float(self.matrix.diagonal().sum())

    def factor(self, shift: float) -> Float64[Tensor, "features features"] | None:
        """Return L, lower triangular, with ``L Lᵀ = JᵀJ + shift I``; None where rounding makes that indefinite.

        Cost: ``F³ / 3`` operations, unless it is the one of last time.
        """
        if self._factor is None or self._factor[0] != shift:
            self._factor = None  # let go before its successor is made
            shifted = self.matrix.clone()
            shifted.diagonal().add_(shift)
            U, info = torch.linalg.cholesky_ex(shifted, upper=True)
            self._factor = shift, None if int(info) else U.mT
        return self._factor[1]


def weight_gram_fits(engine: Engine, num_rows: int) -> bool:
    """Whether J has fewer columns than rows, and half of the budget holds what is made of them."""
    size = engine.num_features
    return 0 < size < num_rows and _COPIES * 8 * size**2 <= engine.budget // 2


def weight_alternative(
    engine: PlannedEngine, num_examples: int, num_rows: int, predicted: PredictedSolve
) -> Alternative | None:
    """Predict what solves by the Gram matrix of the columns would take; None where J has as many columns as rows.

    Args:
        engine: Of the kernel.
        num_examples: N.
        num_rows: Of the kernel.
        predicted: What they would take by conjugate gradients.
    """
    size, job, device = engine.num_features, predicted.job, engine.model.device
    if not 0 < size < num_rows:
        return None
    rates = machine_rates(device, torch.float64)
    cost = engine._cost((num_examples, num_examples), True)
    written = num_examples * engine.layout.rows_per_example
    seconds = cost.rows() + written * size**2 / (_SHARE_OF_RATE["gram"] * rates.flops)
    # A third of the cube for the factor, and as much again for traces of its inverse.
    seconds += job.num_solves * (2 / 3) * size**3 / (_SHARE_OF_RATE["factor"] * rates.flops)
    # To the weights and back, and the residual.
    ways = engine.alternatives(
        (num_examples, num_examples), is_symmetric=True, columns=job.right_hand_sides, calls=2 * job.num_solves
    )
    seconds += min(way.seconds for way in ways if way.engine != "gram")
    how = f"JᵀJ, {size:,} x {size:,}, written down once and factorised" + (" each time" if job.num_solves > 1 else "")
    if not weight_gram_fits(engine, num_rows):
        return Alternative(WEIGHTS, seconds, None, how)
    chunk = _chunks(engine, num_examples)[0]
    held = _COPIES * 8 * size**2 + (chunk.stop - chunk.start) * _row_bytes(engine)
    return Alternative(WEIGHTS, seconds, held, how)


def _chunks(engine: Engine, num_examples: int) -> list[slice]:
    """Divide examples into chunks whose rows of J, and their copies in float64, fit their share."""
    found = engine.row_chunks(num_examples)
    theirs = found[0].stop - found[0].start if found else 1
    ours = max(1, int(_ROWS_SHARE * engine.budget) // _row_bytes(engine))
    return list(slices(num_examples, min(theirs, ours)))


def _row_bytes(engine: Engine) -> int:
    """Of the rows of J of one example, while they are gathered and added up."""
    itemsize = engine.model.dtype.itemsize
    each = slack(engine.model.device.type) * 3 * itemsize + 8
    return int(each * engine.layout.rows_per_example * engine.num_features)
