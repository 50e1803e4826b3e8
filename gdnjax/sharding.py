"""Tensor parallelism in one place: the mesh, the table of partition specs, the one shard_map, the collectives.

Everything that a step computes runs per rank inside `shard_step`. Model code sees the sizes of its rank and calls
`psum` and its siblings below; with one rank they are the identity and no shard_map is built.
"""

import logging
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey, GetAttrKey, KeyPath

log = logging.getLogger("gdnjax")

AXIS = "tp"

P = PartitionSpec

# The one table. A leaf's path (parameter or state field, joined by dots) is matched against these from the top.
# Weights are stored as in the checkpoint: [out, in]. Column-parallel weights split their outputs, row-parallel ones
# their inputs, and the layer that ends with a row-parallel weight sums over ranks.
TABLE: tuple[tuple[str, PartitionSpec], ...] = (
    # Parameters.
    (r"(embed_tokens|lm_head)\.weight", P(AXIS)),
    (r".*linear_attn\.(in_proj_qkv|in_proj_z|in_proj_b|in_proj_a)\.weight", P(AXIS)),
    (r".*linear_attn\.conv1d\.weight", P(AXIS)),
    (r".*linear_attn\.(A_log|dt_bias)", P(AXIS)),
    (r".*linear_attn\.out_proj\.weight", P(None, AXIS)),
    (r".*self_attn\.(q_proj|k_proj|v_proj)\.weight", P(AXIS)),
    (r".*self_attn\.o_proj\.weight", P(None, AXIS)),
    (r".*mlp\.experts\.gate_up_proj", P(None, AXIS)),
    (r".*mlp\.experts\.down_proj", P(None, None, AXIS)),
    (r".*mlp\.(shared_expert\.)?(gate_proj|up_proj)\.weight", P(AXIS)),
    (r".*mlp\.(shared_expert\.)?down_proj\.weight", P(None, AXIS)),
    (r".*mlp\.gate\.weight", P()),
    (r".*mlp\.shared_expert_gate\.weight", P()),
    (r".*(norm|layernorm)\.weight", P()),
    (r"mtp\.(fc|pre_fc_norm_embedding|pre_fc_norm_hidden)\.weight", P()),
    # State: heads, channels and vocabulary are split, slots and blocks are not.
    (r"gdn\.ssm", P(None, None, AXIS)),
    (r"gdn\.conv", P(None, None, None, AXIS)),
    (r"gdn\.pending_ab", P(None, None, None, AXIS)),
    (r"gdn\.(layout|pending)", P()),
    (r"kv\.(k|v)", P(None, None, None, AXIS)),
    (r"logit_rows\.bias|token_counts", P(None, AXIS)),
    (r"logit_rows\..*", P()),
    (r"slots\..*", P()),
)


def make_mesh(tp: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of `tp` devices along the axis "tp". Raises ValueError where there are fewer.

    Ranks on a CPU share XLA's pool of one thread a core, and wait for one another in every collective: more ranks than
    threads can wait for ever, so that is logged as a warning.
    """
    devices = list(jax.devices() if devices is None else devices)
    if len(devices) < tp:
        platform = devices[0].platform if devices else "none"
        hint = f"; to try it on a CPU, set JAX_NUM_CPU_DEVICES={tp} before JAX starts" if platform == "cpu" else ""
        raise ValueError(f"tensor_parallel_size={tp} needs {tp} devices, JAX sees {len(devices)} ({platform}){hint}")
    if devices[0].platform == "cpu" and tp > (os.cpu_count() or 1):
        log.warning(
            "%d ranks on %d CPU cores may wait for one another for ever; set the environment variable NPROC to at "
            "least %d before JAX starts",
            tp,
            os.cpu_count(),
            2 * tp,
        )
    return Mesh(np.asarray(devices[:tp]), (AXIS,))


def path_name(path: KeyPath) -> str:
    """A key path of a pytree as the table spells it: `layers.0.mlp.up_proj.weight`, `gdn.ssm`."""
    parts = []
    for key in path:
        if isinstance(key, DictKey):
            parts.append(str(key.key))
        elif isinstance(key, GetAttrKey):
            parts.append(key.name)
        else:
            parts.append(str(getattr(key, "idx", key)))
    return ".".join(parts)


def spec_of(name: str) -> PartitionSpec:
    """The partition spec of a parameter or state field. A name that the table lacks is an error, never replicated."""
    for pattern, spec in TABLE:
        if re.fullmatch(pattern, name):
            return spec
    raise KeyError(f"{name!r} is not in the sharding table (gdnjax/sharding.py)")


def specs_of(tree: Any) -> Any:
    """The tree of partition specs of a tree of parameters or of a ServeState."""
    return jax.tree_util.tree_map_with_path(lambda path, _: spec_of(path_name(path)), tree)


def shardings_of(tree: Any, mesh: Mesh) -> Any:
    """The tree of NamedShardings of a tree of parameters or of a ServeState."""
    return jax.tree_util.tree_map_with_path(lambda path, _: NamedSharding(mesh, spec_of(path_name(path))), tree)


def shard_step(function: Callable, mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable:
    """Wraps a whole step: `function` then sees one rank's part of every argument. The identity for one rank.

    Varying types are not checked, since kernels' outputs carry none; tests compare all ranks instead.
    """
    if mesh.shape[AXIS] == 1:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def rank(tp: int):
    """This rank's index, 0 to tp - 1."""
    return lax.axis_index(AXIS) if tp > 1 else 0


def psum(x, tp: int):
    """Sum over ranks."""
    return lax.psum(x, AXIS) if tp > 1 else x


def pmax(x, tp: int):
    """Maximum over ranks."""
    return lax.pmax(x, AXIS) if tp > 1 else x


def all_gather(x, tp: int, axis: int):
    """The ranks' parts side by side along `axis`."""
    return lax.all_gather(x, AXIS, axis=axis, tiled=True) if tp > 1 else x
