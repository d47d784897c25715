"""One side of a kernel: examples, and which of their rows the kernel has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast, final

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from ntk_lazy.shapes import Block


@final
@dataclass(frozen=True, eq=False)
class Side:
    """Rows of J on one side of the kernel.

    Attributes:
        x: Shape ``(*batch, N, *example)``.
        selected: Which of the ``N * rows_per_example`` rows, in which order; None for all. Repeats are allowed.
        example_dims: Trailing dimensions of ``x`` that make one example.
        rows_per_example: Rows that one example owns.
    """

    x: Tensor
    selected: Int64[Tensor, " rows"] | None
    example_dims: int
    rows_per_example: int

    @property
    def axis(self) -> int:
        """The dimension of ``x`` that counts examples."""
        return self.x.ndim - 1 - self.example_dims

    @property
    def batch_shape(self) -> torch.Size:
        """Leading dimensions of ``x``."""
        return self.x.shape[: self.axis]

    @property
    def num_examples(self) -> int:
        """N."""
        return self.x.shape[self.axis]

    @property
    def num_rows(self) -> int:
        """Rows of the kernel on this side."""
        return self.num_examples * self.rows_per_example if self.selected is None else self.selected.shape[0]

    def with_x(self, x: Tensor) -> Side:
        """Keep the rows and exchange the inputs."""
        return Side(x, self.selected, self.example_dims, self.rows_per_example)

    def expand(self, batch_shape: torch.Size) -> Side:
        """Broadcast the batch dimensions, without a copy."""
        return self.with_x(self.x.expand(*batch_shape, *self.x.shape[self.axis :]))

    def select(self, index: slice | Tensor) -> Side:
        """Take rows, dropping the examples that none of them belongs to.

        A slice of whole examples stays a view of ``x``; anything else copies the examples it needs, once each.
        """
        rows = torch.arange(self.num_rows, device=self.x.device) if self.selected is None else self.selected
        rows = rows[index]
        r = self.rows_per_example
        examples, place = torch.unique(torch.div(rows, r, rounding_mode="floor"), return_inverse=True)
        kept = place * r + rows % r
        count = examples.shape[0]
        is_whole = kept.shape[0] == count * r and bool((kept == torch.arange(count * r, device=kept.device)).all())
        return Side(self._take(examples), None if is_whole else kept, self.example_dims, r)

    def is_same(self, other: Side) -> bool:
        """Whether two sides are the same rows, so that ``K[i][:, i]`` is known to be symmetric.

        Inputs that ask for gradients are kept apart: each side has a gradient of its own.
        """
        if (
            self.x.requires_grad
            or other.x.requires_grad
            or self.x.shape != other.x.shape
            or self.x.dtype != other.x.dtype
        ):
            return False
        if (self.selected is None) != (other.selected is None) or not torch.equal(self.x, other.x):
            return False
        return self.selected is None or torch.equal(self.selected, cast(Tensor, other.selected))

    def scatter(self, V: Block) -> Float[Tensor, "all_rows k"]:
        """Give the columns rows for all outputs of all examples; the transpose of ``gather``."""
        if self.selected is None:
            return V
        full = V.new_zeros(self.num_examples * self.rows_per_example, V.shape[1])
        return full.index_add_(0, self.selected, V)

    def gather(self, Y: Float[Tensor, "all_rows k"]) -> Block:
        """Keep the rows of this side."""
        return Y if self.selected is None else Y[self.selected]

    def among_all(self, index: Tensor) -> Tensor:
        """Number rows among all outputs of all examples."""
        return index if self.selected is None else self.selected[index]

    def _take(self, examples: Tensor) -> Tensor:
        count = examples.shape[0]
        if count == self.num_examples:
            return self.x
        if count > 0:
            first, last = int(examples[0]), int(examples[-1])
            step = 1 if count == 1 else (last - first) // (count - 1)
            if step * (count - 1) == last - first and bool(
                (examples == torch.arange(first, last + 1, max(step, 1), device=examples.device)).all()
            ):
                return self.x[(slice(None),) * self.axis + (slice(first, last + 1, max(step, 1)),)]
        return self.x.index_select(self.axis, examples)
