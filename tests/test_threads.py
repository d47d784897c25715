"""Threads that share a process, its switches and a module."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from oracle import defect, dense_jacobian
from torch import Tensor, nn

import ntk_lazy as nl
from ntk_lazy.precision import differentiable_attention, ieee_precision
from ntk_lazy.threads import exclusive

_SECONDS = 60  # that a thread which hangs is waited for
_SWITCHES = [
    ("generic", "all"),
    *((backend, operation) for backend in ("cuda", "mkldnn") for operation in ("all", "matmul", "conv", "rnn")),
]


class _Meeting(nn.Module):
    """Tells when it is called, and gives another thread the time to come in."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).tanh()
        if _MEETING:
            _MEETING[0]()
        return self.second(hidden)


_MEETING: list[Callable[[], None]] = []


@pytest.fixture
def meeting() -> Iterator[None]:
    """Let two threads wait for each other inside of a module, as long as it takes to see that they do not meet."""
    barrier = threading.Barrier(2)

    def meet() -> None:
        try:
            barrier.wait(timeout=0.02)
        except threading.BrokenBarrierError:
            barrier.reset()

    _MEETING.append(meet)
    yield
    _MEETING.clear()


@pytest.fixture
def precision() -> Iterator[Callable[[], object]]:
    """Read all switches of float32, also where one set of them contradicts the other; restore them after."""

    def read() -> object:
        def of(look: Callable[[], object]) -> object:
            try:
                return look()
            except RuntimeError as error:
                return str(error)[:40]

        return (
            [torch._C._get_fp32_precision_getter(*switch) for switch in _SWITCHES],
            of(torch.get_float32_matmul_precision),
            of(lambda: torch.backends.cudnn.allow_tf32),
            of(lambda: torch.backends.cuda.matmul.allow_tf32),
            torch.backends.mha.get_fastpath_enabled(),
            torch.backends.cuda.flash_sdp_enabled(),
        )

    yield read
    torch.set_float32_matmul_precision("highest")
    for switch in _SWITCHES:
        torch._C._set_fp32_precision_setter(*switch, "none")
    torch.backends.cudnn.allow_tf32 = True


def _all_at_once(*jobs: Callable[[], None]) -> None:
    """Run each job in a thread, and raise what one of them raised."""
    raised: list[BaseException] = []

    def run(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:  # noqa: BLE001  (it is raised again where pytest sees it)
            raised.append(error)

    threads = [threading.Thread(target=run, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_SECONDS)
        assert not thread.is_alive()
    if raised:
        raise raised[0]


def _case() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    module, x = _Meeting().double(), torch.randn(4, 3, dtype=torch.float64)
    J = dense_jacobian(module, x)
    return module, x, J @ J.mT


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["auto", "autodiff"])
def test_two_products_of_one_module_in_two_threads_leave_it_its_parameters(engine: str, meeting: None):
    module, x, dense = _case()
    V = torch.ones(8, 1, dtype=torch.float64)
    parameters = dict(module.named_parameters())

    def work() -> None:
        with torch.no_grad():
            assert defect(nl.ntk(module, x, engine=engine) @ V, dense @ V) < 1e-12

    _all_at_once(work, work)
    after = dict(module.named_parameters())
    assert all(after[name] is p and isinstance(after[name], nn.Parameter) for name, p in parameters.items())
    assert after.keys() == parameters.keys()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["auto", "autodiff", "factors", "gram"])
def test_two_searches_on_one_operator_find_the_same(engine: str):
    module, x, dense = _case()
    K, largest = nl.ntk(module, x, engine=engine), torch.linalg.eigvalsh(dense).flip(0)[:3]
    start = threading.Barrier(2)

    def work() -> None:
        start.wait()
        for _ in range(3):
            assert defect(nl.eigsh(K, 3, rtol=1e-8).values, largest) < 1e-8

    _all_at_once(work, work)


def test_switches_come_back_when_threads_leave_in_the_order_in_which_they_came(precision: Callable[[], object]):
    torch.set_float32_matmul_precision("high")
    before = precision()
    entered, leave = threading.Event(), threading.Event()

    def first() -> None:
        with ieee_precision(), differentiable_attention():
            entered.set()
            assert leave.wait(_SECONDS)

    def second() -> None:
        assert entered.wait(_SECONDS)
        with ieee_precision(), differentiable_attention():
            leave.set()
            thread.join(_SECONDS)
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cuda.flash_sdp_enabled()

    thread = threading.Thread(target=first, daemon=True)
    thread.start()
    _all_at_once(second)
    assert precision() == before


def _in_a_fork() -> None:
    module, x, dense = _case()
    with torch.no_grad():
        os._exit(0 if defect(nl.ntk(module, x).to_dense(), dense) < 1e-12 and not _is_turned() else 1)


def _is_turned() -> bool:
    return torch.get_float32_matmul_precision() != "high"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_inherits_neither_a_held_lock_nor_a_turned_switch(precision: Callable[[], object]):
    torch.set_float32_matmul_precision("high")
    held, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with exclusive(), ieee_precision():
            held.set()
            assert leave.wait(_SECONDS)

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    assert held.wait(_SECONDS)
    child = multiprocessing.get_context("fork").Process(target=_in_a_fork)
    child.start()
    child.join(_SECONDS)
    leave.set()
    thread.join(_SECONDS)
    assert child.exitcode == 0
    assert not _is_turned()


@pytest.mark.parametrize("legacy", ["highest", "high", "medium"])
@pytest.mark.parametrize("allows_tf32", [True, False])
@pytest.mark.parametrize("newer", [{}, {("generic", "all"): "tf32"}, {("cuda", "matmul"): "ieee"}])
def test_old_and_new_switches_may_be_read_inside_and_come_back(
    legacy: str, allows_tf32: bool, newer: dict[tuple[str, str], str], precision: Callable[[], object]
):
    torch.set_float32_matmul_precision(legacy)
    torch.backends.cudnn.allow_tf32 = allows_tf32
    for switch, value in newer.items():
        torch._C._set_fp32_precision_setter(*switch, value)
    before = precision()
    with ieee_precision():
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
        with torch.backends.cudnn.flags(enabled=False), ieee_precision():
            assert {torch._C._get_fp32_precision_getter(*switch) for switch in _SWITCHES} == {"ieee"}
    assert precision() == before
    # What an entry follows is followed again.
    torch._C._set_fp32_precision_setter("generic", "all", "ieee")
    followed = precision()
    with ieee_precision():
        pass
    torch._C._set_fp32_precision_setter("generic", "all", "none")
    torch._C._set_fp32_precision_setter("generic", "all", "ieee")
    assert precision() == followed


class _Flagged(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32
        with torch.backends.cudnn.flags(enabled=False, deterministic=True):
            return super().forward(x).sin()


def test_a_forward_pass_may_set_flags_of_its_own(precision: Callable[[], object]):
    torch.manual_seed(0)
    module, x = _Flagged(3, 2).double(), torch.randn(4, 3, dtype=torch.float64)
    torch.backends.cuda.matmul.allow_tf32 = True
    before, J = precision(), dense_jacobian(module, x)
    for engine in ("auto", "autodiff"):
        assert defect(nl.ntk(module, x, engine=engine).to_dense().detach(), J @ J.mT) < 1e-12
    assert precision() == before
