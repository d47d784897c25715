"""A kernel as the tensors that make it: linear_operator takes it apart into them, and puts it together again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor
from typing_extensions import override

from ntk_lazy.engines.contract import X1, X2, Preflight
from ntk_lazy.model import FunctionalModel, ModelCall
from ntk_lazy.modes import as_recordable
from ntk_lazy.operator.bilinear import BilinearGradient
from ntk_lazy.operator.gramian import Gramian
from ntk_lazy.operator.indices import is_everything, is_same_index
from ntk_lazy.operator.side import Side
from ntk_lazy.outputs import OutputLayout
from ntk_lazy.plan import EngineSettings

_PARAM, _CONSTANT, _BUFFER = "p.", "c.", "b."


class KernelRepresentation(LinearOperator):  # type: ignore[misc]  # linear_operator has no types
    """Points, rows, scale, and each parameter and buffer by its name, with the numbers beneath them.

    Gradients reach them, and ``to``, ``detach``, indices, batches and pickling work; the module itself is held by a
    wrapper that no conversion can reach.
    """

    def __init__(  # noqa: PLR0913  (linear_operator builds it anew from exactly these)
        self,
        x1: Tensor,
        x2: Tensor | None = None,
        *,
        call: ModelCall,
        layout: OutputLayout,
        preflight: Preflight,
        settings: EngineSettings,
        example_dims: int,
        order: tuple[str, ...],
        rows1: Tensor | None = None,
        rows2: Tensor | None = None,
        scale: Tensor | None = None,
        **tensors: Tensor,
    ) -> None:
        # In inference mode linear_operator builds operators too, and from tensors that were made in it.
        x1 = as_recordable(x1)
        x2, rows1, rows2, scale = (None if t is None else as_recordable(t) for t in (x2, rows1, rows2, scale))
        tensors = {name: as_recordable(tensor) for name, tensor in tensors.items()}
        shared = {"call": call, "layout": layout, "preflight": preflight, "settings": settings}
        optional = {"rows1": rows1, "rows2": rows2, "scale": scale}
        inputs = (x1,) if x2 is None else (x1, x2)
        super().__init__(*inputs, **shared, **optional, example_dims=example_dims, order=order, **tensors)
        self._layout, self._preflight, self._settings = layout, preflight, settings
        self._model = model = FunctionalModel(
            call=call,
            # linear_operator hands the tensors back sorted by name, and a flat vector follows the module's order.
            params={n: tensors[_PARAM + n] for n in order},
            constants={
                n[2:]: t.detach() if n.startswith(_BUFFER) else t
                for n, t in tensors.items()
                if not n.startswith(_PARAM)
            },
            buffer_names=frozenset(n.removeprefix(_BUFFER) for n in tensors if n.startswith(_BUFFER)),
            is_widened=preflight.is_widened,
        )
        self._gramian = Gramian(
            settings.build(model, layout, preflight),
            Side(x1, rows1, example_dims, layout.rows_per_example),
            None if x2 is None else Side(x2, rows2, example_dims, layout.rows_per_example),
            scale,
        )

    @classmethod
    def of(
        cls,
        model: FunctionalModel,
        side1: Side,
        side2: Side | None,
        *,
        layout: OutputLayout,
        preflight: Preflight,
        settings: EngineSettings,
    ) -> Self:
        """Build the operator from the parts that ``ntk`` has checked; ``side2=None`` makes it square."""
        return cls(
            *([side1.x] if side2 is None else [side1.x, side2.x]),
            call=model.call,
            layout=layout,
            preflight=preflight,
            settings=settings,
            example_dims=side1.example_dims,
            order=tuple(model.params),
            rows1=side1.selected,
            rows2=None if side2 is None else side2.selected,
            **_tensors(model),
        )

    @property
    @override
    def dtype(self) -> torch.dtype:
        return self._gramian.dtype

    @property
    @override
    def device(self) -> torch.device:
        return self._gramian.device

    @property
    def is_symmetric(self) -> bool:
        """Whether both sides are known to be the same rows."""
        return self._gramian.side2 is None

    @property
    def is_gram_matrix(self) -> bool:
        """Whether K is ``J Jᵀ`` of a real J: one set of rows, one kernel, and no negative scale."""
        scale = self._gramian.scale
        return self.is_symmetric and not self.batch_shape and (scale is None or bool(scale.detach() >= 0))

    def unscaled(self) -> Self:
        """The same kernel without its scale: ``J1 J2ᵀ``."""
        return self if self._gramian.scale is None else self.__class__(*self._args, **(self._kwargs | {"scale": None}))

    @property
    def settings(self) -> EngineSettings:
        """What was asked of the engine, and what is kept from one operator to the next."""
        return self._settings

    @property
    def gramian(self) -> Gramian:
        """The numbers beneath the operator, for the backward passes of what is read off it."""
        return self._gramian

    # What linear_operator does to any operator.

    @override
    def _size(self) -> torch.Size:
        return self._gramian.shape

    @override
    def _transpose_nonbatch(self) -> LinearOperator:
        return self if self.is_symmetric else self._rebuild(self._gramian.columns, self._gramian.side1)

    @override
    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> LinearOperator:
        side1, side2 = self._gramian.side1, self._gramian.columns
        symmetric = self.is_symmetric and is_same_index(row_index, col_index)
        if batch_indices:
            side1, side2 = side1.expand(self.batch_shape), side2.expand(self.batch_shape)
            side1, side2 = (side.with_x(side.x[tuple(batch_indices)]) for side in (side1, side2))
        side1 = side1 if is_everything(row_index) else side1.select(row_index)
        side2 = side2 if is_everything(col_index) else side2.select(col_index)
        return self._rebuild(side1, None if symmetric or side1.is_same(side2) else side2)

    @override
    def _unsqueeze_batch(self, dim: int) -> LinearOperator:
        return self._on_batches(lambda x: x.unsqueeze(dim))

    @override
    def _permute_batch(self, *dims: int) -> LinearOperator:
        return self._on_batches(lambda x: x.permute(*dims, *range(len(dims), x.ndim)))

    @override
    def type(self, dtype: torch.dtype) -> LinearOperator:
        return self._map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t)

    @override
    def to(self, *args: Any, **kwargs: Any) -> LinearOperator:
        example = torch.empty(0, dtype=self.dtype, device=self.device).to(*args, **kwargs)
        return self._map_tensors(
            lambda t: t.to(example.device, example.dtype) if t.is_floating_point() else t.to(example.device)
        )

    # For those who make another one.

    def _rebuild(
        self,
        side1: Side,
        side2: Side | None,
        *,
        scale: Tensor | None = None,
        model: FunctionalModel | None = None,
    ) -> Self:
        kwargs = self._kwargs | ({} if model is None else _tensors(model))
        kwargs |= {"rows1": side1.selected, "rows2": None if side2 is None else side2.selected}
        kwargs["scale"] = self._gramian.scale if scale is None else scale
        return self.__class__(*([side1.x] if side2 is None else [side1.x, side2.x]), **kwargs)

    def _on_batches(self, change: Callable[[Tensor], Tensor]) -> Self:
        sides = [
            side.with_x(change(side.expand(self.batch_shape).x))
            for side in (self._gramian.side1, self._gramian.columns)
        ]
        return self._rebuild(sides[0], None if self.is_symmetric else sides[1])

    def _map_tensors(self, change: Callable[[Tensor], Tensor]) -> Self:
        kwargs: dict[str, Any] = {n: change(v) if isinstance(v, Tensor) else v for n, v in self._kwargs.items()}
        return self.__class__(*(change(x) for x in self._args), **kwargs)

    def _gradients_with_graph(self, form: Callable[[Gramian], Tensor]) -> tuple[Tensor | None, ...]:
        """Differentiate a function of K in all tensors of the representation, so that it can be done again.

        By plain autograd, on a view of each tensor: one tensor may be a function of another, and the gradient in that
        one must not pass through it.

        Cost: the graph of all examples at once.
        """
        with torch.enable_grad():
            tensors = [t.view_as(t) if t.requires_grad else t for t in self.representation()]
            value = form(self.representation_tree()(*tensors).gramian)
            asked = [t for t in tensors if t.requires_grad]
            if not (asked and value.requires_grad):
                return (None,) * len(tensors)
            found = iter(torch.autograd.grad(value, asked, create_graph=True, allow_unused=True))
        return tuple(next(found) if t.requires_grad else None for t in tensors)

    def _gradients(self, differentiate: Callable[[set[str]], BilinearGradient]) -> tuple[Tensor | None, ...]:
        """Hand what was found by the names of the engine to the tensors that ask for a gradient."""
        names = [*("x1", "x2")[: len(self._args)], *self._differentiable_kwargs]
        asked = {n for n, t in zip(names, self.representation(), strict=True) if t.requires_grad and n[:2] != _BUFFER}
        if not asked:
            return (None,) * len(names)
        engine_names = {n: {"x1": X1, "x2": X2}.get(n, n[2:]) for n in asked - {"scale"}}
        total = differentiate(set(engine_names.values()))
        scale = 1.0 if self._gramian.scale is None else self._gramian.scale.detach()
        found = {n: total.gradient(name) for n, name in engine_names.items()}
        scaled = {n: None if g is None else g * scale for n, g in found.items()} | {"scale": total.value}
        return tuple(scaled[n] if n in asked else None for n in names)


def _tensors(model: FunctionalModel) -> dict[str, Tensor]:
    """Name the tensors of a model as the representation of the operator has them."""
    tensors = {_PARAM + n: t for n, t in model.params.items()}
    return tensors | {(_BUFFER if n in model.buffer_names else _CONSTANT) + n: t for n, t in model.constants.items()}
