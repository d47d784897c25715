"""What was made of a kernel, for as long as that kernel stays the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, final

import torch
from torch import Tensor

from ntk_lazy.engines.chunks import is_same_view
from ntk_lazy.model import FunctionalModel

Value = TypeVar("Value")


@final
class KeptValue:
    """Remembers what was made of one kernel; another one takes its place.

    Gaussian processes take operators apart and build them anew for each product and each step of training, so that
    nothing can be kept in them. A tensor that was written to through ``.data`` looks unchanged: whoever keeps
    something here must be able to tell that it is out of date, or be none the worse for it.
    """

    def __init__(self) -> None:
        # All in one, which another thread finds whole.
        self._kept: tuple[Any, ...] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> KeptValue:
        return KeptValue()

    def __reduce__(self) -> tuple[type[KeptValue], tuple[()]]:
        return KeptValue, ()

    def find(self, model: FunctionalModel, x: Tensor, rows: Tensor | None, key: int | Tensor | None = None) -> Any:
        """Return what is kept of a kernel, or None.

        Args:
            model: The model with its tensors.
            x: Points.
            rows: Which rows of the kernel are meant; None for all.
            key: What else it was made for.
        """
        kept = self._kept
        if kept is None or not kept[0].has_tensors_of(model):
            return None
        _, value, old_x, old_rows, old_key, old_versions = kept
        versions = _versions(model, x)
        is_same = is_same_view(x, old_x) and versions == old_versions and None not in versions
        return value if is_same and _is_equal(rows, old_rows) and _is_equal(key, old_key) else None

    def keep(
        self, model: FunctionalModel, x: Tensor, rows: Tensor | None, value: Value, key: int | Tensor | None = None
    ) -> Value:
        """Keep something of a kernel in the place of what was kept."""
        self._kept = model, value, x, rows, key, _versions(model, x)
        return value

    def get(
        self,
        model: FunctionalModel,
        x: Tensor,
        rows: Tensor | None,
        key: int | Tensor | None,
        make: Callable[[], Value],
    ) -> Value:
        """Return what is kept; made now if another kernel, or other numbers in its tensors, are asked for."""
        found: Value | None = self.find(model, x, rows, key)
        return self.keep(model, x, rows, make(), key) if found is None else found

    def forget(self) -> None:
        """Let go of it."""
        self._kept = None


def _versions(model: FunctionalModel, x: Tensor) -> list[int | None]:
    """Whoever writes to a tensor in place moves its version on; inference tensors have none."""
    tensors = [x, *model.params.values(), *model.constants.values()]
    return [None if t.is_inference() else t._version for t in tensors]


def _is_equal(one: int | Tensor | None, other: int | Tensor | None) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or torch.equal(one, other)
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other
