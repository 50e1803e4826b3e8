"""What else JAX offers for a workload: each name stands for a call like the workload's own."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernel_bench.timing import DoesNotFitError
from kernel_bench.workloads import Workload


def of(work: Workload) -> dict[str, Callable[..., Any]]:
    if re.fullmatch(r"attention-decode-.*x\d+", work.name):
        return {"jax paged_attention": _jax_paged_attention}
    match = re.fullmatch(r"attention-prefill-(\d+)/(\d+)x(\d+)-1x(\d+)-(\d+)q", work.name)
    if match:
        context, queries = int(match[4]), int(match[5])
        return {"cuDNN": functools.partial(_cudnn, context=context, queries=queries)}
    if work.name.startswith("grouped"):
        return {"ragged_dot": _ragged_dot}
    return {}


def _ragged_dot(x, pools, layer):
    """XLA's own; on GPUs it stores the rows once for every group. Raises DoesNotFitError where the device's memory does
    not hold them: XLA would try every tile of that product before it says so.
    """
    stored = x["weight"].shape[0] * x["rows"].size * x["x"].shape[1] * x["x"].dtype.itemsize
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit is not None and stored > limit:
        raise DoesNotFitError(f"does not fit ({stored / 2**30:.0f} GiB)")
    return lax.ragged_dot(x["x"][x["rows"]], x["weight"].swapaxes(1, 2), x["sizes"]), pools


def _jax_paged_attention(x, pools, layer):
    """jax.experimental.pallas.ops.gpu.paged_attention. Its pages lie by kv head: our pool read as if it did, so the
    values are others, the bytes and their order on a page the same.
    """
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention

    layers, blocks, size, heads, width = x["k"].shape
    # No slice of a pool, which would be a copy: all layers' blocks in one row.
    k, v = (x[name].reshape(heads, layers * blocks, size, width) for name in ("k", "v"))
    return paged_attention(x["q"][:, 0], k, v, x["table"] + layer * blocks, x["position"][:, 0] + 1), pools


def _cudnn(x, pools, layer, *, context: int, queries: int):
    """cuDNN's fused attention over keys and values that lie side by side: what it does for a prompt without pages."""
    q = x["q"].reshape(1, queries, *x["q"].shape[2:])
    k, v = (x[name][layer].reshape(-1, *x[name].shape[3:])[:context][None] for name in ("k", "v"))
    if context > queries:
        # Queries stand at the end: the mask of cuDNN begins at the first key.
        bias = jnp.where(
            jnp.arange(context)[None, :] <= context - queries + jnp.arange(queries)[:, None], 0.0, -jnp.inf
        )
        return jax.nn.dot_product_attention(q, k, v, bias[None, None].astype(q.dtype), implementation="cudnn"), pools
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn"), pools
