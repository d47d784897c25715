"""The user's module, generators and global switches come back as they were, whatever happens in between."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from case import Case
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from zoo import REFUSED, RIGHT

import ntk_lazy as nl

_BACKENDS = torch.backends
_GLOBALS: dict[str, Callable[[], object]] = {
    "grad mode": torch.is_grad_enabled,
    "default dtype": torch.get_default_dtype,
    "deterministic algorithms": torch.are_deterministic_algorithms_enabled,
    "threads": torch.get_num_threads,
    "matmul precision": torch.get_float32_matmul_precision,
    "autocast": lambda: (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")),
    "attention kernels": lambda: (
        _BACKENDS.cuda.flash_sdp_enabled(),
        _BACKENDS.cuda.mem_efficient_sdp_enabled(),
        _BACKENDS.cuda.math_sdp_enabled(),
        _BACKENDS.cuda.cudnn_sdp_enabled(),
    ),
    "attention fast path": _BACKENDS.mha.get_fastpath_enabled,
    "tf32": lambda: (_BACKENDS.cuda.matmul.fp32_precision, _BACKENDS.cudnn.conv.fp32_precision),
    "mkldnn": lambda: (_BACKENDS.mkldnn.enabled, _BACKENDS.mkldnn.matmul.fp32_precision),
    "hooks on all modules": lambda: [
        list(hooks)
        for name, hooks in vars(nn_module).items()
        if name.startswith("_global_") and isinstance(hooks, dict)
    ],
    "precision": lambda: (_BACKENDS.cudnn.allow_tf32, _BACKENDS.cudnn.rnn.fp32_precision, _BACKENDS.fp32_precision),
    "warning filters": lambda: list(warnings.filters),
    "generators": lambda: (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())),
}
_HOOKS = [name for name in vars(nn.Module()) if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))]


@dataclass(frozen=True)
class Snapshot:
    """All that a user could see of a module and of the process."""

    modules: dict[str, Any]
    tensors: dict[str, Any]
    process: dict[str, object]

    @classmethod
    def of(cls, module: nn.Module) -> Snapshot:
        """Take a picture; tensors by identity, version, value and gradient."""
        modules = {
            name: (
                inner.training,
                {attribute: id(value) for attribute, value in vars(inner).items()},
                {hooks: list(getattr(inner, hooks)) for hooks in _HOOKS},
                list(inner._parameters),
                list(inner._buffers),
                list(inner._modules),
            )
            for name, inner in module.named_modules()
        }
        named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
        tensors = {
            name: (
                id(tensor),
                tensor._version,
                tensor.data_ptr(),
                tensor.detach().clone().double().nan_to_num(7.0, 8.0, 9.0).tolist(),
                tensor.requires_grad,
                tensor.is_leaf,
                None if tensor.grad is None else (id(tensor.grad), tensor.grad.tolist()),
                str(tensor.stride()),
            )
            for name, tensor in named
        }
        return cls(modules, tensors, {name: look() for name, look in _GLOBALS.items()})

    def assert_same(self, later: Snapshot) -> None:
        """Compare part by part, so that a failure says what has changed."""
        assert later.modules == self.modules
        for name, before in self.tensors.items():
            assert later.tensors[name] == before, name
        assert later.tensors.keys() == self.tensors.keys()
        for name, before in self.process.items():
            assert later.process[name] == before, name


def use(K: nl.NTKLinearOperator) -> None:
    """Do everything that runs the model."""
    V = torch.ones(K.shape[-1], 2, dtype=K.dtype)
    for result in (
        K @ V,
        K.mT @ V,
        K.diagonal(),
        K.to_dense(),
        K[:, 0],
        K[:1],
        K.jacobian_rmatmul(V),
        K.jacobian_matmul(torch.ones(K.num_features, 1, dtype=K.dtype)),
        K.half_gram(V),
    ):
        assert (result.to_dense() if not isinstance(result, Tensor) else result).isfinite().all()
    assert "parameters" in str(K.explain())


def params_of(case: Case) -> list[str] | None:
    """Return the choice of parameters as ``ntk`` wants it."""
    return None if case.params is None else list(case.params)


@pytest.mark.parametrize("case", RIGHT, ids=str)
def test_a_module_comes_back_bit_for_bit(case: Case):
    module, x = case.module(), case.inputs(3)
    for i, parameter in enumerate(module.parameters()):
        if i % 2:
            parameter.grad = torch.full_like(parameter, 0.5)
    kept = x.clone()
    before = Snapshot.of(module)
    use(nl.ntk(module, x, params=params_of(case), output_fn=case.output_fn, chunk_size=2))
    before.assert_same(Snapshot.of(module))
    assert torch.equal(x, kept)
    assert x.grad is None


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_a_module_that_is_refused_comes_back_bit_for_bit(case: Case):
    module, x = case.module(), case.inputs(3)
    before = Snapshot.of(module)
    with pytest.raises(case.error):
        nl.ntk(module, x, params=params_of(case), output_fn=case.output_fn)
    before.assert_same(Snapshot.of(module))


class Breakdown(Exception):  # noqa: N818
    """What a user's module may raise."""


_COUNTDOWN = [10**9]  # out of reach of what puts a module back


class Fragile(nn.Module):
    """Raises in one call of its forward pass, after it has begun to write to its buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3, dtype=torch.float64)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        hidden = self.inner(x).tanh()
        _COUNTDOWN[0] -= 1
        if _COUNTDOWN[0] == 0:
            raise Breakdown("at this call")
        return hidden


@pytest.mark.slow
def test_an_exception_of_the_model_reaches_the_user_and_nothing_else_is_left_behind():
    module, x = Fragile(), torch.randn(3, 4, dtype=torch.float64)
    use(nl.ntk(module, x))
    num_calls = 10**9 - _COUNTDOWN[0]
    assert num_calls > 20
    for call in range(1, num_calls + 1):
        _COUNTDOWN[0] = call
        before = Snapshot.of(module)
        with pytest.raises(Breakdown, match="at this call"):
            use(nl.ntk(module, x))
        before.assert_same(Snapshot.of(module))


@pytest.mark.parametrize("name", ["tanh", "checkpoint", "encoder layer, eval", "lstm, float32"])
def test_global_switches_neither_reach_a_product_nor_are_moved_by_it(name: str):
    (case,) = [case for case in RIGHT if case.name == name]
    module, x = case.module(), case.inputs(3)
    expected = nl.ntk(module, x, output_fn=case.output_fn)
    V = torch.ones(expected.shape[0], 2, dtype=expected.dtype)
    product = expected @ V
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            before = Snapshot.of(module)
            found = nl.ntk(module, x, output_fn=case.output_fn) @ V
            before.assert_same(Snapshot.of(module))
    finally:
        torch.set_float32_matmul_precision(precision)
    assert torch.equal(found, product)


def test_the_generators_of_python_and_numpy_stay_where_they_were():
    class Dice(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0 * (random.random() + float(np.random.rand()))

    module, x = Dice(4, 3).double(), torch.ones(3, 4, dtype=torch.float64)
    before = Snapshot.of(module)
    use(nl.ntk(module, x))
    before.assert_same(Snapshot.of(module))


def test_gradients_of_the_user_go_on_as_if_no_kernel_had_been_taken():
    (case,) = [case for case in RIGHT if case.name == "tanh"]
    module, x = case.module(), case.inputs(3)
    loss = module(x).square().sum()
    use(nl.ntk(module, x))
    loss.backward()
    twin = case.module()
    twin(x).square().sum().backward()
    for mine, theirs in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad)
