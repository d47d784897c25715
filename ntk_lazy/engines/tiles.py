"""Tiles of K from the factors of layers: Gram matrices of inputs times Gram matrices of gradients."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TypeAlias

from jaxtyping import Float
from torch import Tensor

from ntk_lazy.engines.uses import Outer, ParameterRows, Rows, Use
from ntk_lazy.gemm import times_transposed

Uses: TypeAlias = Mapping[str, list[Use]]
# Gradients (b, q, o), and the inputs (b, i) that they meet; None for those of a bias.
Layer: TypeAlias = tuple[Float[Tensor, "b q o"], list[Tensor | None]]


def plain_parameters(chunks: Sequence[Uses]) -> set[str]:
    """Name the parameters of layers that are used once, at one position, in all chunks.

    A bias counts where its weight does: by itself it is cheaper by rows.
    """
    plain = {name for name in chunks[0] if all(_factors(uses[name]) is not None for uses in chunks)}
    lonely = {names for uses in chunks for names, (_, inputs) in layers(uses, plain).items() if inputs == [None]}
    return plain - {name for names in lonely for name in names}


def layers(uses: Uses, plain: Collection[str]) -> dict[tuple[str, ...], Layer]:
    """Bring together the parameters that share their gradients: a weight and its bias."""
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


def row_slices(
    left: Sequence[list[Use]], right: Sequence[list[Use]], limit: int
) -> Iterator[tuple[Sequence[ParameterRows | None], Sequence[ParameterRows | None]]]:
    """Write down rows of J of one parameter for all chunks of two sides, the same entries of it on both at a time.

    Args:
        left: For each chunk, the uses of the parameter.
        right: The same of the other side.
        limit: Bytes of rows at once.

    Returns:
        For each chunk of each side its rows; None where they are zero.
    """
    outers = [_outer(found) for side in (left, right) for found in side]
    if any(outer is None for outer in outers):
        rows = [_sum([use.rows() for use in found]) if found else None for found in left]
        yield rows, rows if left is right else [_sum([use.rows() for use in f]) if f else None for f in right]
        return
    found = [outer for outer in outers if outer is not None]
    width = found[0].G.shape[3]
    size = max(1, limit // sum(outer.bytes_per_output for outer in found))
    for begin in range(0, width, size):
        part = slice(begin, min(begin + size, width))
        rows = [outer.of_outputs(part).rows() for outer in found[: len(left)]]
        yield rows, rows if left is right else [outer.of_outputs(part).rows() for outer in found[len(left) :]]


def _outer(found: list[Use]) -> Outer | None:
    return found[0] if len(found) == 1 and isinstance(found[0], Outer) else None


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
