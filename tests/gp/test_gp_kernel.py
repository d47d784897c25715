"""The kernel in a GPyTorch model: what it equals, what stays lazy, what it lists, moves and copies."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import gpytorch
import pytest
import torch
from gpytorch.kernels import LinearKernel, RBFKernel, ScaleKernel
from linear_operator.operators import ConstantMulLinearOperator, SumLinearOperator
from oracle import defect, dense_jacobian, dense_kernel
from torch import Tensor, nn

import ntk_lazy as nl
from ntk_lazy import kernel as kernel_module
from ntk_lazy.gp import NTKKernel
from ntk_lazy.operator.ntk_linear_operator import NTKLinearOperator

TIGHT = 1e-10


def _network(num_outputs: int = 2, width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, num_outputs)).double()


def _image_network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 2)]
    return nn.Sequential(*layers).double().eval()


def _inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def checks(monkeypatch) -> list[int]:
    """Count the checks of a network."""
    counted: list[int] = []
    check = kernel_module.check

    def counting(model, x):
        counted.append(x.shape[0])
        return check(model, x)

    monkeypatch.setattr(kernel_module, "check", counting)
    return counted


@pytest.fixture
def lazy(monkeypatch) -> None:
    """Forbid writing K down."""

    def refuse(self, **options):
        raise AssertionError(f"{tuple(self.shape)} was written down")

    monkeypatch.setattr(NTKLinearOperator, "to_dense", refuse)


@pytest.mark.slow
def test_gpytorch_is_imported_on_demand():
    code = "import sys, ntk_lazy; assert 'gpytorch' not in sys.modules; ntk_lazy.gp.NTKKernel; import gpytorch"
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'pg'"):
        _ = nl.pg


@pytest.mark.parametrize("outputs", ["full", "trace", "sum", 1])
def test_covariances_equal_the_dense_kernel(outputs):
    network, x, z = _network(), _inputs(5, 3), _inputs(4, 3, seed=2)
    kernel = NTKKernel(network, outputs=outputs)
    J, H = dense_jacobian(network, x), dense_jacobian(network, z)
    square, rectangular = (dense_kernel(J, other, 2, outputs) for other in (J, H))
    assert kernel(x).shape == square.shape
    assert defect(kernel(x).to_dense(), square) < TIGHT
    assert defect(kernel(x, z).to_dense(), rectangular) < TIGHT
    assert defect(kernel(x, diag=True), square.diagonal()) < TIGHT
    assert defect(kernel(x).diagonal(), square.diagonal()) < TIGHT
    assert kernel.num_outputs_per_input(x, x) == (2 if outputs == "full" else 1)


def test_options_reach_the_operator():
    kernel = NTKKernel(_network(), params="2.*", engine="autodiff", memory_budget="3MB", chunk_size=2)
    K = kernel(_inputs(5, 3)).evaluate_kernel()
    plan = K.explain()
    assert (plan.engine, plan.memory_budget, plan.chunks.examples, plan.num_params) == ("autodiff", 3_000_000, 2, 18)
    with pytest.raises(nl.BudgetError):
        NTKKernel(_network(), max_dense_bytes=10)(_inputs(5, 3)).to_dense()


def test_a_kernel_of_equal_inputs_is_known_to_be_symmetric():
    kernel, x = NTKKernel(_network()), _inputs(5, 3)
    assert kernel(x).evaluate_kernel().is_symmetric
    assert kernel(x, x.clone()).evaluate_kernel().is_symmetric
    assert kernel(x)[2:6, 2:6].evaluate_kernel().is_symmetric
    assert not kernel(x, x + 1).evaluate_kernel().is_symmetric
    assert not kernel(x, x.clone().requires_grad_()).evaluate_kernel().is_symmetric


def test_the_network_is_checked_once_for_all_that_is_asked(checks):
    network, x = _network(), _inputs(6, 3)
    kernel = ScaleKernel(NTKKernel(network, trainable=True)).double()
    for _ in range(3):
        kernel(x).evaluate_kernel() @ _inputs(12, 1)
        kernel(x)[..., 4:, :4].evaluate_kernel()
        kernel(x, x[:2], diag=False).evaluate_kernel()
        kernel(x, diag=True)
        with torch.no_grad():
            network[0].weight.add_(0.1)
    assert checks == [4]
    assert defect(kernel(x).evaluate_kernel().to_dense() / kernel.outputscale, _dense(network, x)) < TIGHT


def test_another_kind_of_network_or_input_is_checked_again(checks):
    network = _network()
    kernel = NTKKernel(network, batch_shape=torch.Size([2]))
    kernel(_inputs(1, 3)).to_dense()
    kernel(_inputs(5, 3)).to_dense()  # one example could not show whether examples depend on each other
    kernel(_inputs(1, 3)).to_dense()
    kernel[0](_inputs(5, 3)).to_dense()
    kernel.expand_batch(3, 2)(_inputs(5, 3)).to_dense()
    assert checks == [1, 4]
    network.eval()
    kernel(_inputs(5, 3)).to_dense()
    assert checks == [1, 4, 4]
    kernel.float()
    assert kernel(_inputs(5, 3).float()).to_dense().dtype == torch.float32
    assert checks == [1, 4, 4, 4]


def _dense(network: nn.Module, x: Tensor) -> Tensor:
    J = dense_jacobian(network, x)
    return J @ J.mT


def test_slices_of_a_joint_covariance_stay_lazy(lazy):
    kernel = ScaleKernel(NTKKernel(_network())).double()
    K = kernel(_inputs(9, 3))
    v = _inputs(18, 1)
    for sliced in (K[..., 8:, :8], K[..., 8:, 8:], K[..., 7:, :9], K[[1, 5, 6], :], K[:, [2]], K.mT[:4]):
        part = sliced.evaluate_kernel()
        assert isinstance(part, NTKLinearOperator)
        assert (part @ v[: part.shape[-1]]).shape == (part.shape[-2], 1)


def test_sums_and_scales_of_kernels_stay_lazy(lazy):
    x, v = _inputs(5, 3), _inputs(5, 2)
    one, two = NTKKernel(_network(1)), NTKKernel(_network(1, width=5), params="0.*")
    total = (ScaleKernel(one) + ScaleKernel(two) + ScaleKernel(LinearKernel()) + ScaleKernel(RBFKernel())).double()
    assert isinstance(total(x).evaluate_kernel(), SumLinearOperator)
    expected = sum(part(x).evaluate_kernel() @ v for part in total.kernels)
    assert defect(total(x) @ v, expected.detach()) < TIGHT
    by_batch = ScaleKernel(one, batch_shape=torch.Size([3])).double()
    by_batch.outputscale = torch.tensor([0.5, 1.0, 2.0])
    K = by_batch(x).evaluate_kernel()
    assert isinstance(K, ConstantMulLinearOperator)
    assert defect(K @ v, by_batch.outputscale.detach()[:, None, None] * (one(x) @ v)) < TIGHT


def test_batches_of_inputs_and_of_kernels_equal_their_members():
    kernel = NTKKernel(_network(), batch_shape=torch.Size([3, 1]))
    x = _inputs(2, 4, 3)
    K = kernel(x)
    assert K.shape == (3, 2, 8, 8)
    dense, alone = K.to_dense(), NTKKernel(_network())
    for i in range(2):
        assert defect(dense[1, i], alone(x[i]).to_dense()) < TIGHT
    assert defect(kernel(x, diag=True), dense.diagonal(dim1=-2, dim2=-1)) < TIGHT
    assert kernel[1](x).shape == (2, 8, 8)
    assert defect(K[2, 1].to_dense(), dense[2, 1]) < TIGHT
    with pytest.raises(nl.ShapeError, match="does not expand"):
        kernel.expand_batch(2, 2)


def test_active_dims_choose_columns():
    x = _inputs(5, 4)
    kernel = ScaleKernel(NTKKernel(_network(), active_dims=(0, 3, 1))).double()
    expected = _dense(_network(), x[:, [0, 3, 1]])
    assert defect(kernel(x).to_dense() / kernel.outputscale.detach(), expected) < TIGHT


def test_outputs_are_ordered_as_in_a_multitask_distribution():
    network, x = _network(3), _inputs(4, 3)
    kernel = NTKKernel(network)
    draws = gpytorch.distributions.MultitaskMultivariateNormal(torch.zeros(4, 3).double(), kernel(x))
    assert draws.event_shape == (4, 3)
    J = dense_jacobian(network, x).reshape(4, 3, -1)
    assert defect(draws.variance, J.square().sum(-1)) < TIGHT
    noisy = gpytorch.likelihoods.MultitaskGaussianLikelihood(3, has_global_noise=False).double()
    noises = torch.tensor([0.1, 1.0, 10.0]).double()
    noisy.task_noises = noises
    assert defect(noisy(draws).variance - draws.variance, noises.expand(4, 3)) < TIGHT


def test_flattened_images_equal_images():
    network, x = _image_network(), _inputs(5, 2, 4, 4)
    kernel = NTKKernel(network, input_shape=x.shape[1:])
    assert defect(kernel(x.flatten(1)).to_dense(), _dense(network, x)) < TIGHT
    K = kernel(x.flatten(1), x[1:3].flatten(1)).evaluate_kernel()
    assert K.gramian.side1.x.data_ptr() == x.data_ptr()
    assert defect(kernel(x[:4].reshape(2, 2, -1)).to_dense()[1], _dense(network, x[2:4])) < TIGHT


class _Pairs(torch.utils.data.Dataset):
    """Images with their targets, each made when it is asked for."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        assert isinstance(index, int)
        return self.images[index], 0


@pytest.mark.parametrize("engine", ["auto", "autodiff", "factors", "gram"])
@pytest.mark.parametrize("kind", [lambda x: x, lambda x: x.numpy(), _Pairs], ids=["tensor", "array", "data set"])
def test_numbers_of_images_equal_images(kind, engine):
    network, x = _image_network(), _inputs(7, 2, 4, 4)
    kernel = NTKKernel(network, dataset=kind(x), engine=engine, chunk_size=2)
    rows, columns = torch.tensor([[6], [0], [3], [3]]), torch.arange(3)
    J = dense_jacobian(network, x).reshape(7, 2, -1)
    left, right = J[rows[:, 0]].flatten(0, 1), J[columns].flatten(0, 1)
    K = kernel(rows, columns[:, None])
    assert defect(K.to_dense(), left @ right.mT) < TIGHT
    assert defect(K @ _inputs(6, 2), left @ (right.mT @ _inputs(6, 2))) < TIGHT
    assert defect(kernel(rows, diag=True), left.square().sum(1)) < TIGHT
    assert kernel(columns).shape == (6, 6)


def test_a_data_set_is_read_chunk_by_chunk_also_without_factors():
    sizes = []

    class Watched(_Pairs):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            sizes.append(index)
            return super().__getitem__(index)

    class WithoutRule(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 2, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return (x.flatten(1)[:, :3, None] * self.weight.sin().exp()).logsumexp(1)

    x = _inputs(6, 2, 4, 4)
    kernel = NTKKernel(WithoutRule(), dataset=Watched(x))
    K = kernel(torch.arange(6)[:, None])
    assert defect(K.to_dense(), _dense(kernel.model, x)) < TIGHT
    assert set(sizes) == set(range(6))


def test_data_are_shared_by_copies_and_kept_out_of_the_state():
    x = _inputs(5, 3)
    kernel = NTKKernel(_network(), dataset=x)
    twin = copy.deepcopy(kernel)
    assert twin._inputs.dataset is kernel._inputs.dataset
    assert kernel.state_dict().keys() == NTKKernel(_network()).state_dict().keys()
    again = pickle.loads(pickle.dumps(kernel))
    assert torch.equal(again(torch.arange(5)).to_dense(), kernel(torch.arange(5)).to_dense())


# What is listed, moved, saved and copied.


def test_parameters_are_listed_only_where_the_network_is_trained():
    network = _network()
    frozen = ScaleKernel(NTKKernel(network))
    trained = ScaleKernel(NTKKernel(network, trainable=True))
    assert [n for n, _ in frozen.named_parameters()] == ["raw_outputscale"]
    assert {id(p) for p in network.parameters()} < {id(p) for p in trained.parameters()}
    assert len(list(frozen.named_buffers())) == len(list(trained.named_buffers()))
    assert all(p.requires_grad for p in network.parameters())
    assert frozen.state_dict().keys() == trained.state_dict().keys()


def test_state_holds_the_network():
    x = _inputs(5, 3)
    kernel = ScaleKernel(NTKKernel(_network())).double()
    kernel.outputscale = 2.5
    other = ScaleKernel(NTKKernel(_network())).double()
    with torch.no_grad():
        other.base_kernel.model[0].weight.zero_()
    assert not torch.equal(other(x).to_dense(), kernel(x).to_dense())
    other.load_state_dict(kernel.state_dict())
    assert torch.equal(other(x).to_dense(), kernel(x).to_dense())


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda k: pickle.loads(pickle.dumps(k))], ids=["copy", "pickle"])
def test_copies_have_a_network_of_their_own(duplicate, trainable):
    network, x = _network(), _inputs(5, 3)
    kernel = ScaleKernel(NTKKernel(network, trainable=trainable, params=lambda n, p: n != "0.bias")).double()
    before = kernel(x).to_dense()
    twin = duplicate(kernel)
    assert torch.equal(twin(x).to_dense(), before)
    with torch.no_grad():
        network[0].weight.mul_(2)
    assert torch.equal(twin(x).to_dense(), before)
    assert not torch.equal(kernel(x).to_dense(), before)


def test_conversions_reach_the_network():
    network, x = _network(), _inputs(5, 3)
    kernel = ScaleKernel(NTKKernel(network)).double()
    before = kernel(x).to_dense()
    kernel.float()
    assert network[0].weight.dtype == torch.float32 == kernel.base_kernel.dtype
    assert defect(kernel(x.float()).to_dense(), before) < 1e-5
    kernel.to("meta")
    assert network[0].weight.device.type == "meta"
    assert kernel.base_kernel.device.type == "meta"


def test_the_mode_of_the_network_is_left_alone():
    network = _image_network()
    kernel = ScaleKernel(NTKKernel(network))
    kernel.train()
    assert kernel.base_kernel.training
    assert not any(module.training for module in network.modules())
    network.train()
    kernel.eval()
    assert not kernel.base_kernel.training
    assert network.training


# Gradients.


def test_gradients_equal_autograd_through_the_dense_kernel():
    network, x, z = _network(), _inputs(4, 3).requires_grad_(), _inputs(3, 3, seed=2).requires_grad_()
    kernel = ScaleKernel(NTKKernel(network, trainable=True)).double()
    leaves = [*network.parameters(), kernel.raw_outputscale, x, z]

    def rows(points: Tensor) -> Tensor:
        found = []
        for point in points:
            for output in network(point[None])[0]:
                grads = torch.autograd.grad(output, list(network.parameters()), create_graph=True)
                found.append(torch.cat([g.flatten() for g in grads]))
        return torch.stack(found)

    weights, square = _inputs(8, 6), _inputs(8, 8)
    jacobian = rows(x)
    expected = kernel.outputscale * (
        (weights * (jacobian @ rows(z).mT)).sum()
        + (square * (jacobian @ jacobian.mT)).sum()
        + (jacobian.square().sum(1) * square[0]).sum()
    )
    ways = (
        lambda K: K.to_dense(),
        lambda K: K @ torch.eye(K.shape[-1], dtype=torch.float64),
    )
    for read in ways:
        found = (
            (weights * read(kernel(x, z))).sum()
            + (square * read(kernel(x))).sum()
            + (kernel(x).diagonal() * square[0]).sum()
        )
        assert abs(found.item() / expected.item() - 1) < TIGHT
        got = torch.autograd.grad(found, leaves, allow_unused=True)
        want = torch.autograd.grad(expected, leaves, allow_unused=True, retain_graph=True)
        assert sum(w is None for w in want) == 1  # the last bias is in no row of J
        for g, w in zip(got, want, strict=True):
            assert w is None or defect(g, w) < 1e-8
            assert w is not None or g is None or not g.any()


def test_no_gradient_reaches_a_network_that_is_not_trained():
    network, x = _network(), _inputs(4, 3)
    kernel = ScaleKernel(NTKKernel(network)).double()
    loss = kernel(x).to_dense().sum() + (kernel(x) @ _inputs(8, 1)).sum()
    loss.backward()
    assert kernel.raw_outputscale.grad is not None
    assert all(p.grad is None for p in network.parameters())


def test_gradients_reach_parameters_outside_of_the_jacobian():
    network, x = _network(), _inputs(4, 3)
    NTKKernel(network, params="2.*", trainable=True)(x).to_dense().sum().backward()
    assert network[0].weight.grad.abs().max() > 0
