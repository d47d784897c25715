"""Plain torch.func, as one writes it down: all examples at once, or in the case's batches where memory asks for it."""

from __future__ import annotations

import torch
from measure import main
from networks import CASES
from torch.func import functional_call, jvp, vjp, vmap


def product(job, data):
    torch.set_num_threads(job["threads"])
    dtype = getattr(torch, job.get("dtype", "float32"))
    case = CASES[job["case"]]
    net, x = case.network().to(dtype), torch.from_numpy(data["x"]).to(dtype)
    params = {n: p.detach() for n, p in net.named_parameters()}
    V = torch.from_numpy(data["V"]).to(dtype)
    if job.get("is_reference"):
        # Its fused recurrent layers have no forward mode.
        torch.backends.mkldnn.set_flags(False)
    batch = case.batch if job.get("is_reference") else job.get("batch") or len(x)

    def outputs(part):
        return lambda p: functional_call(net, p, (part,)).flatten()

    def run():
        rows = case.num_outputs
        total = {n: torch.zeros(V.shape[1], *p.shape, dtype=dtype) for n, p in params.items()}
        for begin in range(0, len(x), batch):
            transpose = vjp(outputs(x[begin : begin + batch]), params)[1]
            part = vmap(lambda v, transpose=transpose: transpose(v)[0])(
                V[begin * rows : (begin + batch) * rows].mT.contiguous()
            )
            total = {n: total[n] + part[n] for n in total}
        found = []
        for part in x.split(batch):
            found.append(vmap(lambda w, part=part: jvp(outputs(part), (params,), (w,))[1])(total).mT)
        return torch.cat(found)

    return run, lambda Y: {"product": Y.numpy()}


if __name__ == "__main__":
    main({"product": product})
