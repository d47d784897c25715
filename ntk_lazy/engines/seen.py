"""What an operation sees of a parameter: often not the parameter itself, but a part, a view or a function of it.

A packed projection is split; a table of positions is cut to the length of the sequence, or looked up at places that
are the same for all examples; a temperature is an exponential; ``einsum`` permutes. Nothing of this has to do with
data. Views are followed on a tensor without numbers, whose strides tell which entries are seen; of functions that act
on each entry alone the derivative is one number for each entry.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self, final

import torch
from torch import Tensor

from ntk_lazy.engines.uses import Lookup, Outer, Rows, Use, Within


@final
@dataclass(frozen=True, eq=False)
class Seen:
    """Entries of a parameter in the shape and order in which an operation gets them.

    Attributes:
        num_entries: Of the parameter.
        entries: Without numbers: its shape, strides and offset place what is seen among the entries of the parameter,
            or among those of its rows that were looked up.
        scale: Derivative of each entry that is seen; None for 1.
        looked_up: Rows of the parameter in ``entries``, how many it has, and which of them has no gradient (-1: none);
            None where nothing is looked up.
    """

    num_entries: int
    entries: Tensor
    scale: Tensor | None = None
    looked_up: tuple[Tensor, int, int] | None = None

    @classmethod
    def whole(cls, parameter: Tensor) -> Self:
        """The parameter itself."""
        return cls(parameter.numel(), torch.empty(parameter.shape, device="meta"))

    @property
    def shape(self) -> torch.Size:
        """What the operation takes it for."""
        return self.entries.shape

    @property
    def is_turned(self) -> bool:
        """Whether it is a matrix, or a stack of one, whose transpose lies in order."""
        return not self.entries.is_contiguous() and self.shape.numel() > 0 and self.entries.mT.is_contiguous()

    def through(self, node: Any, index: int, output: int) -> Seen | None:
        """What is seen behind an operation that nothing but the parameter enters; None if this is no such operation."""
        name, shape = node.name(), torch.Size(node._input_metadata[output].shape)
        if name in _VIEWS:
            try:
                entries = _VIEWS[name](self.entries, node, output, shape)
                scale = None if self.scale is None else _VIEWS[name](self.scale, node, output, shape)
            except RuntimeError:  # a copy that is not a view of what was copied
                return None
            return replace(self, entries=entries, scale=scale) if entries.shape == shape else None
        if name in _FUNCTIONS or (name in _PRODUCTS and _is_by_number(node, index)):
            return self._mapped(node, index, shape)
        return None

    def perhaps_through(self, node: Any, index: int) -> Seen | None:
        """The same of an operation that data may enter: that it does not shows in the gradient at its output."""
        shape = torch.Size(node._input_metadata[0].shape)
        if node.name() in _SUMS or node.name() in _PRODUCTS:
            return self._mapped(node, index, shape)
        tokens = tokens_of(node)
        is_plain = self.scale is None and self.looked_up is None
        is_plain = is_plain and self.entries.is_contiguous() and self.entries.numel() == self.num_entries
        if tokens is None or index != 0 or not is_plain or not self.entries.ndim:
            return None
        looked_up = tokens, self.shape[0], padding_of(node)
        return replace(self, entries=torch.empty(shape, device="meta"), looked_up=looked_up)

    def common_scale(self) -> Tensor | None:
        """The one number that all entries are scaled by; None where they are scaled by different ones."""
        if self.scale is None or not self.scale.numel():
            return torch.ones(())
        first = self.scale.flatten()[0]
        return first if bool((self.scale == first).all()) else None

    def put_back(self, use: Use) -> Use | None:
        """From a use of what is seen to one of the parameter; None where its factors cannot be rearranged."""
        if isinstance(use, Rows):
            strides = self.entries.stride()
            order = sorted(range(len(strides)), key=lambda d: -strides[d])
            entries = self.entries.permute(order)
            R = use.R.unflatten(2, self.shape) if order else use.R
            use = Rows(R.permute(0, 1, *(d + 2 for d in order)).flatten(2) if order else R)
        elif isinstance(use, Outer) and use.window is None and self.is_turned:
            entries = self.entries.mT
        else:
            entries = self.entries
        if not entries.is_contiguous():
            return None
        if self.looked_up is not None:
            return self._as_lookup(use) if self.entries.numel() == self._num_looked_up else None
        is_all = entries.numel() == self.num_entries
        return use if is_all else Within(use, int(entries.storage_offset()), self.num_entries)

    @property
    def _num_looked_up(self) -> int:
        assert self.looked_up is not None
        tokens, num_tokens, _ = self.looked_up
        return tokens.numel() * (self.num_entries // max(num_tokens, 1))

    def _mapped(self, node: Any, index: int, shape: torch.Size) -> Seen | None:
        """Behind a function of each entry; another operand may be broadcast to its shape, but not the other way."""
        if shape != self.shape:
            return None
        with torch.no_grad():
            metadata = node._input_metadata[0]
            gradients = node(torch.ones(shape, dtype=metadata.dtype, device=metadata.device))
        own = gradients[index] if isinstance(gradients, tuple) else gradients
        return replace(self, scale=own if self.scale is None else own * self.scale)

    def _as_lookup(self, use: Use) -> Use | None:
        assert self.looked_up is not None
        if not isinstance(use, Rows):
            return None
        tokens, num_tokens, padding = self.looked_up
        b, q, _ = use.R.shape
        G = use.R.view(b, q, tokens.numel(), -1).transpose(0, 1)
        if padding >= 0:
            G = G * (tokens.flatten() != padding).unsqueeze(-1)
        return Lookup(tokens.flatten().expand(b, -1), G, num_tokens)


def tokens_of(node: Any) -> Tensor | None:
    """The rows that an operation looks up in a table; None if it is no look-up of whole rows."""
    if node.name() == "EmbeddingBackward0":
        return node._saved_indices
    if node.name() == "IndexSelectBackward0" and node._saved_dim == 0:
        return node._saved_index
    if node.name() != "IndexBackward0" or len(node._saved_indices) != 1:
        return None
    (tokens,) = node._saved_indices
    if tokens is None or tokens.dtype not in (torch.int64, torch.int32):
        return None
    # Indices may count from the end.
    return tokens.long().remainder(int(node._saved_self_sym_sizes[0]))


def padding_of(node: Any) -> int:
    """The row without a gradient; -1 if there is none."""
    return int(node._saved_padding_idx) if node.name() == "EmbeddingBackward0" else -1


def _is_by_number(node: Any, index: int) -> bool:
    """Whether the other operand is one number, which is no data: examples have a dimension."""
    other = node._saved_other if index == 0 else node._saved_self
    return node.next_functions[1 - index][0] is None and isinstance(other, Tensor) and other.ndim == 0


def _signed(number: int) -> int:
    """What the graph shows of a dimension or an index that counts from the end."""
    return int(number) - 2**64 if number >= 2**63 else int(number)


def _squeezed(t: Tensor, node: Any, output: int, shape: torch.Size) -> Tensor:
    return t.squeeze(_signed(node._saved_dim))


def _part(t: Tensor, node: Any, output: int, shape: torch.Size) -> Tensor:
    """One of several outputs, each of a size of its own."""
    dim = _signed(node._saved_dim)
    sizes = [m.shape[dim] for m in node._input_metadata]
    return t.narrow(dim, sum(sizes[:output]), sizes[output])


def _sliced(t: Tensor, node: Any, output: int, shape: torch.Size) -> Tensor:
    dim = _signed(node._saved_dim) % t.ndim
    return t[(slice(None),) * dim + (slice(_signed(node._saved_start), _signed(node._saved_end), node._saved_step),)]


def _transposed(t: Tensor, node: Any, output: int, shape: torch.Size) -> Tensor:
    return t.transpose(_signed(node._saved_dim0), _signed(node._saved_dim1))


_View = Callable[[Tensor, Any, int, torch.Size], Tensor]
_VIEWS: dict[str, _View] = {
    "AliasBackward0": lambda t, node, output, shape: t,
    "CloneBackward0": lambda t, node, output, shape: t,
    "PermuteBackward0": lambda t, node, output, shape: t.permute([_signed(d) for d in node._saved_dims]),
    "ReshapeAliasBackward0": lambda t, node, output, shape: t.view(shape),
    "SelectBackward0": lambda t, node, output, shape: t.select(_signed(node._saved_dim), _signed(node._saved_index)),
    "SliceBackward0": _sliced,
    "SplitBackward0": _part,
    "SplitWithSizesBackward0": _part,
    "SqueezeBackward0": lambda t, node, output, shape: t.squeeze(),
    "SqueezeBackward1": _squeezed,
    "TBackward0": lambda t, node, output, shape: t.t(),
    "ToCopyBackward0": lambda t, node, output, shape: t,
    "TransposeBackward0": lambda t, node, output, shape: t.transpose(
        _signed(node._saved_dim0), _signed(node._saved_dim1)
    ),
    "UnbindBackward0": lambda t, node, output, shape: t.select(_signed(node._saved_dim), output),
    "UnsafeViewBackward0": lambda t, node, output, shape: t.view(shape),
    "UnsqueezeBackward0": lambda t, node, output, shape: t.unsqueeze(_signed(node._saved_dim)),
    "ViewBackward0": lambda t, node, output, shape: t.view(shape),
}
_FUNCTIONS = frozenset(
    f"{name}Backward0"
    for name in (
        *("Abs", "Neg", "Pow", "Reciprocal", "Sqrt", "Rsqrt", "Exp", "Expm1", "Log", "Log1P", "Sin", "Cos"),
        *("Sigmoid", "Tanh", "Relu", "Elu", "Softplus", "ClampMin", "ClampMax"),
    )
) | {"ClampBackward1"}
_PRODUCTS = frozenset(("MulBackward0", "DivBackward0"))
_SUMS = frozenset(("AddBackward0", "SubBackward0", "RsubBackward1"))
