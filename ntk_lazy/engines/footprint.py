"""How many bytes a computation holds, as a function of how many examples and columns go through it at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self, final

import numpy as np
from jaxtyping import Float64

from ntk_lazy.engines.live_bytes import LiveBytes

_POINTS = ((2, 2), (4, 2), (2, 4), (4, 4))


@final
@dataclass(frozen=True, eq=False)
class Footprint:
    """Bytes held by each step of a computation: ``one + b examples + c columns + bc both``.

    A step is linear in each of the two sizes, and the most that any step holds is what a chunk takes. Which step that
    is changes with the sizes, so that no straight line through two small runs would tell.

    Attributes:
        steps: Shape ``(steps, 4)``, the coefficients in that order.
    """

    steps: Float64[np.ndarray, "steps 4"]

    def bytes(self, examples: int, columns: int) -> int:
        """The most that any step holds."""
        return int((self.steps @ np.array([1, examples, columns, examples * columns])).max())

    @classmethod
    def by_column(cls, *, activation_bytes: int, parameter_bytes: int) -> Self:
        """Bound a computation that goes column by column: three times what one backward pass needs."""
        a, p = 3 * activation_bytes, 3 * parameter_bytes
        return cls(np.array([[p, a, p, 0]], dtype=np.float64))

    @classmethod
    def of_gradients(cls, *, activation_bytes: int, parameter_bytes: int) -> Self:
        """Estimate the gradient of ``⟨Jᵀ u, w⟩`` by a second backward pass.

        Each column keeps the graph of its first backward pass beside its gradient and its part of w. Fitted to the
        peaks of perceptrons and convolutions, over the slack that is added to all footprints.
        """
        a, p = activation_bytes, parameter_bytes
        return cls(np.array([[2.4 * p, 3.6 * a, 2.3 * p, 2.6 * a]]))

    @classmethod
    def vectorised(
        cls, *, activation_bytes: int, largest_bytes: int, parameter_bytes: int, largest_parameter_bytes: int
    ) -> Self:
        """Predict a computation that goes through all columns at once, as ``measure`` found it on many networks.

        Forward mode and the backward pass hold up to five of the largest results for each example and column, beside
        what the graph keeps; the gradients are there twice when they are added up, and that of the largest parameter
        once more while it is made.

        Args:
            activation_bytes: Kept by the graph, for an example.
            largest_bytes: Of the largest result, for an example.
            parameter_bytes: Of all parameters.
            largest_parameter_bytes: Of the largest of them.
        """
        a, t, p = activation_bytes, largest_bytes, parameter_bytes
        return cls(np.array([[p, a + 3 * t, 2 * p + largest_parameter_bytes, 5 * t]], dtype=np.float64))

    @classmethod
    def measure(cls, run: Callable[[int, int], object]) -> Self | None:
        """Watch ``run(examples, columns)`` at four small sizes.

        Returns:
            The footprint; None for a computation whose steps depend on the sizes.

        Cost: Four runs with at most 4 examples and 4 columns.
        """
        traces = []
        for examples, columns in _POINTS:
            with LiveBytes() as live:
                run(examples, columns)
            traces.append(live.trace)
        if len({len(trace) for trace in traces}) != 1:
            return None
        design = np.array([[1, b, c, b * c] for b, c in _POINTS], dtype=np.float64)
        steps = np.linalg.solve(design, np.array(traces, dtype=np.float64))
        return cls(np.unique(steps.T.round().clip(min=0), axis=0))
