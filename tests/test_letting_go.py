"""No public call keeps anything: inputs, parameters, operators and all that was made on the way are let go."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpytorch
import pytest
import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.likelihoods import GaussianLikelihood
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import ntk_lazy as nl

ENGINES = ["auto", "autodiff", "factors", "gram"]
N = 12


class _Made(TorchDispatchMode):
    """Follow all storages that operators make; whether they are alive does not depend on objects of Python."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, Any] = {}
        self.count = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self._storages[id(storage)] = weakref.ref(storage)
                self.count += 1
        return result

    def living(self) -> list[int]:
        """Bytes of those that are alive."""
        storages = [reference() for reference in self._storages.values()]
        return [storage.nbytes() for storage in storages if storage is not None]


class _Net(nn.Module):
    """Layers with factors, activations, a buffer, and a parameter that has none."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 2)
        self.power = nn.Parameter(torch.eye(3) / 3)
        self.register_buffer("shift", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.first(x @ torch.linalg.matrix_exp(self.power)) + self.shift).tanh())


class _TwiceReverse(_Net):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


# Calls that are left; what lies in a module itself is put back after each call.
_LEFT: list[int] = []


class _Fails(_Net):
    """Raises at a call that comes after so many others."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self._number = len(_LEFT)
        _LEFT.append(after)

    def forward(self, x: Tensor) -> Tensor:
        _LEFT[self._number] -= 1
        if _LEFT[self._number] < 0:
            raise KeyError("the user's own")
        return super().forward(x)


class _Drops(_Net):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, training=True)


class _Regression(gpytorch.models.ExactGP):
    def __init__(self, x: Tensor, y: Tensor, kernel: gpytorch.kernels.Kernel) -> None:
        super().__init__(x, y, GaussianLikelihood())
        self.mean_module, self.covar_module = gpytorch.means.ZeroMean(), kernel

    def forward(self, x: Tensor) -> MultivariateNormal:
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


def _everything(K: nl.NTKLinearOperator) -> None:
    """What an operator is asked for, whichever engine multiplies."""
    V = torch.ones(K.shape[1], 2, dtype=K.dtype)
    for operator in (K.detach(), K):
        operator @ V
        operator.to_dense()
        operator.diagonal()
        operator[torch.tensor([3, 1]), torch.tensor([0, 5])]
        operator[2:5, ::3].to_dense()
    K.explain()
    with K.linearised(4):
        K.detach() @ V
        K.detach() @ V
    K.half_gram(V)
    K.jacobian_matmul(K.jacobian_rmatmul(V))
    K.at(torch.ones(2, 3)).to_dense()
    ((K @ V).sum() + K.to_dense().sum() + K.diagonal().sum()).backward()


def _solve(K: nl.NTKLinearOperator) -> None:
    quadratic, logdet = K.add_jitter(1.0).inv_quad_logdet(torch.ones(K.shape[0], 1), logdet=True)
    (quadratic + logdet).backward()
    K.detach().add_jitter(1.0).solve(torch.ones(K.shape[0], 2))


def _eigenpairs(K: nl.NTKLinearOperator) -> None:
    for solver in (nl.Lanczos(), nl.LOBPCG(), nl.Dense()):
        pairs = nl.eigsh(K, 2, solver=solver, on_unconverged="return")
    nl.eigenfunctions(pairs, K)(torch.ones(2, 3))
    nl.layer_energies(pairs, K)
    nl.relative_energy(pairs, torch.ones(K.shape[0]))
    with pytest.raises(nl.NotConvergedError):
        nl.eigsh(K, 4, solver=nl.Lanczos(block_size=2), rtol=1e-6, max_products=8)


def _estimates(K: nl.NTKLinearOperator) -> None:
    nl.trace(K)
    nl.frobenius_norm(K)
    nl.effective_rank(K)
    nl.kernel_target_alignment(K, torch.ones(K.shape[0]))
    nl.spectral_position(K, torch.ones(K.shape[0]))
    nl.kernel_slice(K, torch.ones(1, 3), torch.ones(2, 3))


def _track(module: nn.Module, x: Tensor, folder: Path | None) -> None:
    tracker = nl.SpectrumTracker(x, k=2, folder=folder, keep_vectors=folder is not None)
    for step in range(2):
        tracker.record(module, step, lr=0.1, target=torch.ones(len(x), 2))


def _process(module: nn.Module, x: Tensor) -> None:
    kernel = nl.gp.NTKKernel(module, outputs=0, trainable=True)
    gp = _Regression(x, torch.ones(len(x)), kernel)
    gpytorch.mlls.ExactMarginalLogLikelihood(gp.likelihood, gp)(gp(x), gp.train_targets).backward()
    with torch.no_grad(), gpytorch.settings.fast_pred_var():
        gp.eval()(torch.ones(3, 3)).variance  # noqa: B018


def _refused(error: type[Exception], call: Callable[[], object]) -> None:
    with pytest.raises(error):
        call()


JOBS: dict[str, Callable[[nn.Module, Tensor, Path], object]] = {
    **{
        f"{engine}, {job.__name__.strip('_')}": lambda m, x, _, engine=engine, job=job: job(nl.ntk(m, x, engine=engine))
        for engine in ENGINES
        for job in (_everything, _solve)
    },
    "modes": lambda m, x, _: [nl.ntk(m, x, outputs=mode).explain() for mode in ("trace", "sum", 1)],
    "eigenpairs": lambda m, x, _: _eigenpairs(nl.ntk(m, x)),
    "estimates": lambda m, x, _: _estimates(nl.ntk(m, x)),
    "scratch files": lambda m, x, folder: nl.ntk(m, x, scratch=folder) @ torch.ones(2 * N, 1),
    "doctor": lambda m, x, _: str(nl.doctor(m, x)),
    "tracker": lambda m, x, _: _track(m, x, None),
    "tracker in a folder": _track,
    "process": lambda m, x, _: _process(m, x),
    "no budget": lambda m, x, _: _refused(nl.BudgetError, lambda: nl.ntk(m, x, memory_budget=9) @ torch.ones(2 * N, 1)),
    "too large": lambda m, x, _: _refused(nl.BudgetError, lambda: nl.ntk(m, x, max_dense_bytes=9).to_dense()),
    "wrong shape": lambda m, x, _: _refused(RuntimeError, lambda: nl.ntk(m, x[:, :2])),
    "wrong dtype": lambda m, x, _: _refused(nl.ShapeError, lambda: nl.ntk(m, x.double())),
    "wrong rows": lambda m, x, _: _refused(nl.ShapeError, lambda: nl.ntk(m, x).jacobian_rmatmul(torch.ones(3, 1))),
}


def _left_behind(make: Callable[[], nn.Module], job: Callable[[nn.Module, Tensor, Path], object], folder: Path) -> int:
    """Do a job on a new module and new inputs, and return the bytes of what is alive of them and of all results."""
    torch.manual_seed(0)
    with _Made() as made:
        module = make()
        x = torch.randn(N, 3)
        references = [weakref.ref(t) for t in (x, *module.parameters(), *module.buffers())]
        storages = [weakref.ref(t.untyped_storage()) for t in (x, *module.parameters(), *module.buffers())]
        owner = weakref.ref(module)
        job(module, x, folder)
        del module, x
    gc.collect()
    assert made.count > 0
    assert owner() is None
    assert not [r for r in (*references, *storages) if r() is not None]
    return sum(made.living())


@pytest.fixture(autouse=True, scope="module")
def _of_the_process(tmp_path_factory: pytest.TempPathFactory):
    """What is made once for a process, such as the rates of the machine, is no part of what a call keeps."""
    K = nl.ntk(nn.Linear(3, 2), torch.randn(N, 3), scratch=tmp_path_factory.mktemp("scratch"))
    K.explain()
    K @ torch.ones(2 * N, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_a_call_lets_go_of_all_that_it_was_given_and_made(name: str, tmp_path: Path):
    assert _left_behind(_Net, JOBS[name], tmp_path) == 0


@pytest.mark.slow
def test_nothing_is_left_of_a_model_that_is_differentiated_twice_in_reverse(tmp_path: Path):
    assert _left_behind(_TwiceReverse, lambda m, x, _: _everything(nl.ntk(m, x, engine="autodiff")), tmp_path) == 0


_REFUSED = {"dropout": _Drops, "batch norm": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))}


@pytest.mark.parametrize("make", _REFUSED.values(), ids=_REFUSED)
def test_nothing_is_left_of_a_model_that_is_refused(make, tmp_path: Path):
    def job(module: nn.Module, x: Tensor, _: Path) -> None:
        _refused(nl.UnsupportedModuleError, lambda: nl.ntk(module, x))
        assert not nl.doctor(module, x).is_supported

    assert _left_behind(make, job, tmp_path) == 0


@pytest.mark.parametrize("after", [0, 1, 4, 8, 16, 23])
def test_nothing_is_left_where_the_model_raises(after: int, tmp_path: Path):
    def job(module: nn.Module, x: Tensor, _: Path) -> None:
        try:
            K = nl.ntk(module, x)
            for _ in range(24):
                K @ torch.ones(2 * N, 1)
        except KeyError as error:
            assert "own" in str(error)  # noqa: PT017
        else:
            pytest.fail("it was called fewer times")

    assert _left_behind(lambda: _Fails(after), job, tmp_path) == 0
