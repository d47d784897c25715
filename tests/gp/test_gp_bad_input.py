"""What the kernel refuses: one error each, which names the cure."""

from __future__ import annotations

import copy
import warnings

import gpytorch
import pytest
import torch
from gpytorch.kernels import ScaleKernel
from torch import Tensor, nn

import ntk_lazy as nl
from ntk_lazy.gp import NTKKernel


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))


def _convolution() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 2))


IMAGES = torch.randn(5, 3, 8, 8)
X = torch.randn(5, 3)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    ("kernel", "x", "says"),
    [
        (lambda: NTKKernel(_convolution()), IMAGES, "input_shape=x.shape.1:.. and the inputs x.flatten.1."),
        (lambda: NTKKernel(_convolution()), IMAGES.flatten(1), "examples of shape .192,.*input_shape="),
        (lambda: NTKKernel(_convolution(), input_shape=(3, 8, 8)), IMAGES, "one example a row: x.flatten.1."),
        (lambda: NTKKernel(_convolution(), input_shape=(3, 8, 8)), X, "have 3 columns, .*3, 8, 8. makes 192"),
        (lambda: NTKKernel(_network()), torch.randn(5, 4), "examples of shape .4,.*D must fit the network"),
        (lambda: NTKKernel(_network()), torch.arange(15).reshape(5, 3), "pass NTKKernel.*dataset=data"),
        (lambda: NTKKernel(_network()), X.half(), "torch.float16.*x.float()"),
        (lambda: NTKKernel(_network()), X.double(), "inputs are torch.float64 and the network is torch.float32"),
        (lambda: NTKKernel(_network()), X.to("meta"), "inputs are on meta and the network is on cpu"),
        (lambda: NTKKernel(_network(), dataset=X), X, "integers of shape .N, 1."),
        (lambda: NTKKernel(_network(), dataset=X), torch.ones(5, 2).long(), "integers of shape .N, 1."),
        (lambda: NTKKernel(_network(), dataset=X), torch.tensor([[0], [5]]), "examples 0 to 5 of a dataset of 5"),
        (lambda: NTKKernel(_network(), dataset=X), torch.tensor([[-1]]), "from 0 on"),
        (lambda: NTKKernel(_network(), dataset=X.double()), torch.tensor([[1]]), "gp.double()"),
        (lambda: NTKKernel(_network(), dataset=IMAGES), torch.tensor([[1]]), "fails on 1 examples of shape .3, 8, 8."),
        (lambda: NTKKernel(_network(), num_outputs=3), X, "num_outputs=3, but the network has 2"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(kernel, x, says, scaled):
    kernel = ScaleKernel(kernel()) if scaled else kernel()
    with pytest.raises(nl.ShapeError, match=f"(?s){says}"):
        kernel(x).evaluate_kernel()


@pytest.mark.parametrize(
    ("kernel", "inputs", "says"),
    [
        (lambda: NTKKernel(_network()), (X, torch.randn(4, 5)), "have 3 and 5 columns"),
        (lambda: NTKKernel(_network(), active_dims=(0, 1, 5)), (torch.randn(5, 4),), "active_dims=.0, 1, 5.*have 4"),
        (lambda: NTKKernel(_network()), (X, X.double()), "float64 on cpu and those of the kernel torch.float32"),
        (lambda: NTKKernel(_network()), (X, X.to("meta")), "inputs are on meta"),
        (lambda: NTKKernel(_network()), (X[:, 0],), "examples of shape .1,.*one example a row"),
        (lambda: NTKKernel(_network()), (X, X.half()), "torch.float16.*x.float()"),
    ],
)
def test_a_second_set_of_inputs_and_columns_that_do_not_fit_are_refused(kernel, inputs, says):
    with pytest.raises(nl.ShapeError, match=says):
        kernel()(*inputs).evaluate_kernel()


@pytest.mark.parametrize("other", [X.double(), X.half(), X.long(), X.to("meta")], ids=lambda x: f"{x.dtype} {x.device}")
def test_points_of_another_kind_are_refused_by_a_kernel_that_is_moved_to_them(other):
    network = _network()
    if other.dtype == torch.float16:
        network.double()
    K = nl.ntk(network, X.to(network[0].weight.dtype))
    with pytest.raises(nl.ShapeError, match=r"points are .* and those of the kernel .*: pass x.to"):
        K.at(other)
    assert K.at(X.to(network[0].weight.dtype)).shape == K.shape


def test_one_target_for_several_outputs_is_refused():
    class Regression(gpytorch.models.ExactGP):
        def __init__(self) -> None:
            super().__init__(X, X[:, 0], gpytorch.likelihoods.GaussianLikelihood())
            self.covar_module = NTKKernel(_network())

        def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
            return gpytorch.distributions.MultivariateNormal(x[..., 0], self.covar_module(x))

    for gp in (Regression().eval(), Regression()):
        with pytest.raises(nl.ShapeError, match=r"5 targets has 10 rows.*outputs=0"):
            gp(X if gp.training else X[:2])


def test_no_point_is_an_empty_kernel():
    assert NTKKernel(_network())(X, X[:0]).to_dense().shape == (10, 0)


@pytest.mark.parametrize("option", ["ard_num_dims", "lengthscale_prior"])
def test_options_of_kernels_with_lengthscales_are_refused(option):
    with pytest.raises(TypeError, match=option):
        NTKKernel(_network(), **{option: 2})


def test_inputs_that_are_not_finite_are_refused():
    bad = X.clone()
    bad[3, 1] = torch.nan
    with pytest.raises(nl.NonFiniteError, match="example 3"):
        NTKKernel(_network())(bad).evaluate_kernel()
    with pytest.raises(nl.NonFiniteError, match="example 3"):
        NTKKernel(_network(), dataset=bad)
    kernel = NTKKernel(_network(), dataset=torch.utils.data.TensorDataset(bad))
    with pytest.raises(nl.NonFiniteError, match="example 3 of the dataset"):
        kernel(torch.tensor([[0], [1], [3]])).to_dense()


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(8)], ids=["dropout", "batch norm"])
def test_a_network_in_train_mode_is_refused_until_it_is_in_eval_mode(layer):
    network = nn.Sequential(nn.Linear(3, 8), copy.deepcopy(layer), nn.Linear(8, 2))
    kernel = NTKKernel(network)
    for switch in (kernel.train, kernel.eval):
        switch()
        with pytest.raises(nl.UnsupportedModuleError, match=r"'1'.*eval\(\) on the network itself"):
            kernel(X).evaluate_kernel()
    network.eval()
    kernel.train()
    assert kernel(X).to_dense().shape == (10, 10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_network_in_half_precision_is_refused(dtype):
    with pytest.raises(nl.ShapeError, match=r"'0.weight' is torch.*float\(\) on the network"):
        NTKKernel(_network().to(dtype))
    kernel = NTKKernel(_network())
    kernel.to(dtype)
    with pytest.raises(nl.ShapeError, match=r"float\(\) on the network"):
        kernel(X).evaluate_kernel()


def test_a_faulty_network_is_named_by_the_check_of_ntk():
    class Coupled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) - super().forward(x).mean(0)

    with pytest.raises(nl.UnsupportedModuleError, match="example") as caught:
        NTKKernel(Coupled(3, 2).train())(X).evaluate_kernel()
    assert "eval()" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"dataset": X, "input_shape": (3,)}, "leave input_shape out"),
        ({"dataset": [].__iter__()}, "a data set with a length and items, not list_iterator"),
        ({"dataset": torch.empty(0, 3)}, "no example"),
        ({"params": "nothing"}, "no parameter is called 'nothing'"),
        ({"outputs": "all"}, "outputs must be"),
        ({"engine": "fast"}, "engine must be one of"),
        ({"chunk_size": 0}, "chunk_size must be"),
        ({"max_dense_bytes": -1}, "max_dense_bytes must not"),
        ({"memory_budget": "much"}, "memory_budget"),
        ({"output_fn": 1}, "output_fn must be"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_options_that_do_not_fit_are_refused_when_the_kernel_is_made(options, says):
    with pytest.raises(nl.ArgumentError, match=says):
        NTKKernel(_network(), **options)


def test_a_function_is_no_network():
    with pytest.raises(nl.ArgumentError, match="holds a module"):
        NTKKernel(lambda params, x: x)


def test_the_last_dimension_is_no_batch():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        covariance = ScaleKernel(NTKKernel(_network(), num_outputs=2))(X, last_dim_is_batch=True)
        with pytest.raises(nl.ArgumentError, match="active_dims"):
            covariance.evaluate_kernel()
