"""curvlinops: products with J and its adjoint, batch by batch."""

from __future__ import annotations

import torch
from curvlinops import JacobianLinearOperator
from measure import main
from networks import CASES
from scipy.sparse.linalg import LinearOperator, eigsh


def _operators(job, data):
    torch.set_num_threads(job["threads"])
    case = CASES[job["case"]]
    net, x = case.network(), torch.from_numpy(data["x"])
    batches = [(part, part[:, :0]) for part in x.split(case.batch)]
    params = [p for p in net.parameters() if p.requires_grad]
    J = JacobianLinearOperator(net, params, batches, num_data=len(x), check_deterministic=False)
    return J, J.adjoint()


def product(job, data):
    J, JT = _operators(job, data)
    V = torch.from_numpy(data["V"])
    return lambda: J @ (JT @ V), lambda Y: {"product": Y.detach().numpy()}


def eigen(job, data):
    def run():
        J, JT = _operators(job, data)
        n = J.shape[0]

        def multiply(v):
            return (J @ (JT @ torch.from_numpy(v.reshape(n, -1).astype("float32")))).detach().numpy().reshape(v.shape)

        K = LinearOperator((n, n), matvec=multiply, matmat=multiply, dtype="float32")
        return eigsh(K, k=job["k"], tol=1e-3)

    return run, lambda pairs: {"values": pairs[0][::-1], "vectors": pairs[1][:, ::-1]}


if __name__ == "__main__":
    main({"product": product, "eigen": eigen})
