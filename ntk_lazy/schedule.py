"""At which steps of a training something is recorded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

from ntk_lazy.errors import ArgumentError


@final
@dataclass(frozen=True)
class LogSpaced:
    """Step 0 and steps that are equally spaced in their logarithm; ``step in schedule`` asks.

    Attributes:
        per_decade: Steps between 1 and 10, between 10 and 100 and so on.
    """

    per_decade: int = 6

    def __post_init__(self) -> None:
        if self.per_decade < 1:
            raise ArgumentError(f"per_decade must be at least 1, not {self.per_decade}.")

    def __contains__(self, step: object) -> bool:
        if not isinstance(step, int) or step < 0:
            return False
        if step == 0:
            return True
        nearest = round(math.log10(step) * self.per_decade)
        # Neighbours too: rounding 10^(i/d) to a step may move it past the middle between two exponents.
        return any(round(10 ** (i / self.per_decade)) == step for i in (nearest - 1, nearest, nearest + 1))
