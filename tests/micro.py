"""A float32 model of three small layers with everything in it that the real ones have: one rank's or several ranks'.

Its MTP head, where it is asked for, is as random as the rest: greedy drafts are all but never right.
"""

import dataclasses
import functools

import jax
import numpy as np

from gdnjax import build_model, random_params
from gdnjax.config import (
    AttentionConfig,
    DeltaConfig,
    LatentAttentionConfig,
    LayerKind,
    MlpKind,
    ModelConfig,
    MoeConfig,
    YarnConfig,
)
from gdnjax.sharding import path_name
from tests.compiling import IN_ONE_PIECE, WITHOUT_MLIR, compiled_with

D, A = LayerKind.DELTA, LayerKind.ATTENTION

MICRO = ModelConfig(
    model_type="qwen3_5_moe_text",
    # Odd, so that two and four ranks pad it.
    vocab_size=101,
    hidden_size=32,
    intermediate_size=48,
    # States of two layers share a pool, and one of them is updated behind attention.
    layer_kinds=(D, A, D),
    mlp_kinds=(MlpKind.MOE, MlpKind.DENSE, MlpKind.DENSE),
    # K and V differ, so that a state read in the wrong layout is another state.
    delta=DeltaConfig(num_key_heads=4, num_value_heads=8, key_head_dim=8, value_head_dim=12, conv_kernel=4),
    # Four ranks hold each of the two kv heads twice.
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16, rotary_dim=8, rope_theta=10_000.0),
    moe=MoeConfig(
        num_experts=4, experts_per_token=2, intermediate_size=16, shared_intermediate_size=16, normalise_top_k=True
    ),
    dtype="float32",
    mtp_layers=1,
)


SHALLOW = dataclasses.replace(MICRO, layer_kinds=(D, A), mlp_kinds=(MlpKind.MOE, MlpKind.DENSE))
"""A layer of each kind, and both kinds of MLP: half the compiling."""


LATENTS = ModelConfig(
    model_type="deepseek_v3",
    vocab_size=MICRO.vocab_size,
    hidden_size=32,
    intermediate_size=48,
    layer_kinds=(A,) * 3,
    mlp_kinds=(MlpKind.DENSE, MlpKind.MOE, MlpKind.MOE),
    attention=LatentAttentionConfig(
        num_heads=3,
        q_lora_rank=12,
        kv_lora_rank=20,
        qk_nope_head_dim=8,
        qk_rope_head_dim=6,
        v_head_dim=10,
        rope_theta=10_000.0,
        yarn=YarnConfig(factor=4.0, original_context=64, attention_factor=1.1),
        score_factor=1.3,
    ),
    moe=MoeConfig(
        num_experts=8,
        experts_per_token=3,
        intermediate_size=16,
        shared_intermediate_size=16,
        normalise_top_k=True,
        scoring="sigmoid",
        routed_scaling=1.7,
        correction_bias=True,
        num_groups=4,
        top_k_groups=2,
        shared_gate=False,
    ),
    zero_centred_norms=False,
    dtype="float32",
    mtp_layers=1,
)
"""Latents alone and no state, experts in groups: the other small model, of one rank."""


def made(config: ModelConfig, seed: int, **options) -> dict:
    """Random float32 parameters of one rank. A small program for each shape, so compiled quickly, whoever asks: as
    users compile them they would take ten seconds.
    """
    with compiled_with(IN_ONE_PIECE, WITHOUT_MLIR):
        return random_params(config, 1, "float32", jax.random.key(seed), **options)


@functools.cache
def micro_params(tp: int = 1, mtp: bool = False, expert_parallel: bool = False) -> dict:
    """Global float32 parameters as `tp` ranks hold them side by side; the same model for every `tp`, with its head and
    without, experts whole or cut.
    """
    params = made(MICRO, 3)
    if mtp:
        params |= {"mtp": made(MICRO, 4, mtp=True)["mtp"]}
    return spread(params, tp, expert_parallel)


def spread(params: dict, tp: int, expert_parallel: bool = False) -> dict:
    """Global arrays of one rank as `tp` ranks hold them; of any model with MICRO's heads."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _spread(path_name(path), np.asarray(leaf), tp, expert_parallel), params
    )


def _spread(name: str, value: np.ndarray, tp: int, expert_parallel: bool) -> np.ndarray:
    delta, attention = MICRO.delta, MICRO.attention
    match name.removesuffix(".weight").rsplit(".", 1)[-1]:
        case "in_proj_qkv" | "conv1d":
            return _rank_major(np.split(value, [delta.key_dim, 2 * delta.key_dim]), tp)
        case "gate_up_proj" if not expert_parallel:
            gate, up = np.split(value.swapaxes(0, 1), 2)
            return _rank_major([gate, up], tp).swapaxes(0, 1)
        case "k_proj" | "v_proj":
            heads = value.reshape(attention.num_kv_heads, attention.head_dim, -1)
            return heads.repeat(max(1, tp // attention.num_kv_heads), axis=0).reshape(-1, value.shape[1])
        case "embed_tokens" | "lm_head":
            return np.pad(value, ((0, -len(value) % tp), (0, 0)))
    return value


def _rank_major(parts: list[np.ndarray], tp: int) -> np.ndarray:
    """The first piece of every part, then the second piece of every part, and so on."""
    return np.concatenate([np.split(part, tp)[rank] for rank in range(tp) for part in parts])


@functools.cache
def shallow_params(mtp: bool = False) -> dict:
    """SHALLOW's, of one rank; the same model with its head and without."""
    params = made(SHALLOW, 3, mtp=True)
    return params if mtp else {name: leaf for name, leaf in params.items() if name != "mtp"}


def micro_model(tp: int = 1, mtp: bool = False, expert_parallel: bool = False):
    """Its `Model`, of one of `tp` ranks."""
    return build_model(MICRO.with_expert_parallel() if expert_parallel else MICRO, "float32", tp, mtp=mtp)
