"""What an engine's memory is divided by, before there is an engine: the bytes that its devices have left, those of the
weights on one rank, and the workspace of the largest of its steps.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import psutil
from jax.sharding import Mesh

from gdnjax import memory, sharding
from gdnjax.config import EngineConfig
from gdnjax.memory import MemoryPlan
from gdnjax.models import Model, engine_geometry, partition
from gdnjax.serving import packing
from gdnjax.serving.plan import max_growth
from gdnjax.shapes import Params
from gdnjax.state import ServeState, empty_state, shardings_of
from gdnjax.step import StepOptions, build_word_steps

Left = tuple[int, int | None]
"""What `bytes_left` returns."""


def plan_memory(
    model: Model,
    config: EngineConfig,
    mesh: Mesh,
    max_model_len: int,
    params: Any,
    agree: Callable[[Left], Left] = lambda left: left,
) -> MemoryPlan:
    """Divides what is left of the memory of one rank. `params` are the parameters or their shapes. With several
    processes `agree` gives what the one with the least has.

    Raises MemoryError as `memory.plan` does, which says, too, how much of a device is taken, and ValueError for a
    host_cache_gib that the host does not have.
    """
    _check_host_memory(config)
    left, limit = agree(bytes_left(mesh, params, expert_parallel=model.expert_parallel))
    workspace = 0
    # A CPU has no limit to stay under, only memory that happens to be free, so its workspace is not counted. Nor is it
    # where blocks are given and nothing is to be compiled before it is used.
    if limit is not None and (config.warmup or config.num_kv_blocks is None):
        workspace = step_workspace(model, config, mesh, max_model_len, params)
    try:
        return memory.plan(
            engine_geometry(model, config),
            config,
            max_model_len=max_model_len,
            budget_bytes=math.floor(left * config.gpu_memory_utilization),
            weight_bytes=weight_bytes(params, model.tp, expert_parallel=model.expert_parallel),
            workspace_bytes=workspace,
        )
    except MemoryError as error:
        if limit is None or left >= limit:
            raise
        raise MemoryError(
            f"{error}. Of a device's {limit:,} bytes {limit - left:,} are in use, by arrays or another LLM of this "
            "process; its close() gives them back"
        ) from None


def _check_host_memory(config: EngineConfig) -> None:
    """Raises ValueError for more of the host's memory than the host has."""
    total = psutil.virtual_memory().total
    if config.host_cache_gib * (1 << 30) > total:
        raise ValueError(
            f"host_cache_gib={config.host_cache_gib:g} exceeds the memory of this host; allowed: less than "
            f"{total / (1 << 30):,.1f}"
        )


def bytes_left(mesh: Mesh, params: Any, *, expert_parallel: bool = False) -> Left:
    """Bytes that each device of the mesh has for weights, pools and workspace, and the limit of the one with the least;
    None where devices have no limit. Of several processes each sees its own devices. Parameters that are in their
    places are not taken for those of somebody else.
    """
    own = _placed_bytes(mesh, params, partition.shardings_of(params, mesh, expert_parallel=expert_parallel))
    left = []
    for device in mesh.local_devices:
        stats = _memory_stats(device)
        if "bytes_limit" in stats:
            limit = stats["bytes_limit"]
            left.append((limit - stats.get("bytes_in_use", 0) + own[device], limit))
    if left:
        return min(left)
    # Ranks on a CPU share its memory.
    return (psutil.virtual_memory().available + sum(own.values())) // mesh.devices.size, None


def _memory_stats(device: Any) -> dict[str, int]:
    """What a device says of its memory; nothing on a CPU."""
    return device.memory_stats() or {}


def _placed_bytes(mesh: Mesh, params: Any, places: Any) -> dict[Any, int]:
    """Bytes of parameters on each device of the mesh, of those that need not be copied to be where they belong."""
    own = dict.fromkeys(mesh.devices.flat, 0)
    for leaf, place in zip(jax.tree.leaves(params), jax.tree.leaves(places), strict=True):
        if isinstance(leaf, jax.Array) and leaf.sharding.is_equivalent_to(place, leaf.ndim):
            for shard in leaf.addressable_shards:
                own[shard.device] += shard.data.nbytes
    return own


def weight_bytes(params: Any, tp: int, *, expert_parallel: bool = False) -> int:
    """Bytes of the parameters on one of `tp` ranks: of those that are not split the whole."""

    def on_one_rank(path, leaf):
        split = sharding.AXIS in partition.spec_of(sharding.path_name(path), expert_parallel=expert_parallel)
        return leaf.size * leaf.dtype.itemsize // (tp if split else 1)

    return sum(jax.tree.leaves(jax.tree_util.tree_map_with_path(on_one_rank, params)))


def step_workspace(model: Model, config: EngineConfig, mesh: Mesh, max_model_len: int, params: Any) -> int:
    """Bytes of temporaries of the largest of all steps on one rank."""
    return max(workspaces(model, config, mesh, max_model_len, params).values())


def workspaces(model: Model, config: EngineConfig, mesh: Mesh, max_model_len: int, params: Any) -> dict[str, int]:
    """Bytes of temporaries on one rank of each step that the engine may run, in its largest bucket, by name. Compiled
    side by side, from shapes alone.
    """
    pools, geometry = _pools(model, config, max_model_len), engine_geometry(model, config)
    state = jax.eval_shape(lambda: empty_state(geometry, pools, config, max_model_len))
    params = with_shardings(params, partition.shardings_of(params, mesh, expert_parallel=model.expert_parallel))
    state = with_shardings(state, shardings_of(state, mesh))
    # Tracing holds Python's lock; the compiler does not.
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as compilers:
        compiled = {
            name: compilers.submit(step.lower(*arguments).compile)
            for name, step, arguments in largest_steps(model, config, mesh, params, state)
        }
        return {name: future.result().memory_analysis().temp_size_in_bytes for name, future in compiled.items()}


def _pools(model: Model, config: EngineConfig, max_model_len: int) -> MemoryPlan:
    """Pools to compile with. They are no part of the workspace, since steps update them in place.

    Where the settings fix their sizes, these: the engine's own steps then come from the persistent cache. Else the
    smallest, so that those of another start do, whatever memory is free.
    """
    blocks, checkpoints = -(-max_model_len // config.block_size), 0
    if not config.enable_prefix_caching or config.num_checkpoint_slots is not None:
        blocks, checkpoints = config.num_kv_blocks or blocks, config.num_checkpoint_slots or 0
    return MemoryPlan.of_counts(
        engine_geometry(model, config),
        num_slots=config.max_num_seqs + checkpoints,
        num_checkpoint_slots=checkpoints,
        num_blocks=blocks,
        num_logit_rows=config.num_logit_rows,
        num_count_rows=config.max_num_seqs,
    )


def largest_steps(
    model: Model, config: EngineConfig, mesh: Mesh, params: Params, state: ServeState
) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Every kind of step with what it takes, in the largest bucket of each. Fewer drafts than the most need less."""
    plain, full = plain_options(config), full_options(model, config)
    steps = build_word_steps(model, mesh, plain, params, state)
    rows, width, drafts = config.prefill_rows, state.slots.block_table.shape[1], config.num_speculative_tokens
    # The variant with prompt_logprobs holds logits of the prompt beside everything else.
    prefill = packing.pack_prefill(
        [],
        tokens=config.max_num_batched_tokens,
        rows=config.prefill_rows_of(config.max_num_batched_tokens),
        table_width=width,
        checkpoints=config.keeps_states(state.cache.spec),
        mask_rows={},
    )
    with_prompt = dataclasses.replace(full, prompt_logprobs=True)
    yield "prefill", steps.prefill(with_prompt), (params, state, prefill)
    pack_decode = functools.partial(
        packing.pack_decode,
        [],
        {},
        [],
        rows=config.max_num_seqs,
        table_width=width,
        grown_width=max_growth(drafts, config.block_size),
        drafts=drafts > 0,
    )
    yield "decode, full sampler", steps.decode(full), (params, state, pack_decode(mask_rows={}))
    if not config.batch_invariant:
        yield "decode, plain sampler", steps.decode(plain), (params, state, pack_decode())
    if config.keeps_states(state.cache.spec):
        yield "seal", steps.seal, (params, state, packing.pack_seals([], rows=rows))
    yield (
        "admit",
        steps.admit,
        (state, packing.pack_admissions([], rows=rows, table_width=width, tails=config.keeps_states(state.cache.spec))),
    )
    yield "fill counts", steps.fill_counts, (state, packing.count_batch([], [], rows=rows))
    none = np.zeros((0, 0), np.uint32)
    masks = packing.pack_masks(none, rows=config.max_num_seqs, vocab_size=model.vocab_size, ranks=model.tp)
    yield "fill masks", steps.fill_masks, (state, masks)


def plain_options(config: EngineConfig) -> StepOptions:
    """What steps with the plain sampler are compiled with."""
    return StepOptions(
        state_layout=config.state_layout,
        rounding_seed=config.seed if config.ssm_rounding == "stochastic" else None,
        num_drafts=config.num_speculative_tokens,
        acceptance=config.draft_acceptance,
        forced_length=config.spec_acceptance_length,
    )


def full_options(model: Model, config: EngineConfig) -> StepOptions:
    """What steps with the full sampler are compiled with."""
    most = min(config.max_logprobs, model.vocab_size)
    return dataclasses.replace(plain_options(config), full=True, max_logprobs=most)


def with_shardings(tree: Any, shardings: Any) -> Any:
    """The shapes of a tree of arrays, in their places."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree, shardings
    )
