"""What a checkpoint is to the rest of the package: names, shapes, dtypes, and slices read on demand."""

import math
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import ml_dtypes
import numpy as np

ALLOWED_DTYPES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16))

ORBAX_FOLDER = "params"
"""Where a checkpoint directory of scripts/convert.py has its tensors."""

# Names of the tensors that go with block-wise quantised weights.
QUANTISED_SUFFIXES = ("_scale_inv",)

# Dtypes of 8 bits and fewer are met in quantised checkpoints only, as safetensors ("F8_E4M3", "I8") and numpy
# ("float8_e4m3fn", "int8") spell them.
QUANTISED_DTYPES = ("F8_", "F6_", "F4", "I8", "U8", "float8_", "float6_", "float4_", "int8", "uint8")


@runtime_checkable
class TensorSource(Protocol):
    """A checkpoint on disk, opened for reading; a context manager. Nothing is read before it is asked for.

    `read` takes one slice per axis, step 1 and within the shape, and returns an array in the tensor's own dtype
    (bfloat16 is that of ml_dtypes). It may be a view of a file or of something kept: copy it if it is to be changed.
    Several threads may read at once. `shape`, `dtype` and `read` raise KeyError for a name that is not in `names`.
    """

    def names(self) -> tuple[str, ...]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> np.dtype: ...

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray: ...

    def __enter__(self) -> "TensorSource": ...

    def __exit__(self, *exception: object) -> None: ...


def read_whole(source: TensorSource, name: str) -> np.ndarray:
    """All of one tensor."""
    return source.read(name, tuple(slice(0, size) for size in source.shape(name)))


def tensor_bytes(source: TensorSource, name: str) -> int:
    """The size of one tensor, found without reading it."""
    return math.prod(source.shape(name)) * source.dtype(name).itemsize


def check_dtypes(where: str, dtypes: Mapping[str, str]) -> None:
    """Raises ValueError unless all tensors are float32 or bfloat16. `dtypes`: tensor name -> the format's word."""
    quantised = [
        f"{name} ({dtype})"
        for name, dtype in dtypes.items()
        if name.endswith(QUANTISED_SUFFIXES) or dtype.startswith(QUANTISED_DTYPES)
    ]
    if quantised:
        raise ValueError(
            f"{where}: quantised checkpoints are not supported yet; use the bfloat16 or float32 checkpoint. "
            f"Quantised tensors: {abbreviate(quantised)}"
        )
    allowed = ("F32", "BF16", *(dtype.name for dtype in ALLOWED_DTYPES))
    other = [f"{name} ({dtype})" for name, dtype in dtypes.items() if dtype not in allowed]
    if other:
        raise ValueError(f"{where}: unsupported dtype; allowed: float32, bfloat16. Tensors: {abbreviate(other)}")


def abbreviate(names: list[str], limit: int = 8) -> str:
    """Names for an error message: the first few, and how many more there are."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, and {len(names) - limit} more"
