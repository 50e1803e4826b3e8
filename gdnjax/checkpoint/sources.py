"""What a checkpoint is to the rest of the package: names, shapes, dtypes, and slices read on demand."""

import math
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import ml_dtypes
import numpy as np

ALLOWED_DTYPES = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16))
"""Of weights that are not quantised."""

ORBAX_FOLDER = "params"
"""Where a checkpoint directory of scripts/convert.py has its tensors."""

DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
}
"""What can be read, by safetensors' words: floating-point weights, and what quantised ones are stored as."""


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
    """Raises ValueError where a tensor is of none of DTYPES. `dtypes`: tensor name -> the format's word, or numpy's."""
    allowed = {*DTYPES, *(dtype.name for dtype in DTYPES.values())}
    other = [f"{name} ({dtype})" for name, dtype in dtypes.items() if dtype not in allowed]
    if other:
        raise ValueError(
            f"{where}: unsupported dtype; allowed: {', '.join(dtype.name for dtype in DTYPES.values())}. "
            f"Tensors: {abbreviate(other)}"
        )


def abbreviate(names: list[str], limit: int = 8) -> str:
    """Names for an error message: the first few, and how many more there are."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, and {len(names) - limit} more"
