"""The decode step by the kernel in Triton (`triton_kernel.py`): which forms it has, and its launch."""

import jax

from gdnjax.backend import Backend
from gdnjax.pallas_kernels.gated_delta_rule import tiles
from gdnjax.pallas_kernels.launch import from_the_triton_extra, launch, layer_number, power_of_two
from gdnjax.shapes import Array


def decode(
    qkv, gates, ssm, layer, read_slot, write_slot, order, key_dim, rounding, backend: Backend
) -> tuple[Array, Array]:
    _check(gates, order, rounding)
    with from_the_triton_extra():
        from gdnjax.pallas_kernels.gated_delta_rule.triton_kernel import gated_delta_rule_decode

    layers, slots, heads, size = ssm.shape
    value_dim = size // key_dim
    tile = tiles.TRITON["vk" if order.read else "kv"]
    columns = min(tile.columns, power_of_two(value_dim))
    # As in the other kernel: eight threads side by side read 128 bytes.
    lanes = min(128 // ssm.dtype.itemsize, power_of_two(key_dim))
    args = (layer_number(layer), read_slot, write_slot, qkv, gates.a, gates.b, gates.A_log, gates.dt_bias, ssm)
    o, ssm = launch(
        gated_delta_rule_decode,
        backend,
        name="gated_delta_rule_decode",
        programs=len(qkv) * heads * -(-value_dim // columns),
        args=args,
        out=[
            jax.ShapeDtypeStruct((len(qkv), heads, value_dim), qkv.dtype),
            jax.ShapeDtypeStruct(ssm.shape, ssm.dtype),
        ],
        warps=tile.warps,
        aliases={len(args) - 1: 1},
        layers=layers,
        slots=slots,
        heads=heads,
        key_heads=(qkv.shape[-1] - heads * value_dim) // (2 * key_dim),
        K=key_dim,
        V=value_dim,
        columns=columns,
        lanes=lanes,
        parts=power_of_two(key_dim) // lanes,
        read_vk=order.read,
        write_vk=order.write,
        beta_scale=gates.beta_scale,
    )
    return o, ssm


def _check(gates, order, rounding) -> None:
    """Raises ValueError for what the kernel does not have."""
    lacking = {
        "a pool of both orders": (not isinstance(order.read, bool), "a read order of all rows"),
        "a decay of each key channel": (gates.per_channel, "one of each head"),
        "stochastic rounding": (rounding is not None, "rounding=None"),
    }
    for form, (asked, allowed) in lacking.items():
        if asked:
            raise ValueError(f"kernels='triton': gated_delta_rule.decode has no kernel for {form}; allowed: {allowed}")
