"""Memory that runs out is called so, whatever was tried when it did; nothing else is taken for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import ntk_lazy as nl
from ntk_lazy.out_of_memory import is_out_of_memory

ENGINES = ["auto", "autodiff", "factors", "gram"]
_MORE_THAN_THERE_IS = 1 << 50  # numbers: no machine has an address space for them


# Calls of each of the models below; what lies in a module itself is put back after each call.
_CALLS: list[int] = []


class _Greedy(nn.Module):
    """Asks for more memory than there is at one of its calls, or for more than so many examples."""

    def __init__(self, *, call: int | None = None, examples: int = 1000) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.power = nn.Parameter(torch.eye(3) / 3)  # without factors, so that all ways are tried
        self._number, self._greedy, self._examples = len(_CALLS), call, examples
        _CALLS.append(0)

    def forward(self, x: Tensor) -> Tensor:
        _CALLS[self._number] += 1
        if _CALLS[self._number] - 1 == self._greedy or x.shape[0] > self._examples:
            torch.empty(_MORE_THAN_THERE_IS)
        return self.inner(x @ torch.linalg.matrix_exp(self.power))

    def count(self) -> int:
        return _CALLS[self._number]


def _ask(module: _Greedy) -> None:
    K = nl.ntk(module, torch.randn(6, 3), chunk_size=3)
    K.explain()
    K.detach() @ torch.ones(12, 2)


@pytest.mark.slow
def test_at_whatever_pass_memory_runs_out_it_is_called_so_with_the_cure():
    sated = _Greedy()
    _ask(sated)
    assert sated.count() > 8
    for call in range(sated.count()):
        with pytest.raises(nl.BudgetError, match="ran out of memory") as refusal:
            _ask(_Greedy(call=call))
        assert refusal.value.requested_bytes == 4 * _MORE_THAN_THERE_IS
        for cure in ("memory_budget", "chunk_size"):
            assert cure in str(refusal.value)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_every_job_says_so(engine: str):
    K = nl.ntk(_Greedy(examples=4), torch.randn(9, 3), engine=engine, memory_budget=2_000_000, chunk_size=9)
    V = torch.ones(18, 2)
    jobs = {
        "product": lambda: K.detach() @ V,
        "with a graph": lambda: (K @ V).sum().backward(),
        "written down": K.detach().to_dense,
        "diagonal": K.detach().diagonal,
        "half product": lambda: K.half_gram(V),
        "J": lambda: K.jacobian_matmul(torch.ones(K.num_features, 1)),
        "eigenpairs": lambda: nl.eigsh(K, 2),
        "trace": lambda: nl.trace(K),
    }
    said = {}
    for name, job in jobs.items():
        try:
            job()
        except nl.BudgetError as error:
            said[name] = "ran out of memory" in str(error)
        except RuntimeError:
            said[name] = False
        else:
            said[name] = True  # it goes through fewer examples at once
    assert said == dict.fromkeys(jobs, True)


def test_doctor_reports_it():
    diagnosis = nl.doctor(_Greedy(call=0), torch.randn(4, 3))
    assert "ran out of memory" in str(diagnosis.problem)


@pytest.mark.parametrize(
    "message",
    [
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 4503599627370496 bytes. Error code 12 (Cannot allocate memory)",
        "[enforce fail at alloc_cpu.cpp:81] data. DefaultCPUAllocator: not enough memory: you tried to allocate 8 "
        "bytes.",
        "std::bad_alloc",
        "unable to mmap 400 bytes from file </tmp/x>: Cannot allocate memory (12)",
    ],
)
def test_it_is_told_by_what_allocators_say(message: str):
    assert is_out_of_memory(RuntimeError(message))
    assert not is_out_of_memory(ValueError(message))


def test_a_cpu_says_so_by_a_plain_error():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(_MORE_THAN_THERE_IS)
    assert type(caught.value) is RuntimeError
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x3 and 2x2)"))
    assert not is_out_of_memory(RuntimeError("Trying to use forward AD with checkpoint that does not support it"))


def test_what_a_gpu_raises_keeps_its_type_and_gets_the_cure():
    class OutOfGpu(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(torch.OutOfMemoryError) as caught:
        nl.ntk(OutOfGpu(3, 2), torch.randn(4, 3))
    assert "memory_budget" in caught.value.__notes__[0]
