"""What only a CUDA device can show; the zoo and the solvers run there from their own files."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from oracle import defect
from torch import nn

import ntk_lazy as nl
from ntk_lazy.study.claims import judge
from ntk_lazy.study.config import preset
from ntk_lazy.study.run import run_study

pytestmark = pytest.mark.gpu


def test_float32_products_use_no_reduced_precision_and_leave_the_switches_alone():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 2)).cuda()
    x = torch.randn(20, 3, 8, 8, device="cuda")
    V = torch.randn(40, 4, device="cuda")
    before = torch.backends.cudnn.allow_tf32
    single = nl.ntk(net, x) @ V
    assert torch.backends.cudnn.allow_tf32 == before
    double = nl.ntk(net.double(), x.double()) @ V.double()
    # TF32 keeps 10 bits: it would be off by 1e-3 or more.
    assert defect(single.double(), double) < 1e-5


def test_a_product_does_not_wait_for_the_host():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 1)).cuda()
    # The factor engine waits at each use of a parameter while it captures a chunk, to see that its examples hold.
    K = nl.ntk(net, torch.randn(100, 8, device="cuda"), engine="autodiff", chunk_size=30).detach()
    V = torch.randn(100, 4, device="cuda")
    K @ V
    torch.cuda.set_sync_debug_mode("error")
    try:
        K @ V
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_peak_memory_on_the_device_stays_under_the_budget():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 1)).cuda()
    budget = 200_000_000
    K = nl.ntk(net, torch.randn(20_000, 8, device="cuda"), memory_budget=budget).detach()
    V = torch.randn(20_000, 16, device="cuda")
    K @ V
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = K @ V
    assert torch.cuda.max_memory_allocated() - before - result.nbytes <= budget


@pytest.mark.slow
def test_the_claims_of_the_paper_hold_on_the_device(tmp_path):
    steps = (0, 100, 300, 1_000, 1_200, 1_500, 1_800, 1_999, 2_600, 2_750, 2_900, 3_000)
    config = dataclasses.replace(preset("analytic"), snapshots=steps, num_pictures=1, device="cuda")
    verdicts = {c.name: c.verdict for c in judge(run_study(config, tmp_path / "analytic"))}
    assert {n: verdicts[n] for n in ("C1", "C4", "C6", "C10", "C11")} == dict.fromkeys(
        ("C1", "C4", "C6", "C10", "C11"), "pass"
    )
