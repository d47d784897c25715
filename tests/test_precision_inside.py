"""A model that computes in a coarser dtype than its parameters have: K is right to that, and a kernel all the same."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from oracle import defect, dense_jacobian
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

import ntk_lazy as nl

ENGINES = ["autodiff", "factors", "gram"]


class RootMeanSquare(nn.Module):
    """Normalises in float32, whatever comes in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, h: Tensor) -> Tensor:
        wide = h.to(torch.float32)
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(h.dtype)


class Decoder(nn.Module):
    """One layer of attention with rotary tables and a mask, and some or all of its parts in float32."""

    def __init__(self, *, norm: bool = False, rotary: bool = False, softmax: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.norm = RootMeanSquare(8) if norm else nn.Identity()
        self.qkv, self.out, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 3)
        self.register_buffer("frequencies", 100.0 ** (-torch.arange(4) / 4))
        self.rotary, self.softmax = rotary, softmax

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.table(tokens)
        q, k, v = self.qkv(self.norm(h)).chunk(3, -1)
        t = tokens.shape[1]
        if self.rotary:
            angles = (torch.arange(t).float()[:, None] * self.frequencies.float()).repeat(1, 2)
            q, k = (a * angles.cos() + torch.cat([-a[..., 4:], a[..., :4]], -1) * angles.sin() for a in (q, k))
        mask = torch.full((t, t), torch.finfo(torch.float32).min, dtype=torch.float32).triu(1)
        scores = q @ k.mT / math.sqrt(8) + mask
        weights = scores.softmax(-1, dtype=torch.float32).to(q.dtype) if self.softmax else scores.softmax(-1)
        return self.head((h + self.out(weights @ v)).mean(1))


class Ending(nn.Module):
    """Two layers, something done to what is between them, and something to what they return."""

    def __init__(self, at_end: Callable[[Tensor], Tensor], within: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 9), nn.Linear(9, 3)
        self.within, self.at_end = within, at_end

    def forward(self, x: Tensor) -> Tensor:
        return self.at_end(self.last(self.within(self.first(x))))


class Autocast(Ending):
    """In bfloat16, or float16, as autocast has it."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(nn.Identity())
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=self.dtype):
            return super().forward(x)


def _part_in_half(y: Tensor) -> Tensor:
    return torch.stack([y[:, 0], y[:, 1].bfloat16().to(y.dtype), y[:, 2].half().to(y.dtype)], 1)


def _through_half(h: Tensor) -> Tensor:
    return h.tanh().bfloat16().to(h.dtype)


def _checkpointed(h: Tensor) -> Tensor:
    return checkpoint(_through_half, h, use_reentrant=False)


def _assert_has_the_kernel(module: nn.Module, x: Tensor, engine: str, *, tolerance: float) -> None:
    """Compare with autograd row by row on the module as it is, and find that products are symmetric to rounding."""
    J = dense_jacobian(module, x)
    K = nl.ntk(module, x, engine=engine)
    V = torch.randn(K.shape[1], 3, generator=Generator().manual_seed(0), dtype=torch.float64).to(K.dtype)
    product = (K @ V).detach().double()
    assert defect(product, J @ (J.mT @ V.double())) < tolerance
    assert defect(K.to_dense().detach(), J @ J.mT) < tolerance
    form = V.double().mT @ product
    assert defect(form, form.mT) < 100 * torch.finfo(K.dtype).eps


def tokens() -> Tensor:
    """Four short texts."""
    return torch.randint(0, 11, (4, 5), generator=Generator().manual_seed(0))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "parts",
    [{"norm": True}, {"rotary": True}, {"softmax": True}, {"norm": True, "rotary": True, "softmax": True}],
    ids=" ".join,
)
def test_float64_models_with_float32_inside_have_a_kernel(parts: dict[str, bool], engine: str):
    torch.manual_seed(0)
    _assert_has_the_kernel(Decoder(**parts).double(), tokens(), engine, tolerance=100 * torch.finfo(torch.float32).eps)


def test_a_float32_table_alone_is_used_as_it_is():
    torch.manual_seed(0)
    module = Decoder(rotary=True).double()
    _assert_has_the_kernel(module, tokens(), "autodiff", tolerance=1e-13)
    assert nl.ntk(module, tokens()).explain().preflight.remarks == ()


def test_a_search_for_eigenpairs_finds_those_of_a_float64_model_with_float32_inside():
    torch.manual_seed(0)
    module = Decoder(norm=True, softmax=True).double()
    J = dense_jacobian(module, tokens())
    pairs = nl.eigsh(nl.ntk(module, tokens(), engine="autodiff"), 5, solver=nl.Lanczos())
    assert pairs.status == "converged"
    assert defect(pairs.values, torch.linalg.eigvalsh(J @ J.mT).flip(0)[:5]) < 1e-5


@pytest.mark.parametrize("engine", ENGINES)
def test_float32_inside_is_left_out_where_outputs_cancel(engine: str):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), RootMeanSquare(8), nn.Tanh(), nn.Linear(8, 2)).double()
    target = copy.deepcopy(net).requires_grad_(False)

    def residual(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(net, params, x) - target(x)

    x, params = torch.randn(6, 5, dtype=torch.float64), {n: p.detach() for n, p in net.named_parameters()}
    params["3.weight"] = params["3.weight"] * (1 + 1e-12)
    J = dense_jacobian(net, x)
    K = nl.ntk(residual, x, params=params, engine=engine)
    V = torch.randn(12, 3, generator=Generator().manual_seed(0), dtype=torch.float64)
    assert defect(K @ V, J @ (J.mT @ V)) < 100 * torch.finfo(torch.float32).eps
    assert defect(V.mT @ (K @ V), (V.mT @ (K @ V)).mT) < 100 * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("at_end", [Tensor.bfloat16, Tensor.half, _part_in_half], ids=["bfloat16", "float16", "part"])
def test_a_cast_to_half_precision_at_the_end_costs_no_digit(
    at_end: Callable[[Tensor], Tensor], dtype: torch.dtype, engine: str
):
    torch.manual_seed(0)
    module, x = Ending(at_end).to(dtype), torch.randn(6, 5).to(dtype)
    _assert_has_the_kernel(module, x, engine, tolerance=1e3 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "make",
    [
        lambda: Autocast(torch.bfloat16),
        lambda: Autocast(torch.float16),
        lambda: Ending(nn.Identity(), _through_half),
        lambda: Ending(nn.Identity(), _checkpointed),
    ],
    ids=["autocast", "autocast to float16", "cast", "checkpointed cast"],
)
def test_half_precision_within_is_left_out_of_products(make: Callable[[], nn.Module], engine: str):
    torch.manual_seed(0)
    _assert_has_the_kernel(make(), torch.randn(6, 5), engine, tolerance=4 * torch.finfo(torch.bfloat16).eps)


def test_casts_of_a_model_in_half_precision_follow_its_parameters():
    torch.manual_seed(0)
    module = Ending(Tensor.float, lambda h: h.float().tanh().bfloat16()).bfloat16()
    plain = Ending(nn.Identity())
    plain.load_state_dict(module.state_dict())
    x = torch.randn(6, 5).bfloat16()
    J = dense_jacobian(plain, x)
    assert defect(nl.ntk(module, x).to_dense().detach(), J @ J.mT) < 1e3 * torch.finfo(torch.float32).eps


def test_bits_of_numbers_are_those_of_the_dtype_that_the_model_asks_for():
    class Signs(Ending):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * (x.bfloat16().view(torch.int16)[:, :1] > 0)

    torch.manual_seed(0)
    module, x = Signs(nn.Identity()), torch.randn(6, 5)
    _assert_has_the_kernel(module, x, "autodiff", tolerance=1e3 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: nn.Sequential(Ending(Tensor.bfloat16), nn.Tanh()), "'0' (Ending) computes in bfloat16: products"),
        (lambda: Decoder(norm=True).double(), "'norm' (RootMeanSquare) computes in float32: products"),
    ],
    ids=["bfloat16", "float32"],
)
def test_a_coarser_dtype_is_named_with_its_module(make: Callable[[], nn.Module], says: str):
    torch.manual_seed(0)
    module = make()
    x = tokens() if isinstance(module, Decoder) else torch.randn(4, 5)
    assert says in str(nl.doctor(module, x))
    assert says in str(nl.ntk(module, x).explain())


def _insists(y: Tensor) -> Tensor:
    half = y.bfloat16()
    if half.dtype != torch.bfloat16:
        raise TypeError("this kernel takes bfloat16")
    return half


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("at_end", "says"),
    [
        (_insists, ("computes in bfloat16", "this kernel takes bfloat16")),
        (lambda y: y.to(torch.float8_e4m3fn).to(y.dtype), ("computes in float8_e4m3fn", "a digit")),
        (lambda y: (1 + 1e-3 * y).bfloat16() - 1, ("computes in bfloat16", "outputs hang on that")),
    ],
    ids=["insists", "float8", "cancels"],
)
def test_half_precision_that_a_model_cannot_do_without_is_refused_with_the_cure(
    at_end: Callable[[Tensor], Tensor], says: tuple[str, ...], engine: str
):
    torch.manual_seed(0)
    with pytest.raises(nl.UnsupportedModuleError) as refusal:
        nl.ntk(nn.Sequential(nn.Linear(5, 5), Ending(at_end)), torch.randn(4, 5), engine=engine)
    for words in (*says, "'1' (Ending)", "Take the cast", "output_fn"):
        assert words in str(refusal.value)
