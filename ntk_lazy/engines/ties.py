"""Operators that torch differentiates otherwise in forward mode than in reverse mode where two numbers are equal.

At such points (a maximum of equal numbers, a bound that is met, an activation of exactly zero) there is no derivative,
and each mode takes one of its own. J of the one and Jᵀ of the other make a K that is not symmetric. Which operators do
so was found by trying all that have a kink, on equal numbers and zeros, against reverse mode row by row (torch 2.13):
the others (``relu``, ``abs``, ``maximum``, ``amax``, ``sort``, pooling, norms, ...) agree. Reverse mode applied twice
agrees with itself for all of these but PReLU, which is written out instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from typing_extensions import override

aten = torch.ops.aten

_BOTH = {aten.fmax.default: "fmax", aten.atan2.default: "atan2"}
_BOUNDED = frozenset((aten.clamp.Tensor, aten.clamp_.Tensor))
_REDUCED = frozenset((aten.scatter_reduce.two, aten.scatter_reduce_.two))
# By operator: where its indices are, and what is written there. Of values written to one place the last one counts, but
# reverse mode gives a gradient to each.
_WRITTEN = {
    aten.index_put.default: (1, 2),
    aten.index_put_.default: (1, 2),
    aten._index_put_impl_.default: (1, 2),
    aten.scatter.src: (2, 3),
    aten.scatter_.src: (2, 3),
    aten.index_copy.default: (2, 3),
    aten.index_copy_.default: (2, 3),
    aten.put.default: (1, 2),
    aten.put_.default: (1, 2),
}


def rule_at_ties(
    func: Any, args: Any, kwargs: Any, *, depends: Callable[[Any], bool], varies: Callable[[Any], bool]
) -> str:
    """Name an operator whose derivatives may differ at ties which the data decide on; "" for any other.

    Args:
        func: The operator.
        args: Its operands.
        kwargs: Its options.
        depends: Whether an operand depends on parameters.
        varies: Whether it depends on the examples. What does not has the same ties in all of them.
    """
    if func in _BOTH:
        return _BOTH[func] if any(map(depends, args)) else ""
    if func in _BOUNDED:
        bounds = [*args[1:], *kwargs.values()]
        return "clamp by a tensor" if any(map(depends, bounds)) else ""
    if func in _REDUCED:
        reduce = args[4] if len(args) > 4 else kwargs["reduce"]
        is_smooth = reduce in ("sum", "mean")
        return "" if is_smooth or not (depends(args[0]) or depends(args[3])) else f"scatter_reduce with {reduce}"
    if func in _WRITTEN:
        places, values = (args[i] for i in _WRITTEN[func])
        places = places if isinstance(places, list | tuple) else [places]
        is_added = any(given is True for given in (*args[3:], *kwargs.values()))
        is_by_number = any(isinstance(t, Tensor) and t.dtype not in (torch.bool, torch.uint8) for t in places)
        if depends(values) and is_by_number and not is_added and any(map(varies, places)):
            return "writing to places that may coincide"
    return ""


@final
class WrittenOut(TorchFunctionMode):
    """Write PReLU out, whose derivative at zero is the slope in reverse mode, and one in its rules for both others."""

    @override
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.prelu or func is Tensor.prelu:
            return _prelu(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _prelu(input: Tensor, weight: Tensor) -> Tensor:
    # One slope for each entry of dimension 1, if there are several.
    slopes = weight.reshape([1, -1] + [1] * (input.ndim - 2)) if weight.ndim and input.ndim > 1 else weight
    return torch.where(input > 0, input, slopes * input)
