"""The recurrent form in one kernel: decode, verify and fold.

A program holds a tile of one head's state, some value columns by all of K, in registers: it reads the tile once, walks
over the request's rows, and writes the tile once. Bytes: each state once in and once out, and little else (at 48 heads
of 128 x 128 in float32, 6.3 MB a request against 30 kB of inputs), so the ceiling is that of a copy. A request that
writes to the null slot is padding, or has ended: it costs its outputs' zeros.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu

from gdnjax.backend import Backend
from gdnjax.pallas_kernels.gated_delta_rule import tiles
from gdnjax.pallas_kernels.gated_delta_rule.rounding import head_keys
from gdnjax.pallas_kernels.gated_delta_rule.state_tile import StateTile, heads_and_blocks
from gdnjax.pallas_kernels.launch import barrier, launch, layer_number, power_of_two, scaled, sigmoid, softplus
from gdnjax.shapes import Array


def decode(
    qkv, gates, ssm, layer, read_slot, write_slot, order, key_dim, rounding, backend: Backend
) -> tuple[Array, Array]:
    o, ssm = _run(
        "decode",
        qkv[:, None],
        gates.a[:, None],
        gates.b[:, None],
        gates,
        ssm,
        layer,
        (read_slot, write_slot),
        order,
        key_dim,
        rounding,
        backend,
        new=1,
    )
    return o[:, 0], ssm


def verify(qkv, gates, ssm, layer, read_slot, write_slot, pending, order, key_dim, new, rounding, backend: Backend):
    slots = (read_slot, write_slot, pending)
    o, ssm = _run("verify", qkv, gates.a, gates.b, gates, ssm, layer, slots, order, key_dim, rounding, backend, new=new)
    return o, ssm


def fold(qkv, gates, ssm, layer, read_slot, write_slot, count, order, key_dim, rounding, backend: Backend) -> Array:
    slots = (read_slot, write_slot, count)
    return _run("fold", qkv, gates.a, gates.b, gates, ssm, layer, slots, order, key_dim, rounding, backend, new=0)[-1]


def _run(kind, qkv, a, b, gates, ssm, layer, slots, order, key_dim, rounding, backend: Backend, *, new: int):
    """qkv [n, rows, x], a [n, rows, hv] or [n, rows, hv, K], b [n, rows, hv]; of `new` rows outputs [n, new, hv, V]."""
    count = qkv.shape[0]
    heads, value_dim = ssm.shape[2], ssm.shape[3] // key_dim
    mixed = not isinstance(order.read, bool)
    tile = tiles.recurrent(backend, ssm.dtype, order, key_dim, value_dim)
    columns = min(tile.columns, power_of_two(value_dim))
    blocks = -(-value_dim // columns)
    # Only a mixed pool has bits that say how a row is stored.
    stored = (order.read.astype(jnp.int32),) if mixed else ()
    out = [jax.ShapeDtypeStruct((count, new, heads, value_dim), qkv.dtype)] if new else []
    # What the nearest rounding does not need is no operand of it.
    noise = () if rounding is None else (rounding.keys, jnp.asarray(rounding.first_head, jnp.int32).reshape(1))
    args = (layer_number(layer), *slots, *stored, *noise, qkv, a, b, gates.A_log, gates.dt_bias, ssm)
    return launch(
        _kernel,
        backend,
        name=f"gated_delta_rule_{kind}" + "_kda" * gates.per_channel,
        programs=count * heads * blocks,
        args=args,
        out=[*out, jax.ShapeDtypeStruct(ssm.shape, ssm.dtype)],
        warps=tile.warps,
        aliases={len(args) - 1: len(out)},
        key_dim=key_dim,
        columns=columns,
        read_vk=None if mixed else order.read,
        write_vk=order.write,
        new=new,
        keep_new=kind == "decode",
        stochastic=rounding is not None,
        beta_scale=gates.beta_scale,
        interpret=backend.interpret,
    )


def _kernel(
    program,
    layer_ref,
    read_ref,
    write_ref,
    *refs,
    key_dim,
    columns,
    read_vk,
    write_vk,
    new,
    keep_new,
    stochastic,
    beta_scale,
    interpret,
):
    # Decode folds nothing first, and only a mixed pool has bits.
    count_ref, refs = (None, refs) if keep_new else (refs[0], refs[1:])
    stored_ref, refs = (None, refs) if read_vk is not None else (refs[0], refs[1:])
    keys_ref, first_head_ref, refs = (*refs[:2], refs[2:]) if stochastic else (None, None, refs)
    qkv_ref, a_ref, b_ref, A_log_ref, dt_bias_ref, ssm_ref, *outputs = refs
    out_ref = outputs[-1]
    rows, width = qkv_ref.shape[1:]
    heads, value_dim = ssm_ref.shape[2], ssm_ref.shape[3] // key_dim
    per_channel = len(dt_bias_ref.shape) == 2
    key_channels = (width - heads * value_dim) // 2
    ratio = heads * key_dim // key_channels

    blocks = -(-value_dim // columns)
    row, head, block = heads_and_blocks(heads, blocks, program)
    # Eight threads side by side read 128 bytes.
    lanes = 128 // ssm_ref.dtype.itemsize
    tile = StateTile.of(layer_ref[0], head, block, columns=columns, key_dim=key_dim, value_dim=value_dim, lanes=lanes)

    def nothing():
        # Zeros are finite, through norms, products and routers.
        zeros = jnp.zeros((columns,), qkv_ref.dtype)
        for j in range(new):
            plgpu.store(outputs[0].at[row, j, head, tile.v], zeros, mask=tile.v_mask)

    def run():
        state = tile.load(ssm_ref, read_ref[row], bool(read_vk) if stored_ref is None else stored_ref[row] != 0)
        if stored_ref is not None:
            # Where the order changes in place, what one thread stores another may not have loaded yet. (The tile is a
            # whole head then, so that no other program is in it.)
            barrier(interpret)

        key_start = head // ratio * key_dim
        value_start = 2 * key_channels + head * value_dim

        def load(ref, at, channel, there, mask):
            """Channels of a row, 0 where the row is not `there` (a scalar; None: it is)."""
            if there is not None:
                there = jnp.broadcast_to(there, channel.shape)
                mask = there if mask is None else there & mask
            return plgpu.load(ref.at[(*at, channel)], mask=mask, other=None if mask is None else 0)

        def load_row(j, channel, there, mask):
            return load(qkv_ref, (row, j), channel, there, mask)

        rate = jnp.exp(A_log_ref[head].astype(jnp.float32))
        bias = load(dt_bias_ref, (head,), tile.k, None, tile.k_mask) if per_channel else dt_bias_ref[head]
        bias = bias.astype(jnp.float32)

        # All rows are loaded before the first is used: one latency, not one a row.
        pending = [] if count_ref is None else [j < count_ref[row] for j in range(rows - new)]
        exists = [*pending, *[None] * new]
        ks = [load_row(j, key_channels + key_start + tile.k, there, tile.k_mask) for j, there in enumerate(exists)]
        vs = [load_row(j, value_start + tile.v, there, tile.v_mask) for j, there in enumerate(exists)]
        qs = [load_row(j, key_start + tile.k, None, tile.k_mask) for j in range(rows - new, rows)]

        # The gates of all rows at once, a thread a row. A row that is not there leaves the state as it is, to the bit;
        # its gates may be anything.
        place = jnp.arange(power_of_two(rows), dtype=jnp.int32)
        real = place < rows
        if count_ref is not None:
            real &= (place < count_ref[row]) | (place >= rows - new)

        def of_rows(ref):
            return plgpu.load(ref.at[row, place, head], mask=real, other=0).astype(jnp.float32)

        if per_channel:
            a = [load(a_ref, (row, j, head), tile.k, there, tile.k_mask) for j, there in enumerate(exists)]
            b = of_rows(b_ref)
        else:
            a, b = of_rows(a_ref), of_rows(b_ref)
            keeps = jnp.where(real, jnp.exp(-rate * softplus(a + bias)), 1.0)
        betas = jnp.where(real, scaled(sigmoid(b), beta_scale), 0.0)

        def one_of(j, gates):
            return jnp.sum(jnp.where(place == j, gates, 0.0))

        def decay(j):
            """What row j leaves of the state: a number, or one of each key channel."""
            if not per_channel:
                return one_of(j, keeps)
            keep = jnp.exp(-rate * softplus(a[j].astype(jnp.float32) + bias))
            return keep if exists[j] is None else jnp.where(exists[j], keep, 1.0)

        def inputs(j):
            """k as it came, its reciprocal norm, v, and the two gates."""
            k = ks[j].astype(jnp.float32)
            keep, beta = decay(j), one_of(j, betas)
            return k, lax.rsqrt(jnp.sum(k * k) + 1e-6), vs[j].astype(jnp.float32), keep, beta

        # In a sum over k of what is kept of the state, a head's decay is a factor, and a channel's is one of k's.
        def outside(keep):
            return 1.0 if per_channel else keep

        def inside(keep, x):
            return tile.along_k(keep * x if per_channel else x)

        def along(keep):
            return tile.along_k(keep) if per_channel else keep

        keys = None
        if keys_ref is not None and first_head_ref is not None:
            keys = head_keys(keys_ref[row], layer_ref[0], first_head_ref[0] + head)
        for j in range(len(pending)):
            k, norm, v, keep, beta = inputs(j)
            written = beta * (v - outside(keep) * norm * tile.over_k(state * inside(keep, k)))
            state = along(keep) * state + tile.along_v(written * norm) * tile.along_k(k)
        if not keep_new:
            tile.store(out_ref, write_ref[row], state, write_vk, keys=keys)
        for j in range(new):
            k, norm, v, keep, beta = inputs(len(pending) + j)
            q = qs[j].astype(jnp.float32)
            scale = lax.rsqrt(jnp.sum(q * q) + 1e-6) * key_dim**-0.5
            # What the old state gives to k and to q is summed side by side; the row's own part of the output is rank
            # one.
            written = norm * beta * (v - outside(keep) * norm * tile.over_k(state * inside(keep, k)))
            o = scale * (outside(keep) * tile.over_k(state * inside(keep, q)) + written * jnp.sum(k * q))
            plgpu.store(outputs[0].at[row, j, head, tile.v], o.astype(qkv_ref.dtype), mask=tile.v_mask)
            if keep_new or j + 1 < new:
                state = along(keep) * state + tile.along_v(written) * tile.along_k(k)
        if keep_new:
            tile.store(out_ref, write_ref[row], state, write_vk, keys=keys)

    lax.cond(write_ref[row] > 0, run, nothing)
