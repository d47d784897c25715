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

Node: TypeAlias = Any  # a node of the graph of autograd; its class depends on the operation

_TURNS = ("TBackward0", "TransposeBackward0")


@dataclass(frozen=True, eq=False)
class Edge:
    """One use of one parameter.

    Attributes:
        name: The parameter.
        node: The operation that uses it.
        index: Which operand it is.
        is_turned: Whether the operation sees a matrix transposed.
    """

    name: str
    node: Node
    index: int
    is_turned: bool

    @property
    def operation(self) -> str:
        """What the operation is called, for messages."""
        return str(self.node.name())


def edges(output: Tensor, leaves: Mapping[str, Tensor]) -> list[Edge]:
    """List all uses of leaves on the way to an output, in an order that depends on the graph alone."""
    names = {id(leaf): name for name, leaf in leaves.items()}
    found = []
    for node in _nodes(output):
        if node.name() in _TURNS and _leaf(node, names) is not None:
            continue  # not a use yet, but how a matrix is handed over
        for index, (child, _) in enumerate(node.next_functions):
            reached = None if child is None else _leaf(child, names)
            if reached is not None:
                name, num_turns = reached
                found.append(Edge(name, node, index, num_turns % 2 == 1))
    return found


def _nodes(output: Tensor) -> Iterator[Node]:
    stack, seen = [output.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(child for child, _ in node.next_functions)


def _leaf(node: Node, names: Mapping[int, str]) -> tuple[str, int] | None:
    """Follow transpositions of a matrix down to a leaf: its name, and how many they are."""
    num_turns = 0
    while node is not None and node.name() in _TURNS:
        num_turns += 1
        node = node.next_functions[0][0]
    variable = getattr(node, "variable", None)
    if variable is None or id(variable) not in names or (num_turns and variable.ndim != 2):
        return None
    return names[id(variable)], num_turns


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
    def detect(cls, G: Tensor, weighted: Tensor, weights: Tensor, *, tolerance: float) -> Self | None:
        """Find out where the examples are, from gradients before and after each example was given a weight.

        Returns:
            The placement; None if examples cannot be told apart.
        """
        candidates = (cls(dim, is_first) for dim in range(G.ndim) for is_first in (True, False))
        return next((c for c in candidates if c._holds(G, weighted, weights, tolerance=tolerance)), None)

    def _holds(self, G: Tensor, weighted: Tensor, weights: Tensor, *, tolerance: float) -> bool:
        """Whether each part of the gradients was scaled by the weight of its example."""
        b = weights.numel()
        if self.dim >= G.ndim or G.shape[self.dim] % b:
            return False
        before, after = self.split(G, b), self.split(weighted, b)
        scaled = before * weights.to(G.dtype).reshape(b, *[1] * (before.ndim - 1))
        return bool((scaled - after).abs().max() <= tolerance * after.abs().max())


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
