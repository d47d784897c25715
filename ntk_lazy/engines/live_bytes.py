"""How many bytes of results are alive while a computation runs, and behind it.

Activations, tangents and temporaries live and die inside autograd and cannot be read off a module. They are counted
where they are made: every operator call reports its results, and the death of a storage is seen as it happens. Unlike
hooks on the tensors that autograd saves, this goes on where the computation transforms functions itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from ntk_lazy.engines.watch import Watch


@final
class LiveBytes(Watch):
    """Record the bytes of all living results after each operator call.

    Convolutions bring their operands and their result into a blocked layout of their own while they run: they count
    once more.

    Attributes:
        trace: Bytes after each operator, with the workspace that it had.
        total: Bytes that are alive now.
        largest: Bytes of the largest of all results.
    """

    def __init__(self, given: Iterable[Tensor] = ()) -> None:
        """Watch; what lies in the memory of ``given`` counts as nothing."""
        super().__init__()
        self.trace: list[int] = []
        self.total = self.largest = 0
        # By identity: an address is not to be had of the tensors that transforms of functions wrap.
        self._given = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in given)}
        self._living: dict[int, weakref.ref[Any]] = {}

    def bytes_of(self, tensor: Tensor) -> int:
        """Bytes of those that are alive which lie in the memory of a tensor."""
        storage = tensor.untyped_storage()
        return storage.nbytes() if id(storage) in self._living else 0

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                self._admit(leaf.untyped_storage())
        workspace = 0
        if "convolution" in str(func):
            workspace = sum(t.nbytes for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor))
        self.trace.append(self.total + workspace)
        return result

    def _admit(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._living or key in self._given:
            return
        size = storage.nbytes()
        # Not this object itself: a result that outlives it would keep it alive, and all that it was given.
        owner = weakref.ref(self)

        def forget(_: Any, key: int = key, size: int = size) -> None:
            watch = owner()
            if watch is not None:
                del watch._living[key]
                watch.total -= size

        self._living[key] = weakref.ref(storage, forget)
        self.total += size
        self.largest = max(self.largest, size)
