"""What the gate compiles: every kernel at every named workload, and whole steps at the sizes of published models."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.sharding import Mesh, SingleDeviceSharding
from kernel_bench.workloads import OLMO, WORKLOADS, Workload

from gdnjax.assets import config_file
from gdnjax.backend import Backend
from gdnjax.checkpoint.coded import usual_formats
from gdnjax.config import ATTENTION, DELTA, EngineConfig, ModelConfig
from gdnjax.memory import MemoryPlan, StateGeometry
from gdnjax.models import abstract_params, build_model, engine_geometry, partition
from gdnjax.serving import packing
from gdnjax.serving.planning import with_shardings
from gdnjax.state import empty_state, shardings_of
from gdnjax.step import StepOptions, Steps, build_word_steps
from rocm.compiling import Demands
from rocm.counts import COUNTED, COUNTED_LAYERS, LAYERS

MAX_MODEL_LEN = 8192

STEP_LAYERS = (0, 1, LAYERS - 1)
"""Of a period of a model: the first layer, one behind it, whose rows of the pools are not the first, and attention. A
third GDN layer would be the second again.
"""

STEP_MODELS = (
    ("qwen3.5-9b", 1, 0, False),
    ("qwen3.5-9b", 2, 3, True),
    ("qwen3.5-35b-a3b", 1, 3, True),
)
"""(preset, ranks, drafts, whether its pools are over 4 GiB) of whole steps in bfloat16. With WHOLE_EXPERTS they have
every pair of dense or MoE, one rank or several, and plain or with drafts in large pools.
"""

WHOLE_EXPERTS = "qwen3.5-397b-a17b", 4
"""(preset, ranks) of those with whole experts, weights in FP8 blocks."""

SLOTS, BLOCKS = 256, 32768
"""Of the pools of a step, times its ranks: so many that each pool is larger than all that the step may keep beside
them.
"""

IN_LARGE_POOLS = (
    "gdn-decode-32h-128",
    "gdn-decode-48h-128-kv",
    "gdn-decode-48h-128-bf16state",
    "gdn-verify-48h-128-4+4",
    "gdn-prefill-48h-1024",
    "kda-decode-32h-128",
    "kda-verify-32h-128-4+4",
    "kda-prefill-32h-8192",
    "conv-prefill-8192-8192",
    "conv-decode-10240-128",
    "conv-verify-10240-128",
    "attention-decode-24/4x256-128x2048",
    "attention-decode-24/4x256-128x2048-int8",
    "attention-decode-24/4x256-1x131072",
    "attention-decode-16/4x256-1x1125-of2304",
    "attention-prefill-24/4x256-1x8192-2048q",
    "kv-write-4x256-128",
    "kv-write-4x256-128-int8",
    "latent-decode-32x512+64-128x2048",
    "latent-decode-128x512+64-1x131072",
    "latent-prefill-32x512+64-1x8192-8192q",
    "latent-write-512+64-128",
)
"""Workloads that are compiled again in pools over 4 GiB: every way to index a pool. The fold is in a step, the seal."""

WAVES = {
    "causal_conv1d_decode": 8,
    "causal_conv1d_fold": 8,
    "causal_conv1d_prefill": 8,
    "causal_conv1d_verify": 8,
    "causal_conv1d_windows": 8,
    "expert_routing_choose": 8,
    "expert_routing_sort": 8,
    "gated_delta_rule_decode": 4,
    "gated_delta_rule_decode_kda": 7,
    "gated_delta_rule_fold": 7,
    "gated_delta_rule_fold_kda": 5,
    "gated_delta_rule_inverse": 4,
    "gated_delta_rule_scores": 3,
    "gated_delta_rule_scores_kda": 2,
    "gated_delta_rule_verify": 5,
    "gated_delta_rule_verify_kda": 4,
    "gated_delta_rule_walk": 2,
    "gated_delta_rule_walk_kda": 2,
    "grouped_matmul": 4,
    "grouped_matmul_tiles": 8,
    "gumbel_argmax": 8,
    "latent_attention": 1,
    "latent_attention_merge": 8,
    "latent_attention_split": 1,
    "latent_attention_write": 8,
    "matmul_project": 4,
    "matmul_rows": 4,
    "matmul_rows_activated": 4,
    "matmul_rows_gated": 4,
    "matmul_swiglu": 4,
    "paged_attention": 1,
    "paged_attention_enter": 8,
    "paged_attention_enter_quantised": 8,
    "paged_attention_merge": 8,
    "paged_attention_split": 1,
    "paged_attention_write": 8,
    "paged_attention_write_quantised": 8,
}
"""The fewest waves a SIMD of each kernel over both chips and all sizes: what it has. Who takes some away says why here.

Attention holds a head of 256 for 64 rows in registers; smaller tiles would read keys and values more often. The fold
has 8 waves in pools up to 4 GiB, and 7 where addresses have 64 bits.
"""

MASKED_WAVES = {"gated_delta_rule_verify": 4}
"""The same of heads that are no powers of two: a mask, and a register more for each of the rows that wait."""

LARGE = 64 << 20
"""Bytes of a workload's pools from which a copy of them would show: chunks of a prompt need more than small pools."""


@dataclasses.dataclass(frozen=True)
class Function:
    """Something to compile. `refused_for`: it has to be refused, and this is what is said of it."""

    name: str
    lower: Callable[[], Any]
    demands: Demands
    refused_for: str | None = None


def kernels(arch: str, device) -> Iterator[Function]:
    """Each workload of bench_kernels, and some of them in pools over 4 GiB."""
    backend, placement = Backend("pallas", arch), SingleDeviceSharding(device)
    for name in WORKLOADS:
        yield workload(name, device, backend)
    for name in IN_LARGE_POOLS:
        work = WORKLOADS[name]
        arguments, pools = enlarged(*jax.eval_shape(work.inputs, jax.random.key(0)))
        name = f"{name}, pools over 4 GiB"
        yield _kernel(name, work, _placed(arguments, placement), _placed(pools, placement), backend)


def workload(name: str, device, backend: Backend) -> Function:
    """One of bench_kernels."""
    work, placement = WORKLOADS[name], SingleDeviceSharding(device)
    arguments, pools = jax.eval_shape(work.inputs, jax.random.key(0))
    return _kernel(name, work, _placed(arguments, placement), _placed(pools, placement), backend)


def _kernel(name: str, work: Workload, arguments, pools, backend: Backend) -> Function:
    size = _bytes(pools)
    return Function(
        name,
        lambda: jax.jit(lambda x, p: work.call(x, p, 0, backend), donate_argnums=1).lower(arguments, pools),
        Demands(
            size,
            most_temporary_bytes=size - 1 if size >= LARGE else None,
            waves=WAVES | (MASKED_WAVES if OLMO.sizes in name else {}),
        ),
    )


def enlarged(arguments: dict[str, Any], pools) -> tuple[dict[str, Any], Any]:
    """A workload's shapes with as many slots or blocks as `fatal_count` says; attention has its pools as arguments."""
    names = () if jax.tree.leaves(pools) else ("k", "v", "scales", "c")
    read = {name: arguments[name] for name in names if name in arguments}
    leaves = jax.tree.leaves((pools, read))
    largest = max(leaves, key=lambda leaf: leaf.size * leaf.dtype.itemsize)
    layers, per_layer = 2 * largest.shape[0], math.prod(largest.shape[2:])
    count = fatal_count(layers, per_layer, largest.dtype.itemsize)

    def enlarge(leaf):
        return jax.ShapeDtypeStruct((layers, count, *leaf.shape[2:]), leaf.dtype)

    return arguments | jax.tree.map(enlarge, read), jax.tree.map(enlarge, pools)


def fatal_count(layers: int, elements: int, itemsize: int) -> int:
    """The fewest slots or blocks, of so many elements, of a pool that Triton's fault hits (see buffers.py).

    It has more than 2^32 bytes, and a layer of fewer than 2^31 elements whose size in bits has bit 31 set, so that the
    largest offset that an unbounded layer could have, in bits, is negative as an integer of 64 bits.
    """
    count = (1 << 32) // (layers * elements * itemsize) + 1
    while not count * elements * itemsize * 8 >> 31 & 1:
        count += 1
    if count * elements >= 1 << 31:
        raise ValueError(f"{layers} layers of {elements} elements a slot: no pool of theirs is hit")
    return count


def steps(arch: str, devices_of: Callable[[int], list[Any]]) -> Iterator[Function]:
    """Whole steps: STEP_LAYERS of a dense and of MoE models, with and without drafts, on one rank and several, in small
    pools and in pools over 4 GiB; of the largest its weights in FP8 blocks, experts whole on four ranks.
    """
    for preset, ranks, drafts, large in STEP_MODELS:
        yield from _steps(arch, devices_of(ranks), preset, ranks, drafts, large)
    preset, ranks = WHOLE_EXPERTS
    yield from _steps(arch, devices_of(ranks), preset, ranks, 0, False, whole_experts_in_fp8=True)


def _steps(
    arch: str, devices, preset: str, ranks: int, drafts: int, large: bool, *, whole_experts_in_fp8: bool = False
) -> Iterator[Function]:
    engine = EngineConfig(
        max_num_seqs=32,
        max_num_batched_tokens=2048,
        tensor_parallel_size=ranks,
        enable_expert_parallel=whole_experts_in_fp8,
        num_speculative_tokens=drafts,
    )
    counts = None if large else (SLOTS * ranks, BLOCKS * ranks)
    built = _built(arch, devices, preset, engine, STEP_LAYERS, counts, fp8=whole_experts_in_fp8)
    params, state, options = built.params, built.state, built.options
    full = dataclasses.replace(options, full=True, max_logprobs=engine.max_logprobs)
    width = MAX_MODEL_LEN // engine.block_size
    # The pools are updated in place, and all temporaries together are smaller than any copy of states, keys or values.
    pools = (state.cache.slots[DELTA]["ssm"], *state.cache.pages[ATTENTION].values())
    demands = Demands(
        alias_bytes=_bytes(state.cache) // ranks,
        most_temporary_bytes=min(map(_bytes, pools)) // ranks - 1,
        waves=WAVES,
    )
    # As engines have them: whoever has a structure is drawn for by the full sampler, and so is a prompt's end.
    prefill = packing.pack_prefill([], tokens=2048, rows=8, table_width=width, mask_rows={})
    decode = {mask: built.decode_batch(32, masks=mask) for mask in (False, True)}
    name = f"{preset}, {len(STEP_LAYERS)} layers, {ranks} rank{'s' * (ranks > 1)}, {drafts} drafts"
    name += ", pools over 4 GiB" * large + ", whole experts in FP8 blocks" * whole_experts_in_fp8
    yield Function(f"prefill of {name}", lambda: built.steps.prefill(full).lower(params, state, prefill), demands)
    # The sampler is the same in all of them, but for drafts and ranks.
    samplers = {"plain": options} | ({"full": full} if (drafts > 0) == (ranks > 1) else {})
    for sampler, chosen in samplers.items():
        yield Function(
            f"decode, {sampler} sampler, of {name}",
            lambda chosen=chosen: built.steps.decode(chosen).lower(params, state, decode[chosen.full]),
            demands,
        )
    if drafts:
        seal = packing.pack_seals([], rows=8)
        yield Function(f"seal of {name}", lambda: built.steps.seal.lower(params, state, seal), demands)


@dataclasses.dataclass(frozen=True)
class _Built:
    """The steps of some layers of a model, as shapes."""

    steps: Steps
    params: Any
    state: Any
    options: StepOptions
    block_size: int

    def decode_batch(self, rows: int, *, masks: bool = False):
        drafts = self.options.num_drafts
        shape = {"table_width": MAX_MODEL_LEN // self.block_size, "grown_width": 1 + drafts, "drafts": drafts > 0}
        return packing.pack_decode([], {}, [], rows=rows, **shape, mask_rows={} if masks else None)


def _built(
    arch: str,
    devices,
    preset: str,
    engine: EngineConfig,
    layers: Sequence[int],
    counts: tuple[int, int] | None,
    *,
    fp8: bool = False,
) -> _Built:
    """Steps of these layers of a preset's model, weights in blocks of FP8 or in bfloat16. `counts`: slots and blocks;
    None: pools over 4 GiB.
    """
    config = ModelConfig.from_hf(config_file(preset)).with_layers(layers)
    ranks, drafts = engine.tensor_parallel_size, engine.num_speculative_tokens
    if engine.enable_expert_parallel:
        config = config.with_expert_parallel()
    coded = {}
    if fp8:
        numbers = abstract_params(config, ranks, "bfloat16", mtp=drafts > 0)
        coded = usual_formats(numbers, ranks, "fp8", expert_parallel=config.expert_parallel)
    mesh = Mesh(np.array(devices), ("tp",))
    model = build_model(config, "bfloat16", ranks, mtp=drafts > 0, backend=Backend("pallas", arch))
    geometry = engine_geometry(model, engine)
    slots, blocks = _large_counts(geometry) if counts is None else counts
    plan = MemoryPlan.of_counts(geometry, num_slots=slots, num_blocks=blocks, num_logit_rows=8, num_count_rows=32)
    state = jax.eval_shape(lambda: empty_state(geometry, plan, engine, MAX_MODEL_LEN))
    state = with_shardings(state, shardings_of(state, mesh))
    params = abstract_params(config, ranks, "bfloat16", mtp=drafts > 0, coded=coded)
    params = with_shardings(params, partition.shardings_of(params, mesh, expert_parallel=config.expert_parallel))
    options = StepOptions(state_layout=engine.state_layout, num_drafts=drafts)
    return _Built(build_word_steps(model, mesh, options, params, state), params, state, options, engine.block_size)


def counted(arch: str, devices) -> Iterator[Function]:
    """Steps whose launches are counted: see `rocm.counts`."""
    for what in COUNTED:
        for kind, layers in COUNTED_LAYERS.items():
            engine = EngineConfig(max_num_seqs=128, num_speculative_tokens=what.drafts)

            def lower(what=what, layers=layers, engine=engine):
                built = _built(arch, devices, "qwen3.5-9b", engine, layers, (SLOTS, BLOCKS), fp8=what.fp8)
                batch = built.decode_batch(what.rows)
                return built.steps.decode(built.options).lower(built.params, built.state, batch)

            yield Function(what.of(kind), lower, Demands(most_launches=what.most(layers)))


def _large_counts(geometry: StateGeometry) -> tuple[int, int]:
    """Slots and blocks of pools that Triton's fault hits; one of each is null."""
    states = next(leaf for kind, leaf in geometry.cache.leaves() if kind.name == DELTA and leaf.name == "ssm")
    keys = next(leaf for kind, leaf in geometry.cache.leaves() if kind.name == ATTENTION and leaf.name == "k")
    block = geometry.block_size * math.prod(keys.shape)
    return (
        fatal_count(states.layers, math.prod(states.shape), jnp.dtype(states.dtype).itemsize) - 1,
        fatal_count(keys.layers, block, jnp.dtype(keys.dtype).itemsize) - 1,
    )


def controls(device) -> Iterator[Function]:
    """What has to be refused, or the gate itself is broken."""
    yield known_to_spill(device)
    yield known_to_be_cut(device)
    yield known_to_be_merged(device)


def known_to_be_cut(device) -> Function:
    """One store at a layer that is not bounded, in a pool over 4 GiB (see buffers.py)."""
    shape = (4, fatal_count(4, 128, 4), 128)

    def kernel(layer_ref, x_ref, _, out_ref):
        lane = jnp.arange(128, dtype=jnp.int32)
        plgpu.store(out_ref.at[layer_ref[0], pl.program_id(0), lane], plgpu.load(x_ref.at[lane]))

    def function(layer, x, pool):
        return pl.pallas_call(
            kernel,
            grid=(3,),
            out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
            input_output_aliases={2: 0},
            name="cut",
            compiler_params=plgpu.CompilerParams(num_warps=2, num_stages=1),
        )(layer, x, pool)

    types = ((1,), jnp.int32), ((128,), jnp.float32), (shape, jnp.float32)
    operands = [jax.ShapeDtypeStruct(*kind, sharding=SingleDeviceSharding(device)) for kind in types]
    return Function(
        "a kernel whose offsets are cut",
        lambda: jax.jit(function, donate_argnums=2).lower(*operands),
        Demands(),
        refused_for="buffer instructions into an array",
    )


def known_to_spill(device) -> Function:
    """A chunk of 64 as one product of products in one wave: far more than 512 registers."""

    def kernel(x_ref, o_ref):
        x = x_ref[...]
        for _ in range(2):
            x = x + jnp.exp(x @ x.T) @ x
        o_ref[...] = x

    def function(x):
        out = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pl.pallas_call(
            kernel, out_shape=out, name="spills", compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1)
        )(x)

    x = jax.ShapeDtypeStruct((64, 128), jnp.float32, sharding=SingleDeviceSharding(device))
    return Function("a kernel that spills", lambda: jax.jit(function).lower(x), Demands(), refused_for="VGPR spills")


def known_to_be_merged(device) -> Function:
    """Two products of the same rows, one of them small, as XLA has them where nothing is said of that."""

    def function(x, large, small):
        return x @ large.T, x @ small.T

    operands = [
        jax.ShapeDtypeStruct((rows, 1024), jnp.bfloat16, sharding=SingleDeviceSharding(device))
        for rows in (512, 4096, 64)
    ]
    return Function(
        "products that XLA makes one of",
        lambda: jax.jit(function).lower(*operands),
        Demands(),
        refused_for="sliced of a product that XLA made of several",
    )


def _placed(tree, sharding):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def _bytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
