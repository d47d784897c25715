"""Small modules that are awkward to differentiate, to vectorise or to leave alone; the zoo houses them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint


class Through(nn.Module):
    """A module called through a function, for those that want more than one argument."""

    def __init__(self, inner: nn.Module, call: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.inner = inner
        self.call = call

    def forward(self, x: Tensor) -> Any:
        return self.call(self.inner, x)


class TiedLinears(nn.Module):
    """One weight tensor under two names: ``first.weight is second.weight``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).tanh()).tanh())


class SharedLayer(nn.Module):
    """One layer object called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.shared(self.shared(x).tanh()).tanh())


class TiedHead(nn.Module):
    """A token model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix = nn.Embedding(7, 4), nn.Linear(4, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.mix(self.embedding(tokens)).tanh(), self.embedding.weight)


class BareParameters(nn.Module):
    """Parameters outside any layer: a matrix laid out in columns, a vector and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.columns = nn.Parameter(torch.randn(4, 5).mT)
        self.offset = nn.Parameter(torch.randn(5))
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x @ self.columns.mT + self.offset).sin()[:, ::2]


class ImagePatches(nn.Module):
    """A small vision transformer: class token, slice of a table of positions, layer scale, learned temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(2, 4, 2, stride=2)
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.registers = nn.Parameter(torch.randn(2, 4))
        self.positions = nn.Parameter(torch.randn(1, 9, 4))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, add_bias_kv=True)
        self.gamma = nn.Parameter(torch.randn(4))
        self.temperature = nn.Parameter(torch.tensor(0.3))
        self.sharpness = nn.Parameter(torch.tensor(1.3))
        self.gate = nn.Parameter(torch.randn(4))
        self.weight = nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).mT
        h = torch.cat([self.token.expand(x.shape[0], -1, -1), self.registers.repeat(x.shape[0], 1, 1), h], 1)
        h = h + self.positions[:, : h.shape[1]]
        h = h + self.gamma * self.attention(h, h.sin(), h.cos())[0]
        h = torch.sigmoid(self.gate) * h[:, 0] + (1 - torch.sigmoid(self.gate)) * h.mean(1)
        h = h / self.sharpness * (1 + self.gamma)
        return (h @ (self.weight * 0.5).T) * self.temperature.exp().clamp(max=100)


class TokenPositions(nn.Module):
    """Tables that are looked up at places which are the same for all examples, and by index."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 4))
        self.positions, self.types = nn.Embedding(6, 4, padding_idx=1), nn.Embedding(2, 4)
        self.bias = nn.Parameter(torch.randn(5, 2))

    def forward(self, tokens: Tensor) -> Tensor:
        places = torch.arange(tokens.shape[1], device=tokens.device)
        h = self.table[tokens] + self.positions(places) + self.types(torch.zeros_like(places)[None])
        distance = (places[:, None] - places).clamp(-2, 2)  # negative ones count from the end
        bias = self.bias[distance.flatten()].unflatten(0, distance.shape).permute(2, 0, 1)
        scores = torch.einsum("bsd,btd->bst", h, h)[:, None] / 8 + bias
        return torch.einsum("bhst,btd->bhd", scores.softmax(-1), h).sin()


class HeadsByEinsum(nn.Module):
    """Attention whose projections are ``einsum`` with a weight for each head, and other products without a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = (nn.Parameter(torch.randn(2, 3, 4)) for _ in range(2))
        self.value, self.per_head = nn.Parameter(torch.randn(4, 2, 3)), nn.Parameter(torch.randn(2, 3, 2))
        self.left, self.vector = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(8))
        self.out = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        query, key = torch.einsum("bsi,hdi->bhsd", x, self.query), torch.einsum("bsi,hdi->bhsd", x, self.key)
        value = torch.einsum("bsi,ihd->bhsd", x, self.value)
        mixed = F.scaled_dot_product_attention(query, key, value)
        flat = mixed.transpose(1, 2).flatten(2)
        heads = torch.einsum("bhi,hio->bho", mixed.mean(2), self.per_head)
        summed = torch.bmm(flat.tanh(), self.out.T.expand(x.shape[0], 6, 4))
        joined = torch.cat([(self.left @ x).sin().mean(1), summed.mean(1)], 1)
        return torch.cat([heads.flatten(1), (joined @ self.vector)[:, None]], 1)


class ScaledWeights(nn.Module):
    """Layers in the parametrisation of the kernel: standard normal weights, scaled where they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(3, 6))
        self.bias = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.first * 4**-0.5, self.bias * 0.1).relu()
        return F.linear(hidden, self.second / 6**0.5)


class MixedDtypes(nn.Module):
    """A layer in one dtype and a scale in another, which is that of the output."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.inner(x.to(self.inner.weight.dtype)).tanh().to(self.scale.dtype)


class FunctionalWeights(nn.Module):
    """The weights of one network are the output of another: one set for each example."""

    def __init__(self) -> None:
        super().__init__()
        self.maker = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("ncd,nd->nc", self.maker(x).tanh().unflatten(1, (3, 4)), x)


class WritesInPlace(nn.Module):
    """An in-place ReLU, then columns of zeros are overwritten by index."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.first(x), inplace=True)
        placed = torch.zeros(x.shape[0], 6, dtype=x.dtype, device=x.device)
        placed[:, [0, 2, 4]] = hidden[:, :3]
        placed[:, 1] = hidden[:, 5]
        return self.head(placed)


class Checkpointed(nn.Module):
    """A block whose activations are recomputed in the backward pass."""

    def __init__(self, *, use_reentrant: bool, is_first: bool = False) -> None:
        super().__init__()
        self.first, self.block, self.head = nn.Linear(4, 4), nn.Linear(4, 6), nn.Linear(6, 3)
        self.use_reentrant = use_reentrant
        self.is_first = is_first

    def forward(self, x: Tensor) -> Tensor:
        def inner(hidden: Tensor) -> Tensor:
            return self.block(hidden).tanh()

        entering = x if self.is_first else self.first(x)
        return self.head(checkpoint(inner, entering, use_reentrant=self.use_reentrant))


class CausalAttention(nn.Module):
    """Attention through the functional interface, with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.head = nn.Linear(4, 12), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(query, key, value, is_causal=True))


class CountsCalls(nn.Module):
    """Writes a buffer in every forward pass; the output does not depend on it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x).sin()


class DriftsWithCalls(CountsCalls):
    """Writes a buffer in every forward pass, and the output depends on it."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.calls * self.inner(x)


class DrawsNumbers(nn.Module):
    """Consumes random numbers, which reach the output scaled by ``amplitude``."""

    def __init__(self, amplitude: float) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)
        self.amplitude = amplitude

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).sin() + self.amplitude * torch.rand(3, dtype=x.dtype, device=x.device)


class Remembers(nn.Module):
    """Keeps its last activations and counts its calls in plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 2)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = self.inner(x).tanh()
        return self.head(self.last)


class BranchesOnData(nn.Module):
    """Python asks each example which of two layers it wants."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.high(row) if row.sum() > 0 else self.low(row) for row in x])


class BranchesOnParameter(nn.Module):
    """Python asks a parameter which way to go."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x)
        return hidden.tanh() if self.inner.weight.norm() > 1e-3 else hidden


class Headed(nn.Module):
    """A two-layer perceptron whose output goes through a function, and which may own unused parameters."""

    def __init__(self, head: Callable[[Tensor], Any], *, num_outputs: int = 3, is_wasteful: bool = False) -> None:
        super().__init__()
        self.hidden, self.last = nn.Linear(4, 5), nn.Linear(5, num_outputs)
        self.unused = nn.Linear(4, 2) if is_wasteful else None
        self.head = head

    def forward(self, x: Tensor) -> Any:
        return self.head(self.last(self.hidden(x).tanh()))


class PaddedEncoder(nn.Module):
    """A token model that masks the padding, whose mask of infinities for the future is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4), nn.Linear(4, 2)
        self.encoder = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        self.register_buffer("future", torch.full((5, 5), -torch.inf).triu(1))

    def forward(self, tokens: Tensor) -> Tensor:
        padding = torch.zeros(tokens.shape, dtype=self.future.dtype, device=tokens.device).masked_fill(
            tokens == 6, -torch.inf
        )
        padding[:, 0] = 0
        hidden = self.encoder(self.embedding(tokens), src_mask=self.future, src_key_padding_mask=padding)
        return self.head(hidden[:, -1])


class MixtureOfExperts(nn.Module):
    """Each example goes to the best two of three layers, gathered by index."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Linear(4, 2) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2, -1)
        total = x.new_zeros(x.shape[0], 2)
        for i, expert in enumerate(self.experts):
            row, place = torch.where(chosen == i)
            total = total.index_add(0, row, expert(x[row]) * weights[row, place].unsqueeze(1))
        return total


class GradientReversal(torch.autograd.Function):
    """The identity whose gradient is minus one: autograd's Jacobian, not the function's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


def reverse_gradient(x: Tensor) -> Tensor:
    """Apply ``GradientReversal``."""
    return GradientReversal.apply(x)


class WrongForwardRule(torch.autograd.Function):
    """The square, whose forward-mode derivative is wrong and whose reverse-mode derivative is right."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.square()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] * tangent


class OnceDifferentiable(torch.autograd.Function):
    """The square, by an operation that has a backward pass and nothing else, as fused kernels have."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


def once_differentiable_square(x: Tensor) -> Tensor:
    """Apply ``OnceDifferentiable``."""
    return OnceDifferentiable.apply(x)


def wrong_forward_square(x: Tensor) -> Tensor:
    """Apply ``WrongForwardRule``."""
    return WrongForwardRule.apply(x)


def hooked_weight_norm() -> nn.Module:
    """Normalise a weight the older way: a hook computes it before each call. Torch warns, and models go on using it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.utils.weight_norm(nn.Linear(6, 3)))
