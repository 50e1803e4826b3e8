"""Every op at the sizes of published models: inputs, the call, the float64 answer, bytes and operations.

A workload's pools have several layers, and its calls go from one to the next as a model's do, so that what is read is
not in the cache.

Of some the first few rows are `real`, and the others padding, as in a decode step whose bucket is larger than its
batch: they point at null slots, null blocks and no query, and give zeros. Bytes and operations are of real rows alone.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdnjax.backend import Backend
from gdnjax.models import random_codes
from gdnjax.pallas_kernels import causal_conv1d, gated_delta_rule, matmul, paged_attention, row_forms
from gdnjax.pallas_kernels.expert_routing import Rule, choose_experts, sort_by_expert
from gdnjax.pallas_kernels.gated_delta_rule import Gates, Rounding, StateOrder
from gdnjax.pallas_kernels.grouped_matmul import grouped_matmul
from gdnjax.pallas_kernels.gumbel_argmax import gumbel_argmax
from gdnjax.pallas_kernels.normed import Gated, GateUp, Normed, numbers, summed
from gdnjax.pallas_kernels.rows import Rows, make_chunks
from gdnjax.quantized import CodeFormat
from kernel_bench import exact

CHUNK = 64
K = V = 128
TAPS = 4

Tree = Any


@dataclasses.dataclass(frozen=True)
class Workload:
    """One call of one op.

    Fields:
      name     op, then what is special.
      inputs   key -> (arguments, pools): what the call reads, and what it changes in place.
      call     (arguments, pools, layer, backend) -> (outputs, pools).
      exact    (arguments, pools, layer) -> (outputs, pools) in float64; the pools' rows that the call has to write.
      written  (pools, arguments, layer) -> the rows of the pools that the call writes, to be compared.
      limits   relative norm of the error against float64: of outputs, and of what is written.
      sample   outputs -> those that are compared.
      chain    see timing.Calls.
      bytes    that must be read and written at least.
      flops    that must be done at least.
    """

    name: str
    inputs: Callable[[jax.Array], tuple[Tree, Tree]]
    call: Callable[[Tree, Tree, int, Backend], tuple[Tree, Tree]]
    exact: Callable[[Tree, Tree, int], tuple[Tree, Tree]]
    written: Callable[[Tree, Tree, int], Tree]
    layers: int
    bytes: int
    flops: int
    limits: tuple[float, float]
    sample: Callable[[Tree], Tree] = lambda outputs: outputs
    chain: str | None = None


def _random(key, shape, dtype=jnp.bfloat16, scale=1.0):
    return (scale * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Heads:
    """Heads of the delta rule. `per_channel`: each key channel decays by itself, Kimi Delta Attention."""

    key_heads: int
    heads: int
    key_dim: int = K
    value_dim: int = V
    per_channel: bool = False
    beta_scale: float = 1.0

    @property
    def op(self) -> str:
        return "kda" if self.per_channel else "gdn"

    @property
    def sizes(self) -> str:
        return "" if (self.key_dim, self.value_dim) == (K, V) else f"-{self.key_dim}x{self.value_dim}"

    @property
    def decays(self) -> tuple[int, ...]:
        return (self.heads, self.key_dim) if self.per_channel else (self.heads,)

    @property
    def channels(self) -> int:
        return 2 * self.key_heads * self.key_dim + self.heads * self.value_dim

    @property
    def state(self) -> int:
        """Numbers of all heads' states."""
        return self.heads * self.key_dim * self.value_dim

    @property
    def token_bytes(self) -> int:
        """Of a token's q, k, v, a and b."""
        return 2 * (self.channels + math.prod(self.decays) + self.heads)

    def gates(self, keys, shape) -> Gates:
        """Half-lives of 1 to 200 tokens."""
        half_life = 200.0 ** jnp.linspace(0, 1, math.prod(self.decays)).reshape(self.decays)
        return Gates(
            a=_random(keys[0], (*shape, *self.decays), scale=0.3),
            b=_random(keys[1], (*shape, self.heads), scale=2.0),
            A_log=jnp.zeros((self.heads,), jnp.float32),
            dt_bias=jnp.log(jnp.expm1(jnp.log(2.0) / half_life)),
            beta_scale=self.beta_scale,
        )


def _padding(numbers: jax.Array, real: int) -> jax.Array:
    """Slots or blocks of rows, those behind the first `real` null."""
    return jnp.where(jnp.arange(numbers.shape[0]) < real, numbers, 0)


def _rows(rows: int, real: int) -> str:
    return str(rows) if real == rows else f"{real}of{rows}"


jax.tree_util.register_dataclass(Gates, data_fields=["a", "b", "A_log", "dt_bias"], meta_fields=["beta_scale"])


def recurrent(
    kind: str,
    rows: int,
    of: Heads,
    *,
    old: int = 0,
    new: int = 1,
    state="float32",
    vk=True,
    real: int | None = None,
    stochastic: bool = False,
):
    """Decode, verify with `old` pending rows and `new` tokens, or fold of `old` rows, with none. `stochastic`: states
    in bfloat16 are rounded by noise.
    """
    real = rows if real is None else real
    layers = max(2, min(24, 512 // rows))
    order = StateOrder(read=vk, write=vk)
    shape = (rows,) if kind == "decode" else (rows, old + new)

    def inputs(key):
        keys = jax.random.split(key, 4)
        slot = 1 + jax.random.permutation(jax.random.fold_in(key, 7), rows).astype(jnp.int32)
        arguments = {
            "qkv": _random(keys[0], (*shape, of.channels)),
            "gates": of.gates(jax.random.split(keys[1]), shape),
            "slot": _padding(slot, real),
            "pending": _padding(jnp.full((rows,), old, jnp.int32), real),
        }
        if stochastic:
            arguments["noise"] = jax.random.bits(keys[3], (rows,), jnp.uint32)
        return arguments, _random(keys[2], (layers, rows + 1, of.heads, of.key_dim * of.value_dim), state, 0.1)

    def call(x, ssm, layer, backend):
        rounding = Rounding(keys=x["noise"]) if stochastic else None
        static = {"key_head_dim": of.key_dim, "rounding": rounding, "backend": backend}
        if kind == "fold":
            folded = gated_delta_rule.fold(
                x["qkv"], x["gates"], ssm, layer, x["slot"], x["slot"], x["pending"], order, **static
            )
            return (), folded
        if kind == "decode":
            return gated_delta_rule.decode(x["qkv"], x["gates"], ssm, layer, x["slot"], x["slot"], order, **static)
        return gated_delta_rule.verify(
            x["qkv"], x["gates"], ssm, layer, x["slot"], x["slot"], x["pending"], order, new=new, **static
        )

    size = jnp.dtype(state).itemsize
    name = f"{of.op}-{kind}-{of.heads}h-{_rows(rows, real)}{of.sizes}"
    name += {"decode": "", "verify": f"-{old}+{new}", "fold": f"-{old}"}[kind]
    name += ("" if vk else "-kv") + ("-bf16state" if state == "bfloat16" else "") + "-stochastic" * stochastic
    tokens = 1 if kind == "decode" else old + new
    return Workload(
        name=name,
        inputs=inputs,
        call=call,
        exact=exact.padded(
            functools.partial(
                exact.recurrent, old=0 if kind == "decode" else old, kind=kind, vk=vk, key_dim=of.key_dim
            ),
            real,
        ),
        written=lambda ssm, x, layer: ssm[layer, x["slot"][:real]],
        layers=layers,
        bytes=real * (2 * of.state * size + tokens * of.token_bytes + new * 2 * of.heads * of.value_dim),
        flops=real * tokens * 8 * of.state,
        # By noise a number is moved by a whole step at most, to the nearest by half of one.
        limits=(4e-3, 1e-5 if state == "float32" else 8e-3 if stochastic else 4e-3),
    )


def chunked(lengths: tuple[int, ...], of: Heads, *, correlated: bool = False, vk: bool = True):
    """Prefill of fresh prompts, one after another."""
    tokens, rows = sum(lengths), len(lengths)
    order = StateOrder(read=vk, write=vk)
    layers = 2

    def inputs(key):
        keys = jax.random.split(key, 4)
        qkv = _random(keys[0], (tokens, of.channels))
        if correlated:
            first = of.key_heads * of.key_dim
            direction = _random(keys[3], (first,))
            qkv = qkv.at[:, first : 2 * first].set(0.05 * qkv[:, first : 2 * first] + direction)
        arguments = {
            "qkv": qkv,
            "gates": of.gates(jax.random.split(keys[1]), (tokens,)),
            **packed_rows(lengths),
        }
        return arguments, _random(keys[2], (layers, rows + 1, of.heads, of.key_dim * of.value_dim), jnp.float32, 0.1)

    def call(x, ssm, layer, backend):
        packed, chunks = rows_and_chunks(x, tokens)
        return gated_delta_rule.prefill(
            x["qkv"], x["gates"], ssm, layer, packed, chunks, order, key_head_dim=of.key_dim, backend=backend
        )

    k, v = of.key_dim, of.value_dim
    per_chunk = 2 * CHUNK * (3 * k * v + CHUNK * (2 * k + 2 * v)) + 2 * CHUNK**3 // 3
    return Workload(
        name=f"{of.op}-prefill-{of.heads}h-{_lengths(lengths)}{of.sizes}" + ("-correlated" if correlated else ""),
        inputs=inputs,
        call=call,
        exact=functools.partial(exact.chunked, lengths=lengths, vk=vk, key_dim=of.key_dim),
        written=lambda ssm, x, layer: ssm[layer, x["slot"]],
        layers=layers,
        bytes=tokens * (of.token_bytes + 2 * of.heads * of.value_dim) + rows * 4 * of.state,
        flops=of.heads * sum(-(-n // CHUNK) for n in lengths) * per_chunk,
        limits=(8e-2, 8e-2) if correlated else (1.5e-2, 1.5e-2),
        chain="chunk_length",
    )


def packed_rows(lengths) -> dict[str, jax.Array]:
    """The batch of fresh rows of these lengths, as `packing` makes it."""
    starts = np.cumsum([0, *lengths[:-1]])
    table = [
        (i, start + at, min(CHUNK, n - at))
        for i, (start, n) in enumerate(zip(starts, lengths, strict=True))
        for at in range(0, n, CHUNK)
    ]
    row, start, length = (np.array(x, np.int32) for x in zip(*table, strict=True))
    columns = {
        "slot": 1 + np.arange(len(lengths)),
        "start": starts,
        "length": np.array(lengths),
        "chunk_row": row,
        "chunk_start": start,
        "chunk_length": length,
        "token_row": np.repeat(np.arange(len(lengths)), lengths),
        "token_offset": np.concatenate([np.arange(n) for n in lengths]),
    }
    return {name: jnp.asarray(value, jnp.int32) for name, value in columns.items()}


def rows_and_chunks(x, tokens: int):
    rows = Rows(
        read_slot=x["slot"],
        write_slot=x["slot"],
        fresh=jnp.ones(x["slot"].shape, bool),
        start=x["start"],
        length=x["length"],
        token_row=x["token_row"],
        token_offset=x["token_offset"],
        token_valid=jnp.ones((tokens,), bool),
    )
    return rows, make_chunks(x["chunk_row"], x["chunk_start"], x["chunk_length"], tokens=tokens, size=CHUNK)


def conv_prefill(lengths: tuple[int, ...], channels: int):
    tokens, rows, layers = sum(lengths), len(lengths), 2

    def inputs(key):
        keys = jax.random.split(key, 3)
        arguments = {
            "x": _random(keys[0], (tokens, channels)),
            "weight": _random(keys[1], (channels, TAPS), scale=0.5),
            **packed_rows(lengths),
        }
        return arguments, _random(keys[2], (layers, rows + 1, TAPS - 1, channels))

    def call(x, conv, layer, backend):
        packed, chunks = rows_and_chunks(x, tokens)
        return causal_conv1d.prefill(x["x"], x["weight"], conv, layer, packed, chunks, backend=backend)

    return Workload(
        name=f"conv-prefill-{channels}-{_lengths(lengths)}",
        inputs=inputs,
        call=call,
        exact=functools.partial(exact.conv_prefill, lengths=lengths),
        written=lambda conv, x, layer: conv[layer, x["slot"]],
        layers=layers,
        bytes=tokens * channels * 4,
        flops=tokens * channels * 2 * TAPS,
        limits=(4e-3, 0),
        chain="token_row",
    )


def conv_update(rows: int, channels: int, *, pending: int = 0, new: int = 1, real: int | None = None):
    """Decode, or verify of `new` tokens behind `pending` ones."""
    real = rows if real is None else real
    layers = 24

    def inputs(key):
        keys = jax.random.split(key, 3)
        arguments = {
            "x": _random(keys[0], (rows, new, channels) if pending else (rows, channels)),
            "weight": _random(keys[1], (channels, TAPS), scale=0.5),
            "slot": _padding(1 + jnp.arange(rows, dtype=jnp.int32), real),
            "pending": _padding(jnp.full((rows,), pending, jnp.int32), real),
        }
        return arguments, _random(keys[2], (layers, rows + 1, TAPS - 1 + pending, channels))

    def call(x, conv, layer, backend):
        slot = x["slot"]
        if not pending:
            return causal_conv1d.decode(x["x"], x["weight"], conv, layer, slot, slot, backend=backend)
        return causal_conv1d.verify(x["x"], x["weight"], conv, layer, slot, slot, x["pending"], backend=backend)

    # Windows and pending rows are read and written; tokens are read, and written as channels.
    moved = 2 * (TAPS - 1 + pending) + new
    return Workload(
        name=f"conv-{'verify' if pending else 'decode'}-{channels}-{_rows(rows, real)}",
        inputs=inputs,
        call=call,
        exact=exact.padded(functools.partial(exact.conv_update, pending=pending), real),
        written=lambda conv, x, layer: conv[layer, x["slot"][:real]],
        layers=layers,
        bytes=2 * channels * real * (moved + pending + new),
        flops=real * channels * (pending + new) * 2 * TAPS,
        limits=(4e-3, 0),
    )


def attention(
    requests: int,
    context: int,
    queries: int,
    heads: int,
    kv_heads: int,
    width: int,
    *,
    block_size: int = 16,
    int8: bool = False,
    real: int | None = None,
    long: int = 0,
    table: int = 0,
):
    """`queries` tokens of each request at the end of its context: 1 to 8 in decode, all of a chunk in prefill. Keys and
    values are bfloat16, or int8 with scales. `long`: one request more, with a context of so many keys. Tables have room
    for so many, too, or for `table`.
    """
    real = requests if real is None else real
    short, requests, real = requests, requests + (long > 0), real + (long > 0)
    contexts = (*([long] if long else []), *[context] * short)
    per_tile = min(queries, CHUNK)
    tiles_of = queries // per_tile
    of_token = 2 * kv_heads * (width + 4 if int8 else 2 * width)
    layers = max(1, min(4, (8 << 30) // (sum(contexts) * of_token)))

    def stored(key, shape):
        return jax.random.randint(key, shape, -127, 128, jnp.int8) if int8 else _random(key, shape)

    def scales_of(key, shape):
        """Of keys and of values, which they give a variance near 1."""
        return tuple(
            jax.random.uniform(jax.random.fold_in(key, part), shape, jnp.float32, 0.5, 1.5) * 3**0.5 / 127
            for part in (7, 8)
        )

    def inputs(key):
        keys = jax.random.split(key, 4)
        shape = (layers, _blocks_of(contexts, block_size), block_size, kv_heads, width)
        arguments = {
            "q": _random(keys[0], (requests * tiles_of, per_tile, heads, width)),
            **_contexts(keys[3], contexts, queries, block_size, real, table),
            "k": stored(keys[1], shape),
            "v": stored(keys[2], shape),
            "scales": scales_of(key, shape[:-1]) if int8 else None,
        }
        return arguments, ()

    def call(x, pools, layer, backend):
        tiles = paged_attention.Tiles(x["position"], x["table"], jnp.max(x["position"]) + 1)
        o = paged_attention.attend(x["q"], x["k"], x["v"], layer, tiles, scales=x["scales"], backend=backend)
        return o, pools

    return Workload(
        name=_attending("attention", f"{heads}/{kv_heads}x{width}", short, context, queries, real - (long > 0))
        + (f"+1x{long}" if long else f"-of{table}" if table else "")
        + ("-int8" if int8 else ""),
        inputs=inputs,
        call=call,
        exact=exact.padded(exact.attention, real * tiles_of),
        written=lambda pools, x, layer: (),
        layers=layers,
        bytes=sum(contexts[:real]) * of_token + real * 2 * queries * heads * width * 2,
        flops=sum(_pairs(each, queries) for each in contexts[:real]) * heads * width * 4,
        limits=(6e-3, 0),
        chain="layer",
    )


def _blocks_of(contexts: Sequence[int], block_size: int) -> int:
    """Blocks of a pool, one of which is null."""
    return sum(-(-context // block_size) for context in contexts) + 1


def _contexts(
    key, contexts: Sequence[int], queries: int, block_size: int, real: int, table: int = 0
) -> dict[str, jax.Array]:
    """Positions and tables of tiles of at most a chunk, their queries at the end of each request's context. Tables are
    as wide as the longest, or as `table` keys are.
    """
    per_tile, requests = min(queries, CHUNK), len(contexts)
    free = 1 + jax.random.permutation(key, _blocks_of(contexts, block_size) - 1).astype(jnp.int32)
    blocks = np.array([-(-context // block_size) for context in contexts])
    number = np.arange(max(*blocks, -(-table // block_size)))
    # Entries behind a context's own name the null block.
    place = np.where(number < blocks[:, None], (np.cumsum(blocks) - blocks)[:, None] + number, free.size)
    position = np.array(contexts)[:, None, None] - queries + np.arange(queries).reshape(1, -1, per_tile)
    position = np.where(np.arange(requests)[:, None, None] < real, position, -1)
    return {
        "position": jnp.asarray(position.reshape(-1, per_tile), jnp.int32),
        "table": jnp.repeat(jnp.append(free, 0)[place], queries // per_tile, axis=0),
    }


def _pairs(context: int, queries: int) -> int:
    """Of queries and the keys that they see, of one request."""
    return sum(context - queries + i + 1 for i in range(queries))


def _attending(op: str, heads: str, requests: int, context: int, queries: int, real: int) -> str:
    kind = "decode" if queries <= 8 else "prefill"
    name = f"{op}-{kind}-{heads}-{_rows(requests, real)}x{context}"
    return name + (f"-{queries}q" if queries > 1 else "")


def latent(
    requests: int,
    context: int,
    queries: int,
    heads: int,
    *,
    value_dim: int = 512,
    rest: int = 64,
    block_size: int = 16,
    real: int | None = None,
):
    """`attention` over latents of `value_dim + rest` columns in bfloat16, which all heads share."""
    real = requests if real is None else real
    per_tile = min(queries, CHUNK)
    count = requests * queries // per_tile
    # The scale is that of a head's own key, before it is absorbed.
    width, scale = value_dim + rest, (128 + rest) ** -0.5
    layers = max(1, min(4, (8 << 30) // (requests * context * 2 * width)))

    def inputs(key):
        keys = jax.random.split(key, 3)
        shape = (layers, _blocks_of([context] * requests, block_size), block_size, width)
        arguments = {
            # Scores have a variance near 1.
            "q": _random(keys[0], (count, per_tile, heads, width), scale=1 / (scale * width**0.5)),
            **_contexts(keys[2], [context] * requests, queries, block_size, real),
            "c": _random(keys[1], shape),
        }
        return arguments, ()

    def call(x, pools, layer, backend):
        tiles = paged_attention.Tiles(x["position"], x["table"], jnp.max(x["position"]) + 1)
        o = paged_attention.attend_latent(
            x["q"], x["c"], layer, tiles, value_dim=value_dim, scale=scale, backend=backend
        )
        return o, pools

    return Workload(
        name=_attending("latent", f"{heads}x{value_dim}+{rest}", requests, context, queries, real),
        inputs=inputs,
        call=call,
        exact=exact.padded(functools.partial(exact.latent, value_dim=value_dim, scale=scale), real * count // requests),
        written=lambda pools, x, layer: (),
        layers=layers,
        bytes=real * 2 * (context * width + queries * heads * (width + value_dim)),
        flops=real * _pairs(context, queries) * heads * 2 * (width + value_dim),
        limits=(6e-3, 0),
        chain="layer",
    )


def kv_write(rows: int, kv_heads: int, width: int, *, int8: bool = False, real: int | None = None):
    """Keys and values of so many tokens to blocks of their own."""
    real = rows if real is None else real
    layers, block_size = 8, 16

    def inputs(key):
        keys = jax.random.split(key, 4)
        shape = (layers, rows + 1, block_size, kv_heads, width)
        arguments = {
            "k": _random(keys[0], (rows, kv_heads, width)),
            "v": _random(keys[1], (rows, kv_heads, width)),
            "block": _padding(1 + jax.random.permutation(keys[2], rows).astype(jnp.int32), real),
            "offset": jax.random.randint(keys[3], (rows,), 0, block_size, jnp.int32),
        }
        pool = jnp.zeros(shape, jnp.int8 if int8 else jnp.bfloat16)
        # What is left of others is not what is compared.
        scale = jnp.full(shape[:-1], jnp.nan, jnp.float32)
        return arguments, (pool, pool, (scale, scale)) if int8 else (pool, pool)

    def call(x, pools, layer, backend):
        k_blocks, v_blocks, *scales = pools
        k, v, block, offset = (x[name] for name in ("k", "v", "block", "offset"))
        if not int8:
            return (), paged_attention.write(k_blocks, v_blocks, layer, k, v, block, offset, backend=backend)
        write = functools.partial(paged_attention.write_quantised, k_blocks, v_blocks, *scales, backend=backend)
        return (), write(layer, k, v, block, offset)

    def written(pools, x, layer):
        place = layer, x["block"][:real], x["offset"][:real]
        k, v = (pool[place].astype(jnp.float32) for pool in pools[:2])
        if int8:
            k, v = (part * scale[place][..., None] for part, scale in zip((k, v), pools[2], strict=True))
        return k, v

    return Workload(
        name=f"kv-write-{kv_heads}x{width}-{_rows(rows, real)}" + ("-int8" if int8 else ""),
        inputs=inputs,
        call=call,
        exact=exact.padded(exact.kv_write, real),
        written=written,
        layers=layers,
        bytes=real * kv_heads * 2 * (2 * width + (width + 4 if int8 else 2 * width)),
        flops=0,
        # Half a step of 127 is 0.7% of values whose largest is three times the usual one.
        limits=(0, 1.5e-2 if int8 else 0),
    )


def enter(rows: int, heads: int, kv_heads: int, width: int, rotary: int):
    """Queries, each with its gate behind it, and keys of so many tokens: norm, rotation, and the write to blocks."""
    written = kv_write(rows, kv_heads, width)

    def inputs(key):
        arguments, pools = written.inputs(key)
        keys = jax.random.split(jax.random.fold_in(key, 9), 4)
        angle = jnp.tile(jax.random.uniform(keys[3], (rows, rotary // 2), jnp.float32, 0, 6), 2)
        return arguments | {
            "q": _random(keys[0], (rows, 2 * heads, width)),
            "q_weight": _random(keys[1], (width,), scale=0.1),
            "k_weight": _random(keys[2], (width,), scale=0.1),
            "cos": jnp.cos(angle),
            "sin": jnp.sin(angle),
        }, pools

    def call(x, pools, layer, backend):
        angles = x["cos"], x["sin"]
        turn = paged_attention.Turn(x["q_weight"], x["k_weight"], eps=1e-6, centre=1.0, angles=angles, gated=True)
        (k, v), places = pools, (x["block"], x["offset"])
        q, k_blocks, v_blocks, _ = paged_attention.enter(
            k, v, None, layer, x["q"], x["k"], x["v"], turn, *places, backend=backend
        )
        return q, (k_blocks, v_blocks)

    return dataclasses.replace(
        written,
        name=f"kv-enter-{heads}/{kv_heads}x{width}-{rows}",
        inputs=inputs,
        call=call,
        exact=exact.enter,
        bytes=rows * (2 * 2 * (heads + 2 * kv_heads) * width + 8 * rotary),
        # The norm is rounded before it is turned.
        limits=(6e-3, 6e-3),
    )


def latent_write(rows: int, *, value_dim: int = 512, rest: int = 64, real: int | None = None):
    """Latents of so many tokens to blocks of their own."""
    real = rows if real is None else real
    layers, block_size, width = 16, 16, value_dim + rest

    def inputs(key):
        keys = jax.random.split(key, 3)
        arguments = {
            "c": _random(keys[0], (rows, width)),
            "block": _padding(1 + jax.random.permutation(keys[1], rows).astype(jnp.int32), real),
            "offset": jax.random.randint(keys[2], (rows,), 0, block_size, jnp.int32),
        }
        return arguments, jnp.zeros((layers, rows + 1, block_size, width), jnp.bfloat16)

    def call(x, pages, layer, backend):
        return (), paged_attention.write_latent(pages, layer, x["c"], x["block"], x["offset"], backend=backend)

    return Workload(
        name=f"latent-write-{value_dim}+{rest}-{_rows(rows, real)}",
        inputs=inputs,
        call=call,
        exact=exact.padded(exact.latent_write, real),
        written=lambda pages, x, layer: pages[layer, x["block"][:real], x["offset"][:real]],
        layers=layers,
        bytes=real * 2 * 2 * width,
        flops=0,
        limits=(0, 0),
    )


def _weight(key, shape: tuple[int, ...], codes: str | None, grid: tuple[int, int] | None = None):
    """Of numbers, or of codes of that type, in blocks of 128 x 128 or with a scale for each row."""
    if codes is None:
        return _random(key, shape, scale=shape[-1] ** -0.5)
    return random_codes(CodeFormat(codes, grid or (128, 128)).abstract(shape), key)


def _codes(codes: str | None, grid: tuple[int, int] | None) -> str:
    """How a workload's name tells what the weights are."""
    return "" if codes is None else f"-{codes.removesuffix('_e4m3fn')}{'-by-row' if grid else ''}"


def grouped(
    tokens: int, experts: int, per_token: int, depth: int, width: int, codes: str | None = None, ranks: int = 1
):
    """Tokens that choose experts at random; `width` is gate and up together. Of several ranks with whole experts one
    has the rows of all choices, of which its own, an equal share, stand first. Rows are taken from where tokens stand.
    """
    rows, held = tokens * per_token, experts // ranks
    own = rows // ranks

    def inputs(key):
        keys = jax.random.split(key, 3)
        chosen = jax.vmap(lambda k: jax.random.choice(k, experts, (per_token,), replace=False))(
            jax.random.split(keys[2], tokens)
        )
        arguments = {
            "x": _random(keys[0], (tokens, depth)),
            "rows": jax.random.permutation(keys[2], rows).astype(jnp.int32) // per_token,
            "weight": _weight(keys[1], (held, width, depth), codes),
            "sizes": jnp.bincount(chosen.reshape(-1)[:own] % held, length=held).astype(jnp.int32),
        }
        return arguments, ()

    def call(x, pools, layer, backend):
        out = grouped_matmul(x["x"], x["weight"], x["sizes"], rows=x["rows"], expected_rows=own, backend=backend)
        return out, pools

    # Of many experts few are missed: each with probability (1 - top / experts)^tokens.
    read = held * (1 - (1 - per_token / experts) ** tokens)
    of = f"{held}of" if ranks > 1 else ""
    return Workload(
        name=f"grouped-{of}{experts}e-top{per_token}-{depth}x{width}{_codes(codes, None)}-{tokens}",
        inputs=inputs,
        call=call,
        exact=functools.partial(exact.grouped, own=own),
        written=lambda pools, x, layer: (),
        layers=1,
        bytes=int(read * width * depth * (2 if codes is None else 1)) + (min(own, tokens) * depth + own * width) * 2,
        flops=2 * own * depth * width,
        limits=(4e-3, 0),
        sample=lambda out: out[:own][:: exact.every(own)],
        chain="sizes",
    )


def products(
    kind: str, rows: int, inputs: int, *outputs: int, codes: str | None = None, grid: tuple[int, int] | None = None
):
    """Projections of a decode step, as layers have them: `kind` names them, "gate-up" ends in silu(gate) * up, "head"
    in float32. Of codes are those of 128 outputs and more.
    """
    layers = 4

    def inputs_of(key):
        keys = jax.random.split(key, 1 + layers)
        weights = [
            [
                _weight(jax.random.fold_in(k, i), (n, inputs), codes if n >= 128 else None, grid)
                for i, n in enumerate(outputs)
            ]
            for k in keys[1:]
        ]
        return {"x": _random(keys[0], (rows, inputs)), "weights": weights}, ()

    def call(x, pools, layer, backend):
        weights = x["weights"][layer]
        if kind == "gate-up":
            return matmul.swiglu(x["x"], *weights, backend=backend), pools
        dtype = jnp.float32 if kind == "head" else None
        return matmul.project(x["x"], *weights, out_dtype=dtype, backend=backend), pools

    width = outputs[0] if kind == "gate-up" else sum(outputs)
    out_size = 4 if kind == "head" else 2
    return Workload(
        name=f"matmul-{kind}-{inputs}x{sum(outputs)}{_codes(codes, grid)}-{rows}",
        inputs=inputs_of,
        call=call,
        exact=functools.partial(exact.products, gated=kind == "gate-up"),
        written=lambda pools, x, layer: (),
        layers=layers,
        bytes=sum(n * inputs * (1 if codes and n >= 128 else 2) for n in outputs)
        + rows * (2 * inputs + out_size * width),
        flops=2 * rows * sum(outputs) * inputs,
        limits=(4e-3, 0),
        chain="x",
    )


def normed(rows: int, width: int, parts: int = 0):
    """The norm in front of products of a decode step, of rows to which a term of so many `parts` is added before."""

    def inputs(key):
        keys = jax.random.split(key, 3)
        arguments = {"x": _random(keys[0], (rows, width)), "weight": _random(keys[1], (width,), scale=0.1)}
        if parts:
            arguments["added"] = _random(keys[2], (parts, rows, width), jnp.float32)
        return arguments, ()

    def call(x, pools, layer, backend):
        rows = Normed(x["x"], x["weight"], 1e-6, 1.0, added=x.get("added"))
        if backend.is_reference:
            return (summed(rows.x, rows.added), numbers(rows)) if parts else numbers(rows), pools
        whole, prepared = row_forms.prepared(rows, row_forms.WIDE, backend, wide=True)
        return (whole, prepared.wide) if parts else prepared.wide, pools

    return Workload(
        name=f"normed-{width}{f'-{parts}parts' if parts else ''}-{rows}",
        inputs=inputs,
        call=call,
        exact=exact.normed,
        written=lambda pools, x, layer: (),
        layers=1,
        bytes=2 * (2 * rows + 1) * width + (2 + 4 * parts) * rows * width * (parts > 0),
        flops=0,
        limits=(4e-3, 0),
        chain="x",
    )


def gated(rows: int, heads: int, width: int):
    """The gated norm in front of a product with codes, and the halves of its rows."""

    def inputs(key):
        keys = jax.random.split(key, 3)
        shape = (rows, heads, width)
        gate = _random(keys[1], (rows, heads * width))
        return {"x": _random(keys[0], shape), "gate": gate, "weight": _random(keys[2], (width,))}, ()

    def rows_of(x):
        return Gated(x["x"], x["gate"], x["weight"], 1e-6, "silu")

    return _halved(f"normed-gated-{heads}x{width}-{rows}", inputs, rows_of, exact.gated, rows * heads * width, "x")


def activated(rows: int, width: int):
    """The activation in front of experts' second product with codes, and the halves of its rows."""

    def inputs(key):
        return {"both": _random(key, (rows, 2 * width))}, ()

    def rows_of(x):
        return GateUp.of(x["both"])

    return _halved(f"normed-activated-{width}-{rows}", inputs, rows_of, exact.activated, rows * width, "both")


def _halved(name: str, inputs: Callable, rows_of: Callable, exactly: Callable, count: int, chain: str):
    """What is made of rows on the way to their halves, `count` numbers of them: two are read and one is written for
    each, and two halves.
    """

    def call(x, pools, layer, backend):
        rows = rows_of(x)
        if backend.is_reference:
            return numbers(rows), pools
        found, *_ = row_forms.rows_of(rows, row_forms.HALVES, backend, wide=True)
        return found, pools

    return Workload(
        name=name,
        inputs=inputs,
        call=call,
        exact=exactly,
        written=lambda pools, x, layer: (),
        layers=1,
        bytes=2 * 4 * count,
        flops=0,
        limits=(4e-3, 0),
        chain=chain,
    )


def draws(rows: int, vocab: int, temperature: float):
    """Tokens of a decode step."""

    def inputs(key):
        keys = jax.random.split(key, 2)
        arguments = {
            "logits": _random(keys[0], (rows, vocab), jnp.float32, 2.0),
            "temperature": jnp.full((rows,), temperature, jnp.float32),
            "seed": jax.random.bits(keys[1], (rows, 2), jnp.uint32),
            "position": jnp.arange(rows, dtype=jnp.int32),
        }
        return arguments, ()

    def call(x, pools, layer, backend):
        return gumbel_argmax(x["logits"], x["temperature"], None, x["seed"], x["position"], backend=backend), pools

    return Workload(
        name=f"draw-{rows}x{vocab}" + ("-greedy" if not temperature else ""),
        inputs=inputs,
        call=call,
        exact=exact.draws,
        written=lambda pools, x, layer: (),
        layers=1,
        bytes=rows * vocab * 4,
        flops=0,
        limits=(1e-5, 0),
        # The best sums: of two that all but tie either token may be drawn.
        sample=lambda outputs: outputs[1:],
        chain="temperature",
    )


def choices(tokens: int, experts: int, top: int):
    """The experts that tokens go to."""

    def inputs(key):
        return {"logits": _random(key, (tokens, experts), jnp.float32, 2.0), "valid": jnp.ones((tokens,), bool)}, ()

    def call(x, pools, layer, backend):
        return choose_experts(x["logits"], None, x["valid"], Rule(top), backend=backend), pools

    return Workload(
        name=f"choose-{tokens}x{experts}-top{top}",
        inputs=inputs,
        call=call,
        exact=functools.partial(exact.choices, top=top),
        written=lambda pools, x, layer: (),
        layers=1,
        bytes=4 * tokens * (experts + 2 * top),
        flops=0,
        limits=(1e-5, 0),
        # The weights: of two that all but tie either expert may be chosen.
        sample=lambda outputs: outputs[:1],
        chain="logits",
    )


def order(tokens: int, experts: int, top: int):
    """Pairs of a token and a choice in the order of their experts."""

    def inputs(key):
        return {"expert": jax.random.randint(key, (tokens, top), 0, experts, jnp.int32)}, ()

    def call(x, pools, layer, backend):
        return sort_by_expert(x["expert"], experts, backend=backend), pools

    return Workload(
        name=f"sort-{tokens}x{top}of{experts}",
        inputs=inputs,
        call=call,
        exact=functools.partial(exact.order, experts=experts),
        written=lambda pools, x, layer: (),
        layers=1,
        bytes=4 * (3 * tokens * top + experts),
        flops=0,
        limits=(0, 0),
        chain="expert",
    )


def _lengths(lengths) -> str:
    return str(lengths[0]) if len(lengths) == 1 else f"{len(lengths)}x{lengths[0]}"


KIMI = Heads(32, 32, per_channel=True)
"""Of Kimi-Linear-48B-A3B."""

OLMO = Heads(30, 30, key_dim=96, value_dim=192, beta_scale=2.0)
"""Of Olmo-Hybrid-7B."""

WORKLOADS = {
    work.name: work
    for work in (
        *(recurrent("decode", rows, Heads(16, heads)) for heads in (32, 48, 64) for rows in (1, 16, 128, 256)),
        recurrent("decode", 128, Heads(16, 48), vk=False),
        recurrent("decode", 128, Heads(16, 48), state="bfloat16"),
        recurrent("decode", 128, Heads(16, 48), state="bfloat16", stochastic=True),
        *(recurrent("verify", 128, Heads(16, 48), old=old, new=4) for old in (0, 1, 4)),
        recurrent("verify", 128, Heads(16, 32), old=4, new=4),
        recurrent("verify", 1, Heads(16, 48), old=4, new=4),
        recurrent("decode", 128, Heads(16, 48), real=9),
        recurrent("verify", 128, Heads(16, 48), old=4, new=4, real=9),
        *(chunked((n,), Heads(16, 48)) for n in (1024, 8192, 32768)),
        chunked((1024,) * 8, Heads(16, 48)),
        chunked((8192,), Heads(16, 48), correlated=True),
        chunked((8192,), Heads(16, 32)),
        recurrent("decode", 1, KIMI),
        recurrent("decode", 128, KIMI),
        recurrent("decode", 128, KIMI, vk=False),
        recurrent("verify", 128, KIMI, old=4, new=4),
        recurrent("fold", 128, KIMI, old=4, new=0),
        chunked((1024,), KIMI),
        chunked((8192,), KIMI),
        chunked((8192,), KIMI, correlated=True),
        recurrent("decode", 128, OLMO),
        recurrent("verify", 128, OLMO, old=4, new=4),
        chunked((8192,), OLMO),
        conv_prefill((8192,), 10240),
        conv_prefill((8192,), 8192),
        conv_update(128, 10240),
        conv_update(128, 10240, pending=4, new=4),
        conv_update(128, 10240, real=9),
        conv_update(128, 10240, pending=4, new=4, real=9),
        attention(128, 2048, 1, 24, 4, 256),
        attention(128, 2048, 4, 24, 4, 256),
        attention(128, 2048, 1, 24, 4, 256, int8=True),
        attention(128, 2048, 1, 16, 4, 256),
        attention(128, 2048, 1, 32, 2, 256),
        attention(128, 2048, 1, 24, 4, 256, real=9),
        attention(1, 131072, 1, 24, 4, 256),
        attention(1, 1125, 1, 16, 4, 256, table=2304),
        attention(16, 1125, 1, 16, 4, 256, table=2304),
        # A long context beside short ones, and what it costs them that one might be there.
        attention(63, 1000, 1, 16, 4, 256, long=131072),
        attention(64, 1000, 1, 16, 4, 256, table=131072),
        attention(64, 1000, 1, 16, 4, 256),
        attention(63, 1000, 4, 16, 4, 256, long=131072),
        attention(63, 1000, 1, 16, 4, 256, long=131072, int8=True),
        attention(1, 8192, 8192, 24, 4, 256),
        attention(1, 8192, 2048, 24, 4, 256),
        kv_write(128, 4, 256),
        kv_write(128, 4, 256, int8=True),
        kv_write(128, 4, 256, real=9),
        *(enter(rows, 16, 4, 256, 64) for rows in (1, 128, 512)),
        latent(128, 2048, 1, 32),
        latent(128, 2048, 1, 128),
        latent(1, 131072, 1, 128),
        latent(1, 8192, 8192, 32),
        latent_write(128),
        *(
            work
            for rows in (1, 128)
            for work in (
                products("delta", rows, 4096, 8192, 4096, 32, 32),
                products("gate-up", rows, 4096, 12288, 12288),
                products("out", rows, 4096, 4096),
                products("down", rows, 12288, 4096),
            )
        ),
        *(
            work
            for rows in (1, 16, 128)
            for work in (
                products("delta", rows, 4096, 8192, 4096, 32, 32, codes="float8_e4m3fn"),
                products("gate-up", rows, 4096, 12288, 12288, codes="float8_e4m3fn"),
                products("out", rows, 4096, 4096, codes="float8_e4m3fn"),
                products("down", rows, 12288, 4096, codes="float8_e4m3fn"),
            )
        ),
        products("down", 16, 12288, 4096, codes="float8_e4m3fn", grid=(1, 12288)),
        products("down", 16, 12288, 4096, codes="int8", grid=(1, 12288)),
        products("gate-up", 16, 4096, 12288, 12288, codes="int8"),
        products("delta", 128, 4096, 8192, 4096, 32, 32, codes="int8"),
        *(products("head", rows, 4096, 248320, codes="float8_e4m3fn", grid=(1, 4096)) for rows in (1, 16, 128)),
        # 27B: too few outputs for the tile of many, too many to be called few.
        products("down", 1, 17408, 5120),
        products("down", 1, 17408, 5120, codes="float8_e4m3fn"),
        products("out", 1, 6144, 5120, codes="float8_e4m3fn"),
        normed(1, 4096),
        normed(1, 4096, parts=4),
        normed(128, 4096, parts=2),
        normed(128, 5120),
        gated(16, 32, 128),
        activated(1280, 1024),
        draws(128, 248320, 1.0),
        draws(128, 248320, 0.0),
        draws(1, 248320, 1.0),
        *(choices(tokens, 512, 10) for tokens in (1, 128, 8192)),
        *(order(tokens, 512, 10) for tokens in (1, 128, 512)),
        grouped(128, 512, 10, 4096, 2048),
        grouped(128, 256, 8, 2048, 1024),
        grouped(8192, 512, 10, 4096, 2048),
        # Of 4096 x 2048, 512 matrices of codes are more than Pallas can number: see memory.UNNUMBERED.
        grouped(128, 512, 10, 2048, 1024, codes="float8_e4m3fn"),
        grouped(128, 256, 8, 2048, 1024, codes="float8_e4m3fn"),
        grouped(8192, 512, 10, 2048, 1024, codes="float8_e4m3fn"),
        grouped(128, 256, 8, 2048, 1024, codes="int8"),
        # Qwen3.5-397B-A17B, whole experts on four ranks.
        grouped(128, 512, 10, 4096, 2048, codes="float8_e4m3fn", ranks=4),
        grouped(128, 512, 10, 1024, 4096, codes="float8_e4m3fn", ranks=4),
        # Three drafts of each of these requests are verified at once.
        grouped(512, 512, 10, 4096, 2048, codes="float8_e4m3fn", ranks=4),
        grouped(512, 512, 10, 1024, 4096, codes="float8_e4m3fn", ranks=4),
        grouped(8192, 512, 10, 4096, 2048, codes="float8_e4m3fn", ranks=4),
    )
}
