"""Networks whose forward pass solves an equation, or whose output is the residual of one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .architecture import Built, architecture


class Field(nn.Module):
    """The right-hand side of an ordinary differential equation."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """Return dy/dt."""
        return self.net(torch.cat([y, t.expand(*y.shape[:-1], 1)], dim=-1))


class Flow(nn.Module):
    """Where the solution is at time one."""

    def __init__(self, *, adjoint: bool, method: str) -> None:
        super().__init__()
        self.field, self.adjoint, self.method = Field(), adjoint, method

    def forward(self, x: Tensor) -> Tensor:
        """Solve from x."""
        from torchdiffeq import odeint, odeint_adjoint

        solve = odeint_adjoint if self.adjoint else odeint
        times = torch.linspace(0, 1, 5, dtype=x.dtype)
        return solve(self.field, x, times, method=self.method)[-1]


@architecture("neural ODE, fixed steps", "torchdiffeq")
def ode_fixed():
    return Built(Flow(adjoint=False, method="rk4"), torch.randn(4, 2))


@architecture("neural ODE, steps chosen by the batch", "torchdiffeq", cure="neural ODE, fixed steps")
def ode_adaptive():
    return Built(Flow(adjoint=False, method="dopri5"), torch.randn(4, 2))


@architecture("neural ODE, adjoint method", "torchdiffeq", cure="neural ODE, fixed steps")
def ode_adjoint():
    return Built(Flow(adjoint=True, method="rk4"), torch.randn(4, 2))


class Poisson(nn.Module):
    """The residual of a Poisson equation at points, by ``torch.func`` in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the Laplacian plus a source, one number for each point."""
        hessians = torch.func.vmap(torch.func.hessian(lambda point: self.net(point).squeeze()))(x)
        return hessians.diagonal(dim1=1, dim2=2).sum(dim=1) + torch.sin(3 * x[:, 0])


@architecture("PINN, torch.func.hessian", "torch")
def pinn():
    return Built(Poisson(), torch.rand(6, 2))


class Heat(nn.Module):
    """The residual of the heat equation, by ``torch.autograd.grad`` in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 24), nn.Tanh(), nn.Linear(24, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return u_t minus u_xx."""
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_(True)
            (first,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(first[:, 0].sum(), x, create_graph=True)
        return (first[:, 1] - second[:, 0])[:, None]


@architecture("PINN, torch.autograd.grad", "torch")
def pinn_autograd():
    return Built(Heat(), torch.rand(6, 2))


class Hamiltonian(nn.Module):
    """The field of a learned Hamiltonian: the gradient of a network, rotated."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 24), nn.Tanh(), nn.Linear(24, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return dq/dt and dp/dt."""
        gradients = torch.func.vmap(torch.func.grad(lambda point: self.net(point).squeeze()))(x)
        return torch.stack([gradients[:, 1], -gradients[:, 0]], dim=1)


@architecture("Hamiltonian network, torch.func.grad", "torch")
def hamiltonian():
    return Built(Hamiltonian(), torch.randn(6, 2))


class DeepOperator(nn.Module):
    """DeepONet: a branch for a function's samples, a trunk for the point."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 16))
        self.trunk = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 16))

    def forward(self, x: Tensor) -> Tensor:
        """Eight samples and a point."""
        return torch.einsum("bi,bi->b", self.branch(x[:, :8]), self.trunk(x[:, 8:]))


@architecture("DeepONet", "torch")
def deeponet():
    return Built(DeepOperator(), torch.randn(6, 9))
