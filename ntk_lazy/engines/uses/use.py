"""What every use of a parameter can do, and the plainest one: the rows of J themselves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias, final

from jaxtyping import Float
from torch import Tensor
from typing_extensions import override

from ntk_lazy.engines.chunks import slices
from ntk_lazy.gemm import add_gram_, times_transposed

Coefficients: TypeAlias = Float[Tensor, "b q k"]
ParameterColumns: TypeAlias = Float[Tensor, "k p"]
ParameterRows: TypeAlias = Float[Tensor, "b q p"]

COPY_BYTES = 32 << 20
"""Products and sums that copy their operands do so for pieces of so many bytes."""
# Copies in float64 of pieces of so many bytes stay in cache.
_CACHED_BYTES = 2 << 20
# Entries of a parameter so small that its sums are in float64.
_FEW = 4096


class Use(ABC):
    """The part of J that belongs to one use of one parameter, on a chunk of examples."""

    @property
    @abstractmethod
    def held(self) -> tuple[Tensor | None, Tensor]:
        """The factors: one that is the same for every row of J of an example, if there is one, and the other."""

    @property
    @abstractmethod
    def factors(self) -> tuple[Tensor, ...]:
        """The same with the examples as their first dimension."""

    @property
    @abstractmethod
    def kind(self) -> tuple[object, ...]:
        """All that is not a factor."""

    @abstractmethod
    def with_factors(self, *factors: Tensor) -> Use:
        """The same kind of use with other factors."""

    @property
    @abstractmethod
    def num_entries(self) -> int:
        """Entries of the parameter, p."""

    @abstractmethod
    def pull(self, V: Coefficients, W: ParameterColumns) -> None:
        """Add ``(Jᵀ V)ᵀ`` to W."""

    @abstractmethod
    def push(self, W: ParameterColumns, Y: Coefficients) -> None:
        """Add ``J Wᵀ`` to Y."""

    @abstractmethod
    def rows(self, examples: slice = slice(None)) -> ParameterRows:
        """Write the rows of J down."""

    def as_rows(self) -> Rows:
        """The same with positions summed."""
        return Rows(self.rows())

    @property
    @abstractmethod
    def division(self) -> tuple[object, ...]:
        """How entries are divided: uses of the same division have the same parts, in the same order."""

    @abstractmethod
    def parts(self, num_entries: int) -> Iterator[slice]:
        """Divide the entries of the parameter into parts of about so many; what a part counts is up to the use."""

    @abstractmethod
    def part(self, which: slice) -> ParameterRows:
        """Write the rows of J down for one part."""

    @abstractmethod
    def at(self, examples: slice) -> Use:
        """The same for some examples of the chunk, without a copy."""


@final
@dataclass(frozen=True, eq=False)
class Rows(Use):
    """The rows themselves, for parameters as small as a bias, or wherever they are as cheap as factors."""

    R: ParameterRows

    @property
    @override
    def held(self) -> tuple[Tensor | None, Tensor]:
        return None, self.R

    @property
    @override
    def factors(self) -> tuple[Tensor, ...]:
        return (self.R,)

    @property
    @override
    def kind(self) -> tuple[object, ...]:
        return (Rows,)

    @override
    def with_factors(self, *factors: Tensor) -> Rows:
        return Rows(*factors)

    @property
    @override
    def num_entries(self) -> int:
        return self.R.shape[2]

    @override
    def pull(self, V: Coefficients, W: ParameterColumns) -> None:
        # A bias near the output has one large gradient for all examples: it carries the largest eigenvector, and what
        # a long float32 sum loses would hide small eigenvalues. In float64 it costs next to nothing.
        is_small = self.num_entries <= _FEW
        total = W.double() if is_small else W
        for piece in self._pieces(_CACHED_BYTES if is_small else COPY_BYTES):
            v, R = V[piece].flatten(0, 1), self.R[piece].flatten(0, 1)
            if is_small:
                total.addmm_(v.mT.double(), R.double())
            else:
                add_gram_(total, v, R)
        if is_small:
            W.copy_(total)

    @override
    def push(self, W: ParameterColumns, Y: Coefficients) -> None:
        for piece in self._pieces(COPY_BYTES):
            part = Y[piece]
            part += times_transposed(self.R[piece].flatten(0, 1), W).view_as(part)

    @override
    def rows(self, examples: slice = slice(None)) -> ParameterRows:
        return self.R[examples]

    @property
    @override
    def division(self) -> tuple[object, ...]:
        return "entries", self.num_entries

    @override
    def parts(self, num_entries: int) -> Iterator[slice]:
        return slices(self.R.shape[2], num_entries)

    @override
    def part(self, which: slice) -> ParameterRows:
        return self.R[:, :, which]

    @override
    def at(self, examples: slice) -> Rows:
        return Rows(self.R[examples])

    def _pieces(self, num_bytes: int) -> Iterator[slice]:
        """Cut the chunk into pieces of so many bytes."""
        size = max(1, num_bytes // max(1, self.R.shape[1] * self.R.shape[2] * self.R.element_size()))
        return slices(self.R.shape[0], size)
