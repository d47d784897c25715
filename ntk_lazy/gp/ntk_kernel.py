"""The empirical neural tangent kernel as a kernel of GPyTorch."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any, Self, final

import torch
from gpytorch.kernels import Kernel
from gpytorch.models.exact_prediction_strategies import DefaultPredictionStrategy
from linear_operator.operators import LinearOperator
from torch import Tensor, nn
from typing_extensions import override

from ntk_lazy.engines.chunks import parse_budget
from ntk_lazy.errors import ArgumentError, NTKLazyError, ShapeError, UnsupportedModuleError
from ntk_lazy.gp.dataset import Examples, IndexedExamples
from ntk_lazy.gp.inputs import InputFormat, active_columns
from ntk_lazy.gp.prediction import NTKPredictionStrategy
from ntk_lazy.gp.targets import refuse_one_target
from ntk_lazy.kernel import ntk
from ntk_lazy.model import FunctionalModel, OutputFunction, ParameterChoice, check_output_fn
from ntk_lazy.operator import NTKLinearOperator, Side
from ntk_lazy.outputs import OutputMode, as_output_mode
from ntk_lazy.plan import EngineName, EngineSettings

_CHECKED_EXAMPLES = 4


@final
class NTKKernel(Kernel):  # type: ignore[misc]  # gpytorch has no types
    """Take the empirical neural tangent kernel of a network as the covariance of a Gaussian process, lazily.

    Evaluated, it is an ``NTKLinearOperator``. It goes wherever a kernel of GPyTorch goes: into ``ScaleKernel`` and sums
    of kernels, with batches of inputs, ``diag=True`` and slices.

    The network is held and not copied, as a submodule is: ``to``, ``double`` and ``load_state_dict`` of the Gaussian
    process change it in place, its tensors are in ``state_dict``, and ``deepcopy`` and pickle take it along. But
    ``parameters()`` lists its parameters only with ``trainable``, and ``train()`` and ``eval()`` leave its mode alone,
    because K depends on it.

    Args:
        model: The network, in ``eval()`` mode if it has dropout or batch-norm; float32 or float64, like inputs and
            likelihood (``gp.double()`` converts all of them).
        num_outputs: C, where it should not be found out by running the network.
        input_shape: Shape of one example, for inputs of shape ``(N, D)`` that are flattened images, ``x.flatten(1)``.
        dataset: A tensor, an array, or a map-style data set whose items are examples or begin with them. The inputs of
            the Gaussian process are then the numbers of examples, integers of shape ``(N, 1)``, and the examples are
            read chunk by chunk, for each pass of the network anew.
        params: Which parameters make up J, as for ``ntk``; chosen once, now.
        trainable: Whether the marginal likelihood trains the network. J does not depend on it.
        outputs: As for ``ntk``. ``"full"`` gives row ``i*C + c`` to example i and output c, which is the order of
            ``MultitaskMultivariateNormal``.
        output_fn: As for ``ntk``.
        engine: As for ``ntk``.
        memory_budget: As for ``ntk``.
        max_dense_bytes: As for ``ntk``. GPyTorch writes K down up to ``max_cholesky_size`` rows.
        chunk_size: As for ``ntk``.
        batch_shape: Of kernels in a batch; all of them are the same one.
        active_dims: Columns of the inputs that are taken.

    Cost: the check of ``ntk``, a few passes over four examples, at the first evaluation; again after ``to``, ``double``
        and the like, for examples of another shape or dtype, and for a network in another mode. An evaluation looks at
        all inputs for NaN; at a dataset that is a tensor this is done once, now, and at items as they are read.

    Raises:
        ArgumentError: Options that do not fit together; no such parameter, output, engine or budget.
        NonFiniteError: A NaN or an infinity in a dataset.
        ShapeError: A network in half precision.
    """

    def __init__(  # noqa: PLR0913  (a front door, like ntk)
        self,
        model: nn.Module,
        *,
        num_outputs: int | None = None,
        input_shape: Sequence[int] | None = None,
        dataset: Examples | None = None,
        params: ParameterChoice = None,
        trainable: bool = False,
        outputs: OutputMode = "full",
        output_fn: OutputFunction | None = None,
        engine: EngineName = "auto",
        memory_budget: int | float | str | None = None,
        max_dense_bytes: int | None = None,
        chunk_size: int | None = None,
        batch_shape: torch.Size | None = None,
        active_dims: Sequence[int] | None = None,
    ) -> None:
        super().__init__(batch_shape=batch_shape, active_dims=active_dims)
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"NTKKernel holds a module, not {type(model).__name__}; put a function into forward().")
        check_output_fn(output_fn)
        self.model = model
        self.num_outputs = num_outputs
        self.trainable = trainable
        self._inputs = InputFormat(
            shape=None if input_shape is None else tuple(input_shape),
            dataset=None if dataset is None else IndexedExamples(dataset),
        )
        self._output_fn = output_fn
        # By name: a predicate that is asked again could answer otherwise, and cannot be pickled.
        chosen = FunctionalModel.from_module(model, params=params)
        self._names = tuple(chosen.params)
        self._outputs = as_output_mode(outputs)
        self._options = {
            "engine": engine,
            "memory_budget": memory_budget,
            "max_dense_bytes": max_dense_bytes,
            "chunk_size": chunk_size,
        }
        # Made to be checked before any data are there: with the first inputs ``ntk`` makes its own.
        EngineSettings(
            engine=engine,
            memory_budget=parse_budget(memory_budget, chosen.device),
            max_dense_bytes=max_dense_bytes or 0,
            chunk_size=chunk_size,
        )
        self._refuse_half()
        self._checked: dict[object, NTKLinearOperator] = {}

    # What a kernel of GPyTorch is asked for.

    @override
    def forward(
        self, x1: Tensor, x2: Tensor, diag: bool = False, last_dim_is_batch: bool = False, **params: Any
    ) -> LinearOperator | Tensor:
        """Evaluate the kernel; ``kernel(x1, x2)`` calls this once entries or products are asked for.

        Args:
            x1: Inputs of the rows, shape ``(*batch, N1, D)``.
            x2: Inputs of the columns, shape ``(*batch, N2, D)``.
            diag: Whether to return the diagonal alone.
            last_dim_is_batch: Refused: a network takes whole examples.
            params: Ignored, as by the kernels of GPyTorch.

        Returns:
            An operator of shape ``(*batch, N1*C, N2*C)``, or its diagonal.

        Raises:
            ArgumentError: ``last_dim_is_batch``.
            NonFiniteError: A NaN or an infinity in inputs, parameters, outputs or gradients.
            ShapeError: Inputs that the network cannot take, in shape, dtype or device.
            UnsupportedModuleError: The Jacobian would be random, coupled between examples, or does not exist.
        """
        if last_dim_is_batch:
            raise ArgumentError(
                "last_dim_is_batch gives a network one column at a time. Add kernels with active_dims instead."
            )
        rows = active_columns(x1, self.active_dims)
        K = self._at(rows, rows if x1 is x2 else active_columns(x2, self.active_dims))
        batch = torch.broadcast_shapes(self._batch_shape, K.batch_shape)
        if diag:
            diagonal: Tensor = K.diagonal()
            return diagonal.expand(*batch, -1)
        return K if batch == K.batch_shape else K.expand(*batch, *K.matrix_shape)

    @override
    def __call__(
        self,
        x1: Tensor,
        x2: Tensor | None = None,
        diag: bool = False,
        last_dim_is_batch: bool = False,
        **params: Any,
    ) -> Any:
        # Beyond here GPyTorch takes columns and compares inputs itself, and torch says what went wrong inside.
        if self.active_dims is not None:
            for x in (x1,) if x2 is None else (x1, x2):
                width = 1 if x.ndim == 1 else x.shape[-1]
                if int(self.active_dims.max()) >= width:
                    raise ShapeError(
                        f"active_dims={self.active_dims.tolist()} choose among columns that start from 0, and inputs "
                        f"of shape {tuple(x.shape)} have {width}."
                    )
        if x2 is not None and x1.ndim > 1 and x2.ndim > 1 and x1.shape[-1] != x2.shape[-1]:
            raise ShapeError(
                f"inputs of shape {tuple(x1.shape)} and {tuple(x2.shape)} have {x1.shape[-1]} and {x2.shape[-1]} "
                "columns: rows and columns of K are examples of one kind."
            )
        return super().__call__(x1, x2, diag=diag, last_dim_is_batch=last_dim_is_batch, **params)

    @override
    def num_outputs_per_input(self, x1: Tensor, x2: Tensor) -> int:
        if self._outputs != "full":
            return 1
        found = self.num_outputs or self._found_outputs(x1)
        if found > 1:
            refuse_one_target(x1.shape[-2], found)
        return found

    def _found_outputs(self, x: Tensor) -> int:
        """C, for inputs of which kernels around this one may take some columns only."""
        few, network = active_columns(x, self.active_dims)[..., :_CHECKED_EXAMPLES, :], self._network()
        try:
            return self._check(self._points(few, network), network).num_outputs
        except ShapeError:
            # Sums and products of kernels, and BoTorch's of tasks, ask before they choose columns.
            found = next((checked.num_outputs for checked in self._checked.values()), None)
            found = found or self._inputs.outputs_of_some_columns(few, network)
            if found is None:
                raise
            return found

    @override
    def prediction_strategy(
        self, train_inputs: Any, train_prior_dist: Any, train_labels: Tensor, likelihood: Any
    ) -> DefaultPredictionStrategy:
        return NTKPredictionStrategy(train_inputs, train_prior_dist, train_labels, likelihood)

    @property
    @override
    def dtype(self) -> torch.dtype:
        own = [p.dtype for p in self.parameters(recurse=False)]
        dtypes = {*own, reduce(torch.promote_types, (self.model.get_parameter(n).dtype for n in self._names))}
        if len(dtypes) > 1:
            raise RuntimeError(f"The kernel's parameters have multiple dtypes: {dtypes}.")
        return dtypes.pop()

    @property
    @override
    def device(self) -> torch.device:
        return self.model.get_parameter(self._names[0]).device

    @override
    def named_sub_kernels(self) -> Iterator[tuple[str, Kernel]]:
        # A network has many modules and no kernels, and GPyTorch asks at every access to a shape.
        return iter(())

    @override
    def expand_batch(self, *sizes: Any) -> NTKKernel:
        shape = torch.Size(sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes)
        own = (1,) * (len(shape) - len(self._batch_shape)) + tuple(self._batch_shape)
        if len(own) > len(shape) or any(size not in (1, new) for size, new in zip(own, shape, strict=True)):
            raise ShapeError(f"a kernel with batch shape {tuple(self._batch_shape)} does not expand to {tuple(shape)}.")
        return self._with_batch_shape(shape)

    @override
    def __getitem__(self, index: Any) -> NTKKernel:
        if not self._batch_shape:
            return self
        index = tuple(index) if isinstance(index, tuple | list) else (index,)
        return self._with_batch_shape(torch.empty(()).expand(self._batch_shape)[index].shape)

    # What a module is asked for.

    @override
    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        # Parameters and buffers are listed by module, here and in every module above: where these are not seen, the
        # network is no hyper-parameter. Conversions and state_dict go through the children, and find it.
        memo = set() if memo is None else memo
        seen = memo if self.trainable else memo | {self.model}
        for name, module in super().named_modules(seen, prefix, remove_duplicate):
            if remove_duplicate:
                memo.add(module)
            yield name, module

    @override
    def train(self, mode: bool = True) -> Self:
        self.training = mode
        for child in self.children():
            if child is not self.model:
                child.train(mode)
        return self

    @override
    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        before = self._kinds()
        super()._apply(fn, recurse)
        # BoTorch moves its models to where they are, at each step.
        if self._kinds() != before:
            self._checked.clear()
        return self

    def _kinds(self) -> list[tuple[torch.dtype, torch.device]]:
        return [(t.dtype, t.device) for t in self.model.parameters()]

    @override
    def __getstate__(self) -> dict[str, Any]:
        # What was checked holds on to this network, and copies go with another one.
        return {**super().__getstate__(), "_checked": {}}

    def _with_batch_shape(self, shape: torch.Size) -> NTKKernel:
        """The same kernel of the same network in another batch."""
        twin = copy.copy(self)
        twin._batch_shape, twin._checked = shape, self._checked
        return twin

    # From inputs to the operator.

    @property
    def outputs(self) -> OutputMode:
        """Which outputs make up the rows."""
        return self._outputs

    def linearised_at(self, x: Tensor) -> tuple[NTKLinearOperator, FunctionalModel, Tensor]:
        """The kernel at inputs of shape ``(N, D)``, the network with its tensors of now, and the points it takes."""
        network = self._network()
        points = self._points(x, network)
        return self._check(points, network).at(points, model=network), network, points

    def _at(self, x1: Tensor, x2: Tensor) -> NTKLinearOperator:
        """K between two sets of inputs; square where they are known to be the same."""
        network = self._network()
        points = self._points(x1, network)
        checked = self._check(points, network)
        if x1 is x2:
            return checked.at(points, model=network)
        others = self._points(x2, network)
        rows, columns = (Side(x, None, self._inputs.input_dims, checked.num_outputs) for x in (points, others))
        return checked.at(points, None if rows.is_same(columns) else others, model=network)

    def _points(self, x: Tensor, network: FunctionalModel) -> Tensor:
        if x.device != network.device:
            raise ShapeError(
                f"inputs are on {x.device} and the network is on {network.device}; move one of them with .to()."
            )
        return self._inputs.points(x)

    def _network(self) -> FunctionalModel:
        """The network with the tensors of now; cut off from their gradients unless it is trained."""
        self._refuse_half()
        names = set(self._names)
        network = FunctionalModel.from_module(
            self.model,
            params=lambda name, _: name in names,
            input_fn=self._inputs.dataset,
            output_fn=self._output_fn,
        )
        if self.trainable:
            return network
        return replace(
            network,
            params={n: t.detach() for n, t in network.params.items()},
            constants={n: t.detach() for n, t in network.constants.items()},
        )

    def _check(self, points: Tensor, network: FunctionalModel) -> NTKLinearOperator:
        """The kernel at a few points, checked once for all points of this kind."""
        axis = points.ndim - self._inputs.input_dims - 1
        few = points.detach()[(0,) * axis][:_CHECKED_EXAMPLES]
        modes = tuple(module.training for module in self.model.modules())
        kind = (few.shape[1:], few.dtype, few.device, network.dtype, network.device, modes)
        checked = self._checked.get(kind)
        # One example alone cannot show whether examples depend on each other.
        if checked is None or checked.num_examples < few.shape[0]:
            checked = self._checked[kind] = self._check_now(few, network)
        return checked

    def _check_now(self, few: Tensor, network: FunctionalModel) -> NTKLinearOperator:
        examples = few if self._inputs.dataset is None else self._inputs.dataset(few)
        if examples.is_floating_point() and examples.dtype != network.dtype:
            raise ShapeError(
                f"inputs are {examples.dtype} and the network is {network.dtype}: convert the inputs or the network; "
                "gp.double() converts a whole Gaussian process with its inputs."
            )
        try:
            checked = ntk(network, few, outputs=self._outputs, **self._options)  # type: ignore[arg-type]
        except UnsupportedModuleError as error:
            if "model.eval()" not in str(error):
                raise
            raise UnsupportedModuleError(
                f"{error} Here that is eval() on the network itself: train() and eval() of a Gaussian process leave it "
                "in the mode that it has."
            ) from error
        except (NTKLazyError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, ValueError, IndexError) as error:
            reason = str(error).partition("\n")[0]
            raise ShapeError(
                f"the network fails on {examples.shape[0]} examples of shape {tuple(examples.shape[1:])} ({reason}). "
                "Inputs of a GP have shape (N, D), one example a row, and D must fit the network. For images x, pass "
                "NTKKernel(..., input_shape=x.shape[1:]) and the inputs x.flatten(1), or NTKKernel(..., dataset=x) and "
                "the numbers of examples."
            ) from error
        if self.num_outputs not in (None, checked.num_outputs):
            raise ShapeError(
                f"num_outputs={self.num_outputs}, but the network has {checked.num_outputs}: leave it out."
            )
        return checked

    def _refuse_half(self) -> None:
        for name in self._names:
            dtype = self.model.get_parameter(name).dtype
            if dtype not in (torch.float32, torch.float64):
                raise ShapeError(
                    f"parameter {name!r} is {dtype}, and the solves of a GP need float32 or float64: call float() on "
                    "the network."
                )
