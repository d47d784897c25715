"""What the check of a model counts and times, and what it does not load."""

from __future__ import annotations

import subprocess
import sys

import machine
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import ntk_lazy as nl
from ntk_lazy.engines import contract
from ntk_lazy.engines.flops import FlopCount


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
