"""Parts of parameters: one of the projections that are packed into one weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import final

from torch import Tensor
from typing_extensions import override

from ntk_lazy.engines.uses.use import Coefficients, ParameterColumns, ParameterRows, Use


@final
@dataclass(frozen=True, eq=False)
class Within(Use):
    """A use of some entries of a parameter that lie together, as of one part of a packed projection.

    Attributes:
        inner: The use of these.
        start: The first of them.
        size: Entries of the parameter.
    """

    inner: Use
    start: int
    size: int

    @property
    @override
    def held(self) -> tuple[Tensor | None, Tensor]:
        return self.inner.held

    @property
    @override
    def num_entries(self) -> int:
        return self.size

    @property
    @override
    def kind(self) -> tuple[object, ...]:
        return Within, self.start, self.size, self.inner.num_entries, *self.inner.kind

    @property
    @override
    def factors(self) -> tuple[Tensor, ...]:
        return self.inner.factors

    @override
    def with_factors(self, *factors: Tensor) -> Within:
        return replace(self, inner=self.inner.with_factors(*factors))

    @property
    def _place(self) -> slice:
        return slice(self.start, self.start + self.inner.num_entries)

    @override
    def pull(self, V: Coefficients, W: ParameterColumns) -> None:
        own = W[:, self._place].contiguous()
        self.inner.pull(V, own)
        W[:, self._place] = own

    @override
    def push(self, W: ParameterColumns, Y: Coefficients) -> None:
        self.inner.push(W[:, self._place].contiguous(), Y)

    @override
    def rows(self, examples: slice = slice(None)) -> ParameterRows:
        own = self.inner.rows(examples)
        R = own.new_zeros(*own.shape[:2], self.size)
        R[:, :, self._place] = own
        return R

    @property
    @override
    def division(self) -> tuple[object, ...]:
        return "within", self.start, self.size, *self.inner.division

    @override
    def parts(self, num_entries: int) -> Iterator[slice]:
        return self.inner.parts(num_entries)

    @override
    def part(self, which: slice) -> ParameterRows:
        return self.inner.part(which)

    @override
    def at(self, examples: slice) -> Within:
        return replace(self, inner=self.inner.at(examples))
