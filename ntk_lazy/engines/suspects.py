"""Which module is at fault: what a forward pass calls, and what is known or found about each of the calls."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from typing_extensions import override

from ntk_lazy.engines.linearisation import outputs
from ntk_lazy.engines.rounding import Rounding, noise
from ntk_lazy.engines.watch import Watch
from ntk_lazy.errors import UnsupportedModuleError
from ntk_lazy.model import FunctionalModel, as_ieee
from ntk_lazy.module_state import module_state_kept
from ntk_lazy.out_of_memory import refuse_out_of_memory
from ntk_lazy.precision import differentiable_weight_norm

# What a transform of functions raises where it meets an operation that it has no rule for. The module has run
# without the transform by then, so that none of these can be the user's own.
TRANSFORM_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError)
# What a module raises besides, where it wants another number of examples.
LOOKUP_ERRORS = (IndexError, KeyError, AssertionError)

AS_ONE_EXAMPLE = (
    "Where the first dimension are the nodes of one graph, or other parts of one thing, pass that as one example: "
    "x.unsqueeze(0), to a module that returns torch.stack([model(one) for one in x])."
)


@dataclass(frozen=True, eq=False)
class Call:
    """One call of one module in a forward pass.

    Attributes:
        name: Of the module.
        module: The module.
        num_dims: Of the tensors among its arguments by position.
        args: All of these, where they are kept.
        kwargs: Those by name, where they are kept.
    """

    name: str
    module: nn.Module
    num_dims: tuple[int, ...]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        kind = type(self.module).__name__
        return f"{self.name!r} ({kind})" if self.name else f"the model itself ({kind})"


@contextmanager
def recorded_calls(
    module: nn.Module | None, running: list[Call] | None = None, *, keep_arguments: bool = False
) -> Iterator[list[Call]]:
    """List the calls of a module and of those inside it, in the order in which they return.

    Each module has a hook for the length of this context. One hook on all modules of the process would touch
    less, but torch 2.13 does not take all of such a hook away again.

    Args:
        module: The outermost one; None for a function, which calls none that is known.
        running: Holds the calls that have not returned, the innermost one last, while the context lasts.
        keep_arguments: Whether to keep the arguments, among which are all activations between modules.
    """
    calls: list[Call] = []
    running = [] if running is None else running
    inner = {} if module is None else {found: name for name, found in module.named_modules()}

    def begin(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        num_dims = tuple(arg.ndim for arg in args if isinstance(arg, Tensor))
        kept = (args, kwargs) if keep_arguments else ()
        running.append(Call(inner[called], called, num_dims, *kept))

    def note(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append(running.pop())

    with ExitStack() as hooks:
        for found in inner:
            hooks.callback(found.register_forward_pre_hook(begin, with_kwargs=True).remove)
            hooks.callback(found.register_forward_hook(note, with_kwargs=True).remove)
        yield calls


class EmbeddingWatch(Watch):
    """Notice embeddings, of modules and functional ones, whose backward pass is not the transpose of the forward.

    Attributes:
        has_padding: A row is left out of the gradient (``padding_idx``), but not of the forward-mode derivative.
        has_frequencies: Gradients are divided by how often a token occurs in the batch.
        is_sparse: Gradients are sparse tensors.
    """

    def __init__(self, fixed: Iterable[Tensor]) -> None:
        super().__init__()
        # By identity, as transforms of functions wrap tensors that have no address.
        self._fixed = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in fixed)}
        self.has_padding = self.has_frequencies = self.is_sparse = False

    @override
    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)  # type: ignore[no-untyped-call]
        self._fixed = {}  # what was noticed outlives the watching, and may be pickled

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.embedding.default and id(args[0].untyped_storage()) not in self._fixed:
            options = dict(zip(("padding_idx", "scale_grad_by_freq", "sparse"), args[2:], strict=False)) | (
                kwargs or {}
            )
            self.has_padding |= options.get("padding_idx", -1) >= 0
            self.has_frequencies |= options.get("scale_grad_by_freq", False)
            self.is_sparse |= options.get("sparse", False)
        return func(*args, **(kwargs or {}))


def random_modules(calls: list[Call]) -> list[Call]:
    """List the calls whose result is drawn at random."""
    return [call for call in _distinct(calls) if call.module.training and _is_random(call.module)]


def batch_statistics_modules(calls: list[Call]) -> list[Call]:
    """List the calls that normalise with statistics of the batch."""
    return [
        call
        for call in _distinct(calls)
        if isinstance(call.module, _BatchNorm) and (call.module.training or call.module.running_mean is None)
    ]


def time_first_modules(calls: list[Call]) -> list[Call]:
    """List the calls that take the first dimension for time, because ``batch_first`` was not set."""
    found = []
    for call in _distinct(calls):
        owner = getattr(call.module, "self_attn", call.module)
        if getattr(owner, "batch_first", True) is False and 3 in call.num_dims:
            found.append(call)
    return found


def embedding_modules(calls: list[Call], option: str) -> list[Call]:
    """List the embeddings that were built with an option."""
    # A padding_idx of 0 is set, although it equals False.
    values = [(call, getattr(call.module, option, None)) for call in _distinct(calls)]
    return [call for call, value in values if value is not None and value is not False]


def owners_of(calls: list[Call], tensors: list[str]) -> list[Call]:
    """List the calls of the modules that own the tensors."""
    owners = {name.rpartition(".")[0] for name in tensors}
    return [call for call in _distinct(calls) if call.name in owners]


def first_without_forward_mode(model: FunctionalModel, x: Tensor) -> tuple[Call, str] | None:
    """Find the innermost call that forward mode cannot follow, or follows to another Jacobian than reverse mode.

    Calls are tried in the order in which they return, so that a module is tried after those inside it.

    Returns:
        The call and what happened there; None where every call passes alone.
    """
    with recorded_calls(model.call.module, keep_arguments=True) as calls:
        outputs(model, x)
    for call in calls:
        reason = _try_forward_mode(call)
        if reason is not None:
            return call, reason
    return None


def coupled(calls: list[Call], what: str) -> UnsupportedModuleError:
    """Say that examples depend on each other, and what to do about it."""
    time_first = time_first_modules(calls)
    if time_first:
        cure = f"The first dimension is time to {named(time_first)}: set batch_first=True."
    else:
        cure = f"Compute each example of dimension 0 by itself; where it squeezes, let it squeeze(-1). {AS_ONE_EXAMPLE}"
    return UnsupportedModuleError(f"{what}. {cure}")


def named(calls: list[Call], *, otherwise: str = "the model") -> str:
    """Write out calls for a message, the first few of them."""
    if not calls:
        return otherwise
    shown = ", ".join(str(call) for call in calls[:3])
    return shown if len(calls) <= 3 else f"{shown} and {len(calls) - 3} more"


def first_line(error: BaseException) -> str:
    """Shorten a message of torch to its first sentence."""
    line = str(error).strip().split("\n")[0].split(". ")[0].rstrip(".")
    return line if len(line) <= 160 else line[:157] + "..."


def _distinct(calls: list[Call]) -> list[Call]:
    return list({id(call.module): call for call in calls}.values())


def _is_random(module: nn.Module) -> bool:
    if isinstance(module, _DropoutNd):
        return module.p > 0
    if isinstance(module, nn.MultiheadAttention):
        return module.dropout > 0
    if isinstance(module, nn.RNNBase):
        return module.dropout > 0 and module.num_layers > 1
    return isinstance(module, nn.RReLU | nn.FractionalMaxPool2d | nn.FractionalMaxPool3d)


def _try_forward_mode(call: Call) -> str | None:
    """Differentiate one module alone, in both modes and two columns at once, and say what went wrong."""
    places = [i for i, arg in enumerate(call.args) if isinstance(arg, Tensor) and arg.is_floating_point()]
    params = {name: as_ieee(p.detach()) for name, p in call.module.named_parameters() if p.is_floating_point()}
    primals = (params, {str(i): call.args[i].detach().clone() for i in places})
    if not params and not places:
        return None

    def returned_by(params: dict[str, Tensor], inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        args = tuple(inputs[str(i)] if i in places else arg for i, arg in enumerate(call.args))
        buffers = {name: as_ieee(b.detach().clone()) for name, b in call.module.named_buffers()}
        with module_state_kept(call.module), differentiable_weight_norm():
            returned = functional_call(call.module, {**params, **buffers}, args, call.kwargs)
        return tuple(_floating_tensors(returned))

    tangents = tuple({n: noise((2, *t.shape), like=t, seed=1) for n, t in group.items()} for group in primals)
    try:
        values, transpose = vjp(returned_by, *primals)[:2]
        pushed = vmap(lambda *columns: jvp(returned_by, primals, columns)[1], randomness="same")(*tangents)
        cotangents = tuple(noise((2, *value.shape), like=value, seed=2) for value in values)
        pulled = vmap(transpose, randomness="same")(cotangents)
    except TRANSFORM_ERRORS as error:
        refuse_out_of_memory(error)
        return first_line(error)
    forward = _inner(pushed, cotangents)
    reverse = sum(_inner(p.values(), t.values()) for p, t in zip(pulled, tangents, strict=True))
    scale = (_inner(pushed, pushed) * _inner(cotangents, cotangents)) ** 0.5
    rounding = Rounding.of((*values, *params.values()))
    return "forward and reverse mode disagree" if abs(forward - reverse) > rounding.bound * scale else None


def _floating_tensors(returned: Any) -> Iterator[Tensor]:
    if isinstance(returned, Tensor):
        if returned.is_floating_point():
            yield returned
    elif isinstance(returned, dict):
        yield from _floating_tensors(tuple(returned.values()))
    elif isinstance(returned, tuple | list):
        for value in returned:
            yield from _floating_tensors(value)


def _inner(left: Iterable[Tensor], right: Iterable[Tensor]) -> float:
    return sum((float((a.double() * b.double()).sum()) for a, b in zip(left, right, strict=True)), 0.0)
