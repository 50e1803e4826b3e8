"""The programs of a kernel run in any order, on many units at once: in the interpreter, which has one, in three orders.

A program that needs what another has written gives other results then, to the bit. Every kernel of the package is here
by one call; the call's own outputs are held against its definition, too.
"""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rocm.cases import (
    BFLOAT16,
    BY_ROW,
    FLOAT8,
    Case,
    attention,
    chunked,
    conv,
    conv_prefill,
    delta,
    draw,
    enter,
    every_code,
    grouped,
    kv_write,
    latent,
    latent_write,
    normed,
    product,
    routing,
)
from rocm.cases.case import same_bits

from gdnjax.backend import INTERPRET
from gdnjax.pallas_kernels import launch as launching
from gdnjax.pallas_kernels.expert_routing import Rule

SEEDS = (1, 2)
"""Of the orders beside that of the programs' numbers."""

CASES = [
    delta("decode", ("vk", "kv")),
    delta("decode", ("mixed", "kv"), state=BFLOAT16),
    delta("verify", old=2, new=2),
    delta("fold", ("kv", "kv"), old=3, new=0),
    chunked(("kv", "kv"), dim=16, channels=True),
    chunked(("mixed", "vk"), kept=True, dim=16),
    conv("decode", 72),
    conv("verify", 72),
    conv("fold", 72),
    conv_prefill(72, kept=True),
    attention("decode", kv=np.int8),
    attention("split", blocks=32),
    attention("parts", blocks=32, parts=True, gated=True),
    attention("prefill", queries=64),
    kv_write(kv_heads=3, width=80),
    kv_write(np.int8),
    enter(width=80, heads=6, kv_heads=3, rotary=32),
    latent("split", value_dim=24, rest=8, blocks=32),
    latent("parts", value_dim=24, rest=8, blocks=32, parts=True),
    latent_write(width=80),
    grouped("few"),
    grouped("few", codes=FLOAT8),
    grouped("few", codes=FLOAT8, expected=3),
    grouped("many", depth=104, width=72, codes=FLOAT8, grid=(16, 16)),
    grouped("few", depth=200, width=72, codes=np.int8, grid=BY_ROW),
    product("narrow", 3),
    product("swiglu", 3, outputs=(80, 80)),
    product("split", 3, depth=1024, outputs=(96,)),
    product("narrow", 3, codes=FLOAT8, numbers=(1,)),
    product("narrow", 40, codes=FLOAT8, grid=BY_ROW),
    product("wide", 40, depth=200, codes=np.int8, grid=(24, 48), numbers=(1,)),
    product("swiglu", 3, depth=200, outputs=(80, 80), codes=FLOAT8, grid=(16, 16)),
    product("split", 3, depth=1024, outputs=(96,), codes=FLOAT8),
    every_code(FLOAT8),
    every_code(FLOAT8, rows=3),
    normed(200, parts=4),
    routing(9, 48, Rule(3)),
    draw(),
    draw(sparing=True),
]

QUICK = {"xla_llvm_disable_expensive_passes": True, "xla_backend_optimization_level": 0}
"""Of XLA's compiler on the CPU: what is compiled runs three times."""


@pytest.fixture(autouse=True)
def backend():
    """Orders are the interpreter's alone: no run on the definitions."""


def runs(case: Case) -> list[dict[str, np.ndarray]]:
    """The outputs of the case, its programs in the order of their numbers and then in others. Orders are operands, so
    one function is compiled for all.
    """
    arrays = {name: jnp.asarray(x) for name, x in case.arrays.items()}
    call = jax.jit(lambda x, orders: called(case, x, orders), compiler_options=QUICK)
    counts = programs(case, arrays)
    orders = [[np.arange(count) for count in counts]]
    orders += [[np.random.default_rng(seed).permutation(count) for count in counts] for seed in SEEDS]
    found = [call(arrays, [numbers.astype(np.int32) for numbers in order]) for order in orders]
    return [{name: np.asarray(x) for name, x in outputs.items()} for outputs in found]


def programs(case: Case, arrays) -> list[int]:
    """Of each launch of the case."""
    counts = []

    def counted(call: launching.Launch, _):
        counts.append(call.programs)
        return [jnp.zeros(out.shape, out.dtype) for out in call.out]

    with mock.patch.object(launching, "run", counted):
        jax.eval_shape(lambda x: case.call(x, INTERPRET), arrays)
    return counts


def called(case: Case, arrays, orders):
    """The case's outputs, the programs of its i-th launch in the i-th order."""
    left = iter(orders)

    def in_order(call: launching.Launch, operands):
        return list(launching.ordered(call)(next(left), *operands))

    with mock.patch.object(launching, "run", in_order):
        outputs = case.call(arrays, INTERPRET)
    assert next(left, None) is None
    return outputs


@pytest.mark.short_cases(
    "gdn-verify-vk-vk-float32-bfloat16-2+2",
    "conv-decode-72-bfloat16",
    "kv-write-bfloat16-3x80",
    "grouped-few-256x96",
    "matmul-split-1024x96-3",
    "draw-3x3000",
)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_order_of_programs_changes_nothing(case):
    first, *others = runs(case)
    assert case.compare(first, case.wanted())[1] == []
    for other in others:
        for name, x in first.items():
            # What nobody compares, padding and null things, programs may race for.
            seen = np.broadcast_to(case.seen.get(name, True), x.shape)
            kept = case.kept.get(name, np.zeros(x.shape, bool))
            assert same_bits(x, other[name])[seen | kept].all(), name


@pytest.mark.parametrize("orders", [(0, 1), (0, 2), (1, 2)])
def test_a_kernel_that_needs_an_order_is_seen(orders):
    def kernel(program, _, count_ref):
        # Each program counts on from what the one before has left.
        count_ref[program] = count_ref[(program + 7) % 8] + 1

    def counts(order: int) -> list[int]:
        (found,) = launching.launch(
            kernel,
            dataclasses.replace(INTERPRET, order=order),
            name="counts",
            programs=8,
            args=(jnp.zeros(8, jnp.int32),),
            out=[jax.ShapeDtypeStruct((8,), jnp.int32)],
            aliases={0: 0},
            warps=1,
        )
        return found.tolist()

    assert counts(0) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert counts(orders[0]) != counts(orders[1])
