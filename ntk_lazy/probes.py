"""The probe points: a fixed, ordered set of inputs, read in chunks and always in the same order."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from typing import Self, final

import numpy as np
import torch
from torch import Tensor

from ntk_lazy.errors import NonFiniteError, ShapeError
from ntk_lazy.modes import as_recordable

_FINGERPRINT_CHUNK = 4096


@final
@dataclass(frozen=True, eq=False)
class Probes:
    """Inputs of shape ``(*batch, N, *example)`` and the knowledge of which dimensions make one example.

    Attributes:
        inputs: The data, of any dtype; a memory-mapped array is read as it is needed.
        input_dims: Trailing dimensions of one example: 3 for images, 1 for feature vectors, 0 for scalars. Left out,
            all dimensions but the first.
    """

    inputs: Tensor
    input_dims: int = -1

    def __post_init__(self) -> None:
        if not isinstance(self.inputs, Tensor):
            raise ShapeError(f"inputs must be a Tensor, not {type(self.inputs).__name__}; Probes.of reads arrays.")
        _check_layout(self.inputs)
        object.__setattr__(self, "inputs", as_recordable(self.inputs))
        if self.input_dims == -1:
            object.__setattr__(self, "input_dims", self.inputs.ndim - 1)
        if not 0 <= self.input_dims <= self.inputs.ndim - 1:
            raise ShapeError(
                f"inputs of shape {tuple(self.inputs.shape)} cannot have {self.input_dims} dimensions for one example: "
                "one more is needed to count the examples."
            )

    @classmethod
    def of(cls, data: Tensor | np.ndarray | Probes, *, input_dims: int | None = None) -> Self | Probes:
        """Read inputs of any kind; ``input_dims=None`` means that all dimensions but the first make an example.

        Raises:
            ShapeError: There is no dimension of examples, or the data is not an array.
        """
        if isinstance(data, Probes):
            return data if input_dims in (None, data.input_dims) else cls.of(data.inputs, input_dims=input_dims)
        if isinstance(data, np.ndarray):
            data = _as_tensor(data)
        if not isinstance(data, Tensor):
            raise ShapeError(f"inputs must be a Tensor, a numpy array or Probes, not {type(data).__name__}.")
        if input_dims is not None and (not isinstance(input_dims, int) or input_dims < 0):
            raise ShapeError(f"input_dims must be a count of dimensions or None, not {input_dims!r}.")
        return cls(data, -1 if input_dims is None else input_dims)

    @property
    def num_examples(self) -> int:
        """N."""
        return self.inputs.shape[self.inputs.ndim - 1 - self.input_dims]

    @property
    def batch_shape(self) -> torch.Size:
        """Leading dimensions: one kernel for each."""
        return self.inputs.shape[: self.inputs.ndim - 1 - self.input_dims]

    def check_finite(self) -> None:
        """Raise NonFiniteError, naming the first example that holds a NaN or an infinity."""
        if not (self.inputs.is_floating_point() or self.inputs.is_complex()):
            return
        flat = self.inputs.reshape(-1, *self.inputs.shape[self.inputs.ndim - self.input_dims :])
        for start in range(0, flat.shape[0], _FINGERPRINT_CHUNK):
            finite = (
                flat[start : start + _FINGERPRINT_CHUNK].flatten(1).isfinite().all(1)
                if flat.ndim > 1
                else (flat[start : start + _FINGERPRINT_CHUNK].isfinite())
            )
            if not finite.all():
                bad = start + int((~finite).nonzero()[0])
                raise NonFiniteError(f"example {bad} of the inputs holds a NaN or an infinity. Remove or mend it.")

    def fingerprint(self) -> str:
        """Hash shape, dtype and contents, so that a record can tell which probes it was made with."""
        digest = hashlib.sha256(repr((tuple(self.inputs.shape), str(self.inputs.dtype), self.input_dims)).encode())
        flat = self.inputs.detach().reshape(self.inputs.shape[0], -1) if self.inputs.ndim else self.inputs
        for start in range(0, flat.shape[0], _FINGERPRINT_CHUNK):
            piece = flat[start : start + _FINGERPRINT_CHUNK].contiguous().cpu()
            digest.update(piece.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]


def _check_layout(inputs: Tensor) -> None:
    """Refuse tensors whose examples cannot be taken by slices."""
    if inputs.is_nested:
        raise ShapeError(
            "inputs are a nested tensor, whose examples have different shapes. Pad them to one shape, "
            "x.to_padded_tensor(0.0), and let the model mask what was added."
        )
    if inputs.layout != torch.strided:
        raise ShapeError(f"inputs have the layout {inputs.layout}. Pass x.to_dense().")
    if inputs.is_quantized:
        raise ShapeError("inputs are quantized. Pass x.dequantize().")


def _as_tensor(data: np.ndarray) -> Tensor:
    """View an array as a tensor; a memory map stays on disk. What torch cannot view is copied."""
    if any(stride < 0 for stride in data.strides) or not data.dtype.isnative:
        data = np.ascontiguousarray(data, dtype=data.dtype.newbyteorder("="))
    with warnings.catch_warnings():
        # torch has no read-only tensors and warns of writing to one; nothing here writes to inputs.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        try:
            return torch.from_numpy(data)
        except TypeError as error:
            cure = "x.astype('float64')" if data.dtype.kind in "fc" else "an array of numbers, x.astype('float64')"
            raise ShapeError(f"inputs are an array of {data.dtype}, which torch does not have. Pass {cure}.") from error
