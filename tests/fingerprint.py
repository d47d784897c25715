"""Print which kernels this process multiplies with: their name, and a mark of how their results round.

``nox -s portability`` compares marks, so as not to run the tests twice with the same kernels.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def numbers(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Numbers between 0 and 1 that are the same in each process; random ones are made by kernels, too."""
    counted = torch.arange(rows * columns).view(rows, columns)
    return (counted * 7919 % 10007).to(dtype) / 10007


def mark() -> str:
    """Digest the bits of products, sums and functions; of random numbers, which are drawn by vectors of some width."""
    found = [torch.randn(100, generator=torch.Generator().manual_seed(0))]
    for dtype in (torch.float32, torch.float64):
        for rows, inner, columns in ((1, 1000, 1), (300, 1000, 1), (70, 1000, 33), (500, 700, 300)):
            A, B = numbers(rows, inner, dtype), numbers(columns, inner, dtype)
            found += [A @ B.mT, torch.nn.functional.linear(A, B), A.sum(1), A.sin(), A.std(1)]
            if dtype == torch.float32 and torch.backends.mkldnn.is_available():
                found.append(torch.ops.mkldnn._linear_pointwise(A, B, None, "none", [], ""))
        found.append(torch.linalg.eigvalsh(numbers(60, 60, dtype)))
        found.append(torch.conv2d(numbers(30, 40, dtype)[None, None], numbers(3, 3, dtype)[None, None]))
    digest = hashlib.sha256()
    for tensor in found:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:8]


if __name__ == "__main__":
    print(torch.backends.cpu.get_cpu_capability(), mark())  # noqa: T201
