"""The root of a preconditioner, for as long as the kernel that it approximates stays the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

from torch import Tensor

from ntk_lazy.engines.chunks import is_same_view
from ntk_lazy.model import FunctionalModel


@final
class KeptRoot:
    """Remembers the root of one kernel; another one takes its place.

    Gaussian processes take operators apart and build them anew for each product and each step of training, so that
    nothing can be kept in them. A root that is out of date makes a solve slower, and not wrong.
    """

    def __init__(self) -> None:
        self._model: FunctionalModel | None = None
        self._kept: tuple[Any, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> KeptRoot:
        return KeptRoot()

    def __reduce__(self) -> tuple[type[KeptRoot], tuple[()]]:
        return KeptRoot, ()

    def get(
        self, model: FunctionalModel, x: Tensor, rows: Tensor | None, rank: int, make: Callable[[], Tensor]
    ) -> Tensor:
        """Return the root, made now if another kernel, other numbers in its tensors, or another rank is asked for.

        Args:
            model: The model with its tensors.
            x: Points.
            rows: Which rows of the kernel are meant; None for all.
            rank: Columns of the root.
            make: Makes it.
        """
        tensors = [x, *model.params.values(), *model.constants.values()]
        # Whoever writes to a tensor in place moves its version on; inference tensors have none.
        versions = [None if t.is_inference() else t._version for t in tensors]
        if self._model is not None and self._model.has_tensors_of(model):
            root, old_x, old_rows, old_rank, old_versions = self._kept
            is_same = is_same_view(x, old_x) and rank == old_rank and versions == old_versions and None not in versions
            if is_same and (rows is old_rows or (rows is not None and old_rows is not None and rows.equal(old_rows))):
                return root
        root = make()
        self._model, self._kept = model, (root, x, rows, rank, versions)
        return root
