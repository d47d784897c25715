"""The zoo: every kind of module that people take kernels of, and every kind that must be refused by name."""

from __future__ import annotations

import torch
from case import Case, reals, tokens
from modules import (
    BareParameters,
    BranchesOnData,
    BranchesOnParameter,
    CausalAttention,
    Checkpointed,
    CountsCalls,
    DrawsNumbers,
    DriftsWithCalls,
    FunctionalWeights,
    Headed,
    HeadsByEinsum,
    ImagePatches,
    MixedDtypes,
    MixtureOfExperts,
    PaddedEncoder,
    Remembers,
    ScaledWeights,
    SharedLayer,
    Through,
    TiedHead,
    TiedLinears,
    TokenPositions,
    WritesInPlace,
    hooked_weight_norm,
    once_differentiable_square,
    reverse_gradient,
    wrong_forward_square,
)
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrizations

from ntk_lazy.errors import NonFiniteError, ShapeError, UnsupportedModuleError


def _first(returned: tuple[Tensor, ...]) -> Tensor:
    return returned[0]


def _last_step(returned: tuple[Tensor, object]) -> Tensor:
    return returned[0][:, -1]


def _attend(attention: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    return attention(x, x, x)


def _add_hooks(module: nn.Module) -> None:
    module[0].register_forward_hook(lambda called, args, output: 2 * output)
    module[2].register_forward_pre_hook(lambda called, args: (args[0] + 1,))


def _poison(module: nn.Module) -> None:
    module[2].weight[0, 1] = float("nan")


def _freeze(module: nn.Module) -> None:
    module[0].requires_grad_(False)


def _widen_scale(module: nn.Module) -> None:
    module.scale.data = module.scale.data.double()


def _between(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), layer, nn.Linear(6, 3))


def _activated(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten())


def _encoder(**options: object) -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 6, **options)


def _attention(**options: object) -> nn.Module:
    return Through(nn.MultiheadAttention(4, 2, **options), _attend)


X = reals(4)
SERIES = reals(3, 4)
IMAGE = reals(2, 4, 4)

_DENSE = [
    Case(name="linear", build=lambda: nn.Linear(4, 3), draw=X),
    Case(name="linear, one output, no bias", build=lambda: nn.Linear(4, 1, bias=False), draw=X),
    Case(name="deep linear", build=lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 1)), draw=X),
    Case(name="tanh", build=lambda: _between(nn.Tanh()), draw=X),
    Case(name="relu", build=lambda: _between(nn.ReLU()), draw=X),
    Case(name="relu in place", build=lambda: _between(nn.ReLU(inplace=True)), draw=X),
    Case(name="leaky relu", build=lambda: _between(nn.LeakyReLU(0.1)), draw=X),
    Case(name="prelu", build=lambda: _between(nn.PReLU(6)), draw=X),
    Case(name="prelu, one slope", build=lambda: _between(nn.PReLU()), draw=X),
    Case(name="gelu, log softmax", build=lambda: nn.Sequential(_between(nn.GELU()), nn.LogSoftmax(-1)), draw=X),
    Case(name="layer norm", build=lambda: _between(nn.LayerNorm(6)), draw=X),
    Case(name="rms norm", build=lambda: _between(nn.RMSNorm(6)), draw=X),
    Case(name="group norm", build=lambda: _between(nn.GroupNorm(2, 6)), draw=X),
    Case(name="batch norm, eval", build=lambda: _between(nn.BatchNorm1d(6)), draw=X, is_training=False),
    Case(name="tied weights", build=TiedLinears, draw=X),
    Case(name="shared layer", build=SharedLayer, draw=X),
    Case(name="scaled weights", build=ScaledWeights, draw=X),
    Case(name="bare parameters", build=BareParameters, draw=X),
    Case(name="weights from a network", build=FunctionalWeights, draw=X),
    Case(name="writes in place", build=WritesInPlace, draw=X),
    Case(name="frozen layer", build=lambda: _between(nn.Tanh()), draw=X, prepare=_freeze),
    Case(name="some parameters", build=lambda: _between(nn.Tanh()), draw=X, params=("0.*",)),
    Case(name="unused layer", build=lambda: Headed(lambda y: y, is_wasteful=True), draw=X),
    Case(name="hooks", build=lambda: _between(nn.Tanh()), draw=X, prepare=_add_hooks),
    Case(name="gradient reversal", build=lambda: Headed(reverse_gradient), draw=X),
    Case(name="wrong forward rule", build=lambda: Headed(wrong_forward_square), draw=X),
    Case(name="differentiable once", build=lambda: Headed(once_differentiable_square), draw=X),
    Case(name="mixture of experts", build=MixtureOfExperts, draw=X),
    Case(name="branch on data", build=BranchesOnData, draw=X),
    Case(name="branch on parameter", build=BranchesOnParameter, draw=X),
    Case(name="counts its calls", build=CountsCalls, draw=X),
    Case(name="remembers", build=Remembers, draw=X),
    Case(name="draws unused numbers", build=lambda: DrawsNumbers(0.0), draw=X),
    Case(name="dropout, eval", build=lambda: _between(nn.Dropout(0.5)), draw=X, is_training=False),
    Case(name="dropout, p = 0", build=lambda: _between(nn.Dropout(0.0)), draw=X),
    Case(name="weight norm", build=lambda: _between(parametrizations.weight_norm(nn.Linear(6, 6))), draw=X),
    Case(name="weight norm, by hook", build=hooked_weight_norm, draw=X),
    Case(
        name="spectral norm, eval",
        build=lambda: _between(parametrizations.spectral_norm(nn.Linear(6, 6))),
        draw=X,
        is_training=False,
    ),
    Case(name="checkpoint", build=lambda: Checkpointed(use_reentrant=False), draw=X),
    Case(name="checkpoint first", build=lambda: Checkpointed(use_reentrant=False, is_first=True), draw=X),
    Case(name="float32", build=lambda: _between(nn.Tanh()), draw=X, dtype=torch.float32),
    Case(
        name="float64 head on float32",
        build=lambda: Headed(lambda y: y.double().log_softmax(-1)),
        draw=X,
        dtype=torch.float32,
    ),
    Case(
        name="mixed dtypes",
        build=MixedDtypes,
        draw=X,
        prepare=_widen_scale,
        dtype=torch.float32,
    ),
    Case(name="bfloat16", build=lambda: _between(nn.Tanh()), draw=X, dtype=torch.bfloat16),
    Case(name="bfloat16 checkpoint", build=lambda: Checkpointed(use_reentrant=False), draw=X, dtype=torch.bfloat16),
    Case(name="scalar output", build=lambda: Headed(lambda y: y.squeeze(-1), num_outputs=1), draw=X),
    Case(name="matrix output", build=lambda: Headed(lambda y: y[:, :, None] * y[:, None, :2]), draw=X),
    Case(
        name="dict output", build=lambda: Headed(lambda y: {"logits": y}), draw=X, output_fn=lambda out: out["logits"]
    ),
    Case(name="tuple output", build=lambda: Headed(lambda y: (y, y.argmax(1))), draw=X, output_fn=_first),
]

_STRUCTURED = [
    Case(
        name="conv2d, stride, padding, dilation, groups",
        build=lambda: _activated(nn.Conv2d(2, 4, 2, stride=2, padding=1, dilation=2, groups=2)),
        draw=IMAGE,
    ),
    Case(
        name="conv2d, circular",
        build=lambda: _activated(nn.Conv2d(2, 1, 3, padding=1, padding_mode="circular")),
        draw=IMAGE,
    ),
    Case(name="conv1d", build=lambda: _activated(nn.Conv1d(3, 2, 2, groups=1)), draw=SERIES),
    Case(name="conv3d", build=lambda: _activated(nn.Conv3d(2, 2, 2)), draw=reals(2, 3, 2, 2)),
    Case(
        name="conv transpose",
        build=lambda: _activated(nn.ConvTranspose2d(2, 2, 2, stride=2, output_padding=1, groups=2)),
        draw=reals(2, 2, 2),
    ),
    Case(
        name="residual image network, eval",
        build=lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.InstanceNorm2d(4, affine=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 3),
        ),
        draw=IMAGE,
        is_training=False,
    ),
    Case(
        name="instance norms, train",
        build=lambda: nn.Sequential(
            nn.Conv2d(2, 3, 2),
            nn.PReLU(3),
            nn.InstanceNorm2d(3, affine=True),
            nn.PReLU(),
            nn.Flatten(2),
            nn.InstanceNorm1d(3, affine=True),
            nn.GELU(),
            nn.Unflatten(2, (3, 3, 1)),
            nn.InstanceNorm3d(3, affine=True),
            nn.Flatten(),
            nn.Tanh(),
            nn.Linear(27, 2),
        ),
        draw=IMAGE,
    ),
    Case(
        name="instance norm, eval",
        build=lambda: _activated(nn.Conv2d(2, 2, 3), nn.InstanceNorm2d(2, affine=True, track_running_stats=True)),
        draw=IMAGE,
        is_training=False,
    ),
    Case(name="image patches", build=ImagePatches, draw=IMAGE),
    Case(name="token positions", build=TokenPositions, draw=tokens(5)),
    Case(name="heads by einsum", build=HeadsByEinsum, draw=SERIES),
    Case(
        name="embedding",
        build=lambda: nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(15, 2)),
        draw=tokens(5),
    ),
    Case(
        name="embedding, padding_idx",
        build=lambda: nn.Sequential(nn.Embedding(7, 3, padding_idx=0), nn.Flatten(), nn.Linear(15, 2)),
        draw=tokens(5),
    ),
    Case(name="embedding bag", build=lambda: nn.Sequential(nn.EmbeddingBag(7, 3), nn.Linear(3, 2)), draw=tokens(5)),
    Case(name="head tied to embedding", build=TiedHead, draw=tokens(3)),
    Case(name="attention, train", build=lambda: _attention(batch_first=True), draw=SERIES, output_fn=_first),
    Case(
        name="attention, eval",
        build=lambda: _attention(batch_first=True, dropout=0.1),
        draw=SERIES,
        output_fn=_first,
        is_training=False,
    ),
    Case(name="encoder layer, train", build=lambda: _encoder(dropout=0.0, batch_first=True), draw=SERIES),
    Case(name="encoder layer, eval", build=lambda: _encoder(batch_first=True), draw=SERIES, is_training=False),
    Case(
        name="encoder layer, float32",
        build=lambda: _encoder(batch_first=True, norm_first=True),
        draw=SERIES,
        is_training=False,
        dtype=torch.float32,
    ),
    Case(name="encoder of padded tokens", build=PaddedEncoder, draw=tokens(5)),
    Case(name="causal attention", build=CausalAttention, draw=SERIES),
    Case(name="lstm", build=lambda: nn.LSTM(4, 2, batch_first=True), draw=SERIES, output_fn=_last_step),
    Case(
        name="lstm, float32",
        build=lambda: nn.LSTM(4, 2, batch_first=True),
        draw=SERIES,
        output_fn=_last_step,
        dtype=torch.float32,
    ),
    Case(
        name="gru, two ways, two layers",
        build=lambda: nn.GRU(4, 2, num_layers=2, bidirectional=True, batch_first=True),
        draw=SERIES,
        output_fn=_first,
    ),
]

_UNSUPPORTED = [
    Case(
        name="batch norm, train",
        build=lambda: _between(nn.BatchNorm1d(6)),
        draw=X,
        says=("'1' (BatchNorm1d)", "eval()"),
    ),
    Case(
        name="batch norm, untracked",
        build=lambda: _between(nn.BatchNorm1d(6, track_running_stats=False)),
        draw=X,
        is_training=False,
        says=("'1' (BatchNorm1d)", "track_running_stats=True"),
    ),
    Case(
        name="batch norm of images, train",
        build=lambda: nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.Tanh()),
        draw=IMAGE,
        says=("'1' (BatchNorm2d)", "eval()"),
    ),
    Case(name="dropout, train", build=lambda: _between(nn.Dropout(0.5)), draw=X, says=("'1' (Dropout)", "eval()")),
    Case(name="rare dropout", build=lambda: _between(nn.Dropout(1e-9)), draw=X, says=("'1' (Dropout)", "eval()")),
    Case(
        name="functional dropout",
        build=lambda: Headed(lambda y: F.dropout(y, 0.5, training=True)),
        draw=X,
        is_training=False,
        says=("random", "forward pass"),
    ),
    Case(name="noise", build=lambda: DrawsNumbers(0.1), draw=X, says=("random", "forward pass")),
    Case(
        name="encoder layer with dropout",
        build=lambda: _encoder(batch_first=True),
        draw=SERIES,
        says=("(Dropout)", "eval()"),
    ),
    Case(name="drifts with its calls", build=DriftsWithCalls, draw=X, says=("'calls'", "DriftsWithCalls")),
    Case(
        name="spectral norm, train",
        build=lambda: _between(parametrizations.spectral_norm(nn.Linear(6, 6))),
        draw=X,
        says=("_SpectralNorm", "eval()"),
    ),
    Case(name="batch mean", build=lambda: Headed(lambda y: y - y.mean(0)), draw=X, says=("batch", "example")),
    Case(name="batch order", build=lambda: Headed(lambda y: y.cumsum(0)), draw=X, says=("batch", "example")),
    Case(
        name="lstm, time first",
        build=lambda: nn.LSTM(4, 2),
        draw=SERIES,
        output_fn=_first,
        says=("(LSTM)", "batch_first=True"),
    ),
    Case(
        name="encoder layer, time first",
        build=lambda: _encoder(dropout=0.0),
        draw=SERIES,
        says=("(TransformerEncoderLayer)", "batch_first=True"),
    ),
    Case(
        name="embedding, max_norm",
        build=lambda: nn.Sequential(nn.Embedding(7, 3, max_norm=0.5), nn.Linear(3, 2)),
        draw=tokens(5),
        says=("'0' (Embedding)", "max_norm=None"),
    ),
    Case(
        name="embedding, scale_grad_by_freq",
        build=lambda: nn.Sequential(nn.Embedding(7, 3, scale_grad_by_freq=True), nn.Linear(3, 2)),
        draw=tokens(5),
        says=("'0' (Embedding)", "scale_grad_by_freq=False"),
    ),
    Case(
        name="embedding, sparse",
        build=lambda: nn.Sequential(nn.Embedding(7, 3, sparse=True), nn.Linear(3, 2)),
        draw=tokens(5),
        says=("'0' (Embedding)", "sparse=False"),
    ),
    Case(
        name="reentrant checkpoint first",
        build=lambda: Checkpointed(use_reentrant=True, is_first=True),
        draw=X,
        says=("use_reentrant=False",),
    ),
    Case(
        name="reentrant checkpoint",
        build=lambda: Checkpointed(use_reentrant=True),
        draw=X,
        says=("use_reentrant=False",),
    ),
    Case(
        name="data parallel",
        build=lambda: nn.DataParallel(nn.Linear(4, 3)),
        draw=X,
        says=("DataParallel", "model.module"),
    ),
    Case(name="classes", build=lambda: Headed(lambda y: y.argmax(1)), draw=X, says=("int64", "output_fn")),
    Case(name="complex output", build=lambda: Headed(lambda y: y + 1j), draw=X, says=("complex", "output_fn")),
    Case(name="detached output", build=lambda: Headed(lambda y: y.detach()), draw=X, says=("no parameter", "detached")),
    Case(
        name="only unused parameters",
        build=lambda: Headed(lambda y: y, is_wasteful=True),
        draw=X,
        params=("unused.*",),
        says=("no parameter", "params="),
    ),
    Case(
        name="dict without output_fn", build=lambda: Headed(lambda y: {"logits": y}), draw=X, says=("dict", "output_fn")
    ),
    Case(name="tuple without output_fn", build=lambda: Headed(lambda y: (y, y)), draw=X, says=("tuple", "output_fn")),
]

_MISSHAPEN = [
    Case(name="mean over the batch", build=lambda: Headed(lambda y: y.mean()), draw=X, says=("()", "output_fn")),
    Case(
        name="outputs first",
        build=lambda: Headed(lambda y: y.mT, num_outputs=6),
        draw=X,
        says=("first dimension", "output_fn"),
    ),
    Case(name="no outputs", build=lambda: Headed(lambda y: y[:, :0]), draw=X, says=("no outputs",)),
]

_NOT_FINITE = [
    Case(name="nan parameter", build=lambda: _between(nn.Tanh()), draw=X, prepare=_poison, says=("'2.weight'",)),
    Case(name="nan input", build=lambda: _between(nn.Tanh()), draw=lambda g: X(g) * float("inf"), says=("example 0",)),
    Case(name="nan output", build=lambda: Headed(lambda y: (y - y.abs() - 1).log()), draw=X, says=("example 0",)),
    Case(
        name="infinite gradient",
        build=lambda: Headed(lambda y: y.sub(y.detach()).abs().sqrt()),
        draw=X,
        says=("'hidden.weight'", "example 0"),
    ),
]

RIGHT = [*_DENSE, *_STRUCTURED]
REFUSED = [
    Case(**{**vars(case), "error": error})
    for error, cases in (
        (UnsupportedModuleError, _UNSUPPORTED),
        (ShapeError, _MISSHAPEN),
        (NonFiniteError, _NOT_FINITE),
    )
    for case in cases
]
