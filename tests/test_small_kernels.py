"""Batches of small kernels equal their members, and run the network as often for many as for few."""

from __future__ import annotations

import pytest
import torch
from oracle import defect, dense_jacobian
from torch import Generator, Tensor, nn

import ntk_lazy as nl
from ntk_lazy.model import FunctionalModel
from ntk_lazy.operator.gramian import Gramian

TIGHT = 1e-10


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed), dtype=torch.float64)


def network(*, is_normed: bool = False) -> nn.Module:
    torch.manual_seed(0)
    # Torch differentiates layer norm wrongly where derivatives of many examples are taken at once.
    norm = [nn.LayerNorm(6)] if is_normed else []
    return nn.Sequential(nn.Linear(3, 6), *norm, nn.Tanh(), nn.Linear(6, 2)).double()


def rows(model: nn.Module, x: Tensor) -> Tensor:
    """Rows of J with their graph in x, one by one."""
    parameters = list(model.parameters())
    found = []
    for example in x.reshape(-1, 3).split(1):
        for output in model(example)[0]:
            found.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(output, parameters, create_graph=True)]))
    return torch.stack(found).reshape(*x.shape[:-2], -1, sum(p.numel() for p in parameters))


# Of x1 and x2; a size of 0 for sets that are equal, None for the same points.
SHAPES = {
    "square": ((5,), None),
    "common columns": ((5,), (0,)),
    "common rows": ((0,), (5,)),
    "apart": ((5,), (5,)),
    "broadcast": ((3, 1), (2,)),
    "one kernel for all": ((), (4,)),
}


def points(batch: tuple[int, ...] | None, count: int, seed: int) -> Tensor | None:
    if batch is None:
        return None
    return draw(1, count, 3, seed=seed).expand(5, count, 3).clone() if 0 in batch else draw(*batch, count, 3, seed=seed)


@pytest.mark.parametrize("engine", ["auto", "autodiff"])
@pytest.mark.parametrize("is_selected", [False, True])
@pytest.mark.parametrize("shapes", SHAPES)
def test_a_batch_equals_its_members(shapes: str, is_selected: bool, engine: str):
    model = network()
    x1, x2 = points(SHAPES[shapes][0], 3, 1), points(SHAPES[shapes][1], 4, 2)
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    leaves = [x.requires_grad_() for x in (x1, x2) if x is not None]
    K = nl.ntk(model, x1, x2, input_dims=1, engine=engine) * scale
    J = rows(model, x1)
    dense = 0.5 * J @ (J if x2 is None else rows(model, x2)).mT
    if is_selected:
        which = torch.tensor([5, 0, 3])
        K, dense = K[..., which, :][..., which], dense[..., which, :][..., which]
    V, G = draw(*dense.shape[:-2], dense.shape[-1], 2, seed=3), draw(*dense.shape, seed=4)
    assert defect(K.to_dense().detach(), dense.detach()) < TIGHT
    assert defect((K @ V).detach(), (dense @ V).detach()) < TIGHT
    assert defect(K[..., 1, 2].detach(), dense[..., 1, 2].detach()) < TIGHT
    wanted = [*leaves, *model.parameters()]
    for found, expected in ((K.to_dense(), dense), (K @ V, dense @ V)):
        weights = G if found.shape == G.shape else G @ V
        gradients = torch.autograd.grad((found * weights).sum(), [*wanted, scale], materialize_grads=True)
        truth = torch.autograd.grad((expected * weights).sum(), wanted, retain_graph=True, materialize_grads=True)
        for one, two in zip(gradients, truth, strict=False):
            assert defect(one, two) < TIGHT
        of_scale = (expected.detach() / 0.5 * weights).sum()
        assert abs(gradients[-1] - of_scale) < TIGHT * (expected.detach() * weights).abs().sum()


def test_gradients_through_layer_norm_are_those_of_each_example():
    model, x, z = network(is_normed=True), draw(9, 1, 3).requires_grad_(), draw(4, 3, seed=2)
    K = nl.ntk(model, x, z.expand(9, 4, 3), input_dims=1)
    G = draw(9, 2, 8, seed=4)
    (found,) = torch.autograd.grad((K.to_dense() * G).sum(), x)
    (expected,) = torch.autograd.grad((rows(model, x) @ rows(model, z).mT.detach() * G).sum(), x)
    assert defect(found, expected) < TIGHT


@pytest.mark.parametrize("engine", ["factors", "autodiff"])
def test_many_small_kernels_run_the_network_as_often_as_few(engine: str, monkeypatch: pytest.MonkeyPatch):
    calls: list[int] = []
    call = FunctionalModel.__call__

    def spy(self: FunctionalModel, *args: object, **options: object) -> Tensor:
        calls.append(1)
        return call(self, *args, **options)

    monkeypatch.setattr(FunctionalModel, "__call__", spy)
    counts = []
    for size in (10, 10, 80):  # what is found out once is found out by the first
        x = draw(size, 1, 3).requires_grad_()
        K = nl.ntk(network(), x, draw(6, 3, seed=2).expand(size, 6, 3), input_dims=1, engine=engine)
        calls.clear()
        K.to_dense().sum().backward()
        (K @ draw(12, 1)).sum().backward()
        K[..., 0, 0].detach()
        counts.append(len(calls))
    assert counts[2] == counts[1]
    assert counts[2] < 60


def test_kernels_that_are_not_small_are_multiplied_one_by_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Gramian, "dense", lambda self: pytest.fail("K was written down"))
    model, x = network(), draw(2, 60, 3)
    K = nl.ntk(model, x, input_dims=1, engine="autodiff").detach()
    J = torch.stack([dense_jacobian(model, x[i]) for i in range(2)])
    V = draw(120, 1)
    assert defect(K @ V, J @ (J.mT @ V)) < TIGHT
