"""A module as a pure function of its parameters, and the choice of those that make up J.

The user's module is never changed: tensors are handed to it for the length of one call, and buffers that
its forward pass writes to are private copies.
"""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, TypeAlias, TypeVar, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call  # noqa: TID251  (a call, not a transform)

from ntk_lazy.errors import ArgumentError, ShapeError, UnsupportedModuleError
from ntk_lazy.model_tensors import choose, refuse_inference_tensors, refuse_uninitialised, refuse_wrappers
from ntk_lazy.modes import as_recordable, callers_device, ordinary_mode
from ntk_lazy.module_state import ModuleState, Named, module_state_kept
from ntk_lazy.precision import differentiable_weight_norm, has_weight_norm
from ntk_lazy.threads import exclusive
from ntk_lazy.widened import HALF, Widened, coarsest

ParameterChoice: TypeAlias = str | Sequence[str] | Callable[[str, Tensor], bool] | None
InputFunction: TypeAlias = Callable[[Tensor], Tensor]
OutputFunction: TypeAlias = Callable[[Any], Tensor]
ParameterFunction: TypeAlias = Callable[[dict[str, Tensor], Tensor], Any]
Run: TypeAlias = Callable[[Callable[[Tensor], Any], ModuleState], Any]
Result = TypeVar("Result")


def as_parameter_choice(params: Any) -> Callable[[str, Tensor], bool] | list[str] | None:
    """Read a choice of parameters, and write it down so that it can be made many times. Whether it fits is not known.

    Raises:
        ArgumentError: Neither names or patterns, nor a predicate, nor None.
    """
    if isinstance(params, Mapping):
        raise ArgumentError("params chooses among a module's parameters by name; a mapping serves plain functions.")
    if params is None or callable(params):
        return params
    patterns = [params] if isinstance(params, str) else list(params) if isinstance(params, Iterable) else [params]
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise ArgumentError("params: give names or glob patterns, a predicate on (name, parameter), or None.")
    return patterns


def check_output_fn(output_fn: Any) -> None:
    """Raise ArgumentError unless it can be applied to what a model returns, or is None."""
    if output_fn is not None and not callable(output_fn):
        raise ArgumentError(f"output_fn must be a function of what the model returns, not {type(output_fn).__name__}.")


def as_ieee(tensor: Tensor) -> Tensor:
    """Widen a half-precision tensor to float32, in which products run; leave any other as it is."""
    return tensor.float() if tensor.dtype in HALF else tensor


@final
class ModelCall:
    """Call a module, or a function ``f(params, x)``, with tensors given by name.

    It has no ``to``, ``clone`` or ``detach``, and copying it copies no weights: ``LinearOperator`` looks for
    those on all that it holds, and would move the user's module.
    """

    __slots__ = ("_aliases", "_function", "_has_weight_norm", "_input_fn", "_module", "_names", "_output_fn")

    def __init__(
        self,
        *,
        module: nn.Module | None = None,
        function: ParameterFunction | None = None,
        input_fn: InputFunction | None = None,
        output_fn: OutputFunction | None = None,
    ) -> None:
        self._module = module
        self._function = function
        self._input_fn = input_fn
        self._output_fn = output_fn
        self._has_weight_norm = module is not None and has_weight_norm(module)
        self._names, self._aliases = ({}, {}) if module is None else _names(module)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[Callable[[], ModelCall], tuple[()]]:
        return partial(
            ModelCall,
            module=self._module,
            function=self._function,
            input_fn=self._input_fn,
            output_fn=self._output_fn,
        ), ()

    @property
    def module(self) -> nn.Module | None:
        """The user's module, to be named in messages; None for a plain function."""
        return self._module

    def raw(
        self,
        tensors: dict[str, Tensor],
        x: Tensor,
        then: Callable[[Any], Any] | None = None,
        *,
        copies: bool = False,
    ) -> Any:
        """Return what the model returns for ``x``, after ``output_fn``; and after ``then``, while it holds the tensors.

        Activation checkpointing runs a part of the module again in the backward pass: a backward pass that takes
        place in ``then`` finds the tensors there that the forward pass had, not the module's own.
        """
        return self.holding(tensors, lambda call, _: call(x) if then is None else then(call(x)), copies=copies)

    def holding(self, tensors: dict[str, Tensor], run: Run, *, copies: bool = False) -> Any:
        """Return what ``run`` makes of calls of the model, while it holds the tensors; then put it back as it was.

        Args:
            tensors: By name.
            run: Takes a function that calls the model on examples, and the state that it was in before.
            copies: Whether tensors that it holds under no name are written to, and have to be copied.
        """

        def call(of: Callable[[Tensor], Any], x: Tensor) -> Any:
            with callers_device():
                returned = of(x if self._input_fn is None else as_ieee(self._input_fn(x)))
                return returned if self._output_fn is None else self._output_fn(returned)

        with exclusive(), self._kept() as state:
            if self._module is None:
                function = self._function
                assert function is not None
                state.exchange({}, copies=copies)
                return run(partial(call, lambda x: function(tensors, x)), state)
            tensors = tensors | {name: tensors[first] for name, first in self._aliases.items() if first in tensors}
            state.exchange(tensors, copies=copies)
            written_out = differentiable_weight_norm() if self._has_weight_norm else nullcontext()
            held = {f"module.{name}": tensor for name, tensor in tensors.items()}
            with written_out:
                return functional_call(
                    _Holding(self._module),
                    held,
                    (lambda module: run(partial(call, module), state),),
                    tie_weights=False,
                )

    def _kept(self) -> AbstractContextManager[ModuleState]:
        return module_state_kept(self._module, self._function, self._output_fn, names=self._names)


def _names(module: nn.Module) -> tuple[dict[int, Named], dict[str, str]]:
    """Map tensors, by identity, to their first names; and the other names of tied ones to these, each place once.

    ``functional_call`` finds ties itself, but a module that is registered under two names gets its tensors twice
    from it, and is left with those of the first exchange.
    """
    first: dict[int, Named] = {}
    aliases: dict[str, str] = {}
    for prefix, inner in module.named_modules():
        own = [*inner.named_parameters(recurse=False, remove_duplicate=False)]
        own += inner.named_buffers(recurse=False, remove_duplicate=False)
        for attribute, tensor in own:
            name = f"{prefix}.{attribute}" if prefix else attribute
            _, known = first.setdefault(id(tensor), (weakref.ref(tensor), name))
            if known != name:
                aliases[name] = known
    return first, aliases


@contextmanager
def generators_kept(device: torch.device) -> Iterator[None]:
    """Put the random number generators of torch, NumPy and Python back at the end."""
    of_numpy, of_python = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        np.random.set_state(of_numpy)
        random.setstate(of_python)


@final
class _Holding(nn.Module):
    """A module, and functions of it that run while it holds other tensors."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, run: Callable[[nn.Module], Any]) -> Any:
        return run(self.module)


@final
@dataclass(frozen=True, eq=False)
class FunctionalModel:
    """``f(params, x)`` with outputs flattened to ``(examples, C)``.

    Attributes:
        call: The stateless call.
        params: The parameters that make up J, each tied tensor once, in the module's order.
        constants: All other parameters, and the buffers (detached).
        has_private_buffers: Whether each call gets copies of the buffers, and of tensors in attributes. Switch it off
            only for a model that is known not to write to them.
        keeps_generators: Whether the random number generators are put back after each call, for a model that draws
            numbers which do not reach its output.
        is_widened: Whether casts to half precision are left out, for a model that has some.
    """

    call: ModelCall
    params: dict[str, Tensor]
    constants: dict[str, Tensor]
    buffer_names: frozenset[str] = frozenset()
    has_private_buffers: bool = True
    keeps_generators: bool = False
    is_widened: bool = False

    @classmethod
    @ordinary_mode()
    def from_module(
        cls,
        model: nn.Module,
        *,
        params: ParameterChoice = None,
        input_fn: InputFunction | None = None,
        output_fn: OutputFunction | None = None,
    ) -> Self:
        """Take a module apart; which parameters make up J does not depend on their ``requires_grad``.

        Args:
            model: Any module. It is neither copied nor changed; its parameters stay shared, so that an
                optimiser step is seen by the next call.
            params: None for all floating-point parameters, names or glob patterns, or a predicate on
                ``(name, parameter)``. A tied parameter answers to each of its names.
            input_fn: Makes what the module takes of what stands for some examples, such as their numbers in a data set.
            output_fn: Applied to what the module returns, for modules that return dicts or tuples.

        Raises:
            ArgumentError: No parameter fits, or a pattern fits none.
            UnsupportedModuleError: Its tensors cannot be exchanged (scripted or parallel modules), do not exist yet
                (lazy modules) or are complex.
        """
        refuse_wrappers(model)
        named = dict(model.named_parameters(remove_duplicate=False))
        refuse_uninitialised(named)
        canonical = {id(p): n for n, p in model.named_parameters()}
        chosen = {canonical[id(named[n])] for n in choose(named, as_parameter_choice(params))}
        everything = dict(model.named_parameters())
        refuse_inference_tensors({name: p for name, p in everything.items() if name in chosen})
        buffers = {n: as_ieee(as_recordable(b).detach()) for n, b in model.named_buffers()}
        return cls(
            call=ModelCall(module=model, input_fn=input_fn, output_fn=output_fn),
            params={n: as_ieee(p) for n, p in everything.items() if n in chosen},
            constants={n: as_ieee(as_recordable(p)) for n, p in everything.items() if n not in chosen} | buffers,
            buffer_names=frozenset(buffers),
        )

    @classmethod
    @ordinary_mode()
    def from_function(
        cls,
        function: ParameterFunction,
        tensors: Mapping[str, Tensor],
        *,
        params: ParameterChoice = None,
        output_fn: OutputFunction | None = None,
    ) -> Self:
        """Take a plain function ``f(params, x)`` and its tensors by name; ``params`` chooses as for a module."""
        chosen = set(choose(tensors, as_parameter_choice(params)))
        refuse_inference_tensors({name: t for name, t in tensors.items() if name in chosen})
        tensors = {name: as_recordable(tensor) for name, tensor in tensors.items()}
        return cls(
            call=ModelCall(function=function, output_fn=output_fn),
            params={n: as_ieee(p) for n, p in tensors.items() if n in chosen},
            constants={n: as_ieee(p) for n, p in tensors.items() if n not in chosen},
        )

    @property
    def num_params(self) -> int:
        """P, entries of one flat parameter vector."""
        return sum(p.numel() for p in self.params.values())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of J: that of its parameters, promoted to a common one."""
        dtypes = [p.dtype for p in self.params.values()]
        dtype = dtypes[0]
        for other in dtypes[1:]:
            dtype = torch.promote_types(dtype, other)
        return dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return next(iter(self.params.values())).device

    def __call__(self, params: dict[str, Tensor], x: Tensor) -> Float[Tensor, "examples outputs"]:
        """Evaluate the model at ``params`` on examples ``x`` of shape ``(b, ...)``."""
        with exclusive(), self._generators(), self._arithmetic():
            output = self.call.raw(self._tensors(params), as_ieee(x), copies=self.has_private_buffers)
            return self._flat(output, x.shape[0])

    def has_tensors_of(self, other: FunctionalModel) -> bool:
        """Whether another model computes the same function of the same memory."""
        mine, theirs = self.params | self.constants, other.params | other.constants
        return (
            self.call is other.call
            and list(self.params) == list(other.params)
            and mine.keys() == theirs.keys()
            and all(_is_same_memory(t, theirs[name]) for name, t in mine.items())
        )

    def evaluate(self, params: dict[str, Tensor], x: Tensor, then: Callable[[Tensor], Result]) -> Result:
        """Evaluate the model, and return ``then(outputs)``, computed while the module still holds ``params``."""
        with exclusive(), self._generators(), self._arithmetic():
            result: Result = self.call.raw(
                self._tensors(params),
                as_ieee(x),
                lambda output: then(self._flat(output, x.shape[0])),
                copies=self.has_private_buffers,
            )
        return result

    def in_a_row(self, run: Callable[[Callable[[Tensor], Tensor], ModuleState], Result]) -> Result:
        """Return what ``run`` makes of calls between which nothing is put back, and of the state before the first."""
        with exclusive(), self._generators(), self._arithmetic():
            result: Result = self.call.holding(
                self._tensors(self.params),
                lambda call, state: run(lambda x: self._flat(call(as_ieee(x)), x.shape[0]), state),
                copies=True,
            )
        return result

    def own_params(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The parameters of the module itself, not cut off, converted or exchanged."""
        own = self.params if self.call.module is None else dict(self.call.module.named_parameters())
        return {name: own[name] for name in names}

    def as_it_is(self, x: Tensor) -> Float[Tensor, "examples outputs"]:
        """Evaluate the model at its own parameters, without handing them to it; it writes to copies of its buffers."""
        if self.call.module is None:
            return self(self.params, x)
        buffers = {name: self.constants[name].clone() for name in self.buffer_names}
        return self._flat(self.call.raw(buffers, as_ieee(x), copies=True), x.shape[0])

    def _tensors(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        if not (self.has_private_buffers and self.buffer_names):
            return params | self.constants
        return params | {n: t.clone() if n in self.buffer_names else t for n, t in self.constants.items()}

    def _flat(self, output: Any, num_examples: int) -> Tensor:
        # A model may change the dtype on its way (a head in float64): rows of K are in that of J.
        return _flat_output(output, num_examples).to(self.dtype)

    def _generators(self) -> AbstractContextManager[None]:
        return generators_kept(self.device) if self.keeps_generators else nullcontext()

    def _arithmetic(self) -> AbstractContextManager[object]:
        return Widened(coarsest(self.params.values())) if self.is_widened else nullcontext()


def _flat_output(output: Any, num_examples: int) -> Tensor:
    if not isinstance(output, Tensor):
        raise UnsupportedModuleError(
            f"the model returned {type(output).__name__}, not a tensor. Pass output_fn, which is applied to what "
            "it returns, for example output_fn=lambda out: out['logits']."
        )
    if output.ndim == 0 or output.shape[0] != num_examples:
        raise ShapeError(
            f"the model returned shape {tuple(output.shape)} for {num_examples} examples; its first dimension must be "
            "the examples. Pass output_fn to bring it there."
        )
    if not output.is_floating_point():
        raise UnsupportedModuleError(
            f"the model returned {output.dtype}, not real numbers with a derivative. Return what comes before the last "
            "step (logits, not classes; real and imaginary parts), or pass output_fn, which is applied to it."
        )
    return output.flatten(1) if output.ndim > 1 else output.unsqueeze(1)


def _is_same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
