"""Weights as quantised checkpoints store them, written out number by number, and what they then stand for.

Nothing here is shared with the package: each writer says in its own words what its format is.
"""

import re
from typing import Any

import ml_dtypes
import numpy as np

FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column that each code of an AWQ word is of, from the lowest bits on."""


LEFT_ALONE = re.compile(
    r".*(embed_tokens|lm_head|norm|mlp\.gate|shared_expert_gate|conv1d|in_proj_ba?|in_proj_a|fc)\.weight"
)
"""What published FP8 checkpoints have in bfloat16: embeddings, norms, routers, gates, small projections."""


def is_quantised(name: str, tensor: np.ndarray) -> bool:
    """Whether a published FP8 checkpoint has this tensor of a Qwen model as codes and scales."""
    return tensor.ndim >= 2 and not LEFT_ALONE.fullmatch(name)


def blocks(weight: np.ndarray, rows: int, columns: int, most: float) -> np.ndarray:
    """A scale for each block of a matrix [..., N, K] under which nothing in it is above `most`."""
    lead, (n, k) = weight.shape[:-2], weight.shape[-2:]
    scale = np.zeros((*lead, -(-n // rows), -(-k // columns)), np.float32)
    for i in range(scale.shape[-2]):
        for j in range(scale.shape[-1]):
            block = weight[..., i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            scale[..., i, j] = np.abs(block).max((-2, -1)) / most
    return scale


def spread(scale: np.ndarray, shape: tuple[int, ...], rows: int, columns: int) -> np.ndarray:
    n, k = shape[-2:]
    return scale[..., np.arange(n) // rows, :][..., np.arange(k) // columns]


def fp8(
    name: str, weight: np.ndarray, *, rows: int = 128, columns: int = 128, scale: Any = BFLOAT16, suffix="_scale_inv"
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """FP8 with a scale for each block: the tensors, and the values that they stand for. `scale`: its dtype."""
    scales = blocks(weight, rows, columns, 448)
    if scale == np.uint8:
        exponent = np.ceil(np.log2(scales)).astype(np.int32)
        stored, scales = (exponent + 127).astype(np.uint8), np.exp2(exponent).astype(np.float32)
    else:
        # Rounded up, so that no code is above the largest.
        stored = (scales * 1.01).astype(scale)
        scales = stored.astype(np.float32)
    factors = spread(scales, weight.shape, rows, columns)
    codes = (weight / factors).astype(FLOAT8)
    return {name: codes, name + suffix: stored}, codes.astype(np.float32) * factors


def int8(name: str, weight: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """compressed-tensors' W8A8: a scale for each row."""
    scales = np.abs(weight).max(-1, keepdims=True) / np.float32(127)
    codes = np.rint(weight / scales).astype(np.int8)
    return {name: codes, f"{name}_scale": scales}, codes * scales


def _four_bits(weight: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes 0 to 15 [N, K], zero points and scales [N, groups], asymmetric."""
    n, k = weight.shape
    codes, zeros, scales = np.zeros((n, k), np.int64), [], []
    for start in range(0, k, group):
        part = weight[:, start : start + group]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        scale = ((high - low) / 15).astype(np.float32)
        zero = np.clip(np.rint(-low / scale), 1, 15).astype(np.int64)
        codes[:, start : start + group] = np.clip(np.rint(part / scale[:, None]) + zero[:, None], 0, 15)
        zeros.append(zero)
        scales.append(scale)
    return codes, np.stack(zeros, 1), np.stack(scales, 1)


def _word(codes) -> np.int32:
    """Eight codes as one number, the first in the lowest bits."""
    return np.array(sum(int(code) << 4 * i for i, code in enumerate(codes)), np.uint32).view(np.int32)


def _pack(codes: np.ndarray, order=range(8)) -> np.ndarray:
    """Along the last axis, which is filled up with zeros."""
    codes = np.pad(codes, ((0, 0), (0, -codes.shape[1] % 8)))
    words = codes.reshape(codes.shape[0], -1, 8)
    return np.array([[_word(word[list(order)]) for word in row] for row in words], np.int32)


def _values(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, group: int) -> np.ndarray:
    at = np.arange(codes.shape[1]) // group
    return (codes - zeros[:, at]).astype(np.float32) * scales[:, at]


def gptq(name: str, weight: np.ndarray, *, group: int, v2: bool = False, g_idx: bool = True):
    """Of `name`.weight. Version 1 stores zero points less 1."""
    codes, zeros, scales = _four_bits(weight, group)
    scales = scales.astype(np.float16)
    tensors = {
        f"{name}.qweight": np.ascontiguousarray(_pack(codes).T),
        f"{name}.qzeros": _pack((zeros if v2 else zeros - 1).T),
        f"{name}.scales": np.ascontiguousarray(scales.T),
    }
    if g_idx:
        tensors[f"{name}.g_idx"] = (np.arange(weight.shape[1]) // group).astype(np.int32)
    return tensors, _values(codes, zeros, scales.astype(np.float32), group)


def awq(name: str, weight: np.ndarray, *, group: int):
    """Of `name`.weight."""
    codes, zeros, scales = _four_bits(weight, group)
    scales = scales.astype(np.float16)
    tensors = {
        f"{name}.qweight": _pack(codes.T, AWQ_COLUMNS),
        f"{name}.qzeros": _pack(zeros.T, AWQ_COLUMNS),
        f"{name}.scales": np.ascontiguousarray(scales.T),
    }
    return tensors, _values(codes, zeros, scales.astype(np.float32), group)


def packed(name: str, weight: np.ndarray, *, group: int, symmetric: bool):
    """compressed-tensors' pack-quantized, of `name`.weight."""
    codes, zeros, scales = _four_bits(weight, group)
    if symmetric:
        scales = np.stack([np.abs(weight[:, i : i + group]).max(1) / 7 for i in range(0, weight.shape[1], group)], 1)
        zeros = np.full(scales.shape, 8)
        codes = np.clip(np.rint(weight / scales[:, np.arange(weight.shape[1]) // group]) + 8, 0, 15).astype(np.int64)
    scales = scales.astype(BFLOAT16)
    tensors = {
        f"{name}.weight_packed": _pack(codes),
        f"{name}.weight_scale": scales,
        f"{name}.weight_shape": np.array(weight.shape, np.int64),
    }
    if not symmetric:
        tensors[f"{name}.weight_zero_point"] = np.ascontiguousarray(_pack(zeros.T).T)
    return tensors, _values(codes, zeros, scales.astype(np.float32), group)
