"""Factors of some examples; and of many chunks in one, each kind in one block of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TypeAlias, final

import torch
from torch import Tensor

from ntk_lazy.engines.uses import Use

# For each pass and parameter how it is used, and for each factor the first one that is the same numbers.
Allocator: TypeAlias = Callable[[tuple[int, ...], torch.dtype], Tensor]
Structure: TypeAlias = tuple[list[dict[str, list[tuple[object, ...]]]], list[int]]


@final
@dataclass(frozen=True, eq=False)
class Chunk:
    """Factors of some examples.

    Attributes:
        examples: Which ones.
        uses: For each pass, and each covered parameter, its uses.
    """

    examples: slice
    uses: tuple[dict[str, list[Use]], ...]

    @property
    def num_examples(self) -> int:
        """How many."""
        return self.examples.stop - self.examples.start

    def within(self, stretch: slice) -> Chunk | None:
        """The part that lies in a stretch of the examples, counted from where it begins; None if there is none."""
        start, stop = max(self.examples.start, stretch.start), min(self.examples.stop, stretch.stop)
        if start >= stop:
            return None
        own = slice(start - self.examples.start, stop - self.examples.start)
        uses = tuple({name: [use.at(own) for use in found] for name, found in one.items()} for one in self.uses)
        return Chunk(slice(start - stretch.start, stop - stretch.start), uses)


def join(chunks: Iterable[Chunk], num_examples: int, allocate: Allocator | None = None) -> list[Chunk]:
    """Copy successive chunks that use their parameters alike into one, as they come.

    Blocks for all examples are as large as what they hold. Chunk by chunk, what stays would lie between what goes,
    forward passes and their graphs, and the holes cost as much memory again.

    Args:
        chunks: In the order of their examples.
        num_examples: Of all of them together.
        allocate: Makes the blocks, from shape and dtype; None for memory on the device of the factors.

    Returns:
        One chunk for most models; more where a model takes another way for some examples.
    """
    runs: list[_Run] = []
    for chunk in chunks:
        if not runs and chunk.num_examples == num_examples and allocate is None:
            return [chunk]
        structure = _structure(chunk)
        if not runs or runs[-1].structure != structure:
            runs.append(_Run(chunk, structure, num_examples - chunk.examples.start, allocate))
        runs[-1].add(chunk)
        del chunk  # before the next one is made
    return [run.whole() for run in runs]


@final
class _Run:
    """Chunks of one structure.

    Attributes:
        structure: How they use their parameters.
    """

    def __init__(self, first: Chunk, structure: Structure, capacity: int, allocate: Allocator | None) -> None:
        self.structure = structure
        self._begin = self._end = first.examples.start
        self._empty = [
            {name: [use.with_factors(*_emptied(use.factors)) for use in found] for name, found in uses.items()}
            for uses in first.uses
        ]
        self._blocks = {}
        for number, factor in enumerate(_factors(first)):
            if structure[1][number] == number:
                shape = (capacity, prod(factor.shape[1:]))
                make = allocate or partial(_on_device, factor.device)
                self._blocks[number] = make(shape, factor.dtype)

    def add(self, chunk: Chunk) -> None:
        """Put a chunk behind the others."""
        place = slice(chunk.examples.start - self._begin, chunk.examples.stop - self._begin)
        for number, factor in enumerate(_factors(chunk)):
            if number in self._blocks:
                self._blocks[number][place].view(-1, *factor.shape[1:]).copy_(factor)
        self._end = chunk.examples.stop

    def whole(self) -> Chunk:
        """All of them as one, in the memory of the blocks."""
        length, owners = self._end - self._begin, iter(self.structure[1])

        def filled(use: Use) -> Use:
            blocks = ((self._blocks[next(owners)], factor.shape[1:]) for factor in use.factors)
            return use.with_factors(*(block[:length].view(length, *shape) for block, shape in blocks))

        uses = tuple({name: [filled(use) for use in found] for name, found in uses.items()} for uses in self._empty)
        return Chunk(slice(self._begin, self._end), uses)


def _structure(chunk: Chunk) -> Structure:
    kinds = [
        {
            name: [(*use.kind, *((f.shape[1:], f.dtype) for f in use.factors)) for use in found]
            for name, found in uses.items()
        }
        for uses in chunk.uses
    ]
    seen: dict[tuple[object, ...], int] = {}
    return kinds, [seen.setdefault(_memory(factor), number) for number, factor in enumerate(_factors(chunk))]


def _memory(factor: Tensor) -> tuple[object, ...]:
    """What two views of the same numbers in the same order have in common: a weight and its bias share gradients."""
    dims = [(size, stride) for size, stride in zip(factor.shape, factor.stride(), strict=True) if size != 1]
    return factor.data_ptr(), factor.dtype, tuple(dims)


def _on_device(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


def _factors(chunk: Chunk) -> Iterator[Tensor]:
    for uses in chunk.uses:
        for found in uses.values():
            for use in found:
                yield from use.factors


def _emptied(factors: tuple[Tensor, ...]) -> list[Tensor]:
    return [torch.empty(0, *factor.shape[1:], dtype=factor.dtype, device=factor.device) for factor in factors]
