"""Tiles of K from the factors of layers: Gram matrices of inputs times Gram matrices of gradients."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_lazy.engines.chunks import slices
from ntk_lazy.engines.uses import Outer, Rows, Use, relabelled
from ntk_lazy.gemm import times_transposed

Uses: TypeAlias = Mapping[str, list[Use]]
Side: TypeAlias = list[tuple[int, list[Use]]]
FlatRows: TypeAlias = Float[Tensor, "n w"]
# Gradients (b, q, o), and the inputs (b, i) that they meet; None for those of a bias.
Layer: TypeAlias = tuple[Float[Tensor, "b q o"], list[Tensor | None]]
Place: TypeAlias = tuple[Tensor, ...]

# Vectors that are multiplied pair by pair stay in cache in pieces of so many bytes.
_PIECE_BYTES = 1 << 20


def plain_parameters(chunks: Sequence[Uses]) -> set[str]:
    """Name the parameters of layers that are used once, at one position, in all chunks.

    A bias counts where its weight does: by itself it is cheaper by rows.
    """
    plain = {name for name in chunks[0] if all(_factors(uses[name]) is not None for uses in chunks)}
    lonely = {names for uses in chunks for names, (_, inputs) in layers(uses, plain).items() if inputs == [None]}
    return plain - {name for names in lonely for name in names}


def merged_layers(chunks: Sequence[Uses], plain: Collection[str]) -> dict[tuple[str, ...], Layer]:
    """Join the factors of all chunks, of the parameters that share their gradients: a weight and its bias."""
    found = [layers(uses, plain) for uses in chunks]
    return {names: _joined([layers[names] for layers in found]) for names in found[0]} if found else {}


def layers(uses: Uses, plain: Collection[str]) -> dict[tuple[str, ...], Layer]:
    """Bring together the parameters that share their gradients."""
    found: dict[int, tuple[list[str], Layer]] = {}
    for name in uses:
        factors = _factors(uses[name]) if name in plain else None
        if factors is not None:
            names, (_, inputs) = found.setdefault(factors[0].data_ptr(), ([], (factors[0], [])))
            names.append(name)
            inputs.append(factors[1])
    return {tuple(names): layer for names, layer in found.values()}


def add_tile(left: Layer, right: Layer, tile: Float[Tensor, "b1 q b2 q"]) -> None:
    """Add ``(A1 A2ᵀ + 1) * (G1 G2ᵀ)``, with the 1 for a bias: gradients that are shared are multiplied once.

    Cost: ``2 b1 b2 (i + q² o)`` flops.
    """
    (G1, inputs1), (G2, inputs2) = left, right
    inner: Tensor | None = None
    num_biases = 0
    for A1, A2 in zip(inputs1, inputs2, strict=True):
        if A1 is None or A2 is None:
            num_biases += 1
        else:
            product = times_transposed(A1, A2)
            inner = product if inner is None else inner.add_(product)
    assert inner is not None
    outer = times_transposed(G1.flatten(0, 1), G2.flatten(0, 1))
    tile.addcmul_(outer.view_as(tile), inner.add_(num_biases)[:, None, :, None])


def add_entries(left: Layer, right: Layer, rows1: Tensor, rows2: Tensor, out: Float[Tensor, " entries"]) -> None:
    """Add ``(a1·a2 + 1)(g1·g2)`` for pairs of rows of two sides, with the 1 for a bias.

    Cost: ``2 (i + o)`` flops an entry.
    """
    (G1, inputs1), (G2, inputs2) = left, right
    q = G1.shape[1]
    examples1, examples2 = rows1 // q, rows2 // q
    inner = torch.zeros_like(out)
    for A1, A2 in zip(inputs1, inputs2, strict=True):
        inner += 1 if A1 is None or A2 is None else paired_products(A1, A2, (examples1,), (examples2,))
    out += inner.mul_(paired_products(G1, G2, (examples1, rows1 % q), (examples2, rows2 % q)))


def paired_products(left: Tensor, right: Tensor, at1: Place, at2: Place) -> Float[Tensor, " entries"]:
    """Take inner products of pairs of vectors, the last dimension of what is indexed, without copying them all."""
    out = left.new_empty(at1[0].shape[0])
    for piece in slices(out.shape[0], max(1, _PIECE_BYTES // max(1, left.shape[-1] * left.element_size()))):
        one, two = left[tuple(i[piece] for i in at1)], right[tuple(j[piece] for j in at2)]
        torch.sum(one.mul_(two), -1, out=out[piece])
    return out


def part_of(layer: Layer, examples: slice) -> Layer:
    """The factors of some examples."""
    G, inputs = layer
    return G[examples], [None if A is None else A[examples] for A in inputs]


def row_slices(left: Side, right: Side, num_entries: int) -> Iterator[tuple[FlatRows, FlatRows]]:
    """Write down rows of J of one parameter for all examples of two sides, the same entries of it on both at a time.

    Args:
        left: For each chunk the rows of J that it has, and the uses of the parameter there, perhaps none.
        right: The same of the other side.
        num_entries: Numbers in the rows of both sides at once.
    """
    sides = [left] if left is right else [left, right]
    renewed = iter(relabelled([uses for side in sides for _, uses in side]))
    sides = [[(num, next(renewed)) for num, _ in side] for side in sides]
    if not all(any(uses for _, uses in side) for side in sides):
        return
    found = [uses for side in sides for _, uses in side if uses]
    first = found[0][0]
    is_alike = all(use.division == first.division for uses in found for use in uses)
    num_rows = sum(num for side in sides for num, _ in side)
    for part in first.parts(max(1, num_entries // max(num_rows, 1))) if is_alike else [None]:
        rows = [_flat(side, part) for side in sides]
        yield rows[0], rows[-1]
        rows.clear()  # let go before the next are made


def _flat(side: Side, part: slice | None) -> FlatRows:
    if len(side) == 1:
        return _rows_of(side[0][1], part)
    flat, begin = torch.empty(0), 0
    total = sum(num for num, _ in side)
    for num, uses in side:
        if uses:
            piece = _rows_of(uses, part)
            if flat.ndim == 1:
                # Chunks without a use of the parameter have rows of zeros.
                make = piece.new_empty if all(uses for _, uses in side) else piece.new_zeros
                flat = make(total, piece.shape[1])
            flat[begin : begin + num] = piece
        begin += num
    return flat


def _rows_of(uses: list[Use], part: slice | None) -> FlatRows:
    return _sum([use.rows() if part is None else use.part(part) for use in uses]).flatten(0, 1)


def _joined(layers: list[Layer]) -> Layer:
    if len(layers) == 1:
        return layers[0]
    inputs = zip(*(inputs for _, inputs in layers), strict=True)
    return torch.cat([G for G, _ in layers]), [None if one[0] is None else torch.cat(one) for one in inputs]


def _sum(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _factors(found: list[Use]) -> tuple[Tensor, Tensor | None] | None:
    """Gradients and inputs of a layer with one position that is used once; no inputs for its bias."""
    if len(found) != 1:
        return None
    use = found[0]
    if isinstance(use, Rows):
        return use.R, None
    if isinstance(use, Outer) and use.window is None and use.G.shape[2] == 1:
        return use.G[:, :, 0].transpose(0, 1), use.source[:, 0]
    return None
