"""What the gate compiles: every kernel at every named workload, and whole steps at the sizes of published models."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.sharding import Mesh, SingleDeviceSharding
from kernel_bench.workloads import WORKLOADS

from gdnjax.assets import config_file
from gdnjax.backend import Backend
from gdnjax.config import EngineConfig, ModelConfig
from gdnjax.memory import MemoryPlan
from gdnjax.models import abstract_params, build_model
from gdnjax.serving import packing
from gdnjax.serving.engine import _with_shardings
from gdnjax.state import empty_state
from gdnjax.step import StepOptions, build_steps
from rocm.compiling import Demands

LAYERS = 4
"""Of a model whose whole steps are compiled: one period of its layers."""

MAX_MODEL_LEN = 8192

SLOTS, BLOCKS = 256, 32768
"""Of the pools of a step: so many that each pool is larger than all that the step may keep beside them."""

WAVES = {
    "causal_conv1d_decode": 8,
    "causal_conv1d_fold": 8,
    "causal_conv1d_prefill": 8,
    "causal_conv1d_verify": 8,
    "causal_conv1d_windows": 8,
    "gated_delta_rule_decode": 4,
    "gated_delta_rule_fold": 8,
    "gated_delta_rule_inverse": 4,
    "gated_delta_rule_scores": 3,
    "gated_delta_rule_verify": 5,
    "gated_delta_rule_walk": 2,
    "grouped_matmul": 4,
    "gumbel_argmax": 8,
    "matmul_project": 4,
    "matmul_swiglu": 4,
    "paged_attention": 1,
    "paged_attention_split": 1,
    "paged_attention_write": 8,
    "paged_attention_write_quantised": 8,
}
"""The fewest waves a SIMD of each kernel over both chips and all sizes: what it has. Who takes some away says why here.

Attention holds a head of 256 for 64 rows in registers; smaller tiles would read keys and values more often.
"""

LARGE = 64 << 20
"""Bytes of a workload's pools from which a copy of them would show: chunks of a prompt need more than small pools."""


@dataclasses.dataclass(frozen=True)
class Function:
    """Something to compile. `fails`: it has to be refused."""

    name: str
    lower: Callable[[], Any]
    demands: Demands
    fails: bool = False


def kernels(arch: str, device) -> Iterator[Function]:
    """Each workload of bench_kernels."""
    backend = Backend("pallas", arch)
    for name, work in WORKLOADS.items():
        arguments, pools = _placed(jax.eval_shape(work.inputs, jax.random.key(0)), SingleDeviceSharding(device))

        def lower(work=work, arguments=arguments, pools=pools):
            return jax.jit(lambda x, p: work.call(x, p, 0, backend), donate_argnums=1).lower(arguments, pools)

        size = _bytes(pools)
        yield Function(
            name, lower, Demands(size, most_temporary_bytes=size - 1 if size >= LARGE else None, waves=WAVES)
        )


def steps(arch: str, devices_of: Callable[[int], list[Any]]) -> Iterator[Function]:
    """Whole steps: one period of layers of a dense and of an MoE model, with and without drafts, one rank and two."""
    for preset, ranks, drafts in (
        ("qwen3.5-9b", 1, 0),
        ("qwen3.5-9b", 1, 3),
        ("qwen3.5-9b", 2, 3),
        ("qwen3.5-35b-a3b", 1, 3),
    ):
        yield from _steps(arch, devices_of(ranks), preset, ranks, drafts)


def _steps(arch: str, devices, preset: str, ranks: int, drafts: int) -> Iterator[Function]:
    whole = ModelConfig.from_hf(config_file(preset))
    config = dataclasses.replace(whole, layer_kinds=whole.layer_kinds[:LAYERS], mlp_kinds=whole.mlp_kinds[:LAYERS])
    engine = EngineConfig(
        max_num_seqs=32, max_num_batched_tokens=2048, tensor_parallel_size=ranks, num_speculative_tokens=drafts
    )
    mesh = Mesh(np.array(devices), ("tp",))
    model = build_model(config, "bfloat16", ranks, mtp=drafts > 0, backend=Backend("pallas", arch))
    geometry = model.geometry(engine.block_size, engine.ssm_dtype).speculating(engine)
    plan = MemoryPlan.of_counts(geometry, num_slots=SLOTS, num_blocks=BLOCKS, num_logit_rows=8)
    state = _with_shardings(jax.eval_shape(lambda: empty_state(geometry, plan, engine, MAX_MODEL_LEN)), mesh)
    params = _with_shardings(abstract_params(config, ranks, "bfloat16", mtp=drafts > 0), mesh)
    options = StepOptions(state_layout=engine.state_layout, num_drafts=drafts)
    built = build_steps(model, mesh, options, params, state)
    width = MAX_MODEL_LEN // engine.block_size
    # The pools are updated in place, and all temporaries together are smaller than any copy of states, keys or values.
    pools = (state.gdn.ssm, state.kv.k, state.kv.v)
    demands = Demands(
        alias_bytes=_bytes((state.gdn, state.kv)) // ranks,
        most_temporary_bytes=min(map(_bytes, pools)) // ranks - 1,
        waves=WAVES,
    )
    prefill = packing.pack_prefill([], tokens=2048, rows=8, table_width=width)
    decode = packing.pack_decode([], {}, [], rows=32, table_width=width, grown_width=1 + drafts, drafts=drafts > 0)
    name = f"{preset}, {LAYERS} layers, {ranks} rank{'s' * (ranks > 1)}, {drafts} drafts"
    yield Function(f"prefill of {name}", lambda: built.prefill(options).lower(params, state, prefill), demands)
    yield Function(f"decode of {name}", lambda: built.decode(options).lower(params, state, decode), demands)
    if drafts:
        seal = packing.pack_seals([], rows=8)
        yield Function(f"seal of {name}", lambda: built.seal.lower(params, state, seal), demands)


def known_to_spill(device) -> Function:
    """A chunk of 64 as one product of products in one wave: far more than 512 registers."""

    def kernel(x_ref, o_ref):
        x = x_ref[...]
        for _ in range(4):
            x = x + jnp.exp(x @ x.T) @ x
        o_ref[...] = x

    def function(x):
        out = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pl.pallas_call(
            kernel, out_shape=out, name="spills", compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1)
        )(x)

    x = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=SingleDeviceSharding(device))
    return Function("a kernel that spills", lambda: jax.jit(function).lower(x), Demands(), fails=True)


def _placed(tree, sharding):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def _bytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
