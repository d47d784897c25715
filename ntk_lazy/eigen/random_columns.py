"""Random columns in a fixed order, so that the same seed gives the same solve."""

from __future__ import annotations

import torch

from ntk_lazy.rows import Rows
from ntk_lazy.shapes import Block

_DRAWS_PER_SEED = 1 << 20


class RandomColumns:
    """A source of independent standard normal blocks; the global RNG is not touched."""

    def __init__(self, rows: Rows, *, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rows = rows
        self.dtype = dtype
        self.device = device
        self._seed = seed * _DRAWS_PER_SEED
        self._num_draws = 0

    def __call__(self, num_columns: int) -> Block:
        """Draw the local rows of the next block."""
        self._num_draws += 1
        return self.rows.random_block(
            num_columns, seed=self._seed + self._num_draws, dtype=self.dtype, device=self.device
        )

    def mixing(self, num_rows: int, num_columns: int) -> torch.Tensor:
        """Draw a small float64 matrix, the same on every process, that mixes columns at random."""
        self._num_draws += 1
        generator = torch.Generator().manual_seed((self._seed + self._num_draws) % 2**63)
        return torch.randn(num_rows, num_columns, generator=generator, dtype=torch.float64)
