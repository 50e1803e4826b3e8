"""Small calls of every kernel, with poison wherever nothing may be read, and the definition's word on each.

They run wherever `launch.run` runs kernels: interpreted by XLA, or as machine code in the emulator.
"""

import numpy as np

from gdnjax.pallas_kernels.expert_routing import Rule
from rocm.cases.attention import attention, enter, kv_write, latent, latent_write
from rocm.cases.case import BFLOAT16, FLOAT8, Bound, Case
from rocm.cases.products import activated, draw, every_code, gated, grouped, normed, product, routing
from rocm.cases.recurrent import chunked, conv, conv_prefill, delta

__all__ = ["Bound", "Case", "cases", "race"]

BY_ROW = (1, 1 << 10)
"""The grid of a scale for each output."""

KV, VK, MIXED_KV, MIXED_VK = ("kv", "kv"), ("vk", "vk"), ("mixed", "kv"), ("mixed", "vk")


def cases() -> list[Case]:
    """Every kernel, in all orders and types that it has."""
    return [
        delta("decode"),
        delta("decode", KV),
        delta("decode", state=BFLOAT16),
        delta("decode", KV, state=BFLOAT16),
        delta("decode", MIXED_VK),
        delta("decode", MIXED_KV, state=BFLOAT16),
        delta("decode", ("vk", "kv")),
        *(delta("decode", gates=chosen) for chosen in (1, 2, 3)),
        delta("decode", act=np.float32),
        delta("decode", heads=3, key_heads=3, dim=48),
        delta("verify", old=2, new=2),
        delta("verify", KV, state=BFLOAT16, old=3, new=4),
        delta("verify", MIXED_VK, old=2, new=2),
        delta("verify", old=2, new=2, gates=1),
        delta("fold", old=3, new=0),
        delta("fold", KV, old=3, new=0),
        delta("fold", KV, old=3, new=0, gates=1),
        delta("fold", MIXED_VK, state=BFLOAT16, old=3, new=0),
        chunked(),
        chunked(KV, kept=True),
        chunked(MIXED_VK, state=BFLOAT16, kept=True),
        chunked(act=np.float32),
        chunked(act=np.float32, gates=1),
        chunked(heads=3, key_heads=3, dim=48),
        # States rounded by noise.
        delta("decode", state=BFLOAT16, stochastic=True),
        delta("verify", KV, state=BFLOAT16, old=2, new=2, stochastic=True),
        chunked(state=BFLOAT16, kept=True, stochastic=True),
        # A decay of each key channel.
        delta("decode", channels=True),
        delta("decode", KV, state=BFLOAT16, channels=True),
        delta("decode", MIXED_VK, channels=True),
        *(delta("decode", gates=chosen, channels=True) for chosen in (1, 2)),
        delta("verify", old=2, new=2, channels=True),
        delta("verify", KV, old=3, new=4, act=np.float32, channels=True),
        delta("fold", old=3, new=0, channels=True),
        delta("fold", KV, old=3, new=0, gates=1, channels=True),
        chunked(channels=True),
        chunked(KV, kept=True, act=np.float32, channels=True),
        chunked(MIXED_VK, act=np.float32, gates=1, channels=True),
        chunked(heads=3, key_heads=3, dim=48, channels=True),
        # Heads that are neither square nor powers of two.
        delta("decode", dim=96, value_dim=192, beta_scale=2.0),
        delta("decode", MIXED_VK, dim=96, value_dim=192),
        delta("verify", KV, old=2, new=2, dim=96, value_dim=192, beta_scale=2.0),
        chunked(dim=96, value_dim=192, beta_scale=2.0),
        conv("decode"),
        conv("decode", 1024),
        conv("verify"),
        conv("fold"),
        *(
            conv(kind, dtype=np.float32, large=large)
            for kind in ("decode", "verify", "fold")
            for large in (True, False)
        ),
        conv_prefill(),
        conv_prefill(512, kept=True),
        *(conv_prefill(kept=True, dtype=np.float32, large=large) for large in (True, False)),
        attention("decode"),
        attention("decode", width=256, heads=6, kv_heads=1),
        attention("decode", width=80, heads=3, kv_heads=3),
        attention("decode", kv=np.int8),
        attention("decode", kv=FLOAT8),
        attention("decode", first=20),
        attention("verify", queries=4),
        attention("verify", queries=4, past=2),
        attention("split", blocks=32),
        attention("split", blocks=32, kv=np.int8),
        attention("parts", blocks=32, parts=True, gated=True),
        attention("parts", blocks=32, parts=True, queries=4, kv=np.int8),
        attention("parts", blocks=32, parts=True, kv=FLOAT8, width=80, first=20),
        attention("decode", gated=True),
        attention("prefill", queries=64),
        attention("prefill", queries=64, width=256, heads=2, kv_heads=1),
        attention("prefill", queries=64, width=24, blocks=5, past=90),
        attention("prefill", queries=64, kv=FLOAT8),
        kv_write(),
        kv_write(kv_heads=3, width=80),
        kv_write(np.int8),
        kv_write(FLOAT8),
        enter(),
        enter(width=80, heads=3, kv_heads=3, rotary=80, gated=False),
        enter(heads=4, width=256, rotary=64, normed=False),
        enter(np.int8),
        enter(FLOAT8, rotary=0, gated=False),
        latent("decode"),
        latent("decode", value_dim=24, rest=8, heads=3),
        latent("decode", value_dim=128, rest=0, heads=20, first=20),
        latent("decode", value_dim=128, rest=16, dtype=np.float32),
        latent("verify", queries=4, value_dim=128, past=2),
        latent("split", value_dim=128, blocks=32),
        latent("parts", value_dim=128, blocks=32, parts=True),
        latent("prefill", queries=64, heads=2),
        latent("prefill", queries=64, heads=2, value_dim=48, rest=16, dtype=np.float32),
        latent("prefill", queries=64, heads=3, value_dim=48, rest=16, blocks=5, past=90),
        latent_write(),
        latent_write(width=80),
        grouped("few"),
        grouped("many", depth=96, width=72),
        *(product(kind, rows) for rows in (3, 40) for kind in ("narrow", "wide")),
        *(product("swiglu", rows, outputs=(80, 80)) for rows in (3, 40)),
        product("split", 3, depth=1024, outputs=(96,)),
        *coded_products(),
        normed(200),
        normed(256, np.float32),
        normed(200, parts=4),
        gated(3, 24),
        activated(72),
        normed(256, np.float32, parts=1),
        routing(9, 48, Rule(3)),
        routing(40, 64, Rule(4, scoring="sigmoid", scaling=2.5), biased=True),
        routing(5, 40, Rule(4, scoring="sigmoid", normalised=False, groups=5, top_groups=2), biased=True),
        draw(),
        draw(bounded=True),
        draw(sparing=True),
        draw(bounded=True, sparing=True),
    ]


def coded_products() -> list[Case]:
    """Of weights of eight bits: both types, scales of blocks and of rows, blocks that are cut, codes beside numbers."""
    int8 = np.int8
    return [
        every_code(FLOAT8),
        every_code(int8),
        product("narrow", 3, codes=FLOAT8, numbers=(1,)),
        product("narrow", 3, depth=200, codes=int8, grid=(16, 16), numbers=(0,)),
        product("narrow", 40, outputs=(80, 24, 1), codes=FLOAT8, grid=BY_ROW),
        product("wide", 3, depth=200, codes=FLOAT8, grid=BY_ROW),
        product("wide", 40, depth=200, codes=FLOAT8, grid=(24, 48), numbers=(1,)),
        product("wide", 40, codes=int8),
        product("logits", 3, outputs=(80,), codes=FLOAT8, grid=BY_ROW),
        product("logits", 40, outputs=(80,), codes=FLOAT8, grid=BY_ROW),
        product("swiglu", 3, outputs=(80, 80), codes=FLOAT8),
        product("swiglu", 3, outputs=(80, 80), codes=int8, numbers=(1,)),
        product("swiglu", 40, depth=200, outputs=(80, 80), codes=FLOAT8, grid=(16, 16)),
        product("split", 3, depth=1024, outputs=(96,), codes=FLOAT8),
        product("split", 3, depth=1024, outputs=(96,), codes=int8, grid=BY_ROW),
        grouped("few", codes=FLOAT8),
        grouped("few", codes=FLOAT8, expected=3),
        grouped("few", depth=200, width=72, codes=np.int8, grid=BY_ROW),
        grouped("many", depth=104, width=72, codes=FLOAT8, grid=(16, 16)),
    ]


def race() -> Case:
    """A call that the contract forbids, with programs that race. Its numbers may be right all the same."""
    return delta("decode", ("vk", "kv"), in_place=True)
