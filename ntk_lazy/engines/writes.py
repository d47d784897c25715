"""Tensors that must not be written to: noticed before it happens, so that nobody needs a copy of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from ntk_lazy.engines.watch import Watch


@final
class WriteWatch(Watch):
    """Raise where an operator is about to write to the memory of a tensor, by whatever view or alias of it.

    Attributes:
        found: Name of the tensor that would have been written to; a model that catches all exceptions hides the other.
    """

    def __init__(self, tensors: Mapping[str, Tensor], refusal: Callable[[str], Exception]) -> None:
        super().__init__()
        self.found: str | None = None
        # The storages too: while they are held, no others have their identity.
        self._names = {
            id(storage): (name, storage) for name, t in tensors.items() if (storage := _storage(t)) is not None
        }
        self._refusal = refusal
        self._written: dict[Any, tuple[int | str, ...]] = {}

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        places = self._written.get(func)
        if places is None:
            places = self._written[func] = _written_operands(func)
        for place in places:
            operand = kwargs.get(place) if isinstance(place, str) else args[place] if place < len(args) else None
            for leaf in tree_leaves(operand):
                storage = _storage(leaf)
                if id(storage) in self._names:
                    self.found = self._names[id(storage)][0]
                    raise self._refusal(self.found)
        return func(*args, **kwargs)


def _written_operands(func: Any) -> tuple[int | str, ...]:
    """Places and names of the operands that an operator says it writes to."""
    return tuple(
        argument.name if argument.kwarg_only else place
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def _storage(leaf: Any) -> torch.UntypedStorage | None:
    return leaf.untyped_storage() if isinstance(leaf, Tensor) and leaf.layout == torch.strided else None
