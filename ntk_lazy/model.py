"""A module as a pure function of its parameters, and the choice of those that make up J.

The user's module is never changed: tensors are handed to it for the length of one call, and buffers that
its forward pass writes to are private copies.
"""

from __future__ import annotations

import difflib
import fnmatch
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Self, TypeAlias, TypeVar, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call  # noqa: TID251  (a call, not a transform)

from ntk_lazy.errors import ArgumentError, ShapeError, UnsupportedModuleError
from ntk_lazy.precision import differentiable_weight_norm, has_weight_norm
from ntk_lazy.widened import HALF, Widened, coarsest

ParameterChoice: TypeAlias = str | Sequence[str] | Callable[[str, Tensor], bool] | None
InputFunction: TypeAlias = Callable[[Tensor], Tensor]
OutputFunction: TypeAlias = Callable[[Any], Tensor]
ParameterFunction: TypeAlias = Callable[[dict[str, Tensor], Tensor], Any]
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

    __slots__ = ("_aliases", "_function", "_has_weight_norm", "_input_fn", "_module", "_output_fn")

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
        self._aliases = {} if module is None else _aliases(module)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    @property
    def module(self) -> nn.Module | None:
        """The user's module, to be named in messages; None for a plain function."""
        return self._module

    def raw(self, tensors: dict[str, Tensor], x: Tensor, then: Callable[[Any], Any] | None = None) -> Any:
        """Return what the model returns for ``x``, after ``output_fn``; and after ``then``, while it holds the tensors.

        Activation checkpointing runs a part of the module again in the backward pass: a backward pass that takes
        place in ``then`` finds the tensors there that the forward pass had, not the module's own.
        """

        def finish(returned: Any) -> Any:
            output = returned if self._output_fn is None else self._output_fn(returned)
            return output if then is None else then(output)

        x = x if self._input_fn is None else as_ieee(self._input_fn(x))
        if self._module is None:
            assert self._function is not None
            return finish(self._function(tensors, x))
        written_out = differentiable_weight_norm() if self._has_weight_norm else nullcontext()
        with attributes_kept(self._module), written_out:
            tensors = tensors | {name: tensors[first] for name, first in self._aliases.items() if first in tensors}
            if then is None:
                return finish(functional_call(self._module, tensors, (x,), tie_weights=False))
            held = {f"module.{name}": tensor for name, tensor in tensors.items()}
            return functional_call(_Holding(self._module), held, (x, finish), tie_weights=False)


def _aliases(module: nn.Module) -> dict[str, str]:
    """Map the other names of tied tensors to their first, each place in a module once.

    ``functional_call`` finds ties itself, but a module that is registered under two names gets its tensors twice
    from it, and is left with those of the first exchange.
    """
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    for prefix, inner in module.named_modules():
        own = [*inner.named_parameters(recurse=False, remove_duplicate=False)]
        own += inner.named_buffers(recurse=False, remove_duplicate=False)
        for attribute, tensor in own:
            name = f"{prefix}.{attribute}" if prefix else attribute
            if first.setdefault(id(tensor), name) != name:
                aliases[name] = first[id(tensor)]
    return aliases


@contextmanager
def attributes_kept(module: nn.Module) -> Iterator[None]:
    """Put back what a forward pass assigns to plain attributes: the last activations, a counter, a cache.

    Under a transform of functions these would be tensors that are dead outside of it.
    """
    before = [(vars(inner), dict(vars(inner))) for inner in module.modules()]
    try:
        yield
    finally:
        for now, kept in before:
            if len(now) != len(kept) or any(now.get(name) is not value for name, value in kept.items()):
                for name in now.keys() - kept.keys():
                    del now[name]
                now.update(kept)


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
    """A module followed by a function of what it returns."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, finish: Callable[[Any], Any]) -> Any:
        return finish(self.module(x))


@final
@dataclass(frozen=True, eq=False)
class FunctionalModel:
    """``f(params, x)`` with outputs flattened to ``(examples, C)``.

    Attributes:
        call: The stateless call.
        params: The parameters that make up J, each tied tensor once, in the module's order.
        constants: All other parameters, and the buffers (detached).
        has_private_buffers: Whether each call gets copies of the buffers. Switch it off only for a model
            that is known not to write to them.
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
        _refuse_wrappers(model)
        named = dict(model.named_parameters(remove_duplicate=False))
        _refuse_uninitialised(named)
        canonical = {id(p): n for n, p in model.named_parameters()}
        chosen = {canonical[id(named[n])] for n in _choose(named, params)}
        everything = dict(model.named_parameters())
        buffers = {n: as_ieee(b.detach()) for n, b in model.named_buffers()}
        return cls(
            call=ModelCall(module=model, input_fn=input_fn, output_fn=output_fn),
            params={n: as_ieee(p) for n, p in everything.items() if n in chosen},
            constants={n: as_ieee(p) for n, p in everything.items() if n not in chosen} | buffers,
            buffer_names=frozenset(buffers),
        )

    @classmethod
    def from_function(
        cls,
        function: ParameterFunction,
        tensors: Mapping[str, Tensor],
        *,
        params: ParameterChoice = None,
        output_fn: OutputFunction | None = None,
    ) -> Self:
        """Take a plain function ``f(params, x)`` and its tensors by name; ``params`` chooses as for a module."""
        chosen = set(_choose(tensors, params))
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
        with self._generators(), self._arithmetic():
            return self._flat(self.call.raw(self._tensors(params), as_ieee(x)), x.shape[0])

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
        with self._generators(), self._arithmetic():
            result: Result = self.call.raw(
                self._tensors(params), as_ieee(x), lambda output: then(self._flat(output, x.shape[0]))
            )
        return result

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


def _refuse_wrappers(model: nn.Module) -> None:
    for name, inner in model.named_modules():
        if isinstance(inner, nn.DataParallel | nn.parallel.DistributedDataParallel):
            raise UnsupportedModuleError(
                f"{name or 'the model'} is a {type(inner).__name__}, which copies its parameters. Pass model.module."
            )
        if isinstance(inner, torch.jit.ScriptModule):
            raise UnsupportedModuleError(
                f"{name or 'the model'} is a ScriptModule, whose parameters cannot be exchanged for a call. "
                "Pass the module that it was scripted or traced from."
            )


def _refuse_uninitialised(named: Mapping[str, Tensor]) -> None:
    for name, parameter in named.items():
        if nn.parameter.is_lazy(parameter):
            raise UnsupportedModuleError(
                f"parameter {name!r} has no shape yet. Call the module on an example before you ask for its kernel."
            )


def _choose(named: Mapping[str, Tensor], params: ParameterChoice) -> list[str]:
    """List the names that a choice of parameters fits, refusing a choice that fits none."""
    for name, tensor in named.items():
        if tensor.is_complex():
            raise UnsupportedModuleError(f"parameter {name!r} is complex; the kernel of real parameters is meant here.")
    real = {n: t for n, t in named.items() if t.is_floating_point()}
    params = as_parameter_choice(params)
    if params is None:
        chosen = list(real)
    elif callable(params):
        chosen = [n for n, t in real.items() if params(n, t)]
    else:
        chosen = []
        for pattern in params:
            found = [n for n in real if n == pattern or fnmatch.fnmatchcase(n, pattern)]
            if not found:
                near = difflib.get_close_matches(pattern, real, n=3, cutoff=0.4) or list(real)[:5]
                raise ArgumentError(f"params: no parameter is called {pattern!r}; did you mean {', '.join(near)}?")
            chosen += found
    if not chosen:
        raise ArgumentError("params: no parameter was chosen, so that the kernel would be zero.")
    return chosen


def _is_same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
