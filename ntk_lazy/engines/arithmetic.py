"""What a model computes with that depends on its parameters: in which dtypes, and by which rules at ties."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from ntk_lazy.engines.perturbed import MeasuredRounding
from ntk_lazy.engines.rounding import largest
from ntk_lazy.engines.suspects import TRANSFORM_ERRORS, Call, first_line, named
from ntk_lazy.engines.ties import rule_at_ties
from ntk_lazy.engines.watch import Watch
from ntk_lazy.errors import UnsupportedModuleError
from ntk_lazy.model import FunctionalModel
from ntk_lazy.widened import HALF, coarsest


@final
class Arithmetic(Watch):
    """Notice how a forward pass computes what depends on the parameters, and where.

    What depends on them, and on the examples, is told by the memory it lies in.

    Attributes:
        coarsest: The coarsest dtype of any result, with parameters in it or not.
        ties: Operators whose modes of differentiation differ at ties, and the module that used them first.
        is_left: Whether computing in the dtype of J instead gives the same outputs, but for rounding.
    """

    def __init__(self, params: Collection[Tensor], x: Tensor, running: Sequence[Call]) -> None:
        """Begin.

        Args:
            params: Those that make up J, as the forward pass is given them.
            x: The examples.
            running: The modules that run at the time, the innermost one last.
        """
        super().__init__()
        self.coarsest = self._dtype = coarsest(params)
        self.is_left = False
        self._dependent = set(map(_address, params))
        self._varying = {_address(x)}
        self.ties: dict[str, str] = {}
        self._running = running
        self._found: dict[torch.dtype, str] = {}

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = rule_at_ties(
            func,
            args,
            kwargs or {},
            depends=partial(_lies_in, self._dependent),
            varies=partial(_lies_in, self._varying),
        )
        if rule:
            self.ties.setdefault(rule, self._where())
        given = set(map(_address, _tensors((args, kwargs))))
        made = func(*args, **(kwargs or {}))
        is_dependent = not self._dependent.isdisjoint(given)
        for tensor in _tensors(made):
            for kept in (self._dependent, self._varying):
                (kept.discard if kept.isdisjoint(given) else kept.add)(_address(tensor))
            if tensor.is_floating_point() and _eps(tensor.dtype) > _eps(self._dtype):
                self.coarsest = max(self.coarsest, tensor.dtype, key=_eps)
                if is_dependent:
                    self._found.setdefault(tensor.dtype, self._where())
        return made

    def widen(self, model: FunctionalModel, x: Tensor, output: Tensor, *, is_random: bool) -> FunctionalModel:
        """Leave out the coarser dtypes that parameters go through, if there are any and the model does without them.

        Args:
            model: As it was run, with its casts.
            x: Examples.
            output: What it returned for them.
            is_random: Whether it may return something else each time.

        Returns:
            The model as products should run it.

        Cost: one forward pass where there are any, and 3 more where outputs cancel.

        Raises:
            UnsupportedModuleError: It does not, and they leave no more than three digits of a derivative.
        """
        if not self._found:
            return model
        worst = max(self._found, key=_eps)
        if _eps(worst) > _eps(torch.bfloat16):
            raise self._refusal(worst, "which leaves no more than a digit of a derivative")
        try:
            wider = replace(model, is_widened=True)
            wide = replace(wider, has_private_buffers=True)(model.params, x)
        except torch.OutOfMemoryError:
            raise
        except (*TRANSFORM_ERRORS, AssertionError) as error:
            what = f"and fails where it is not ({type(error).__name__}: {first_line(error)})"
        else:
            # Rounding of a deep network is far below the root of eps, and another function far above.
            difference = largest(wide - output)
            self.is_left = is_random or difference <= _eps(worst) ** 0.5 * largest(output)
            if not self.is_left and worst not in HALF:  # unless terms cancel
                self.is_left = difference <= MeasuredRounding(model, x, coarsest=self.coarsest).outputs
            what = "and its outputs hang on that"
        if not self.is_left and worst in HALF:
            raise self._refusal(worst, what)
        return wider if self.is_left else model

    @property
    def remarks(self) -> tuple[str, ...]:
        """What is worth knowing of precisions coarser than that of J."""
        mine, remarks = _name(self._dtype), []
        for dtype, where in self._found.items():
            about = f"to about {_eps(dtype):.0e}"
            if self.is_left:
                what = f"products leave that out and run in {mine}. The outputs as they are agree {about}."
            else:
                what = f"K is right {about}, although it is in {mine}."
            remarks.append(f"{where} computes in {_name(dtype)}: {what}")
        return tuple(remarks)

    def _refusal(self, dtype: torch.dtype, what: str) -> UnsupportedModuleError:
        return UnsupportedModuleError(
            f"{self._found[dtype]} computes in {_name(dtype)}, {what}. Take the cast, or torch.autocast, out of the "
            "forward pass, or return what comes before the cast; output_fn is applied to what the model returns."
        )

    def _where(self) -> str:
        return named(list(self._running[-1:]))


def _tensors(given: Any) -> list[Tensor]:
    return [t for t in tree_leaves(given) if isinstance(t, Tensor) and t.layout is torch.strided]


def _lies_in(addresses: set[int], given: Any) -> bool:
    return not addresses.isdisjoint(map(_address, _tensors(given)))


def _address(tensor: Tensor) -> int:
    return 0 if tensor._is_zerotensor() else tensor.untyped_storage().data_ptr()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps
