"""The decode step in Triton's own language: what `recurrent.py` does with one row of a request, and no row pending.

The answer to the question of what it takes where Pallas has no lowering through Triton. The only module that imports
triton.
"""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def place(layer, slot, head, layers, slots, heads, size):
    """Where a head's state begins in the pool. The numbers are bounded: `launch.bounded` has why."""
    layer = tl.minimum(tl.maximum(layer, 0), layers - 1).to(tl.int64)
    slot = tl.minimum(tl.maximum(slot, 0), slots - 1).to(tl.int64)
    return ((layer * slots + slot) * heads + head) * size


@triton.jit
def inside(k, v, K, V, vk):
    """Where the numbers of a tile stand in their head's state."""
    k, v = k[:, None, :], v[None, :, None]
    return v * K + k if vk else k * V + v


@triton.jit
def over_k(tile):
    """Sum over k, in a thread first: [columns]."""
    return tl.sum(tl.sum(tile, axis=0), axis=1)


@triton.jit
def log1p(x):
    """Of 0 to 1. Kahan's: what `1 + x` loses of x, the quotient puts back."""
    above = 1.0 + x
    return tl.where(above == 1.0, x, tl.log(above) * (x / tl.where(above == 1.0, 1.0, above - 1.0)))


@triton.jit
def gated_delta_rule_decode(
    layer_ptr,  # [1] int32
    read_ptr,  # [n] int32
    write_ptr,  # [n] int32
    qkv_ptr,  # [n, x]
    a_ptr,  # [n, hv]
    b_ptr,  # [n, hv]
    A_log_ptr,  # [hv] float32
    dt_bias_ptr,  # [hv] float32
    ssm_ptr,  # [layers, slots, hv, K * V]
    o_ptr,  # [n, hv, V]
    out_ptr,  # the same pool
    layers: tl.constexpr,
    slots: tl.constexpr,
    heads: tl.constexpr,
    key_heads: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    columns: tl.constexpr,
    lanes: tl.constexpr,
    parts: tl.constexpr,
    read_vk: tl.constexpr,
    write_vk: tl.constexpr,
    beta_scale: tl.constexpr,
):
    """A program has `columns` value columns by all of K of one head, a tile [parts, columns, lanes] with k as parts x
    lanes: threads side by side in memory then hold several columns between them.
    """
    program = tl.program_id(0)
    blocks: tl.constexpr = (V + columns - 1) // columns
    row, head, block = program // (blocks * heads), program // blocks % heads, program % blocks
    v = block * columns + tl.arange(0, columns)
    k = lanes * tl.arange(0, parts)[:, None] + tl.arange(0, lanes)[None, :]
    in_v, in_k = v < V, k < K
    o_at = o_ptr + (row * heads + head) * V + v

    slot = tl.load(write_ptr + row)
    if slot <= 0:
        # Padding, or a request that has ended. Zeros are finite, through norms, products and routers.
        tl.store(o_at, tl.zeros([columns], o_ptr.dtype.element_ty), mask=in_v)
    else:
        mask = in_k[:, None, :] & in_v[None, :, None]
        state = tl.load(
            ssm_ptr
            + place(tl.load(layer_ptr), tl.load(read_ptr + row), head, layers, slots, heads, K * V)
            + inside(k, v, K, V, read_vk),
            mask=mask,
            other=0.0,
        ).to(tl.float32)

        qkv_at = qkv_ptr + row * (2 * key_heads * K + heads * V)
        key_head = head // (heads // key_heads)
        query = tl.load(qkv_at + key_head * K + k, mask=in_k, other=0.0).to(tl.float32)
        key = tl.load(qkv_at + (key_heads + key_head) * K + k, mask=in_k, other=0.0).to(tl.float32)
        value = tl.load(qkv_at + 2 * key_heads * K + head * V + v, mask=in_v, other=0.0).to(tl.float32)

        a = tl.load(a_ptr + row * heads + head).to(tl.float32) + tl.load(dt_bias_ptr + head)
        softplus = tl.maximum(a, 0.0) + log1p(tl.exp(-tl.abs(a)))
        keep = tl.exp(-tl.exp(tl.load(A_log_ptr + head)) * softplus)
        beta = beta_scale / (1.0 + tl.exp(-tl.load(b_ptr + row * heads + head).to(tl.float32)))

        norm = tl.rsqrt(tl.sum(key * key) + 1e-6)
        scale = tl.rsqrt(tl.sum(query * query) + 1e-6) * K**-0.5
        # What the old state gives to k and to q is summed side by side; the row's own part of the output is rank one.
        written = norm * beta * (value - keep * norm * over_k(state * key[:, None, :]))
        o = scale * (keep * over_k(state * query[:, None, :]) + written * tl.sum(key * query))
        tl.store(o_at, o.to(o_ptr.dtype.element_ty), mask=in_v)
        state = keep * state + written[None, :, None] * key[:, None, :]
        tl.store(
            out_ptr + place(tl.load(layer_ptr), slot, head, layers, slots, heads, K * V) + inside(k, v, K, V, write_vk),
            state.to(out_ptr.dtype.element_ty),
            mask=mask,
        )
