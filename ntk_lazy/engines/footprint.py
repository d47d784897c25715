"""How many bytes a computation holds, as a function of how many examples and columns go through it at once.

Activations, tangents and temporaries live and die inside autograd and cannot be read off a module. They are counted
where they are made: every operator call reports its results, and the death of a storage is seen as it happens.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, final

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from ntk_lazy.engines.watch import Watch

_POINTS = ((2, 2), (4, 2), (2, 4), (4, 4))


@final
class _LiveBytes(Watch):
    """Record the bytes of all living results after each operator call.

    Convolutions bring their operands and their result into a blocked layout of their own while they run: they count
    once more.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trace: list[int] = []
        self._living: dict[int, weakref.ref[Any]] = {}
        self._total = 0

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._admit(leaf.untyped_storage())
        workspace = 0
        if "convolution" in str(func):
            workspace = sum(t.nbytes for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor))
        self.trace.append(self._total + workspace)
        return result

    def _admit(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._living:
            return
        size = storage.nbytes()

        def forget(_: Any, key: int = key, size: int = size) -> None:
            del self._living[key]
            self._total -= size

        self._living[key] = weakref.ref(storage, forget)
        self._total += size


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
    def assume(cls, *, activation_bytes: int, parameter_bytes: int) -> Self:
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
    def measure(cls, run: Callable[[int, int], object]) -> Self | None:
        """Watch ``run(examples, columns)`` at four small sizes.

        Returns:
            The footprint; None for a computation whose steps depend on the sizes.

        Cost: Four runs with at most 4 examples and 4 columns.
        """
        traces = []
        for examples, columns in _POINTS:
            with _LiveBytes() as live:
                run(examples, columns)
            traces.append(live.trace)
        if len({len(trace) for trace in traces}) != 1:
            return None
        design = np.array([[1, b, c, b * c] for b, c in _POINTS], dtype=np.float64)
        steps = np.linalg.solve(design, np.array(traces, dtype=np.float64))
        return cls(np.unique(steps.T.round().clip(min=0), axis=0))
