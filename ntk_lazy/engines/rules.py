"""How each operation of torch uses its parameter: from what it saved and the gradient at its output to factors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor

from ntk_lazy.engines.graph import Edge, Placement
from ntk_lazy.engines.seen import padding_of, tokens_of
from ntk_lazy.engines.uses import Lookup, Outer, Rows, Use, Window

# From an edge, the shape of what it sees of its parameter, gradients (q, *shape) at its output, their placement and the
# number of examples to factors; None where the operation is used in a way that the rule does not know. Rows are in the
# order in which the operation sees entries; a weight may be seen transposed.
Rule: TypeAlias = Callable[[Edge, torch.Size, Tensor, Placement, int], Use | None]


def use_of(edge: Edge, G: Tensor, placement: Placement, b: int) -> Use | None:
    """Make factors of one use of a parameter, if there is a rule that fits.

    Args:
        edge: Where the parameter is used.
        G: Gradients at the output of the operation, ``(q, *shape)``.
        placement: Where the examples are in it.
        b: How many they are.
    """
    rule, seen = _RULES.get(edge.operation), edge.seen
    if rule is None:
        return None
    scale = seen.common_scale()
    if scale is not None and scale != 1:
        G = G * scale
    use = rule(edge, seen.shape, G, placement, b)
    if scale is None and seen.scale is not None:
        # Different entries of a weight are scaled differently: only rows can follow.
        use = Rows(use.R * seen.scale.to(G.dtype).flatten()) if isinstance(use, Rows) else None
    return None if use is None else seen.put_back(use)


def _matrix_product(edge: Edge, shape: torch.Size, G: Tensor, placement: Placement, b: int) -> Use | None:
    """``x @ W`` or ``W @ x``, and these plus a bias."""
    node, has_bias = edge.node, edge.operation == "AddmmBackward0"
    if has_bias and (node._saved_alpha != 1 or node._saved_beta != 1):
        return None
    if has_bias and edge.index == 0:
        return _sum(shape, G, placement, b)
    is_left = edge.index == has_bias
    x = node._saved_mat2 if is_left else node._saved_mat1 if has_bias else node._saved_self
    return None if x is None else _weight(edge, G, x.detach().to(G.dtype), placement, b, is_left=is_left)


def _stacked_product(edge: Edge, shape: torch.Size, G: Tensor, placement: Placement, b: int) -> Use | None:
    """The same for each matrix of a stack: one for each head, or a stack of one, which ``einsum`` makes."""
    is_left = edge.index == 0
    x = edge.node._saved_mat2 if is_left else edge.node._saved_self
    if x is None or placement.dim == 0:
        return None
    x = x.detach().to(G.dtype)
    if shape[0] == 1:
        flat = replace(placement, dim=placement.dim - 1)
        return _weight(edge, G[:, 0], x[0], flat, b, is_left=is_left)
    if placement.dim != 1 + is_left:
        return None
    if is_left:
        G, x, placement = G.mT, x.mT, replace(placement, dim=1)
    into, out = placement.split(x, b), placement.split(G, b, skip=1)
    return Rows(torch.einsum("bqmso,bmsi->bqmoi" if is_left else "bqmso,bmsi->bqmio", out, into).flatten(2))


def _weight(edge: Edge, G: Tensor, x: Tensor, placement: Placement, b: int, *, is_left: bool) -> Use | None:
    """A matrix that is multiplied with positions of examples; from the left, all is transposed."""
    if placement.dim != is_left:
        return None
    if is_left:
        G, x, placement = G.mT, x.mT, replace(placement, dim=0)
    out = placement.split(G, b, skip=1).transpose(0, 1)
    return Outer(placement.split(x, b), out, is_transposed=edge.seen.is_turned != is_left)


def _vector_product(edge: Edge, shape: torch.Size, G: Tensor, placement: Placement, b: int) -> Use | None:
    """``x @ v``."""
    if edge.index != 1:
        return None
    x = placement.split(edge.node._saved_self.detach().to(G.dtype), b)
    return Rows(torch.einsum("bqs,bsi->bqi", placement.split(G, b, skip=1), x))


def _convolution(edge: Edge, shape: torch.Size, G: Tensor, placement: Placement, b: int) -> Use | None:
    node = edge.node
    if placement.dim != 0 or G.shape[1] != b:
        return None
    if edge.index == 2:
        return Rows(G.flatten(3).sum(3).transpose(0, 1))
    x = node._saved_input.detach().to(G.dtype)
    if edge.index != 1 or x.shape[0] != b:
        return None
    dims = x.ndim - 2
    stride, padding, dilation = (
        _each(v, dims) for v in (node._saved_stride, node._saved_padding, node._saved_dilation)
    )
    window = Window(tuple(shape[2:]), stride, padding, dilation)
    groups, q = node._saved_groups, G.shape[0]
    if node._saved_transposed:
        # The kernel moves over the output: gradients there are unfolded, and the input takes the place of gradients.
        beneath = window.unfold(G.flatten(0, 1)).unflatten(0, (q, b))
        if beneath.shape[4] != prod(x.shape[2:]):
            return None
        beneath = beneath.unflatten(2, (groups, -1)).flatten(3, 4)
        inside = x.flatten(2).unflatten(1, (groups, -1))
        return Rows(torch.einsum("qbgos,bgis->bqgio", beneath, inside).flatten(2))
    gradients = G.flatten(3)
    if groups == 1:
        return Outer(x, gradients.mT, window=window)
    beneath = window.unfold(x).unflatten(1, (groups, -1)).flatten(2, 3)
    return Rows(torch.einsum("qbgos,bgis->bqgoi", gradients.unflatten(2, (groups, -1)), beneath).flatten(2))


def _lookup(edge: Edge, shape: torch.Size, G: Tensor, placement: Placement, b: int) -> Use | None:
    tokens = tokens_of(edge.node)
    if tokens is None or edge.index != 0 or placement.dim >= tokens.ndim:
        return None
    tokens = placement.split(tokens, b).flatten(1)
    G = placement.split(G, b, skip=1).transpose(0, 1).reshape(G.shape[0], b, tokens.shape[1], -1)
    padding = padding_of(edge.node)
    if 0 <= padding < shape[0]:
        G = G * (tokens != padding).unsqueeze(-1)
    return Lookup(tokens, G, shape[0])


def _layer_norm(edge: Edge, shape: torch.Size, G: Tensor, placement: Placement, b: int) -> Use | None:
    node = edge.node
    if edge.index == 1:
        G = G * ((node._saved_input.detach() - node._saved_result1) * node._saved_result2)
    elif edge.index != 2:
        return None
    return _sum(shape, G, placement, b)


def _group_norm(edge: Edge, shape: torch.Size, G: Tensor, placement: Placement, b: int) -> Use | None:
    node = edge.node
    if edge.index not in (1, 2) or placement.dim != 0 or G.shape[1] != b:
        return None
    if edge.index == 1:
        x = node._saved_input.detach()
        grouped = x.reshape(b, node._saved_group, -1)
        normal = (grouped - node._saved_result1.reshape(b, -1, 1)) * node._saved_result2.reshape(b, -1, 1)
        G = G * normal.view_as(x)
    return Rows(G.flatten(3).sum(3).transpose(0, 1) if G.ndim > 3 else G.transpose(0, 1))


def _batch_norm(edge: Edge, shape: torch.Size, G: Tensor, placement: Placement, b: int) -> Use | None:
    """Batch normalisation by running statistics."""
    node = edge.node
    if edge.index not in (1, 2) or node._saved_training or placement.dim != 0 or G.shape[1] != b:
        return None
    if edge.index == 1:
        x = node._saved_input.detach()
        channel = (1, -1, *[1] * (x.ndim - 2))
        deviation = (node._saved_running_var + node._saved_eps).sqrt()
        G = G * ((x - node._saved_running_mean.reshape(channel)) / deviation.reshape(channel))
    return Rows(G.flatten(3).sum(3).transpose(0, 1) if G.ndim > 3 else G.transpose(0, 1))


def _addition(edge: Edge, shape: torch.Size, G: Tensor, placement: Placement, b: int) -> Use | None:
    return _sum(shape, G * edge.node._saved_alpha if edge.index == 1 else G, placement, b)


def _subtraction(edge: Edge, shape: torch.Size, G: Tensor, placement: Placement, b: int) -> Use | None:
    return _sum(shape, -G * edge.node._saved_alpha if edge.index == 1 else G, placement, b)


def _multiplication(edge: Edge, shape: torch.Size, G: Tensor, placement: Placement, b: int) -> Use | None:
    other = edge.node._saved_other if edge.index == 0 else edge.node._saved_self
    return None if other is None else _sum(shape, G * other.detach(), placement, b)


def _division(edge: Edge, shape: torch.Size, G: Tensor, placement: Placement, b: int) -> Use | None:
    node = edge.node
    other = node._saved_other.detach()
    if edge.index == 0:
        return _sum(shape, G / other, placement, b)
    return _sum(shape, -G * node._saved_self.detach() / other.square(), placement, b)


def _prelu(edge: Edge, shape: torch.Size, G: Tensor, placement: Placement, b: int) -> Use | None:
    return _sum(shape, G * edge.node._saved_self.detach().clamp(max=0), placement, b) if edge.index == 1 else None


def _expansion(edge: Edge, shape: torch.Size, G: Tensor, placement: Placement, b: int) -> Use | None:
    """A parameter that each example gets for itself: a class token."""
    return _sum(shape, G, placement, b)


def _repetition(edge: Edge, shape: torch.Size, G: Tensor, placement: Placement, b: int) -> Use | None:
    """The same by copies: instance normalisation repeats its parameters for each example."""
    G = placement.split(G, b, skip=1)
    sizes = (*[1] * (G.ndim - 2 - len(shape)), *shape)
    if not placement.is_first and sizes[placement.dim] != 1:
        return None
    if any(copies % size for copies, size in zip(G.shape[2:], sizes, strict=True)):
        return None
    by_copy = [n for copies, size in zip(G.shape[2:], sizes, strict=True) for n in (copies // size, size)]
    G = G.reshape(*G.shape[:2], *by_copy)
    return Rows(G.sum(tuple(range(2, G.ndim, 2))).flatten(2))


def _sum(shape: torch.Size, G: Tensor, placement: Placement, b: int) -> Use | None:
    """Sum the gradient of an operand that was broadcast over its output, example by example."""
    G = placement.split(G, b, skip=1)
    extra = G.ndim - 2 - len(shape)
    if extra < 0 or any(p not in (1, g) for p, g in zip(shape, G.shape[2 + extra :], strict=True)):
        return None
    return Rows(G.sum_to_size(b, G.shape[1], *[1] * extra, *shape).reshape(b, G.shape[1], -1))


def _each(sizes: tuple[int, ...], dims: int) -> tuple[int, ...]:
    return tuple(sizes) if len(sizes) == dims else tuple(sizes) * dims


_RULES: dict[str, Rule] = {
    "AddmmBackward0": _matrix_product,
    "MmBackward0": _matrix_product,
    "BmmBackward0": _stacked_product,
    "MvBackward0": _vector_product,
    "ConvolutionBackward0": _convolution,
    "EmbeddingBackward0": _lookup,
    "IndexBackward0": _lookup,
    "IndexSelectBackward0": _lookup,
    "NativeLayerNormBackward0": _layer_norm,
    "NativeGroupNormBackward0": _group_norm,
    "NativeBatchNormBackward0": _batch_norm,
    "AddBackward0": _addition,
    "SubBackward0": _subtraction,
    "MulBackward0": _multiplication,
    "DivBackward0": _division,
    "PreluKernelBackward0": _prelu,
    "ExpandBackward0": _expansion,
    "RepeatBackward0": _repetition,
}
