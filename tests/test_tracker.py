"""The tracker measures what a dense kernel says, in any loop, and never ends the training."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest
import torch
from oracle import dense_jacobian
from torch import Tensor, nn

from ntk_lazy.eigen import EigenResult, Lanczos, eigsh
from ntk_lazy.errors import ArgumentError, DegenerateError, ShapeError, UnsupportedModuleError
from ntk_lazy.probes import Probes
from ntk_lazy.records import read_records
from ntk_lazy.schedule import LogSpaced
from ntk_lazy.tracker import SpectrumTracker

N = 24


def make_model(num_outputs: int = 1, *, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, num_outputs)).double()


def make_data(num_outputs: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(N, 2, generator=generator, dtype=torch.float64)
    return x, torch.randn(N, num_outputs, generator=generator, dtype=torch.float64)


def dense_energies(K: Tensor, phi: Tensor) -> Tensor:
    V = torch.linalg.eigh(K).eigenvectors.flip(1)
    return (V.mT @ phi.reshape(-1)).square().cumsum(0) / phi.square().sum()


def test_a_record_holds_what_the_dense_kernel_says():
    model, (x, y) = make_model(), make_data()
    record = SpectrumTracker(x, k=6, rtol=1e-8).record(model, 12, lr=0.3, target=y)
    J = dense_jacobian(model, x)
    K, f = J @ J.mT, model(x).detach()
    m = f - y
    values = torch.linalg.eigvalsh(K).flip(0)
    assert record.step == 12
    assert record.status == "converged"
    assert record.values == pytest.approx(values[:6].tolist(), rel=1e-10)
    for name, phi in (("target", y), ("output", f), ("residual", m)):
        assert record.energies[name] == pytest.approx(dense_energies(K, phi)[:6].tolist(), abs=1e-6)
    expected = {
        "loss": m.square().sum() / (2 * N),
        "trace": K.trace(),
        "frobenius_norm": K.norm(),
        "effective_rank": (K.trace() / K.norm()) ** 2,
        "stability": 0.3 * values[0] / N,
        "critical_eigenvalue": 2 * N / 0.3,
        "kernel_target_alignment": (y.mT @ K @ y).item() / (K.norm() * y.square().sum()),
        "spectral_position": (m.mT @ K @ m).item() / (m.square().sum() * K.trace()),
    }
    for name, value in expected.items():
        slack = 5 * record.errors.get(name, 0.0)
        assert record.scalars[name] == pytest.approx(float(value), rel=1e-9, abs=slack), name


def test_the_first_order_error_is_that_of_the_step_the_training_takes_next():
    model, (x, y) = make_model(), make_data()
    lr = 0.05
    record = SpectrumTracker(x, k=2).record(model, 0, lr=lr, target=y)
    J = dense_jacobian(model, x)
    before = model(x).detach()
    predicted = -lr / N * (J @ J.mT) @ (before - y)
    loss = 0.5 * (model(x) - y).square().mean()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(lr * parameter.grad)
    actual = model(x).detach() - before
    cosine = (actual * predicted).sum() / actual.norm() / predicted.norm()
    assert record.scalars["first_order_error"] == pytest.approx(
        float((actual - predicted).norm() / actual.norm()), rel=1e-6
    )
    assert record.scalars["first_order_cosine"] == pytest.approx(float(cosine), rel=1e-9)


LOSSES = {
    "half_mean": lambda residual: residual.square().sum() / (2 * N),
    "mean": lambda residual: nn.functional.mse_loss(residual, torch.zeros_like(residual)),
    "half_sum": lambda residual: residual.square().sum() / 2,
    "sum": lambda residual: nn.functional.mse_loss(residual, torch.zeros_like(residual), reduction="sum"),
}


@pytest.mark.parametrize("reduction", LOSSES)
def test_loss_and_stability_follow_the_reduction(reduction):
    model, (x, y) = make_model(num_outputs=2), make_data(num_outputs=2)
    record = SpectrumTracker(x, k=3, rtol=1e-8, reduction=reduction).record(model, 0, lr=0.1, target=y)
    m = (model(x) - y).detach()
    J = dense_jacobian(model, x)
    # The sharpness of the loss of the linearised model is the top of its Gauss-Newton matrix.
    curvature = torch.autograd.functional.hessian(LOSSES[reduction], m).reshape(2 * N, 2 * N)
    sharpness = torch.linalg.eigvalsh(J.mT @ curvature @ J)[-1]
    assert record.scalars["loss"] == pytest.approx(float(LOSSES[reduction](m)), rel=1e-12)
    assert record.scalars["stability"] == pytest.approx(0.1 * float(sharpness), rel=1e-9)


@pytest.mark.parametrize("outputs", ["full", "trace", "sum", 1])
def test_every_output_mode_measures_energies_on_its_own_rows(outputs):
    model, (x, y) = make_model(num_outputs=2), make_data(num_outputs=2)
    record = SpectrumTracker(x, k=5, rtol=1e-8, outputs=outputs).record(model, 0, target=y)
    J = dense_jacobian(model, x).reshape(N, 2, -1)
    if outputs == "full":
        K, phis = torch.einsum("icp,jdp->icjd", J, J).reshape(2 * N, 2 * N), [y.reshape(-1)]
    elif outputs == "trace":
        K, phis = torch.einsum("icp,jcp->ij", J, J) / 2, [y[:, 0], y[:, 1]]
    elif outputs == "sum":
        K, phis = torch.einsum("ip,jp->ij", J.sum(1), J.sum(1)) / 2, [y.sum(1)]
    else:
        K, phis = J[:, 1] @ J[:, 1].mT, [y[:, 1]]
    weights = [phi.square().sum() for phi in phis]
    energy = sum(w * dense_energies(K, phi) for w, phi in zip(weights, phis, strict=True)) / sum(weights)
    assert record.num_rows == K.shape[0]
    assert record.energies["target"] == pytest.approx(energy[:5].tolist(), abs=1e-6)


def test_the_model_and_the_global_rng_are_left_as_they_were():
    model, (x, y) = make_model(), make_data()
    model.train()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    SpectrumTracker(x, k=3).record(model, 0, lr=0.1, target=y)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert parameter.requires_grad
        assert torch.equal(parameter, before[name])


def test_a_warm_start_gives_the_same_eigenvalues():
    model, (x, _) = make_model(), make_data()
    tracker = SpectrumTracker(x, k=4, rtol=1e-6)
    tracker.record(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    warm = tracker.record(model, 1)
    cold = SpectrumTracker(x, k=4, rtol=1e-6).record(model, 1)
    assert warm.values == pytest.approx(cold.values, rel=1e-9)


def test_a_failed_solve_is_a_record_and_the_training_goes_on(tmp_path, caplog):
    model, (x, y) = make_model(), make_data()
    tracker = SpectrumTracker(x, k=3, folder=tmp_path)
    good = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with caplog.at_level(logging.WARNING):
        failed = tracker.record(model, 0, lr=0.1, target=y)
    assert failed.status == "failed"
    assert not failed.is_usable
    assert "NonFiniteError" in failed.message
    assert "no spectrum at step 0" in caplog.text
    with torch.no_grad():
        model[0].weight.copy_(good)
    assert tracker.record(model, 1, lr=0.1, target=y).status == "converged"
    assert [r.status for r in read_records(tmp_path / "spectrum.jsonl")] == ["failed", "converged"]


def test_a_measurement_that_fails_leaves_the_pairs_in_the_record(monkeypatch, caplog):
    def fail(*arguments: object, **options: object) -> None:
        raise DegenerateError("no angle")

    monkeypatch.setattr("ntk_lazy.measures.kernel_target_alignment", fail)
    model, (x, y) = make_model(), make_data()
    record = SpectrumTracker(x, k=3).record(model, 0, target=y)
    assert record.status == "converged"
    assert len(record.values) == 3
    assert "not measured: DegenerateError: no angle" in record.message
    assert record.failures == {"kernel_target_alignment": "DegenerateError: no angle"}
    assert {"loss", "trace", "spectral_position"} <= record.scalars.keys()
    assert "no angle" in caplog.text


@pytest.mark.parametrize(
    ("outputs", "vanish"),
    [("full", torch.zeros_like), ("sum", lambda y: torch.cat([y[:, :1], -y[:, :1]], dim=1))],
    ids=["full", "sum"],
)
def test_a_target_that_is_zero_on_the_rows_costs_what_it_leaves_undefined_and_nothing_else(outputs, vanish):
    model, (x, y) = make_model(2), make_data(2)
    targets = (vanish(y), y)
    found, usual = (SpectrumTracker(x, k=3, outputs=outputs).record(model, 0, lr=0.1, target=t) for t in targets)
    assert "not measured" not in found.message
    assert found.failures.keys() - usual.failures.keys() == {"energies.target", "kernel_target_alignment"}
    assert found.energies.keys() == usual.energies.keys() - {"target"}
    assert found.scalars.keys() == usual.scalars.keys() - {"kernel_target_alignment"}
    assert math.isnan(found.energy("target", 3))
    assert found.energies["output"] == usual.energies["output"]
    assert found.energies["residual"] == pytest.approx(found.energies["output"], abs=1e-12)


def test_a_solve_that_was_cut_short_is_recorded_as_partial(monkeypatch):
    whole = eigsh
    monkeypatch.setattr("ntk_lazy.tracker.eigsh", lambda K, k, **options: whole(K, k, max_products=32, **options))
    x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    record = SpectrumTracker(x, k=20, solver=Lanczos(block_size=4), rtol=1e-9).record(make_model(), 0)
    assert record.status == "partial"
    assert len(record.values) == 20
    assert 0 < record.num_trusted == sum(record.converged) < 20
    assert "max_products" in record.message


def test_a_model_without_a_kernel_is_refused_at_first_and_recorded_later():
    x, _ = make_data()
    model = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    tracker = SpectrumTracker(x, k=2)
    with pytest.raises(UnsupportedModuleError, match="eval"):
        tracker.record(model, 0)
    assert tracker.record(model.eval(), 0).status == "converged"
    assert tracker.record(model.train(), 1).status == "failed"


def test_an_exception_of_the_users_model_reaches_the_user():
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        SpectrumTracker(make_data()[0], k=2).record(Broken(), 0)


def test_a_target_of_another_length_is_refused_before_anything_is_recorded():
    x, y = make_data()
    tracker = SpectrumTracker(x, k=2)
    with pytest.raises(ShapeError, match="23"):
        tracker.record(make_model(), 0, target=y[1:])
    with pytest.raises(ShapeError, match=r"\(24, 2\)"):
        tracker.record(make_model(), 0, target=y.repeat(1, 2))
    assert tracker.records == []


def test_more_pairs_than_rows_are_all_rows():
    record = SpectrumTracker(make_data()[0], k=1_000).record(make_model(), 0)
    assert len(record.values) == N


def test_a_folder_is_gone_on_with_where_it_stopped(tmp_path):
    model, (x, _) = make_model(), make_data()
    first = SpectrumTracker(x, k=3, folder=tmp_path, keep_vectors=True, schedule={0, 1, 5})
    record = first.record(model, 0)
    second = SpectrumTracker(x, k=3, folder=tmp_path, keep_vectors=True, schedule={0, 1, 5})
    assert [second.due(step) for step in (0, 1, 2, 5)] == [False, True, False, True]
    assert second.records == [record]
    kept = EigenResult.load(tmp_path / record.vectors)
    assert torch.equal(kept.vectors, first.pairs.vectors)
    assert torch.equal(second.pairs.vectors, first.pairs.vectors)


def test_a_folder_with_records_of_other_probes_is_refused(tmp_path):
    model, (x, _) = make_model(), make_data()
    SpectrumTracker(x, k=2, folder=tmp_path).record(model, 0)
    with pytest.raises(ArgumentError, match="other probes"):
        SpectrumTracker(x + 1, k=2, folder=tmp_path)


def test_a_record_says_where_it_comes_from():
    x, _ = make_data()
    made = SpectrumTracker(x, k=2, seed=11).record(make_model(), 0).provenance
    assert (made.seed, made.num_examples, made.device, made.dtype) == (11, N, "cpu", "float64")
    assert made.probes == Probes.of(x).fingerprint()
    assert made.versions["torch"] == torch.__version__.split("+")[0] or made.versions["torch"] == torch.__version__


def test_the_log_spaced_schedule_has_equal_shares_in_each_decade():
    schedule = LogSpaced(per_decade=4)
    due = [step for step in range(10_001) if step in schedule]
    assert due[:4] == [0, 1, 2, 3]
    for decade in (100, 1_000):
        assert sum(decade <= step < 10 * decade for step in due) == 4
    assert {1, 10, 100, 1_000, 10_000} <= set(due)
    assert -1 not in schedule


@pytest.mark.parametrize(
    "wrong",
    [
        {"k": 0},
        {"k": 2.0},
        {"k": "2"},
        {"k": True},
        {"k": None},
        {"reduction": "average"},
        {"reduction": ["mean"]},
        {"keep_vectors": True},
        {"params": 3},
        {"params": {"0.weight": None}},
        {"outputs": "bla"},
        {"outputs": 1.0},
        {"output_fn": 3},
        {"memory_budget": "much"},
        {"solver": "bla"},
        {"rtol": "a"},
        {"rtol": 0.0},
        {"seed": "x"},
        {"seed": 1.5},
        {"progress": "x"},
    ],
    ids=str,
)
def test_a_tracker_that_cannot_work_is_refused_when_it_is_made(wrong):
    with pytest.raises(ArgumentError, match=next(iter(wrong))):
        SpectrumTracker(make_data()[0], **wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"outputs": 1}, "an output that the model does not have"),
        ({"params": "nothing.*"}, "no parameter is called"),
        ({"probes": make_data()[0].float()}, "float32 .*float64"),
    ],
    ids=["output", "parameter", "dtype"],
)
def test_settings_that_do_not_fit_the_model_are_refused_at_the_first_record(wrong, message):
    tracker = SpectrumTracker(**({"probes": make_data()[0], "k": 2} | wrong))
    with pytest.raises(ArgumentError, match=message):
        tracker.record(make_model(), 0)
    assert tracker.records == []


def test_settings_of_numpy_and_choices_that_can_be_read_once_are_kept(tmp_path):
    model, (x, y) = make_model(2), make_data(2)
    names = ["2.*", "0.bias"]
    expected = SpectrumTracker(x, k=2, outputs=1, seed=3, rtol=0.25, params=names)
    tracker = SpectrumTracker(
        x,
        k=np.int64(2),
        outputs=np.int64(1),
        seed=np.int64(3),
        rtol=np.float32(0.25),
        params=(name for name in names),
        folder=tmp_path,
        keep_vectors=True,
    )
    for step in (0, 1):
        record, other = (t.record(model, step, lr=0.1, target=y) for t in (tracker, expected))
        assert record.values == other.values
        assert record.energies == other.energies
        assert record.message == other.message


@pytest.mark.parametrize("kind", [torch.Tensor.numpy, torch.Tensor.tolist], ids=["array", "list"])
def test_a_target_of_any_kind_says_what_the_tensor_says(kind):
    x, y = make_data()
    tracker = SpectrumTracker(x, k=np.int64(2))
    expected, record = (tracker.record(make_model(), 0, target=target) for target in (y, kind(y)))
    assert record.scalars["loss"] == pytest.approx(expected.scalars["loss"], rel=1e-6)
    assert record.energies["target"] == pytest.approx(expected.energies["target"], abs=1e-6)


def test_a_target_that_is_no_array_of_numbers_is_refused_before_anything_is_recorded():
    tracker = SpectrumTracker(make_data()[0], k=2)
    for target in ("y", [[1.0], [1.0, 2.0]], {"y": 1}):
        with pytest.raises(ArgumentError, match="target must be"):
            tracker.record(make_model(), 0, target=target)
    assert tracker.records == []


def test_a_schedule_without_steps_in_a_decade_is_refused():
    with pytest.raises(ArgumentError, match="per_decade"):
        LogSpaced(per_decade=0)
