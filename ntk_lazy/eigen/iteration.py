"""What the driver asks of a method: one block call at a time, and the pairs it holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Float64
from torch import Tensor

from ntk_lazy.shapes import Block


@dataclass(frozen=True, kw_only=True)
class RitzPairs:
    """Approximate eigenpairs, in descending order and in units of the scale of ``Product``.

    Attributes:
        theta: Ritz values ``(j,)``.
        coefficients: ``(m, j)``: the vectors in the coordinates of the method's space.
        residuals: ``‖A x − theta x‖`` as the method knows them, without rounding of ``x`` to its dtype.
        removable: Their part outside the space. The other part is rounding of products already made, which no
            further step reduces.
        rounding: Size that ``removable`` may keep for ever: 0 where it is exact up to the rounding of its own sums.
        asymmetry: Largest difference between ``⟨u, Av⟩`` and ``⟨Au, v⟩`` in the space.
    """

    theta: Float64[Tensor, " j"]
    coefficients: Float64[Tensor, "m j"]
    residuals: Float64[Tensor, " j"]
    removable: Float64[Tensor, " j"]
    asymmetry: float
    rounding: float = 0.0


@dataclass(frozen=True)
class Space:
    """Vectors that were multiplied, and the operator projected on them.

    Attributes:
        V: ``(n, m)``, orthonormal up to rounding.
        T: ``Vᵀ A V``.
        M: ``Vᵀ V``.
    """

    V: Block
    T: Float64[Tensor, "m m"]
    M: Float64[Tensor, "m m"]


class Iteration(Protocol):
    """A method that improves a space by one block call at a time."""

    @property
    def next_width(self) -> int:
        """Columns that the next step multiplies."""
        ...

    @property
    def is_exhaustive(self) -> bool:
        """Whether the space is everything, so that nothing can be missing and nothing can improve."""
        ...

    @property
    def held_bytes(self) -> int:
        """Bytes of long vectors held between steps."""
        ...

    def step(self) -> RitzPairs:
        """Multiply once and extract at least as many pairs as are wanted, or all there are."""
        ...

    def space(self) -> Space:
        """The space that the pairs were extracted from, as a view."""
        ...

    def combine(self, coefficients: Float64[Tensor, "m j"]) -> Block:
        """Form long vectors from coefficients."""
        ...

    def combine_images(self, coefficients: Float64[Tensor, "m j"]) -> Block:
        """Form ``A x`` for such vectors from products that were already made."""
        ...

    def inject(self, block: Block) -> None:
        """Add directions to the space."""
        ...

    def tighten(self, rtol: float) -> None:
        """Aim at a smaller tolerance from now on."""
        ...
