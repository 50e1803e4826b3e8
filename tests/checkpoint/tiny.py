"""Tiny random checkpoints: the model's tensors in plain order, as files store them, and as ranks should hold them.

Everything is written out head by head, so that it shares nothing with the index vectors under test.
"""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from gdnjax.config import AttentionConfig, DeltaConfig, LayerKind, MlpKind, ModelConfig, MoeConfig

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

DENSE = ModelConfig(
    model_type="qwen3_5",
    vocab_size=13,
    hidden_size=6,
    intermediate_size=12,
    layer_kinds=(LayerKind.DELTA, LayerKind.ATTENTION),
    mlp_kinds=(MlpKind.DENSE, MlpKind.DENSE),
    delta=DeltaConfig(num_key_heads=4, num_value_heads=8, key_head_dim=3, value_head_dim=5, conv_kernel=4),
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=4, rotary_dim=2, rope_theta=1e4),
)
MOE = dataclasses.replace(
    DENSE,
    model_type="qwen3_5_moe",
    mlp_kinds=(MlpKind.MOE, MlpKind.MOE),
    moe=MoeConfig(
        num_experts=3, experts_per_token=2, intermediate_size=4, shared_intermediate_size=8, normalise_top_k=True
    ),
)
WHOLE_EXPERTS = dataclasses.replace(
    MOE, moe=dataclasses.replace(MOE.moe, num_experts=4, intermediate_size=3)
).with_expert_parallel()
"""Shared out over two or four ranks, none of which could cut a width of 3."""
NEXT = dataclasses.replace(
    MOE, model_type="qwen3_next", mlp_kinds=(MlpKind.DENSE, MlpKind.MOE), interleaved_projections=True
)
TIED = dataclasses.replace(DENSE, tie_word_embeddings=True)


def model_tensors(cfg: ModelConfig, seed: int = 0, *, mtp: bool = False) -> dict[str, np.ndarray]:
    """Random float32 tensors under module names, in plain order: heads one after another, experts fused."""
    d = cfg.hidden_size
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (cfg.vocab_size, d), "norm.weight": (d,)}
    if not cfg.tie_word_embeddings:
        shapes["lm_head.weight"] = (cfg.vocab_size, d)
    for i, (kind, mlp) in enumerate(zip(cfg.layer_kinds, cfg.mlp_kinds, strict=True)):
        shapes |= _layer_shapes(f"layers.{i}", kind, mlp, cfg)
    if mtp:
        shapes["mtp.fc.weight"] = (d, 2 * d)
        for norm in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
            shapes[f"mtp.{norm}.weight"] = (d,)
        shapes |= _layer_shapes("mtp.layers.0", LayerKind.ATTENTION, cfg.mlp_kinds[-1], cfg)
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def _layer_shapes(layer: str, kind: LayerKind, mlp: MlpKind, cfg: ModelConfig) -> dict[str, tuple[int, ...]]:
    d, delta, attention = cfg.hidden_size, cfg.delta, cfg.attention
    shapes: dict[str, tuple[int, ...]] = {
        f"{layer}.input_layernorm.weight": (d,),
        f"{layer}.post_attention_layernorm.weight": (d,),
    }
    if kind is LayerKind.DELTA:
        heads = delta.num_value_heads
        shapes[f"{layer}.linear_attn.in_proj_qkv.weight"] = (delta.conv_dim, d)
        shapes[f"{layer}.linear_attn.in_proj_z.weight"] = (delta.value_dim, d)
        shapes[f"{layer}.linear_attn.in_proj_b.weight"] = (heads, d)
        shapes[f"{layer}.linear_attn.in_proj_a.weight"] = (heads, d)
        shapes[f"{layer}.linear_attn.conv1d.weight"] = (delta.conv_dim, 1, delta.conv_kernel)
        shapes[f"{layer}.linear_attn.A_log"] = (heads,)
        shapes[f"{layer}.linear_attn.dt_bias"] = (heads,)
        shapes[f"{layer}.linear_attn.norm.weight"] = (delta.value_head_dim,)
        shapes[f"{layer}.linear_attn.out_proj.weight"] = (d, delta.value_dim)
    else:
        width = attention.num_heads * attention.head_dim
        kv_width = attention.num_kv_heads * attention.head_dim
        shapes[f"{layer}.self_attn.q_proj.weight"] = (2 * width, d)
        shapes[f"{layer}.self_attn.k_proj.weight"] = (kv_width, d)
        shapes[f"{layer}.self_attn.v_proj.weight"] = (kv_width, d)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (d, width)
        shapes[f"{layer}.self_attn.q_norm.weight"] = (attention.head_dim,)
        shapes[f"{layer}.self_attn.k_norm.weight"] = (attention.head_dim,)
    dense = f"{layer}.mlp"
    size = cfg.intermediate_size
    if mlp is MlpKind.MOE:
        experts, width = cfg.moe.num_experts, cfg.moe.intermediate_size
        shapes[f"{layer}.mlp.gate.weight"] = (experts, d)
        shapes[f"{layer}.mlp.experts.gate_up_proj"] = (experts, 2 * width, d)
        shapes[f"{layer}.mlp.experts.down_proj"] = (experts, d, width)
        shapes[f"{layer}.mlp.shared_expert_gate.weight"] = (1, d)
        dense, size = f"{layer}.mlp.shared_expert", cfg.moe.shared_intermediate_size
    shapes[f"{dense}.gate_proj.weight"] = (size, d)
    shapes[f"{dense}.up_proj.weight"] = (size, d)
    shapes[f"{dense}.down_proj.weight"] = (d, size)
    return shapes


def stored_tensors(
    model: dict[str, np.ndarray],
    cfg: ModelConfig,
    *,
    prefix: str = "model.language_model.",
    fused: bool = True,
    mtp_fused: bool = False,
) -> dict[str, np.ndarray]:
    """The same tensors as a checkpoint stores them. `mtp_fused` is `fused` for the experts of the MTP head."""
    stored = {}
    for name, tensor in model.items():
        head = name.startswith("mtp.")
        before = "" if head else prefix
        if name == "lm_head.weight":
            stored[name] = tensor
        elif ".mlp.experts." in name and not (mtp_fused if head else fused):
            stored.update({before + part: values for part, values in _split_experts(name, tensor)})
        elif cfg.interleaved_projections and ".in_proj_" in name:
            continue
        else:
            stored[before + name] = tensor
    if cfg.interleaved_projections:
        for i in (i for i, kind in enumerate(cfg.layer_kinds) if kind is LayerKind.DELTA):
            path = f"layers.{i}.linear_attn"
            qkvz, ba = _interleave(model, path, cfg.delta)
            stored[f"{prefix}{path}.in_proj_qkvz.weight"] = qkvz
            stored[f"{prefix}{path}.in_proj_ba.weight"] = ba
    return stored


def _split_experts(name: str, tensor: np.ndarray) -> list[tuple[str, np.ndarray]]:
    path, kind = name.rsplit(".", 1)
    parts = []
    for expert, weight in enumerate(tensor):
        if kind == "gate_up_proj":
            gate, up = np.split(weight, 2)
            parts += [(f"{path}.{expert}.gate_proj.weight", gate), (f"{path}.{expert}.up_proj.weight", up)]
        else:
            parts.append((f"{path}.{expert}.down_proj.weight", weight))
    return parts


def _interleave(model: dict[str, np.ndarray], path: str, delta: DeltaConfig) -> tuple[np.ndarray, np.ndarray]:
    qkv = model[f"{path}.in_proj_qkv.weight"]
    q, k, v = np.split(qkv, [delta.key_dim, 2 * delta.key_dim])
    z, b, a = (model[f"{path}.in_proj_{part}.weight"] for part in "zba")
    groups = delta.num_key_heads
    split = [np.split(part, groups) for part in (q, k, v, z, b, a)]
    qkvz = [part[group] for group in range(groups) for part in split[:4]]
    ba = [part[group] for group in range(groups) for part in split[4:]]
    return np.concatenate(qkvz), np.concatenate(ba)


def global_tensors(model: dict[str, np.ndarray], cfg: ModelConfig, tp: int) -> dict[str, np.ndarray]:
    """The global arrays that `tp` ranks hold side by side."""
    return {name: _global_tensor(name, tensor, cfg, tp) for name, tensor in model.items()}


def _global_tensor(name: str, tensor: np.ndarray, cfg: ModelConfig, tp: int) -> np.ndarray:
    match name.removesuffix(".weight").rsplit(".", 1)[-1]:
        case "embed_tokens" | "lm_head":
            padding = np.zeros((-len(tensor) % tp, tensor.shape[1]), tensor.dtype)
            return np.concatenate([tensor, padding])
        case "in_proj_qkv" | "conv1d":
            width = cfg.delta.key_dim
            q, k, v = tensor[:width], tensor[width : 2 * width], tensor[2 * width :]
            return np.concatenate([np.split(part, tp)[rank] for rank in range(tp) for part in (q, k, v)])
        case "k_proj" | "v_proj" if tp > cfg.attention.num_kv_heads:
            heads, width = cfg.attention.num_kv_heads, cfg.attention.head_dim
            held = [rank // (tp // heads) for rank in range(tp)]
            return np.concatenate([tensor[head * width : (head + 1) * width] for head in held])
        case "gate_up_proj" if not cfg.expert_parallel:
            gate, up = np.split(tensor, 2, axis=1)
            parts = [np.split(part, tp, axis=1)[rank] for rank in range(tp) for part in (gate, up)]
            return np.concatenate(parts, axis=1)
    return tensor


def tree_of(tensors: dict[str, Any]) -> dict[Any, Any]:
    """A nested dict from dotted names, with integers for list indices."""
    tree: dict[Any, Any] = {}
    for name, leaf in tensors.items():
        *path, last = (int(key) if key.isdigit() else key for key in name.split("."))
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def abstract_of(tensors: dict[str, np.ndarray], dtype: Any = np.float32) -> dict[Any, Any]:
    """The tree of shapes of global tensors."""
    return tree_of({name: jax.ShapeDtypeStruct(tensor.shape, np.dtype(dtype)) for name, tensor in tensors.items()})


def other_tensors(seed: int = 1) -> dict[str, np.ndarray]:
    """Tensors of the vision tower and of the MTP head."""
    rng = np.random.default_rng(seed)
    names = ("model.visual.blocks.0.attn.qkv.weight", "model.visual.pos_embed.weight", "mtp.fc.weight")
    return {name: rng.standard_normal((4, 6)).astype(np.float32) for name in names}


def mixed_dtypes(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Matrices in bfloat16 and vectors in float32, as published checkpoints have them."""
    return {name: tensor.astype(BFLOAT16) if tensor.ndim > 1 else tensor for name, tensor in tensors.items()}


def write_single(directory: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes one safetensors file and the files beside it."""
    directory.mkdir(exist_ok=True)
    save_file(_contiguous(tensors), directory / "model.safetensors", metadata={"format": "pt"})
    _write_side_files(directory)


def write_sharded(directory: pathlib.Path, tensors: dict[str, np.ndarray], shards: int = 3) -> None:
    """Writes several safetensors files, their index, and the files beside them."""
    directory.mkdir(exist_ok=True)
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file(_contiguous({name: tensors[name] for name in names[i::shards]}), directory / file)
        weight_map.update(dict.fromkeys(names[i::shards], file))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    _write_side_files(directory)


def _contiguous(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def _write_side_files(directory: pathlib.Path) -> None:
    (directory / "config.json").write_text('{"model_type": "qwen3_5"}\n')
    (directory / "tokenizer.json").write_text('{"version": "1.0"}\n')
    (directory / "chat_template.jinja").write_text("{{ messages }}\n")
