"""Which rows of a long vector this process holds, and how sums over all rows are made.

Everything that a solver may do with a long vector and that needs more than the local rows goes through
this file, so that a sharded operator needs another ``Rows`` and not another solver.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ntk_lazy.errors import ArgumentError
from ntk_lazy.shapes import Block

_ROWS_PER_SEED = 4096


@dataclass(frozen=True)
class Rows:
    """The rows ``start:stop`` of ``total``, held by one process.

    One process holds all rows unless ``start`` and ``stop`` say otherwise.
    """

    total: int
    start: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end <= self.total:
            raise ArgumentError(f"rows {self.start}:{self.end} do not lie in 0:{self.total}.")

    @property
    def end(self) -> int:
        """One past the last local row."""
        return self.total if self.stop is None else self.stop

    @property
    def local(self) -> int:
        """Number of rows held here."""
        return self.end - self.start

    def sum(self, partial: Tensor) -> Tensor:
        """Add a partial sum over the local rows to those of the other processes."""
        return partial

    def random_block(
        self, num_columns: int, *, seed: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> Block:
        """Draw standard normal columns that depend on the seed and the global row alone.

        The same rows get the same numbers on every device, in every dtype up to rounding, and however the
        rows are shared out, which is what makes a solve repeatable. The global RNG is not touched.

        Args:
            num_columns: Columns of the block.
            seed: Any integer; different seeds give independent blocks.
            dtype: Dtype of the result; the numbers are drawn in float64.
            device: Where the result is wanted; the numbers are drawn on the CPU.

        Returns:
            Shape ``(local, num_columns)``.
        """
        pieces = []
        first = self.start // _ROWS_PER_SEED
        for piece in range(first, -(-self.end // _ROWS_PER_SEED)):
            generator = torch.Generator().manual_seed((seed * 1_000_003 + piece) % 2**63)
            drawn = torch.randn(_ROWS_PER_SEED, num_columns, generator=generator, dtype=torch.float64)
            begin = piece * _ROWS_PER_SEED
            pieces.append(drawn[max(self.start - begin, 0) : max(self.end - begin, 0)].to(dtype))
        if not pieces:
            return torch.empty(0, num_columns, dtype=dtype, device=device)
        return torch.cat(pieces).to(device)
