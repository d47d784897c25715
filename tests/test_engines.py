"""Every engine equals the dense kernel on the zoo, and factors are found wherever a rule covers a use."""

from __future__ import annotations

import pytest
import torch
from case import Case
from modules import Through
from oracle import defect, dense_jacobian, dense_kernel
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from zoo import RIGHT
from zoo_kernels import N, checked, columns, jacobian, kernel

import ntk_lazy as nl
from ntk_lazy.engines.graph import largest
from ntk_lazy.engines.uses import Outer

ENGINES = ("factors", "gram")
ROUTED = {"mixture of experts"}  # experts that the first examples do not reach, and rows that move between experts
right = pytest.mark.parametrize("case", [case for case in RIGHT if case.name not in ROUTED], ids=str)
every_engine = pytest.mark.parametrize("engine", ENGINES)


@right
@every_engine
def test_products_of_every_engine_equal_those_of_the_dense_kernel(case: Case, engine: str):
    J, J2 = jacobian(case), jacobian(case, 3, seed=1)
    K = kernel(case, engine=engine, chunk_size=2)
    V = columns(J.shape[0], 3, K.dtype)
    expected = J @ (J.mT @ V.double())
    assert defect(K @ V, expected) < case.tolerance
    with K.linearised():
        assert defect(K @ V[:, :1], expected[:, :1]) < case.tolerance * float(expected.norm() / expected[:, 0].norm())
        assert defect(K @ V, expected) < case.tolerance
    assert defect(K.half_gram(V), V.double().mT @ expected) < case.tolerance
    assert defect(K.diagonal(), J.square().sum(1)) < case.tolerance
    assert defect(K.to_dense(), J @ J.mT) < case.tolerance
    other = K.at(case.inputs(N), case.inputs(3, seed=1))
    V = columns(J2.shape[0], 2, K.dtype)
    assert defect(other @ V, J @ (J2.mT @ V.double())) < case.tolerance
    assert defect(other.to_dense(), J @ J2.mT) < case.tolerance


@right
@pytest.mark.parametrize("outputs", ["trace", "sum", -1])
def test_output_modes_of_factors_equal_their_formulas(case: Case, outputs: str | int):
    J = jacobian(case)
    dense = dense_kernel(J, J, J.shape[0] // N, outputs)
    K = kernel(case, engine="factors", chunk_size=3, outputs=outputs)
    V = columns(N, 2, K.dtype)
    assert defect(K @ V, dense @ V.double()) < case.tolerance
    assert defect(K.to_dense(), dense) < case.tolerance
    W = columns(K.num_features, 2, K.dtype)
    assert defect(V.mT @ K.jacobian_matmul(W), K.jacobian_rmatmul(V).mT.double() @ W.double()) < case.tolerance


@right
@pytest.mark.parametrize("by_example", [True, False])
def test_both_contractions_of_the_factors_agree(case: Case, by_example: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Outer, "_is_by_example", lambda self, k: by_example)
    J = jacobian(case)
    K = kernel(case, engine="factors")
    V = columns(J.shape[0], 3, K.dtype)
    assert defect(K @ V, J @ (J.mT @ V.double())) < case.tolerance


@right
def test_factors_that_do_not_fit_are_made_anew(case: Case, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ntk_lazy.engines.factor_store.FactorStore.keeps", lambda self, n: False)
    J = jacobian(case)
    K = kernel(case, engine="factors", chunk_size=2)
    V = columns(J.shape[0], 3, K.dtype)
    assert defect(K @ V, J @ (J.mT @ V.double())) < case.tolerance
    assert defect(K.half_gram(V), V.double().mT @ J @ J.mT @ V.double()) < case.tolerance


WITHOUT_RULES = {
    "weight norm",  # a function of several parameters
    "weight norm, by hook",
    "spectral norm, eval",
    "lstm, float32",  # one fused operation
    "embedding bag",  # likewise
    "branch on data",  # each example by itself
    "checkpoint first",  # without a graph of its inside
    "unused layer",
    "residual image network, eval",  # normalised and averaged: gradients of rounding alone
}


@right
def test_all_parameters_have_factors_where_rules_reach(case: Case):
    uncovered = checked(case).explain().preflight.coverage.uncovered
    assert bool(uncovered) == (case.name in WITHOUT_RULES), uncovered


@pytest.mark.parametrize("name", sorted(ROUTED))
def test_examples_that_are_routed_go_to_automatic_differentiation(name: str):
    (case,) = [case for case in RIGHT if case.name == name]
    J = jacobian(case)
    V = columns(J.shape[0], 2, torch.float64)
    with pytest.raises(nl.UnsupportedModuleError, match="autodiff"):
        kernel(case, engine="factors") @ V
    # A row of J in the planned engine takes factors first, finds that they fail, and starts again.
    K = kernel(case, engine="auto")
    assert defect(K.jacobian_rmatmul(V), J.mT @ V) < case.tolerance
    assert defect(K @ V, J @ (J.mT @ V)) < case.tolerance


class Sequences(nn.Module):
    """Uses of parameters that modules do not tell: time first, a table as a head, a weight multiplied by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4, padding_idx=0)
        self.attention = nn.MultiheadAttention(4, 2)
        self.mix = nn.Parameter(torch.randn(4, 4))
        self.shift = nn.Parameter(torch.randn(5, 4))
        self.shared = nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.table(tokens) + self.shift
        h = h.transpose(0, 1)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        h = torch.tanh(self.shared(torch.tanh(self.shared(h)))) @ self.mix
        return linear(h.mean(0), self.table.weight)


def test_every_use_of_a_parameter_is_seen_whatever_module_owns_it():
    torch.manual_seed(0)
    module = Sequences().double()
    tokens = torch.randint(0, 7, (6, 5))
    J = dense_jacobian(module, tokens)
    for engine in ENGINES:
        K = nl.ntk(module, tokens, engine=engine, chunk_size=4)
        assert K.explain().preflight.coverage.uncovered == {}
        V = columns(J.shape[0], 3, torch.float64)
        assert defect(K @ V, J @ (J.mT @ V)) < 1e-10
        assert defect(K.to_dense(), J @ J.mT) < 1e-10


def test_the_largest_entry_is_that_in_size_and_nothing_hides_a_nan():
    t = torch.tensor([[0.5, -3.0, 1.0], [2.0, 0.0, -1.0]])
    for view, expected in ((t, 3.0), (-t, 3.0), (t.mT[::2], 2.0), (t[0, 1], 3.0)):
        assert float(largest(view)) == expected
    t[1, 1] = torch.nan
    assert bool(largest(t).isnan())


class Opposite(nn.Module):
    """Positions before examples inside, and two outputs whose gradients cancel each other."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        z = self.inner(x.transpose(0, 1)).tanh().mean((0, 2))
        return torch.stack([z, -z], 1)


def test_outputs_that_are_opposite_do_not_hide_where_examples_are():
    torch.manual_seed(0)
    module, x = Opposite().double(), torch.randn(6, 5, 3, dtype=torch.float64)
    K, J = nl.ntk(module, x, engine="factors", chunk_size=4), dense_jacobian(module, x)
    assert K.explain().preflight.coverage.uncovered == {}
    V = columns(J.shape[0], 3, torch.float64)
    assert defect(K @ V, J @ (J.mT @ V)) < 1e-10


@pytest.mark.parametrize(
    "layer",
    [
        nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1, output_padding=1, groups=2, dilation=1),
        nn.ConvTranspose1d(2, 3, 4, stride=3, dilation=2),
        nn.Conv3d(2, 4, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1), groups=2),
        nn.Conv2d(2, 6, 3, padding=2, dilation=2, groups=2, padding_mode="reflect"),
        nn.Conv1d(2, 3, 4, padding="same", padding_mode="circular"),
    ],
    ids=str,
)
def test_convolutions_of_every_kind_have_factors(layer: nn.Module):
    dims = {"1d": 1, "2d": 2, "3d": 3}[type(layer).__name__[-2:]]
    torch.manual_seed(0)
    module = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.LazyLinear(2)).double()
    x = torch.randn(4, 2, *[6, 5, 4][:dims], dtype=torch.float64)
    module(x)
    J = dense_jacobian(module, x)
    for engine in ENGINES:
        K = nl.ntk(module, x, engine=engine)
        assert K.explain().preflight.coverage.uncovered == {}
        V = columns(J.shape[0], 3, torch.float64)
        assert defect(K @ V, J @ (J.mT @ V)) < 1e-10
        assert defect(K.to_dense(), J @ J.mT) < 1e-10


@pytest.mark.parametrize("tile", [1, 5, 7, 16, 1024])
@pytest.mark.parametrize("budget", [60_000, 10**9])
@pytest.mark.parametrize("engine", ENGINES)
def test_tiles_of_any_size_make_the_same_kernel(engine: str, budget: int, tile: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ntk_lazy.engines.factor_tiles._TILE", tile)
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3)
    ).double()
    x = torch.randn(13, 2, 6, dtype=torch.float64)
    J = dense_jacobian(module, x)
    K = nl.ntk(module, x, engine=engine, memory_budget=budget, max_dense_bytes=10**9)
    dense = K.to_dense().detach()
    assert torch.equal(dense, dense.mT)
    assert defect(dense, J @ J.mT) < 1e-10
    assert defect(K.at(x[:4], x[2:]).to_dense(), J[:12] @ J[6:].mT) < 1e-10


class Largest(TorchDispatchMode):
    """Notice the largest tensor that an operator makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            # A view of the table itself is no new tensor.
            if isinstance(leaf, Tensor) and not leaf._is_view():
                self.largest = max(self.largest, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


class Bag(nn.Module):
    """A table that is looked up, and a readout."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(vocabulary, 8, padding_idx=1), nn.Linear(8, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(tokens)).mean(1))


class Clipped(nn.Module):
    """A layer whose outputs stay above a learned number."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.least = nn.Linear(3, 2), nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.maximum(self.inner(x), self.least)


@every_engine
def test_of_a_table_only_the_rows_that_occur_take_part(engine: str):
    torch.manual_seed(0)
    vocabulary = 5000
    module, tokens = Bag(vocabulary).double(), torch.randint(0, vocabulary, (12, 6))
    tokens[:, 2], tokens[3, 4] = tokens[0, 0], 1
    J = dense_jacobian(module, tokens)
    K = nl.ntk(module, tokens, engine=engine).detach()
    V = columns(J.shape[0], 40, torch.float64)
    with Largest() as seen, K.linearised():
        product, dense = K @ V, K.to_dense()
        form = K.half_gram(V)
    assert defect(product, J @ (J.mT @ V)) < 1e-10
    assert defect(dense, J @ J.mT) < 1e-10
    assert defect(form, V.mT @ J @ (J.mT @ V)) < 1e-10
    # Between points that share few tokens too.
    other = K.at(tokens[:5], tokens[5:]).detach()
    assert defect(other.to_dense(), J[:10] @ J[10:].mT) < 1e-10
    assert defect(other @ V[:14], J[:10] @ (J[10:].mT @ V[:14])) < 1e-10
    # Forty columns of the whole table, or its rows of J, would be more.
    assert seen.largest <= vocabulary * 8


def test_parameters_without_factors_are_named_with_the_reason():
    torch.manual_seed(0)
    bilinear = Through(nn.Bilinear(4, 4, 2), lambda layer, h: layer(h, h))
    K = nl.ntk(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), bilinear), torch.randn(8, 3))
    assert list(K.explain().preflight.coverage.uncovered) == ["2.inner.weight"]
    assert "2.inner.weight: no rule fits" in str(K.explain())


def test_a_scalar_without_factors_has_rows():
    torch.manual_seed(0)
    module = Clipped().double()
    x = torch.randn(6, 3, dtype=torch.float64)
    J = dense_jacobian(module, x)
    for engine in ENGINES:
        K = nl.ntk(module, x, engine=engine)
        assert list(K.explain().preflight.coverage.uncovered) == ["least"]
        assert defect(K.to_dense(), J @ J.mT) < 1e-10


def test_the_plan_ranks_the_engines_and_a_long_job_changes_it():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    K = nl.ntk(module, torch.randn(300, 2))
    plan = K.explain(16, 1000)
    assert {way.engine for way in plan.alternatives} == {"autodiff", "factors", "gram"}
    assert plan.engine == plan.alternatives[0].engine == "gram"
    assert [way.seconds for way in plan.alternatives] == sorted(way.seconds for way in plan.alternatives)
    search = K.explain(eigenpairs=50)
    assert (search.num_columns, search.num_products) == (16, 11)
    assert search.alternatives == K.explain(16, 11).alternatives
    with pytest.raises(nl.ArgumentError, match="eigenpairs"):
        K.explain(eigenpairs=0)
    tight = nl.ntk(module, torch.randn(300, 2), memory_budget=600_000).explain(1, 1000)
    assert tight.engine != "gram"


def test_a_forward_pass_that_fails_leaves_the_module_as_it_was():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    K = nl.ntk(module, torch.randn(8, 3), engine="factors")
    before = {name: p.clone() for name, p in module.named_parameters()}
    module[1].register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("out of luck")))
    with pytest.raises(RuntimeError, match="out of luck"):
        K @ torch.randn(8, 2)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in module.named_parameters())
    assert not module[0]._forward_hooks
    assert not module[2]._forward_hooks
