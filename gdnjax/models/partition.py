"""How ranks share the parameters: one table for all families. None is replicated because nobody thought of it."""

import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gdnjax.sharding import AXIS, P, path_name

# The one table. A parameter's path, joined by dots, is matched against these from the top.
# Weights are stored as in the checkpoint: [out, in]. Column-parallel weights split their outputs, row-parallel ones
# their inputs, and the layer that ends with a row-parallel weight sums over ranks.
TABLE: tuple[tuple[str, PartitionSpec], ...] = (
    (r"(embed_tokens|lm_head|draft_head)\.weight", P(AXIS)),
    (r".*linear_attn\.(in_proj_qkv|in_proj_z|in_proj_b|in_proj_a)\.weight", P(AXIS)),
    (r".*linear_attn\.conv1d\.weight", P(AXIS)),
    (r".*linear_attn\.forget_gate\.A_log", P(None, None, AXIS)),
    (r".*linear_attn\.(forget_gate\.)?(A_log|dt_bias)", P(AXIS)),
    (r".*linear_attn\.(forget_gate\.f_a_proj|g_a_proj)\.weight", P()),
    (r".*linear_attn\.(forget_gate\.f_b_proj|g_b_proj)\.weight", P(AXIS)),
    (r".*linear_attn\.out_proj\.weight", P(None, AXIS)),
    (r".*self_attn\.(q_proj|k_proj|v_proj)\.weight", P(AXIS)),
    (r".*self_attn\.(q_heads_norm|k_heads_norm)\.weight", P(AXIS)),
    (r".*self_attn\.(q_b_proj|k_b_proj|v_b_proj)\.weight", P(AXIS)),
    (r".*self_attn\.(q_a_proj|kv_a_proj_with_mqa)\.weight", P()),
    (r".*self_attn\.o_proj\.weight", P(None, AXIS)),
    (r".*mlp\.experts\.gate_up_proj", P(None, AXIS)),
    (r".*mlp\.experts\.down_proj", P(None, None, AXIS)),
    (r".*mlp\.(shared_experts?\.)?(gate_proj|up_proj)\.weight", P(AXIS)),
    (r".*mlp\.(shared_experts?\.)?down_proj\.weight", P(None, AXIS)),
    (r".*mlp\.gate\.(weight|e_score_correction_bias)", P()),
    (r".*mlp\.shared_expert_gate\.weight", P()),
    (r".*(norm|layernorm)\.weight", P()),
    (r"mtp\.(fc|pre_fc_norm_embedding|pre_fc_norm_hidden)\.weight", P()),
)

# Before TABLE, where ranks share out the routed experts whole.
EXPERT_PARALLEL_TABLE: tuple[tuple[str, PartitionSpec], ...] = ((r".*mlp\.experts\.(gate_up_proj|down_proj)", P(AXIS)),)


# Weights that may stay codes and scales on the devices: what products of rows take. Any other is made numbers of the
# model's dtype as it is read.
CODED = re.compile(
    r".*\.(?!k_b_proj|v_b_proj)(in_proj_\w+|\w+_proj|kv_a_proj_with_mqa)\.weight|.*mlp\.experts\.(gate_up_proj|down_proj)"
)


def spec_of(name: str, *, expert_parallel: bool = False) -> PartitionSpec:
    """The partition spec of a parameter; of codes and scales (`gdnjax.quantized`) that of their weight, since every
    rank has scales of its own. A name that the table lacks is an error, never replicated.

    `expert_parallel` here and below is the model's: modules refuse experts that are shared out otherwise.
    """
    name = re.sub(r"\.(codes|scale)$", "", name)
    for pattern, spec in (*EXPERT_PARALLEL_TABLE, *TABLE) if expert_parallel else TABLE:
        if re.fullmatch(pattern, name):
            return spec
    raise KeyError(f"{name!r} is not in the sharding table (gdnjax/models/partition.py)")


def specs_of(tree: Any, *, expert_parallel: bool = False) -> Any:
    """The tree of partition specs of a tree of parameters."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: spec_of(path_name(path), expert_parallel=expert_parallel), tree
    )


def shardings_of(tree: Any, mesh: Mesh, *, expert_parallel: bool = False) -> Any:
    """The tree of NamedShardings of a tree of parameters."""
    specs = specs_of(tree, expert_parallel=expert_parallel)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
