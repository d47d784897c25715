"""Graphs with outputs for each graph: an example holds the features and the edges of one graph in one tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .architecture import Built, architecture

NODES, FEATURES = 5, 6


def graphs(count: int = 4) -> Tensor:
    """Features beside adjacencies, shape (count, NODES, FEATURES + NODES)."""
    edges = (torch.rand(count, NODES, NODES) < 0.5).float()
    edges = ((edges + edges.mT) > 0).float()
    edges.diagonal(dim1=1, dim2=2).zero_()
    edges[:, 0, 1] = edges[:, 1, 0] = 1
    return torch.cat([torch.randn(count, NODES, FEATURES), edges], dim=2)


class Dense(nn.Module):
    """Two layers of message passing on dense adjacencies, and the mean over nodes."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.first, self.second, self.head = layer(FEATURES, 16), layer(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return three numbers for each graph."""
        features, edges = x[..., :FEATURES], x[..., FEATURES:]
        hidden = torch.relu(self.first(features, edges))
        return self.head(torch.tanh(self.second(hidden, edges)).mean(dim=1))


class Sparse(nn.Module):
    """The same on lists of edges: each batch becomes one large graph, as loaders of torch-geometric do it."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.first, self.second, self.head = layer(FEATURES, 16), layer(16, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return three numbers for each graph."""
        from torch_geometric.nn import global_mean_pool

        count = len(x)
        batch, source, target = x[..., FEATURES:].nonzero().unbind(dim=1)
        edges = torch.stack([batch * NODES + source, batch * NODES + target])
        hidden = torch.relu(self.first(x[..., :FEATURES].reshape(-1, FEATURES), edges))
        hidden = torch.tanh(self.second(hidden, edges))
        return self.head(global_mean_pool(hidden, torch.arange(count).repeat_interleave(NODES), count))


@architecture("GCN", "torch-geometric")
def gcn():
    from torch_geometric.nn import DenseGCNConv

    return Built(Dense(DenseGCNConv).eval(), graphs())


@architecture("GAT", "torch-geometric")
def gat():
    from torch_geometric.nn import DenseGATConv

    return Built(Dense(lambda i, o: DenseGATConv(i, o // 2, heads=2)).eval(), graphs())


@architecture("GIN", "torch-geometric")
def gin():
    from torch_geometric.nn import DenseGINConv

    def layer(i, o):
        return DenseGINConv(nn.Sequential(nn.Linear(i, o), nn.ReLU(), nn.Linear(o, o)), train_eps=True)

    return Built(Dense(layer).eval(), graphs())


@architecture("GraphSAGE", "torch-geometric")
def sage():
    from torch_geometric.nn import DenseSAGEConv

    return Built(Dense(DenseSAGEConv).eval(), graphs())


@architecture("GraphConv", "torch-geometric")
def graph_conv():
    from torch_geometric.nn import DenseGraphConv

    return Built(Dense(DenseGraphConv).eval(), graphs())


@architecture("GCN on lists of edges", "torch-geometric")
def gcn_edges():
    from torch_geometric.nn import GCNConv

    return Built(Sparse(GCNConv).eval(), graphs())


@architecture("GATv2 on lists of edges", "torch-geometric")
def gat_edges():
    from torch_geometric.nn import GATv2Conv

    return Built(Sparse(lambda i, o: GATv2Conv(i, o // 2, heads=2)).eval(), graphs())


@architecture("GraphSAGE on lists of edges, max", "torch-geometric")
def sage_edges():
    from torch_geometric.nn import SAGEConv

    return Built(Sparse(lambda i, o: SAGEConv(i, o, aggr="max")).eval(), graphs())


@architecture("GIN on lists of edges", "torch-geometric")
def gin_edges():
    from torch_geometric.nn import GINConv

    def layer(i, o):
        return GINConv(nn.Sequential(nn.Linear(i, o), nn.ReLU(), nn.Linear(o, o)), train_eps=True)

    return Built(Sparse(layer).eval(), graphs())


@architecture("Graph transformer on lists of edges", "torch-geometric")
def transformer_edges():
    from torch_geometric.nn import TransformerConv

    return Built(Sparse(lambda i, o: TransformerConv(i, o // 2, heads=2, beta=True)).eval(), graphs())


class Cloud(nn.Module):
    """A network of e3nn on clouds of points: harmonics of differences, a tensor product, a sum over pairs."""

    def __init__(self) -> None:
        super().__init__()
        from e3nn import nn as gates
        from e3nn import o3

        self.harmonics = o3.Irreps.spherical_harmonics(2)
        self.middle = o3.Irreps("8x0e + 4x1o")
        self.product = o3.FullyConnectedTensorProduct("2x0e", self.harmonics, "12x0e + 4x1o")
        self.gate = gates.Gate("8x0e", [torch.tanh], "4x0e", [torch.sigmoid], "4x1o")
        self.second = o3.FullyConnectedTensorProduct(self.gate.irreps_out, self.harmonics, "3x0e")
        self.mix = o3.Linear("3x0e", "3x0e")

    def forward(self, x: Tensor) -> Tensor:
        """Return three invariants for each cloud: positions in the first three columns, two features beside."""
        from e3nn.o3 import spherical_harmonics

        differences = x[:, :, None, :3] - x[:, None, :, :3]
        Y = spherical_harmonics(self.harmonics, differences, normalize=False)
        features = x[:, None, :, 3:].expand(-1, x.shape[1], -1, -1)
        hidden = self.gate(self.product(features, Y).sum(dim=2))
        return self.mix(self.second(hidden[:, None].expand(-1, x.shape[1], -1, -1), Y).mean(dim=(1, 2)))


@architecture("e3nn, tensor products", "e3nn")
def e3nn():
    return Built(Cloud().eval(), torch.randn(4, 4, 5))


@architecture("e3nn, radial network", "e3nn")
def e3nn_radial():
    from e3nn.nn import FullyConnectedNet

    return Built(FullyConnectedNet([4, 16, 16, 3], torch.nn.functional.silu).eval(), torch.randn(4, 4))
