"""A model that computes in a coarser dtype than that of J on its way: products leave its casts out.

A cast rounds what is pulled back and pushed forward through it as well. Through half precision these are vectors of
8 or 11 bits, with which K is not symmetric and has no eigenvalue below ``1e-3 λ₁``; through float32, a K in float64 is
not symmetric to the rounding that everything behind it counts on. Autocast around a product is switched off for the
same reason.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from typing_extensions import override

HALF = (torch.float16, torch.bfloat16)
_COARSER = {torch.float32: HALF, torch.float64: (*HALF, torch.float32)}


def coarsest(tensors: Iterable[Tensor]) -> torch.dtype:
    """Return the floating-point dtype with the fewest digits among those of some tensors."""
    return max((t.dtype for t in tensors if t.is_floating_point()), key=lambda dtype: torch.finfo(dtype).eps)


class CannotWidenError(RuntimeError):
    """The bits of a number are looked at, which are others in another dtype."""


@final
class Widened(TorchDispatchMode):
    """Make in a wider dtype what operators would make in a coarser one.

    It works below autograd, and so on the casts that autocast makes too.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        """Begin to compute in no coarser dtype than this one."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._dtype = dtype
        self._coarser = _COARSER.get(dtype, ())

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as engines/watch.py: nobody compiles this

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten.view.dtype and any(dtype.is_floating_point for dtype in (args[0].dtype, args[1])):
            raise CannotWidenError("the bits of a floating-point number are taken for something else")
        if not any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in (*args, *kwargs.values())):
            # Numbers without a derivative, such as positions, are rounded as the model rounds them.
            return tree_map(self._wide, func(*args, **kwargs))
        return func(*map(self._wider, args), **{name: self._wider(given) for name, given in kwargs.items()})

    def _wider(self, given: Any) -> Any:
        return self._dtype if isinstance(given, torch.dtype) and given in self._coarser else given

    def _wide(self, made: Any) -> Any:
        return made.to(self._dtype) if isinstance(made, Tensor) and made.dtype in self._coarser else made
