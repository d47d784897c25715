"""Tensors that a forward pass writes to: noticed before it happens where nobody has a copy of them, or after."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from ntk_lazy.engines import suspects
from ntk_lazy.engines.suspects import Call, named
from ntk_lazy.engines.watch import Watch
from ntk_lazy.errors import UnsupportedModuleError
from ntk_lazy.model import FunctionalModel


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


@final
class Writes:
    """Which parameters and buffers of a copy are no longer those of the model."""

    def __init__(self, copy: FunctionalModel, model: FunctionalModel) -> None:
        self._originals = model.params | model.constants
        self._tensors = copy.params | {name: copy.constants[name] for name in copy.buffer_names}
        self._versions = {name: t._version for name, t in self._tensors.items()}

    def names(self) -> list[str]:
        """List those that were written to; what is written through ``.data`` shows in the numbers alone."""
        return [
            name
            for name, t in self._tensors.items()
            if t._version != self._versions[name] or not _is_same(t.detach(), self._originals[name].detach())
        ]


def refuse_made_parameters(model: FunctionalModel, copy: FunctionalModel) -> None:
    """Refuse a module that has other parameters after its first call than before."""
    if model.call.module is None:
        return
    now = dict(model.call.module.named_parameters())
    known = copy.params | copy.constants
    made = [name for name, p in now.items() if name not in known or p is not known[name]]
    if made:
        raise not_settled(f"it makes parameter {made[0]!r}")


def refuse_written_parameters(
    copy: FunctionalModel, names: list[str], calls: list[Call], call: Callable[[], Tensor]
) -> None:
    """Refuse a module that writes to parameters: in its first call alone, or in the next one too."""
    if not names:
        return
    owners = named(suspects.owners_of(calls, names))
    now = replace(copy, params={name: copy.params[name] for name in names}, constants={}, buffer_names=frozenset())
    writes = Writes(now, replace(now, params={name: p.detach().clone() for name, p in now.params.items()}))
    call()
    if not writes.names():
        raise not_settled(f"{owners} writes to parameter {names[0]!r}")
    raise written_parameter(copy, names[0])


def not_settled(what: str) -> UnsupportedModuleError:
    """Say what the first call of a module does that later ones do not."""
    return UnsupportedModuleError(
        f"the model initialises itself in its first call: {what}. Call it once, on a batch like those that it is made "
        "for, before you ask for its kernel."
    )


def written_parameter(model: FunctionalModel, name: str | None) -> UnsupportedModuleError:
    """Name the module that writes to a parameter, of which autograd does not say which it is."""
    module, owner, parameter = model.call.module, "the model", "a parameter"
    if name is not None:
        parameter = f"parameter {name!r}"
        path = name.rpartition(".")[0]
        owner = "the model" if module is None else str(Call(path, module.get_submodule(path), ()))
    return UnsupportedModuleError(
        f"the forward pass of {owner} writes to {parameter}, so that there is no point to differentiate at. An "
        "embedding with max_norm does so: renormalise its weight once and set max_norm=None."
    )


def _written_operands(func: Any) -> tuple[int | str, ...]:
    """Places and names of the operands that an operator says it writes to."""
    return tuple(
        argument.name if argument.kwarg_only else place
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


def _storage(leaf: Any) -> torch.UntypedStorage | None:
    return leaf.untyped_storage() if isinstance(leaf, Tensor) and leaf.layout == torch.strided else None


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers; a NaN is one."""
    return torch.equal(one, other) or torch.equal(one.nan_to_num(0.5, 1.5, 2.5), other.nan_to_num(0.5, 1.5, 2.5))
