"""Where parameters enter a forward pass: read off the graph that autograd records.

Modules that own a parameter do not tell how it is used: ``F.linear(h, self.emb.weight)``, ``h @ W.T``, a packed
projection and a layer called twice all look the same in the graph, where each use is an edge from an operation to the
parameter. The operation has saved what went in; the gradient at what came out is one backward pass away.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor

from ntk_lazy.engines.seen import Seen

Node: TypeAlias = Any  # a node of the graph of autograd; its class depends on the operation
# By the node that made a tensor: which of its outputs, the operation that the tensor enters, and as which operand.
Users: TypeAlias = dict[Node, list[tuple[int, Node, int]]]


@dataclass(frozen=True, eq=False)
class Edge:
    """One use of one parameter.

    Attributes:
        name: The parameter.
        node: The operation that uses it.
        index: Which operand it is.
        seen: What the operation gets of the parameter.
        onward: Uses of what it makes, in case nothing but the parameter enters it.
    """

    name: str
    node: Node
    index: int
    seen: Seen
    onward: tuple[Edge, ...] = ()

    @property
    def operation(self) -> str:
        """What the operation is called, for messages."""
        return str(self.node.name())

    def all(self) -> Iterator[Edge]:
        """This one and all onward."""
        yield self
        for edge in self.onward:
            yield from edge.all()


def edges(output: Tensor, leaves: Mapping[str, Tensor]) -> list[Edge]:
    """List all uses of leaves on the way to an output, in an order that depends on the graph alone."""
    names = {id(leaf): name for name, leaf in leaves.items()}
    users: Users = {}
    ends = {}
    for node in nodes(output):
        for index, (child, number) in enumerate(node.next_functions):
            if child is not None:
                users.setdefault(child, []).append((number, node, index))
        name = names.get(id(getattr(node, "variable", None)))
        if name is not None:
            ends[name] = node
    return [edge for name, end in ends.items() for edge in _uses(name, end, 0, Seen.whole(leaves[name]), users)]


def _uses(name: str, made_by: Node, output: int, seen: Seen, users: Users) -> Iterator[Edge]:
    """Follow a parameter, or what was made of it alone, to the operations that it enters."""
    for number, node, index in users.get(made_by, ()):
        if number != output:
            continue
        outputs = sorted({n for n, _, _ in users.get(node, ())})
        behind = [(n, seen.through(node, index, n)) for n in outputs]
        if behind and all(further is not None for _, further in behind):
            for n, further in behind:
                yield from _uses(name, node, n, further, users)  # type: ignore[arg-type]
            continue
        perhaps = seen.perhaps_through(node, index)
        onward = () if perhaps is None else tuple(_uses(name, node, 0, perhaps, users))
        yield Edge(name, node, index, seen, onward)


def nodes(output: Tensor) -> Iterator[Node]:
    """Go through the graph behind a tensor, each node once."""
    stack, seen = [output.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(child for child, _ in node.next_functions)


@dataclass(frozen=True)
class Placement:
    """Which part of a tensor belongs to which example.

    Attributes:
        dim: The dimension that the examples are in.
        is_first: Whether they come before the positions that share it.
    """

    dim: int
    is_first: bool

    def split(self, t: Tensor, num_examples: int, *, skip: int = 0) -> Tensor:
        """Bring the examples to the front, and leave the positions where they were.

        Args:
            t: Shape ``(*skipped, ..., b*S or S*b, ...)``.
            num_examples: b.
            skip: Dimensions in front that are not the operation's.

        Returns:
            Shape ``(b, *skipped, ..., S, ...)``.
        """
        dim = self.dim + skip
        sizes = (num_examples, -1) if self.is_first else (-1, num_examples)
        return t.unflatten(dim, sizes).movedim(dim if self.is_first else dim + 1, 0)

    @classmethod
    def detect(cls, G: Tensor, weighted: Tensor, weights: Tensor, *, slack: Tensor) -> Self | None:
        """Find out where the examples are, from gradients before and after each example was given a weight.

        Args:
            G: Before.
            weighted: After.
            weights: Of each example.
            slack: What an entry may be off by.

        Returns:
            The placement; None if examples cannot be told apart.
        """
        candidates = (cls(dim, is_first) for dim in range(G.ndim) for is_first in (True, False))
        return next((c for c in candidates if c._holds(G, weighted, weights, slack)), None)

    def _holds(self, G: Tensor, weighted: Tensor, weights: Tensor, slack: Tensor) -> bool:
        """Whether each part of the gradients was scaled by the weight of its example."""
        b = weights.numel()
        if self.dim >= G.ndim or G.shape[self.dim] % b:
            return False
        before, after = self.split(G, b), self.split(weighted, b)
        w = weights.to(G.dtype).reshape(b, *[1] * (before.ndim - 1))
        return bool(largest(torch.addcmul(after, before, w, value=-1)) <= slack)


def largest(t: Tensor) -> Tensor:
    """The largest entry in size of a tensor that is not empty, without a copy of them all.

    The extremes are found ten times as fast as the maximum norm.
    """
    low, high = torch.aminmax(t)
    return torch.maximum(-low, high)


def output_gradients(output: Tensor, nodes: list[Node], cotangents: Tensor) -> list[Tensor]:
    """Pull cotangents back to the outputs of operations, and no further.

    Args:
        output: ``(b, C)``.
        nodes: Operations; each one's first output is meant.
        cotangents: ``(q, C)``, the same for each example, or ``(q, b, C)``.

    Returns:
        For each node ``(q, *shape)``.
    """
    ends = [torch.autograd.graph.GradientEdge(node, 0) for node in nodes]
    pulled = []
    for u in cotangents:
        grads = torch.autograd.grad(output, ends, u.expand_as(output).to(output.dtype), retain_graph=True)
        pulled.append([g.detach() for g in grads])
    return [torch.stack(column) for column in zip(*pulled, strict=True)]
