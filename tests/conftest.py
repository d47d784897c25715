"""Settings of the test run: one thread, a machine that is given, repeatable examples, shapes checked where declared.

The environment may decide otherwise, as ``nox -s portability`` has it: ``OMP_NUM_THREADS`` threads, on the machine of
``tests/machine.py`` that is named by ``TESTS_MACHINE`` ("measured" for the one that is there), with float32 products by
``TESTS_ROUTE``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import gpytorch
import linear_operator
import pytest
import torch
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

# Before the first import of the package: the shapes that it declares are then checked at every call.
install_import_hook("ntk_lazy", "shape_checker.check_shapes")

import machine  # noqa: E402
from case import Case  # noqa: E402

# Small tensors are faster on one thread.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
_MACHINE, _ROUTE = os.environ.get("TESTS_MACHINE", "usual"), os.environ.get("TESTS_ROUTE", "blas")


@pytest.fixture(autouse=True, scope="session")
def given_machine() -> Iterator[None]:
    """Give all tests one machine: what is chosen by measured rates is chosen otherwise on each."""
    if _MACHINE == "measured":
        yield
        return
    with machine.given(_MACHINE, _ROUTE):
        yield


settings.register_profile(
    "repeatable",
    derandomize=True,
    max_examples=15,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("repeatable")

# What ``import botorch`` changes for the whole process, as it was before.
_USUAL = [
    (setting, name, getattr(setting, name))
    for setting, name in (
        (linear_operator.settings._fast_covar_root_decomposition, "_default"),
        (linear_operator.settings._fast_log_prob, "_default"),
        (linear_operator.settings._fast_solves, "_default"),
        (linear_operator.settings.cholesky_max_tries, "_global_value"),
        (linear_operator.settings.max_cholesky_size, "_global_value"),
        (gpytorch.settings.max_eager_kernel_size, "_global_value"),
    )
]


@pytest.fixture(autouse=True)
def usual_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give each test the settings of GPyTorch, whoever has imported BoTorch."""
    for setting, name, value in _USUAL:
        monkeypatch.setattr(setting, name, value)


def _module_of_the_zoo(item: pytest.Item) -> str:
    case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
    return case.name if isinstance(case, Case) else ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bring the tests of a module of the zoo together, and skip those that need a GPU where there is none."""
    # Processes take their tests in this order: what is made once for a module is then made by one or two of them.
    items.sort(key=_module_of_the_zoo)
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))
