"""Time the three engines on three networks, and put what the planner predicted beside it.

The networks: the paper's MLP (6 x 256), a small CNN on 3 x 32 x 32 images, a transformer encoder on 64 tokens. Products
are timed within a series (factors or K kept), K is timed written down, and every product is compared with automatic
differentiation in float64 first. ``python benchmarks/engines.py [--examples N] [--eigen]``.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import ntk_lazy as nl

ENGINES = ("autodiff", "factors", "gram")


class Block(nn.Module):
    """A pre-norm encoder block with attention written out."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(b, tokens, width)`` to the same shape."""
        b, tokens, width = x.shape
        q, k, v = self.qkv(self.norms[0](x)).view(b, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + self.out(attended.transpose(1, 2).reshape(b, tokens, width))
        return x + self.mlp(self.norms[1](x))


class Encoder(nn.Module):
    """Two blocks and a mean over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(16, 64), nn.Sequential(Block(64, 4), Block(64, 4))
        self.head = nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(b, tokens, 16)`` to ``(b, 1)``."""
        return self.head(self.blocks(self.embed(x)).mean(1))


def mlp() -> nn.Module:
    layers: list[nn.Module] = []
    for d_in, d_out in itertools.pairwise((2, 256, 256, 256, 256, 256, 1)):
        layers += [nn.Linear(d_in, d_out), nn.LeakyReLU()]
        nn.init.xavier_uniform_(layers[-2].weight)
        nn.init.zeros_(layers[-2].bias)
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Module:
    layers: list[nn.Module] = []
    for (c_in, c_out), stride in zip(itertools.pairwise((3, 32, 64, 64, 128)), (1, 2, 2, 2), strict=True):
        layers += [nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, 1))


def seconds(run: Callable[[], object], repeats: int = 3) -> float:
    run()
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def compare(name: str, net: nn.Module, x: Tensor, columns: tuple[int, ...], rate: float) -> None:
    few = x[:32]
    exact = nl.ntk(net.double(), few.double(), engine="autodiff").to_dense().detach()
    net.float()
    for engine in ENGINES:
        K = nl.ntk(net, few, engine=engine).detach()
        error = float((K @ torch.eye(K.shape[1]) - exact).norm() / exact.norm())
        assert error < 1e-5, f"{engine} is off by {error:.1e} on {name}"
    kernels = {engine: nl.ntk(net, x, engine=engine).detach() for engine in ENGINES}
    print(f"\n{name}: N = {len(x):,}, P = {kernels['factors'].num_params:,}; seconds a column (predicted)")
    for k in columns:
        V = torch.randn(kernels["factors"].shape[1], k)
        predicted = {way.engine: way.seconds for way in nl.ntk(net, x).explain(k, 10**6).alternatives}
        cells = []
        for engine, K in kernels.items():
            with K.linearised():
                taken = seconds(lambda K=K, V=V: K @ V)
            cells.append(f"{engine} {taken / k:.5f} ({predicted.get(engine, float('nan')) / 1e6 / k:.5f})")
        print(f"  k = {k:3d}: {', '.join(cells)}", flush=True)
    size = kernels["factors"].shape[0] ** 2 * 4
    made = seconds(lambda: kernels["factors"].to_dense(max_dense_bytes=size), 1)
    predicted = next(way.seconds for way in nl.ntk(net, x).explain(1, 1).alternatives if way.engine == "gram")
    print(f"  K written down: {made:.2f} s ({predicted:.2f}); matrix product {rate:.0f} GFLOP/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--eigen", action="store_true", help="also find 200 eigenpairs of the MLP")
    options = parser.parse_args()
    torch.manual_seed(0)
    A = torch.randn(2048, 2048)
    rate = 2 * 2048**3 / seconds(lambda: A @ A, 5) / 1e9
    points = torch.rand(options.examples, 2) * 2 - 1
    compare("MLP", mlp(), points, (1, 8, 32), rate)
    compare("CNN", cnn(), torch.randn(256, 3, 32, 32), (16, 64), rate)
    compare("transformer", Encoder(), torch.randn(256, 64, 16), (16, 64), rate)
    if options.eigen:
        for engine in ("auto", "factors"):
            began = time.perf_counter()
            pairs = nl.eigsh(nl.ntk(mlp(), points, engine=engine), 200)
            print(
                f"\n200 pairs, {engine}: {time.perf_counter() - began:.1f} s from model to pairs\n{pairs}", flush=True
            )


if __name__ == "__main__":
    main()
