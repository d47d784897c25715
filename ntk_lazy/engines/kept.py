"""Linearisations that outlive one product, while parameters and inputs are promised not to change."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

from torch import Tensor

from ntk_lazy.engines.linearisation import Linearisation


@final
class KeptLinearisations:
    """Keep the linearisations of the first chunks that fit a number of bytes; the others are made anew each time.

    Every product goes through the chunks in the same order, so that dropping the oldest for the newest would keep
    none that is asked for next.
    """

    def __init__(self, budget: int) -> None:
        self._room = budget
        # With the inputs: while these are held, no others can lie at the address that stands in the key.
        self._kept: dict[tuple[object, ...], tuple[Tensor, Linearisation]] = {}

    def get(self, x: Tensor, make: Callable[[], Linearisation], size: int) -> Linearisation:
        """Return the linearisation on a view of the inputs, kept or new.

        Args:
            x: The chunk; the same view of the same memory is the same chunk.
            make: Makes the linearisation.
            size: Bytes that it holds.
        """
        key = (x.data_ptr(), x.shape, x.stride())
        if key in self._kept:
            return self._kept[key][1]
        made = make()
        if size <= self._room:
            self._room -= size
            self._kept[key] = x, made
        return made
