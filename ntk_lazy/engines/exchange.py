"""Whether a model's parameters are what it computes with: K is made by handing it others in their place.

A parameter that ``forward`` reaches by another way than its name, through a list, a closure or a view that was kept,
would stay the module's own there, and be left out of K. While a model runs on copies, no operation may touch the memory
of the originals, or a tensor whose graph leads to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from ntk_lazy.engines.graph import nodes
from ntk_lazy.engines.linearisation import DoubleReverse, Tangents
from ntk_lazy.engines.rounding import Rounding, largest
from ntk_lazy.engines.watch import Watch
from ntk_lazy.errors import UnsupportedModuleError
from ntk_lazy.model import FunctionalModel


@final
class OriginalsWatch(Watch):
    """Notice operations on parameters, while a model runs that was given copies of them.

    Attributes:
        touched: Names of those that it uses nevertheless.
    """

    def __init__(self, originals: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.touched: set[str] = set()
        # By identity: an address is not to be had of the tensors that transforms of functions wrap. While the storages
        # are held, no others have their identity.
        self._names: dict[int, tuple[set[str], torch.UntypedStorage]] = {}
        self._variables = {id(tensor): name for name, tensor in originals.items()}
        self._known: dict[int, Any] = {}  # nodes of graphs that were followed
        for name, tensor in originals.items():
            if tensor.numel():
                storage = tensor.untyped_storage()
                self._names.setdefault(id(storage), (set(), storage))[0].add(name)

    @override
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                known = self._names.get(id(leaf.untyped_storage()))
                self.touched |= set() if known is None else known[0]
                self._follow(leaf.grad_fn)
        return func(*args, **(kwargs or {}))

    def _follow(self, node: Any) -> None:
        """Look for originals behind a node of a graph, at each node once in all."""
        stack = [node]
        while stack:
            one = stack.pop()
            if one is None or id(one) in self._known:
                continue
            self._known[id(one)] = one
            name = self._variables.get(id(getattr(one, "variable", None)))
            if name is not None:
                self.touched.add(name)
            stack.extend(child for child, _ in one.next_functions)


def refuse_unreached(output: Tensor, leaves: Mapping[str, Tensor]) -> None:
    """Raise UnsupportedModuleError where none of the leaves is in the graph of an output, whatever else is."""
    variables = {id(leaf) for leaf in leaves.values()}
    if not any(id(getattr(node, "variable", None)) in variables for node in nodes(output)):
        raise UnsupportedModuleError(
            "no parameter that was chosen reaches the output: it is detached, computed under no_grad, or does not use "
            "them (torch.func.stack_module_state detaches, too). The kernel would be zero. Choose others with params=, "
            "or return the output with its graph."
        )


def refuse_other_ways(model: FunctionalModel, touched: set[str], x: Tensor, U: Tensor, rounding: Rounding) -> None:
    """Refuse a model whose gradients, as it is, are others than those that it has of the tensors it is given.

    Args:
        model: The model.
        touched: Names of parameters whose originals it uses.
        x: Examples.
        U: Cotangents, shape ``(k, b, C)``.
        rounding: Tells gradients apart.

    Cost: two backward passes over ``x`` for each cotangent; none where nothing was touched.

    Raises:
        UnsupportedModuleError: A parameter has another gradient.
    """
    names = [name for name in model.params if name in touched]
    if not names:
        return
    given = DoubleReverse(model, x).pull(U)
    # A model in half precision does not take what it is given together with what it has.
    is_half = any(p.dtype != model.params[name].dtype for name, p in model.own_params(names).items())
    own = None if is_half else _own_gradients(model, names, x, U)
    scale = largest(*given.values())
    for name in names:
        if own is None or rounding.separates(given[name], own[name], scale=max(scale, largest(*own.values()))):
            where = "the mapping that it is given" if model.call.module is None else "its module"
            raise UnsupportedModuleError(
                f"the forward pass reaches parameter {name!r} by another way than by its name (through a global, a "
                "closure, a container or a tensor that was computed from it and kept), so that K would leave a part of "
                f"its gradient out. Take it from {where} in each call, and compute anew what is made of it."
            )


def _own_gradients(model: FunctionalModel, names: list[str], x: Tensor, U: Tensor) -> Tangents | None:
    """Differentiate the model as it is, with its own parameters; None where a graph that it kept is used up."""
    own = model.own_params(names)
    asked = {name: p.requires_grad for name, p in own.items()}
    try:
        for p in own.values():
            if p.is_leaf:
                p.requires_grad_(True)
        with torch.enable_grad():
            output = model.as_it_is(x)
            gradients = [
                torch.autograd.grad(output, list(own.values()), u, retain_graph=True, allow_unused=True) for u in U
            ]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return None
    finally:
        for name, p in own.items():
            if p.is_leaf:
                p.requires_grad_(asked[name])
    pulled = zip(*gradients, strict=True)
    return {
        name: torch.stack([torch.zeros_like(p) if g is None else g for g in columns])
        for (name, p), columns in zip(own.items(), pulled, strict=True)
    }
