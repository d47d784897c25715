"""How much rounding a computation really has: repeat it with each intermediate result a little wrong, and look.

Where large terms cancel (the residual of a differential equation near its solution, a difference of two networks, a
difference quotient), rounding has nothing to do with the size of the result: it is ``eps Σ |∂f/∂v| |v|`` over all
intermediate results v. No list of sizes tells what a term is still multiplied with on its way to the output. But a
computation with random relative errors in all v does, at the price of one more pass (Monte Carlo arithmetic). It is
taken only where two results differ by more than rounding of their own size.

The errors are far larger than rounding, and what they do is scaled down again. So a decision that an error turns over
(a tie of an argmax, a threshold) counts ``sqrt(eps)`` times what it does; had rounding itself been imitated, a
decision would make every difference look like rounding.

Source: Parker, Monte Carlo Arithmetic (1997); Higham, Accuracy and Stability of Numerical Algorithms (2002), §3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from ntk_lazy.engines.linearisation import DoubleReverse, Tangents
from ntk_lazy.engines.rounding import largest, noise
from ntk_lazy.engines.suspects import TRANSFORM_ERRORS
from ntk_lazy.engines.watch import Watch
from ntk_lazy.model import FunctionalModel, generators_kept

# One error for each entry is less than a sum over many terms may collect: 100 covers sums of ten thousand terms added
# one after the other, and the chance that errors of few entries cancel in both samples.
_SAFETY = 100.0
_SAMPLES = 2
_LEAST = 8.0  # eps: where errors of sqrt(eps) lead out of the domain of a function, which smaller ones may not


@final
class MeasuredRounding:
    """What rounding may do to the outputs and gradients of a model on a few examples; measured when it is asked for.

    Cost: ``outputs`` takes 3 forward passes and ``gradients`` 3 forward-and-backward passes, with memory for 4
        parameter vectors, each once.
    """

    def __init__(self, model: FunctionalModel, x: Tensor, *, coarsest: torch.dtype) -> None:
        """Prepare for a model that computes on these examples in no coarser dtype than that."""
        self._model = replace(model, has_private_buffers=True)
        self._x = x
        self._magnification = torch.finfo(coarsest).eps ** -0.5

    @cached_property
    def outputs(self) -> float:
        """Bound on the rounding of an output; 0 where it cannot be measured."""
        return self._measure(lambda model: {"": model(model.params, self._x)})

    @cached_property
    def gradients(self) -> float:
        """Bound on the rounding of an entry of ``Jᵀu`` for a standard normal u; 0 where it cannot be measured."""
        with torch.no_grad(), generators_kept(self._x.device):
            output = self._model(self._model.params, self._x)
        u = noise((1, *output.shape), like=output, seed=5)
        return self._measure(lambda model: DoubleReverse(model, self._x).pull(u))

    def _measure(self, run: Callable[[FunctionalModel], Tangents]) -> float:
        try:
            with generators_kept(self._x.device):
                exact = run(self._model)
            for magnification in (self._magnification, _LEAST):
                changes = [self._change(run, exact, magnification, seed) for seed in range(_SAMPLES)]
                found = max(changes) if all(change < torch.inf for change in changes) else torch.inf
                if found < torch.inf:
                    return _SAFETY * found / magnification
        except torch.OutOfMemoryError:
            raise
        except TRANSFORM_ERRORS:  # what is wrong shows without errors too, or is one that they make
            pass
        return 0.0

    def _change(
        self, run: Callable[[FunctionalModel], Tangents], exact: Tangents, magnification: float, seed: int
    ) -> float:
        errors = Perturbation(self._x.device, magnification, seed)
        model = replace(
            self._model,
            params={name: errors.copy(p) for name, p in self._model.params.items()},
            constants={name: errors.copy(t) for name, t in self._model.constants.items()},
        )
        # The same numbers are drawn again, so that a random model is not taken for one that rounds.
        with generators_kept(self._x.device), errors:
            found = run(model)
        change = max(largest(found.pop(name) - value) for name, value in exact.items())
        return torch.inf if math.isnan(change) else change


@final
class Perturbation(Watch):
    """Multiply what each operator returns by ``1 - magnification eps`` in half of its entries, drawn at random.

    Each tensor has the eps of its own dtype: a detour through a coarser one shows. Small whole numbers stay: ones and
    zeros of a mask, counts and codes are exact, and are compared with each other. Nothing grows, and so overflows.
    """

    def __init__(self, device: torch.device, magnification: float, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator(device).manual_seed(seed)
        self._magnification = magnification

    def copy(self, tensor: Tensor) -> Tensor:
        """Return a copy with errors, without a graph."""
        copied = tensor.detach().clone()
        self._add_errors(copied)
        return copied

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        given = _storages((args, kwargs))
        for leaf in tree_leaves(returned):
            # Views, and what is written in place, have had their errors when they were made.
            if _has_storage(leaf) and given.isdisjoint(_storages(leaf)):
                self._add_errors(leaf)
        return returned

    def _add_errors(self, tensor: Tensor) -> None:
        if not (tensor.is_floating_point() or tensor.is_complex()) or not tensor.numel():
            return
        eps = torch.finfo(tensor.dtype).eps
        errors = torch.empty(tensor.shape, dtype=torch.bool, device=tensor.device).random_(generator=self._generator)
        if tensor.is_floating_point():
            errors &= (tensor != tensor.round()) | (tensor.abs() >= eps**-0.5)
        tensor.sub_(torch.where(errors, tensor * min(self._magnification * eps, 0.5), 0))


def _has_storage(leaf: Any) -> bool:
    """Whether something is a tensor in memory; forward mode has zeros that take none."""
    return isinstance(leaf, Tensor) and leaf.layout is torch.strided and not leaf._is_zerotensor()


def _storages(given: Any) -> set[int]:
    return {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(given) if _has_storage(leaf)}
