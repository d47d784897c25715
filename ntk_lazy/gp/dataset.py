"""Examples by their number in a data set, so that a Gaussian process moves numbers and not examples."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any, Protocol, Self, TypeAlias, final, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from typing_extensions import override

from ntk_lazy.errors import ArgumentError, NonFiniteError
from ntk_lazy.probes import Probes


@runtime_checkable
class MapDataset(Sized, Protocol):
    """A data set with a length, whose item i is example i or a tuple that begins with it."""

    def __getitem__(self, index: int, /) -> Any:
        """Read item ``index``."""


Examples: TypeAlias = Tensor | np.ndarray | MapDataset


@final
class IndexedExamples:
    """Read examples by their numbers; no more than one chunk of them is held at a time.

    The data are never copied: neither with a kernel that is copied, nor to the device of the network. They are pickled.
    """

    __slots__ = ("_data",)

    def __init__(self, data: Examples) -> None:
        if isinstance(data, Tensor | np.ndarray):
            probes = Probes.of(data)
            probes.check_finite()
            data = probes.inputs
        elif not isinstance(data, MapDataset):
            raise ArgumentError(
                f"dataset must be a tensor, an array or a data set with a length and items, not {type(data).__name__}."
            )
        if len(data) == 0:
            raise ArgumentError("dataset holds no example.")
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __call__(self, index: Int[Tensor, " b"]) -> Tensor:
        """Return the examples, shape ``(b, *example)``, on the device of ``index``."""
        examples: Tensor = _Read.apply(index, self)  # type: ignore[no-untyped-call]
        return examples

    def read(self, index: Int[Tensor, " b"]) -> Tensor:
        """Read them outside of any transform of functions."""
        if isinstance(self._data, Tensor):
            return self._data[index.to(self._data.device)].to(index.device)
        numbers = index.tolist()
        examples = torch.stack([_example(self._data[i]) for i in numbers]).to(index.device)
        if examples.is_floating_point() and not examples.isfinite().all():
            bad = numbers[int((~examples.reshape(len(numbers), -1).isfinite().all(1)).nonzero()[0])]
            raise NonFiniteError(f"example {bad} of the dataset holds a NaN or an infinity. Remove or mend it.")
        return examples


def _example(item: Any) -> Tensor:
    return torch.as_tensor(item[0] if isinstance(item, tuple | list) else item)


class _Read(torch.autograd.Function):
    """Tell vmap to read for all of a batch at once: a data set takes plain numbers."""

    @staticmethod
    @override
    def forward(index: Tensor, examples: IndexedExamples) -> Tensor:
        return examples.read(index)

    @staticmethod
    @override
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    @override
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None

    @staticmethod
    @override
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], index: Tensor, examples: IndexedExamples
    ) -> tuple[Tensor, int]:
        index = index.movedim(in_dims[0] or 0, 0)
        return examples(index.reshape(-1)).unflatten(0, index.shape), 0
