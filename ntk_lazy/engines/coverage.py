"""Which parameters have factors, found out on a few examples and checked against plain autograd there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from ntk_lazy.engines.graph import Edge, Placement, edges, largest, output_gradients
from ntk_lazy.engines.linearisation import example_gradients
from ntk_lazy.engines.matches import Matches
from ntk_lazy.engines.rounding import noise
from ntk_lazy.engines.rules import use_of
from ntk_lazy.engines.uses import Outer, Rows, Use, Within
from ntk_lazy.errors import UnsupportedModuleError
from ntk_lazy.model import FunctionalModel

_SAME = 1e-3  # gradients that are scaled by different weights differ by more than this


class FactorMismatchError(UnsupportedModuleError):
    """A chunk of examples takes another way through the model than the first examples did."""

    def __init__(self) -> None:
        super().__init__(
            "the model uses its parameters in one way for its first examples and in another for later ones (a branch "
            "on the data, a router), so that the factors of its layers do not belong to fixed examples. "
            "Pass engine='autodiff', or leave it to 'auto'."
        )


@dataclass(frozen=True)
class LayerCost:
    """What one covered parameter costs, for one example and one row of J.

    Attributes:
        num_params: Entries.
        source_bytes: What is kept of the input of its layer.
        gradient_bytes: What is kept of the gradient at its output, for one row of J.
        num_positions: S; 1 where rows are kept.
        num_outputs: Width of the layer behind it; that of the parameter where rows are kept.
        num_matched: Entries of the rows of J of two examples that meet, at the most: of a table that is looked up
            those of all pairs of positions.
    """

    num_params: int
    source_bytes: int
    gradient_bytes: int
    num_positions: int
    num_outputs: int
    num_matched: int


@dataclass(frozen=True)
class Coverage:
    """Where the factors of each parameter come from.

    Attributes:
        costs: Covered parameters.
        uncovered: Parameters without factors, with the reason.
        by_rows: Those of them whose rows of J are taken for factors; they have costs too.
    """

    costs: dict[str, LayerCost]
    uncovered: dict[str, str]
    by_rows: frozenset[str] = frozenset()

    def completed(self, params: Mapping[str, Tensor]) -> Coverage:
        """The same, with rows of J for parameters without factors: from a gradient of each example, vectorised."""
        extra = {}
        for name in self.uncovered:
            size, num_bytes = params[name].numel(), params[name].nbytes
            extra[name] = LayerCost(size, 0, num_bytes, num_positions=1, num_outputs=size, num_matched=size)
        return replace(self, costs=self.costs | extra, by_rows=frozenset(extra))

    def factors(self, model: FunctionalModel, x: Tensor, cotangents: Float[Tensor, "q C"]) -> dict[str, list[Use]]:
        """Run one chunk of examples through the model and keep the factors of all covered parameters.

        Cost: one forward pass, and ``q + 1`` backward passes that form no gradient of a parameter: the last one checks
            that each part of each factor belongs to the example that it is taken for.

        Raises:
            FactorMismatchError: The model uses its parameters in another way than on the first examples.
        """
        found: dict[str, list[Use]] = {name: [] for name in self.costs}
        if self.by_rows:
            own = {name: p for name, p in model.params.items() if name in self.by_rows}
            others = {name: p for name, p in model.params.items() if name not in self.by_rows}
            alone = replace(model, params=own, constants=model.constants | others)
            gradients = example_gradients(alone, x, cotangents.to(model.dtype))
            found |= {name: [Rows(g.reshape(*g.shape[:2], -1))] for name, g in gradients.items()}
        if self.by_rows == found.keys():
            return found
        # One example alone often takes another way through a model than a batch: its tensors are contiguous.
        num_examples, x = x.shape[0], torch.cat([x, x]) if x.shape[0] == 1 else x

        def keep(output: Tensor, leaves: dict[str, Tensor]) -> None:
            wanted = found.keys() - self.by_rows
            for edge, use in _uses(output, leaves, cotangents, wanted=wanted, dtype=model.dtype):
                if use is None:
                    raise FactorMismatchError
                found[edge.name].append(use.at(slice(num_examples)))

        _with_graph(model, x, keep)
        return found

    @classmethod
    def of(
        cls,
        model: FunctionalModel,
        x: Tensor,
        *,
        cotangents: Float[Tensor, "q C"],
        agrees: Callable[[str, Float[Tensor, "b q p"]], bool],
    ) -> Coverage:
        """Look for factors and check them.

        Args:
            model: The model.
            x: A few examples.
            cotangents: Rows of J to compare.
            agrees: Compares rows of J of one parameter, made from factors, with what plain autograd gave.

        Cost: about a dozen passes over ``x``.
        """
        uses: dict[str, list[Use]] = {}
        uncovered: dict[str, str] = {}

        def explore(output: Tensor, leaves: dict[str, Tensor]) -> None:
            for edge, use in _uses(output, leaves, cotangents, wanted=leaves.keys(), dtype=model.dtype):
                if use is None:
                    uncovered.setdefault(edge.name, f"no rule fits {edge.operation}, which uses it")
                else:
                    uses.setdefault(edge.name, []).append(use)

        _with_graph(model, x, explore)
        for name, found in uses.items():
            if name not in uncovered and not agrees(name, sum(use.rows() for use in found)):  # type: ignore[arg-type]
                uncovered[name] = "its factors disagree with autograd"
        for name in model.params.keys() - uses.keys() - uncovered.keys():
            uncovered[name] = "it does not reach the output of the first examples"
        # A weight and its bias have the same gradients, which are held once.
        counted: set[int] = set()
        covered = {name: _cost(found, x.shape[0], counted) for name, found in uses.items() if name not in uncovered}
        return cls(covered, uncovered)


def _uses(
    output: Tensor, leaves: dict[str, Tensor], cotangents: Tensor, *, wanted: Collection[str], dtype: torch.dtype
) -> Iterator[tuple[Edge, Use | None]]:
    """Make factors of all uses that the output depends on; None where no rule fits.

    A second backward pass gives each example another weight. What is scaled by the weight of an example belongs to it:
    nothing is taken for granted about the order in which a layer sees examples and positions.
    """
    used = [edge for edge in edges(output, leaves) if edge.name in wanted]
    asked = [onward for edge in used for onward in edge.all()]
    b = output.shape[0]
    weights, q = noise((b,), like=output, seed=b), cotangents.shape[0]
    # Of several rows of J a mixture: the sum is zero where outputs are opposite to each other.
    mixture = noise((q,), like=output, seed=q) if q > 1 else weights.new_ones(q)
    together = mixture @ cotangents.to(output.dtype)
    plain = _gradients(output, asked, cotangents)
    weighted = _gradients(output, asked, (together * weights[:, None])[None])
    gradients = dict(zip(asked, zip(plain, weighted, strict=True), strict=True))
    # A weight and its bias are operands of one operation.
    placed: dict[int, Placement | None] = {}
    unused: set[int] = set()
    pending = used[::-1]
    while pending:
        edge = pending.pop()
        G, H = gradients[edge]
        node = id(edge.node)
        if node not in placed and node not in unused:
            size = largest(H) if H.numel() else H.new_zeros(())
            if bool(size == 0):
                unused.add(node)
            else:
                whole = G[0] if q == 1 else torch.tensordot(mixture.to(G.dtype), G, 1)
                placed[node] = Placement.detect(whole, H[0], weights, slack=_SAME * size)
        if node in unused:
            continue
        placement = placed[node]
        if placement is None and edge.onward:
            pending.extend(edge.onward[::-1])  # no example in it: so far it is a function of parameters alone
        else:
            yield edge, None if placement is None else use_of(edge, G.to(dtype), placement, b)


def _gradients(output: Tensor, used: list[Edge], cotangents: Tensor) -> list[Tensor]:
    """Gradients at the operations of edges, each operation once."""
    nodes = list({id(edge.node): edge.node for edge in used}.values())
    if not nodes:
        return []
    by_node = dict(zip(map(id, nodes), output_gradients(output, nodes, cotangents), strict=True))
    return [by_node[id(edge.node)] for edge in used]


def _with_graph(model: FunctionalModel, x: Tensor, then: Callable[[Tensor, dict[str, Tensor]], None]) -> None:
    """Run the model with a graph over its parameters."""
    leaves = {name: p.detach().requires_grad_() for name, p in model.params.items()}
    fixed = replace(model, constants=_detached(model.constants))
    with torch.enable_grad():
        fixed.evaluate(leaves, x.detach(), lambda output: then(output, leaves))


def _detached(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach() for name, t in tensors.items()}


def _cost(uses: list[Use], num_examples: int, counted: set[int]) -> LayerCost:
    """Measure what is held, leaving out what was counted before."""
    rows = uses[0].rows(slice(0, 1))
    q = rows.shape[1]
    sources = gradients = 0
    for use in uses:
        source, gradient = use.held
        sources += 0 if source is None or source.data_ptr() in counted else source.nbytes
        gradients += 0 if gradient.data_ptr() in counted else gradient.nbytes
        counted |= {t.data_ptr() for t in use.held if t is not None}
    layers = [layer for layer in (u.inner if isinstance(u, Within) else u for u in uses) if isinstance(layer, Outer)]
    table = Matches.of([uses])
    return LayerCost(
        num_params=rows.shape[2],
        source_bytes=-(-sources // num_examples),
        gradient_bytes=-(-gradients // (num_examples * q)),
        num_positions=max((layer.G.shape[2] for layer in layers), default=1),
        num_outputs=max((layer.G.shape[3] for layer in layers), default=rows.shape[2]),
        num_matched=rows.shape[2] if table is None else min(rows.shape[2], table.pair_flops),
    )
