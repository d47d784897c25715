"""This library."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from measure import main
from networks import CASES
from torch import Tensor

import ntk_lazy as nl

_STACK = ExitStack()


def _kernel(job: dict[str, Any], data: Any, **options: Any) -> nl.NTKLinearOperator:
    torch.set_num_threads(job["threads"])
    case = CASES[job["case"]]
    return nl.ntk(case.network(), torch.from_numpy(data["x"]), **options).detach()


def product(job, data):
    K = _kernel(job, data, engine=job.get("engine", "auto"))
    V = torch.from_numpy(data["V"])
    _STACK.enter_context(K.linearised(100 * V.shape[1]))
    return lambda: K @ V, lambda Y: {"product": Y.numpy()}


def dense(job, data):
    K = _kernel(job, data, max_dense_bytes=1 << 34)
    return K.to_dense, lambda D: {"product": (D.double() @ torch.from_numpy(data["checked"]).double()).numpy()}


def eigen(job, data):
    # The kernel is part of what is timed.
    def run() -> nl.EigenResult:
        options = {"memory_budget": job["memory_budget"]} if "memory_budget" in job else {}
        return nl.eigsh(_kernel(job, data, **options), job["k"])

    def finish(pairs: nl.EigenResult) -> dict[str, Tensor]:
        print(pairs)
        return {
            "values": pairs.values.numpy(),
            "vectors": pairs.vectors.numpy(),
            "columns": torch.tensor(pairs.cost.columns).numpy(),
        }

    return run, finish


if __name__ == "__main__":
    main({"product": product, "dense": dense, "eigen": eigen})
