"""Chunks of factors become one, without a factor that changes, and shared ones stay shared."""

from __future__ import annotations

import pytest
import torch
from case import Case
from torch import Tensor
from zoo import RIGHT

import ntk_lazy as nl
from ntk_lazy.engines.factor_chunk import Chunk, join
from ntk_lazy.engines.uses import Outer, Rows

SHARED = 6  # examples


def captured(case: Case, *, chunk_size: int, num_examples: int) -> list[Chunk]:
    params = None if case.params is None else list(case.params)
    x = case.inputs(num_examples)
    kernel = nl.ntk(case.module(), x, params=params, output_fn=case.output_fn, engine="factors", chunk_size=chunk_size)
    with torch.no_grad():
        return list(kernel.gramian.engine.store.capture(kernel.gramian.side1.x))


def rows(chunks: list[Chunk], number: int, name: str) -> Tensor:
    """Rows of J of one parameter, of all examples."""
    return torch.cat([torch.as_tensor(sum(use.rows() for use in chunk.uses[number][name])) for chunk in chunks])


@pytest.mark.parametrize("case", RIGHT[::3], ids=str)
def test_a_joined_chunk_has_the_rows_of_its_parts(case: Case):
    chunks = captured(case, chunk_size=2, num_examples=5)
    joined = join(iter(chunks), 5)
    assert (joined[0].examples.start, joined[-1].examples.stop) == (0, 5)
    for number, uses in enumerate(chunks[0].uses):
        for name in uses:
            if all(chunk.uses[number][name] for chunk in chunks):
                found, expected = rows(joined, number, name), rows(chunks, number, name)
                # Sums over positions, of which a larger batch may be added up in another order.
                allowed = 1e2 * torch.finfo(expected.dtype).eps * expected.abs().max()
                assert (found - expected).abs().max() <= allowed


def test_gradients_that_a_weight_shares_with_its_bias_are_held_once():
    G = torch.randn(1, SHARED, 1, 4)
    shared = {"weight": [Outer(torch.randn(SHARED, 1, 3), G)], "bias": [Rows(G[:, :, 0].transpose(0, 1))]}
    parts = [
        Chunk(
            slice(i, i + 2), ({name: [part_of(use, slice(i, i + 2)) for use in uses] for name, uses in shared.items()},)
        )
        for i in range(0, SHARED, 2)
    ]
    (whole,) = join(parts, SHARED)
    (weight,), (bias,) = whole.uses[0]["weight"], whole.uses[0]["bias"]
    assert weight.held[1].data_ptr() == bias.held[1].data_ptr()
    assert torch.equal(bias.rows(), shared["bias"][0].rows())
    assert torch.equal(weight.rows(), shared["weight"][0].rows())


def test_examples_that_take_another_way_begin_another_chunk():
    def chunk(begin: int, uses: list[Rows]) -> Chunk:
        return Chunk(slice(begin, begin + 2), ({"w": uses},))

    some = [Rows(torch.randn(2, 1, 3)) for _ in range(4)]
    parts = [chunk(0, some[:1]), chunk(2, some[1:2]), chunk(4, []), chunk(6, some[2:])]
    joined = join(parts, 8)
    assert [(c.examples.start, c.examples.stop) for c in joined] == [(0, 4), (4, 6), (6, 8)]
    assert [len(c.uses[0]["w"]) for c in joined] == [1, 0, 2]
    assert torch.equal(joined[0].uses[0]["w"][0].rows(), torch.cat([some[0].R, some[1].R]))


def part_of(use: Outer | Rows, examples: slice) -> Outer | Rows:
    return use.with_factors(*(factor[examples] for factor in use.factors))
