"""What ``ntk`` takes: inputs of every kind, choices and numbers, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ntk_lazy as nl


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(7, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _dense(model: nn.Module, inputs: Tensor) -> Tensor:
    return nl.ntk(model, inputs).detach().to_dense()


@pytest.mark.parametrize(
    "part",
    [np.s_[:], np.s_[::2], np.s_[2:5], np.s_[:, ::-1], np.s_[[4, 0]], np.s_[::-1]],
    ids=str,
)
@pytest.mark.parametrize("mode", ["r", "r+", "c"])
def test_a_part_of_a_memory_map_is_read_as_numpy_reads_it(model, x, tmp_path, part, mode):
    np.save(tmp_path / "x.npy", x.numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode=mode)
    expected = _dense(model, torch.from_numpy(np.array(x.numpy()[part])))
    assert torch.equal(_dense(model, mapped[part]), expected)
    assert np.array_equal(np.load(tmp_path / "x.npy"), x.numpy())


def test_other_byte_and_index_orders_are_read_right(model, x):
    expected = _dense(model, x)
    for other in (x.numpy().astype(">f8"), np.asfortranarray(x.numpy())):
        # Strides decide which kernels multiply, and so in which order they add up; P is far more than any sum has.
        allowed = 1e2 * torch.finfo(x.dtype).eps * expected.diagonal().max()
        assert (_dense(model, other) - expected).abs().max() <= allowed


def test_a_read_only_map_is_viewed_and_not_copied(x, tmp_path):
    np.save(tmp_path / "x.npy", x.numpy())
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert nl.Probes.of(mapped).inputs.data_ptr() == mapped.ctypes.data


def test_probes_know_one_example(x):
    assert nl.Probes(x).input_dims == 1
    assert nl.Probes(x[None], 1).batch_shape == (1,)
    for wrong in (2, 5):
        with pytest.raises(nl.ShapeError, match="count the examples"):
            nl.Probes(x, wrong)


def test_the_columns_are_tried_before_the_first_product(model, x):
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        nl.ntk(model, x, torch.randn(4, 5, dtype=torch.float64))
    with pytest.raises(nl.ShapeError, match=r"2 outputs .* but 3"):
        nl.ntk(lambda p, z: z * p["w"], torch.randn(4, 2), torch.randn(4, 3), params={"w": torch.ones(())})


@pytest.mark.parametrize("kind", [torch.Tensor.clone, torch.Tensor.numpy], ids=["tensor", "array"])
def test_inputs_of_another_dtype_are_refused_with_both_dtypes_and_the_cure(model, x, kind):
    double, single = kind(x), kind(x.float())
    cures = r"float32 .*float64.*x\.to\(torch\.float64\).*x\.astype\('float64'\).*model\.float\(\)"
    with pytest.raises(nl.ShapeError, match=cures) as caught:
        nl.ntk(model, single)
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(nl.ShapeError, match=cures):
        nl.ntk(model, double, single)
    with pytest.raises(nl.ShapeError, match=r"float16 .*float64.*model\.float\(\)"):
        nl.ntk(model, x.half())
    assert not nl.doctor(model, single).is_supported
    with pytest.raises(nl.ShapeError, match=r"float64 .*float32.*x\.to\(torch\.float32\).*model\.double\(\)"):
        nl.ntk(model.float(), double)
    with pytest.raises(nl.ShapeError, match=r"float32 .*float64.*convert the parameters\."):
        nl.ntk(lambda p, z: z @ p["w"], single, params={"w": torch.ones(3, 2, dtype=torch.float64)})
    with pytest.raises(nl.ShapeError, match=r"float64 .*float32"):
        nl.ntk(nn.Sequential(nn.Linear(3, 2), nn.Dropout()), double)


def test_a_difference_in_dtype_that_the_model_bears_is_no_fault(x):
    class Casting(nn.Linear):
        def forward(self, z: Tensor) -> Tensor:
            return super().forward(z.to(self.weight.dtype))

    for net, z in [
        (Casting(3, 2), x),
        (Casting(3, 2).double(), x.float()),
        (Casting(3, 2), x.long()),
        (nn.Linear(3, 2), x.half()),
        (nn.Linear(3, 2).bfloat16(), x.float()),
        (nn.Embedding(4, 2).double(), torch.tensor([[0], [1], [3]])),
    ]:
        assert nl.ntk(net, z).shape[0] == 2 * len(z)


def test_another_failure_on_inputs_of_another_dtype_reaches_the_user_as_it_is(x):
    class Broken(nn.Linear):
        def forward(self, z: Tensor) -> Tensor:
            raise error

    error = RuntimeError("mine")
    with pytest.raises(RuntimeError) as caught:
        nl.ntk(Broken(3, 2), x)
    assert caught.value is error


@pytest.mark.parametrize("budget", ["4GB", "4 GB", "512MiB", "1e9", 10**9, 1e9, "2 tb", "1.5g"])
def test_a_memory_budget_is_written_in_many_ways(model, x, budget):
    assert nl.ntk(model, x, memory_budget=budget).explain().memory_budget > 10**8


@pytest.mark.parametrize(
    "options",
    [
        {"memory_budget": "1.2.3GB"},
        {"memory_budget": "4XB"},
        {"memory_budget": [1]},
        {"memory_budget": 0},
        {"memory_budget": float("nan")},
        {"chunk_size": 0},
        {"chunk_size": 2.5},
        {"chunk_size": "3"},
        {"max_dense_bytes": -1},
        {"engine": "dense"},
        {"output_fn": 3},
        {"outputs": 2},
        {"outputs": -3},
        {"outputs": "mean"},
        {"outputs": 0.5},
        {"outputs": True},
        {"params": 3},
        {"params": [3]},
        {"params": "nothing.*"},
        {"params": []},
        {"params": lambda name, parameter: False},
        {"input_dims": -1},
        {"input_dims": 2},
        {"input_dims": 1.5},
    ],
    ids=lambda options: next(iter(options)),
)
def test_an_option_that_cannot_be_meant_is_refused(model, x, options):
    with pytest.raises(nl.ArgumentError):
        nl.ntk(model, x, **options)


def test_an_output_may_be_any_integer(model, x):
    assert torch.equal(
        nl.ntk(model, x, outputs=np.int64(1)).detach().to_dense(), nl.ntk(model, x, outputs=-1).detach().to_dense()
    )


def test_a_module_under_two_names_is_right_and_comes_back(x):
    torch.manual_seed(0)
    shared = nn.Linear(3, 3)
    net = nn.Sequential(shared, nn.Tanh(), shared).double()
    before = dict(net.named_parameters(remove_duplicate=False))
    K = nl.ntk(net, x)
    assert K.num_params == 12
    rows = []
    for entry in net(x).reshape(-1):
        grads = torch.autograd.grad(entry, list(net.parameters()), retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in grads]))
    J = torch.stack(rows)
    assert torch.allclose(K.detach().to_dense(), J @ J.mT, rtol=1e-12)
    assert all(p is before[name] for name, p in net.named_parameters(remove_duplicate=False))
    net.float()


def test_autocast_around_the_library_changes_nothing(x):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    K = nl.ntk(net, x.float()).detach()
    V = torch.randn(14, 3)
    quantities = {
        "product": lambda: K @ V,
        "dense": K.to_dense,
        "diagonal": K.diagonal,
        "entries": lambda: K[torch.arange(14), torch.arange(13, -1, -1)],
        "values": lambda: nl.eigsh(K, 4, solver=nl.Lanczos(block_size=4)).values,
        "trace": lambda: torch.tensor(nl.trace(K, method="stochastic", num_samples=4).value),
        "alignment": lambda: torch.tensor(nl.kernel_target_alignment(K, V[:, 0]).value),
    }
    plain = {name: quantity() for name, quantity in quantities.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = {name: quantity() for name, quantity in quantities.items()}
    assert {name: bool(torch.equal(plain[name], inside[name])) for name in plain} == dict.fromkeys(plain, True)


def test_one_point_needs_no_leading_dimension(model, x):
    K = nl.ntk(model, x).detach()
    column = nl.kernel_slice(K, x[2], x_new=x)
    assert torch.allclose(column, K.to_dense()[:, 4:6], rtol=1e-12)
    assert torch.equal(nl.kernel_slice(K, x[2].numpy(), x.numpy()), column)


@pytest.mark.parametrize("lr", [0.0, -1.0, float("nan"), float("inf")])
def test_a_learning_rate_is_a_positive_number(model, x, lr):
    K = nl.ntk(model, x).detach()
    pairs = nl.eigsh(K, 3)
    m = torch.randn(7, 2, dtype=torch.float64)
    for measure in (
        lambda: nl.first_order_step(K, m, lr),
        lambda: nl.information_flow(pairs, m, lr, kernel=K),
        lambda: nl.stability(pairs, lr, num_examples=7),
    ):
        with pytest.raises(nl.ArgumentError, match="lr"):
            measure()


def test_the_same_inputs_on_both_sides_make_a_gram_matrix(model, x):
    K = nl.ntk(model, x, x)
    assert K.is_symmetric
    assert K.is_gram_matrix
    assert not nl.ntk(model, x, x.clone()).is_gram_matrix


def test_symmetric_kernels_without_half_products_are_solved_too(model, x):
    exact = torch.linalg.eigvalsh(_dense(model, x)).flip(0)
    assert torch.allclose(nl.eigsh(nl.ntk(model, x, x.clone()), 3).values, exact[:3], rtol=1e-6)
    assert torch.allclose(nl.eigsh(nl.ntk(model, x) * -1.0, 3).values, -exact.flip(0)[:3], atol=1e-9)
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(nl.eigsh(nl.ntk(model, x) * scale, 3).values, 2 * exact[:3], rtol=1e-6)
