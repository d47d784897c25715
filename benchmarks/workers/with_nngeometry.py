"""nngeometry: the dense Gram matrix from hooks."""

from __future__ import annotations

import torch
from measure import main
from networks import CASES
from nngeometry import GramMatrix
from nngeometry.layercollection import LayerCollection
from torch.utils.data import DataLoader, TensorDataset


def dense(job, data):
    torch.set_num_threads(job["threads"])
    case = CASES[job["case"]]
    net, x = case.network(), torch.from_numpy(data["x"])
    loader = DataLoader(TensorDataset(x), batch_size=case.batch)

    def run():
        K = GramMatrix(model=net, loader=loader, layer_collection=LayerCollection.from_model(net)).to_torch()
        return K.movedim(0, 1).movedim(2, 3).reshape(len(x) * case.num_outputs, -1)

    return run, lambda K: {"product": (K.double() @ torch.from_numpy(data["checked"]).double()).detach().numpy()}


if __name__ == "__main__":
    main({"dense": dense})
