"""What the check of a model takes, counts and times, and what it does not load."""

from __future__ import annotations

import itertools
import subprocess
import sys
import weakref
from collections.abc import Callable

import machine
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import ntk_lazy as nl
from ntk_lazy.engines import contract
from ntk_lazy.engines.flops import FlopCount
from ntk_lazy.engines.footprint import Footprint


def _mlp() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3, bias=False)), torch.randn(6, 5)


def _cnn() -> tuple[nn.Module, Tensor]:
    layers = nn.Conv2d(2, 4, 3, stride=2), nn.ReLU(), nn.ConvTranspose2d(4, 2, 3, groups=2), nn.Flatten()
    return nn.Sequential(*layers, nn.LazyLinear(3)), torch.randn(4, 2, 9, 9)


def _encoder() -> tuple[nn.Module, Tensor]:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), torch.randn(3, 5, 8)


@pytest.mark.parametrize("make", [_mlp, _cnn, _encoder], ids=lambda make: make.__name__)
def test_operations_are_counted_as_torch_counts_them(make):
    module, x = make()
    module(x)
    with FlopCounterMode(display=False) as reference:
        module(x)
    with FlopCount() as counter:
        module(x)
    assert counter.total == reference.get_total_flops() > 0
    assert counter.is_complete


def test_only_what_cannot_be_counted_is_timed():
    torch.manual_seed(0)

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 6, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(x)[0][:, -1]

    # In float32 the layer is one fused operation; in float64 it is taken apart.
    fused = nl.ntk(Last(), torch.randn(6, 5, 4)).explain().preflight
    assert fused.times is not None
    assert fused.times.in_batch > 0
    assert fused.times.alone > 0
    assert nl.ntk(Last().double(), torch.randn(6, 5, 4).double()).explain().preflight.times is None
    normed = nn.Sequential(nn.Linear(3, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)))
    assert nl.ntk(normed, torch.randn(6, 3)).explain().preflight.times is None


class _Peak(TorchDispatchMode):
    """Follow the bytes of all results that are alive, but for what lies in given tensors."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self._given = [tensor.untyped_storage() for tensor in given]
        self._alive = {id(storage): None for storage in self._given}
        self._total = self.bytes = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            storage = leaf.untyped_storage() if isinstance(leaf, Tensor) else None
            if storage is not None and id(storage) not in self._alive:
                self._alive[id(storage)] = weakref.ref(storage, self._forget(id(storage), storage.nbytes()))
                self._total += storage.nbytes()
        self.bytes = max(self.bytes, self._total)
        return result

    def _forget(self, key: int, size: int) -> Callable[[object], None]:
        def forget(_: object) -> None:
            del self._alive[key]
            self._total -= size

        return forget


class _Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(20_000, 32), nn.Linear(32, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.table(tokens).mean(1))


class _WithoutFactors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.power = nn.Sequential(*_dense(8, 800, 800, 2)), nn.Parameter(torch.eye(8) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x @ torch.linalg.matrix_exp(self.power))


def _dense(*widths: int) -> list[nn.Module]:
    layers = [layer for i, o in itertools.pairwise(widths) for layer in (nn.Linear(i, o), nn.Tanh())]
    return layers[:-1]


def _blocks() -> nn.Module:
    layer = nn.TransformerEncoderLayer(160, 4, 320, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), nn.Flatten(), nn.Linear(480, 2))


# More than the two megabytes of parameters up to which products are watched, with next to no activations.
_LARGE: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "dense": (lambda: nn.Sequential(*_dense(8, 600, 600, 600, 2)), lambda: torch.randn(6, 8)),
    "one layer": (lambda: nn.Sequential(*_dense(900, 800, 2)), lambda: torch.randn(6, 900)),
    "table": (_Table, lambda: torch.randint(0, 20_000, (6, 5))),
    "blocks": (_blocks, lambda: torch.randn(6, 3, 160)),
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(3, 256, 3), nn.ReLU(), nn.Conv2d(256, 280, 3), nn.Flatten(), nn.Linear(280, 2)),
        lambda: torch.randn(6, 3, 5, 5),
    ),
    "without factors": (_WithoutFactors, lambda: torch.randn(6, 8)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", _LARGE)
def test_the_check_takes_six_passes_and_four_parameter_vectors(name: str):
    torch.manual_seed(0)
    make, draw = _LARGE[name]
    module, x = make(), draw()
    examples: list[int] = []
    module.register_forward_pre_hook(lambda _, args: examples.append(args[0].shape[0]))
    parameter_bytes = sum(p.nbytes for p in module.parameters())
    assert parameter_bytes > 2 << 20
    kernels: list[nl.NTKLinearOperator] = []
    jobs = {
        "check": lambda: kernels.append(nl.ntk(module, x, memory_budget="1GB")),
        "derivatives": lambda: kernels[0].gramian.engine.preflight.derivatives,
        "second derivatives": lambda: len(kernels[0].gramian.engine.preflight.find_second_fault()),
    }
    for what, job in jobs.items():
        examples.clear()
        with _Peak([x, *module.parameters()]) as peak:
            job()
        # Beside them stand the activations of four examples, here less than half of a vector.
        vectors = peak.bytes / parameter_bytes
        assert vectors <= 4.5, f"{what}: {vectors} parameter vectors"
        # Where a parameter has no factors both are done at once.
        assert len(examples) <= (10 if name == "without factors" else 6), f"{what}: {examples}"
        assert sum(examples) <= 6 * 4 + (8 if name == "without factors" else 0), f"{what}: {examples}"


@pytest.mark.parametrize("kind", ["dense", "convolutions", "blocks"])
def test_bytes_of_a_large_model_are_predicted_as_they_are_measured_of_a_small_one(kind: str):
    torch.manual_seed(0)
    module, x = {
        "dense": (nn.Sequential(*_dense(8, 96, 96, 96, 2)), torch.randn(6, 8)),
        "convolutions": (
            nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(128, 2)),
            torch.randn(6, 3, 8, 8),
        ),
        "blocks": (nn.TransformerEncoderLayer(24, 4, 48, dropout=0.0, batch_first=True), torch.randn(6, 12, 24)),
    }[kind]
    preflight = nl.ntk(module, x).gramian.engine.preflight
    seen = preflight.find_derivatives.args[1]
    predicted = Footprint.vectorised(
        activation_bytes=seen.activation_bytes,
        largest_bytes=seen.largest_bytes,
        parameter_bytes=sum(p.nbytes for p in module.parameters()),
        largest_parameter_bytes=max(p.nbytes for p in module.parameters()),
    )
    for sizes in ((8, 1), (8, 8), (256, 1), (256, 8)):
        # Slack of 2.5 stands on top of it, and a chunk that is too small costs little.
        assert 0.6 <= predicted.bytes(*sizes) / preflight.derivatives.footprint.bytes(*sizes) <= 2.5


_FRESH = """
import sys
import torch
from torch import nn
import ntk_lazy as nl

norm = nn.InstanceNorm2d(3, affine=True)
module = nn.Sequential(nn.Conv2d(1, 3, 3), nn.PReLU(), norm, nn.Flatten(), nn.Linear(27, 2))
K = nl.ntk(module, torch.randn(8, 1, 5, 5))
K @ torch.randn(16, 3)
with K.linearised(30):
    K @ torch.randn(16, 5)
print("torch._dynamo" in sys.modules)
# Which loads it: the ranking holds automatic differentiation too.
assert not K.explain().preflight.coverage.uncovered
"""


@pytest.mark.slow
def test_products_with_a_covered_model_do_not_load_the_compiler_of_torch():
    found = subprocess.run([sys.executable, "-c", _FRESH], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_how_a_model_differentiates_is_found_out_where_it_may_save_more_than_that_takes(monkeypatch):
    torch.manual_seed(0)
    x, V = torch.randn(50, 3), torch.randn(50, 1)
    with machine.given("fast products"):  # by which automatic differentiation is predicted to be the fastest
        K = nl.ntk(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)), x).detach()
        preflight = K.gramian.engine.preflight
        first = K @ V
        assert not preflight.knows_derivatives
        missed = preflight._missed
        # Many short products are a long one.
        monkeypatch.setattr(contract, "_SECONDS_TO_FIND_OUT", 2.5 * missed)
        K @ V
        assert not preflight.knows_derivatives
        again = K @ V
        assert preflight.knows_derivatives
        assert K.explain(1).engine == "autodiff"
        assert (again - first).abs().max() <= 1e2 * torch.finfo(x.dtype).eps * first.abs().max()
