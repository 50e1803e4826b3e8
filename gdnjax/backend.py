"""The only place that decides by platform: which implementation of the ops runs, resolved once, at start."""

from jax import lax


def resolve(kernels: str, platform: str) -> str:
    """The implementation that `EngineConfig.kernels` means on a platform ("cpu", "rocm", "cuda", "gpu").

    Returns "reference", the only implementation of this version. Raises ValueError for one that does not exist yet.
    """
    if kernels in ("auto", "reference"):
        return "reference"
    raise ValueError(
        f"kernels={kernels!r} on {platform}: the Pallas kernels are not written yet; allowed: 'auto', 'reference'"
    )


FLOAT32_DOT = lax.Precision.HIGHEST
"""Precision of float32 products. GPUs otherwise round the operands to tf32 or xf32 (relative error 1e-3)."""


def dot_precision(dtype) -> lax.Precision | None:
    """What a product of operands of `dtype` needs: bfloat16 products are exact in float32 as they are."""
    return FLOAT32_DOT if dtype == "float32" else None
