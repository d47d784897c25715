"""Measure one architecture: what each engine says of it, how far that is from autograd, and what it costs."""

from __future__ import annotations

import json
import math
import os
import resource
import statistics
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from table import seconds
from torch import Tensor, nn

import ntk_lazy as nl

from . import oracle
from .architecture import ENGINES, Architecture, Built, all_architectures

LARGEST_DATA = 4 << 30
NUM_TIMED = 32  # examples
MOVED = 0.1  # standard deviation of what is added to parameters


class Attempt:
    """Turns whatever is raised inside into a result: a refusal of the library, or a fault."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        word = "refusal" if isinstance(error, nl.NTKLazyError) else "fault"
        place = traceback.extract_tb(trace)[-1]
        self.found |= {word: f"{type(error).__name__}: {error}", "at": f"{Path(place.filename).name}:{place.lineno}"}
        return True


def run(name: str, path: str) -> None:
    """Measure one in this process, and write what was found after each step, so that a crash loses little."""
    resource.setrlimit(resource.RLIMIT_DATA, (LARGEST_DATA, LARGEST_DATA))
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for step in _steps(all_architectures()[name], found):
        with Attempt() as attempt:
            step()
        found |= attempt.found
        Path(path).write_text(json.dumps(found))
        if attempt.found:
            return


def _steps(about: Architecture, found: dict[str, Any]) -> list[Callable[[], None]]:
    """What is done in turn; each adds to what was found."""
    torch.manual_seed(0)
    made: dict[str, Any] = {}

    def build() -> None:
        built = about.build()
        _train(built.model)
        made["float32"], made["float64"] = built, oracle.fresh_copy(built, torch.float64)
        with torch.no_grad():
            shape = tuple(oracle.outputs(oracle.fresh_copy(built, torch.float32), built.x).shape)
        found.update(built=True, num_examples=shape[0], num_outputs=shape[1])
        found["num_params"] = sum(p.numel() for p in oracle.chosen(built).values())

    def reference() -> None:
        made["exact"] = oracle.kernel(oracle.fresh_copy(made["float64"], torch.float64))
        rough = oracle.kernel(oracle.fresh_copy(made["float32"], torch.float32))
        found["float32_itself"] = _distance(rough, made["exact"])
        found["float32_inside"] = oracle.lower_precision(oracle.fresh_copy(made["float64"], torch.float64))

    def agreement() -> None:
        for precision, engines in ENGINES.items():
            found[precision] = {engine: _agreement(made[precision], engine, made["exact"]) for engine in engines}

    def cost() -> None:
        found.update(_coverage_and_cost(made["float32"]))

    return [build, reference, agreement, cost]


def _train(model: nn.Module) -> None:
    """Move every parameter, as training does: at the start biases and adapters are zero, and layers scaled by 1e-6."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=MOVED)


def _kernel(built: Built, **options: Any) -> nl.NTKLinearOperator:
    return nl.ntk(built.model, built.x, output_fn=built.output_fn, params=built.params, **options)


def _agreement(built: Built, engine: str, exact: Tensor) -> dict[str, Any]:
    """What an engine makes of a module that never ran, by a product with every unit vector; and the module after it."""
    mine, other = (oracle.fresh_copy(built, next(built.model.parameters()).dtype) for _ in range(2))
    before = _state(mine.model)
    with Attempt() as attempt, torch.no_grad():
        product = _kernel(mine, engine=engine) @ torch.eye(len(exact), dtype=next(mine.model.parameters()).dtype)
        attempt.found["error"] = _distance(product.double(), exact)
    with torch.no_grad():
        plain = oracle.outputs(other, other.x)  # a module that changes itself does so in a plain call too
        if _state(mine.model) not in (before, _state(other.model)):
            attempt.found["changed"] = "hooks, submodules, modes or buffers"
        elif not torch.equal(oracle.outputs(mine, mine.x), plain):
            attempt.found["changed"] = "outputs"
    return attempt.found


def _state(model: nn.Module) -> list[Any]:
    """What a module consists of beside the values of its tensors."""
    return [
        (
            name,
            type(module).__name__,
            module.training,
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            len(module._backward_hooks),
            "forward" in module.__dict__,
            [(key, tuple(buffer.shape)) for key, buffer in module.named_buffers(recurse=False)],
            [(key, p.requires_grad, p.grad is None) for key, p in module.named_parameters(recurse=False)],
        )
        for name, module in model.named_modules()
    ]


def _distance(found: Tensor, exact: Tensor) -> float:
    """How far a kernel is off, relative to its norm; infinity where it holds a NaN."""
    ratio = float((found - exact).norm() / exact.norm())
    return float("inf") if math.isnan(ratio) else ratio


def _coverage_and_cost(built: Built) -> dict[str, Any]:
    """What has factors, and seconds of a product over those of a forward pass without gradients, on some examples."""
    x = torch.cat([built.x] * (NUM_TIMED // len(built.x) + 1))[:NUM_TIMED]
    many = oracle.fresh_copy(replace(built, x=x), torch.float32)
    with torch.no_grad():
        K = _kernel(many).detach()
        found = _coverage(K.explain(), many)
        cost = found["cost"] = {}
        forward = _median(lambda: oracle.outputs(many, many.x))
        for columns in (1, 16):
            V = torch.randn(K.shape[-1], columns)
            cost[f"engine_{columns}"] = K.explain(num_columns=columns).engine
            cost[f"ratio_{columns}"] = _median(lambda V=V: K @ V) / forward / columns
    return found


def _coverage(plan: nl.Plan, built: Built) -> dict[str, Any]:
    """Of the parameters that outputs depend on; the others have nothing that factors could be of."""
    with torch.enable_grad():
        reached = oracle.reached(oracle.fresh_copy(built, torch.float32))
    sizes = {name: p.numel() for name, p in oracle.chosen(built).items() if name in reached}
    missing = {name: why for name, why in plan.preflight.coverage.uncovered.items() if name in reached}
    return {
        "covered": 1 - sum(sizes[name] for name in missing) / sum(sizes.values()),
        "uncovered": dict(list(missing.items())[:3]),
        "derivatives": plan.preflight.derivatives.mode,
        "note": plan.preflight.derivatives.note,
    }


def _median(do: Callable[[], object]) -> float:
    do()
    return statistics.median(seconds(do) for _ in range(5))
