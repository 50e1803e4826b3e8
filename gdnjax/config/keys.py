"""What becomes of every key of a Hugging Face config.json: honoured, without effect here, or allowed one value only.

The keys are those of transformers' configuration classes of Qwen3-Next, Qwen3.5, DeepSeek-V3 and Olmo-Hybrid, of what
publishers write beside them, and of their neighbours in the family that would change what is computed. A key that is
in none of the tables of its family cannot be judged: files carry the notes of whatever tool wrote them. It is named in
a warning and otherwise ignored, except among the rope settings, where every key changes numbers: there it is an error.
"""

import dataclasses
import json
import logging
from collections.abc import Mapping
from typing import Any

log = logging.getLogger("gdnjax")

SHARED = frozenset(
    (
        "model_type",
        "text_config",
        "quantization_config",  # read by gdnjax.config.quantization
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "layer_types",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "norm_topk_prob",
        "num_nextn_predict_layers",
        "rms_norm_eps",
        "max_position_embeddings",
        "original_max_position_embeddings",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "partial_rotary_factor",
        "tie_word_embeddings",
        "dtype",
        "torch_dtype",
        "eos_token_id",
    )
)
"""Keys of every family."""

HONOURED = SHARED | {
    "full_attention_interval",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
    "num_experts",
    "shared_expert_intermediate_size",
    "decoder_sparse_step",
    "mlp_only_layers",
    "mtp_num_hidden_layers",
    "mtp_use_dedicated_embeddings",
}
"""Keys of Qwen3-Next and Qwen3.5, and of every family that has no table of its own."""

FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "attn_output_gate": (True,),
    # Of the delta layers' norm. "swish" is another name of silu; transformers computes silu whatever is stated.
    "output_gate_type": ("swish", "silu", None),
    # What it asks for is the arithmetic of the state, which is float32 here; EngineConfig.ssm_dtype is how it is kept.
    "mamba_ssm_dtype": ("float32", None),
    "is_encoder_decoder": (False, None),
    "per_layer_config": (None, {}),
    "use_sliding_window": (False, None),
    "sliding_window": (None,),
    "qkv_bias": (False, None),
    "mlp_bias": (False, None),
    "scoring_func": ("softmax", None),
    "routed_scaling_factor": (1.0, None),
    "n_group": (1, None),
    "topk_group": (1, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "attention_multiplier": (None,),
    "embedding_multiplier": (1.0, None),
    "residual_multiplier": (1.0, None),
    "logits_scaling": (1.0, None),
    "logit_scale": (1.0, None),
}
"""Keys that change numbers, and the values of them that are computed. The first is what an absent key means."""


@dataclasses.dataclass(frozen=True)
class FamilyKeys:
    """The tables of a family that is unlike the others: `fixed` is there beside FIXED, less what it honours.

    `aliases`: other names of keys, which transformers reads as well. `rotation_is_stated`: without rope settings, or
    with a rope_theta of null, nothing is rotated; elsewhere there is a default.
    """

    honoured: frozenset[str]
    fixed: dict[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    aliases: dict[str, str] = dataclasses.field(default_factory=dict)
    rotation_is_stated: bool = False


_DEEPSEEK_V3 = FamilyKeys(
    honoured=SHARED
    | {
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "qk_head_dim",
        "v_head_dim",
        "rope_interleave",
        "first_k_dense_replace",
        "n_routed_experts",
        "num_local_experts",
        "n_shared_experts",
        "routed_scaling_factor",
        "n_group",
        "topk_group",
        "num_mtp_layers",
    },
    fixed={
        "scoring_func": ("sigmoid", None),
        "topk_method": ("noaux_tc", None),
        "moe_layer_freq": (1, None),
    },
    aliases={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
)

_KIMI_LINEAR = FamilyKeys(
    honoured=SHARED
    | {
        "linear_attn_config",
        "linear_num_heads",
        "linear_head_dim",
        "linear_conv_kernel_dim",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "qk_head_dim",
        "v_head_dim",
        "first_k_dense_replace",
        "mlp_layer_types",
        "num_experts",
        "num_local_experts",
        "num_experts_per_token",
        "num_shared_experts",
        "n_shared_experts",
        "moe_renormalize",
        "routed_scaling_factor",
        "num_expert_group",
        "n_group",
        "topk_group",
        "model_max_length",
    },
    fixed={
        "scoring_func": ("sigmoid", None),
        "moe_router_activation_func": ("sigmoid", None),
        "use_grouped_topk": (True, None),
        "moe_layer_freq": (1, None),
        "mla_use_nope": (True, None),
    },
    aliases={
        "num_local_experts": "num_experts",
        "num_experts_per_tok": "num_experts_per_token",
        "n_shared_experts": "num_shared_experts",
        "norm_topk_prob": "moe_renormalize",
        "n_group": "num_expert_group",
        "max_position_embeddings": "model_max_length",
    },
)

_OLMO_HYBRID = FamilyKeys(
    honoured=(SHARED - {"num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "num_nextn_predict_layers"})
    | {
        "linear_num_key_heads",
        "linear_num_value_heads",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "linear_conv_kernel_dim",
        "linear_allow_neg_eigval",
    },
    # Of versions before transformers took it up.
    fixed={"linear_use_gate": (True, None)},
    rotation_is_stated=True,
)

FAMILIES: dict[str, FamilyKeys] = {
    "deepseek_v3": _DEEPSEEK_V3,
    "kimi_linear": _KIMI_LINEAR,
    "olmo_hybrid": _OLMO_HYBRID,
}
"""model_type -> tables of its own."""


def honoured_by(model_type: str) -> frozenset[str]:
    """The keys that a family is read from."""
    return FAMILIES[model_type].honoured if model_type in FAMILIES else HONOURED


def fixed_of(model_type: str) -> dict[str, tuple[Any, ...]]:
    """The keys of which a family has one value that is computed, under a few spellings."""
    if model_type not in FAMILIES:
        return FIXED
    of = FAMILIES[model_type]
    return {name: values for name, values in FIXED.items() if name not in of.honoured} | of.fixed


_TRAINING = "of training"
_OUTPUT = "of what transformers' forward returns"
_VISION = "of images and video; text only here"
_FILE = "about the file, not the model"
_CLASSIFIER = "of classifiers"
_TRANSFORMERS = "how transformers computes, not what"
_TOKENS = "the tokenizer puts these tokens where they belong"
_PARALLEL = "how its publisher spread it over devices"
_WINDOW = "of layers with a sliding window, which none may be"

WITHOUT_EFFECT: dict[str, str] = {
    "attention_dropout": _TRAINING,
    "hidden_dropout": _TRAINING,
    "initializer_range": _TRAINING,
    "linear_a_log_min": _TRAINING,
    "linear_a_log_max": _TRAINING,
    "linear_dt_min": _TRAINING,
    "linear_dt_max": _TRAINING,
    "linear_dt_init_floor": _TRAINING,
    "router_aux_loss_coef": _TRAINING,
    "gradient_checkpointing": _TRAINING,
    "mtp_loss_weight": _TRAINING,
    "output_router_logits": _OUTPUT,
    "output_hidden_states": _OUTPUT,
    "output_attentions": _OUTPUT,
    "return_dict": _OUTPUT,
    "tie_last_hidden_states": _OUTPUT,
    "vision_config": _VISION,
    "image_token_id": _VISION,
    "video_token_id": _VISION,
    "vision_start_token_id": _VISION,
    "vision_end_token_id": _VISION,
    "vision_token_id": _VISION,
    "language_model_only": _VISION,
    "architectures": _FILE,
    "transformers_version": _FILE,
    "name_or_path": _FILE,
    "_name_or_path": _FILE,
    "_commit_hash": _FILE,
    "auto_map": _FILE,
    "unsloth_version": _FILE,
    "unsloth_fixed": _FILE,
    "model_name": _FILE,
    "id2label": _CLASSIFIER,
    "label2id": _CLASSIFIER,
    "num_labels": _CLASSIFIER,
    "problem_type": _CLASSIFIER,
    "aux_loss_alpha": _TRAINING,
    "seq_aux": _TRAINING,
    "ep_size": _PARALLEL,
    "pretraining_tp": _PARALLEL,
    "use_cache": _TRANSFORMERS,
    "chunk_size_feed_forward": _TRANSFORMERS,
    "attn_implementation": _TRANSFORMERS,
    "_attn_implementation": _TRANSFORMERS,
    "experts_implementation": _TRANSFORMERS,
    "max_window_layers": _WINDOW,
    "bos_token_id": _TOKENS,
    "pad_token_id": _TOKENS,
    "sep_token_id": _TOKENS,
    "decoder_start_token_id": _TOKENS,
}
"""Keys that change nothing here, and why."""

ROPE_KEYS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "yarn": frozenset(
        (
            "factor",
            "original_max_position_embeddings",
            "beta_fast",
            "beta_slow",
            "attention_factor",
            "mscale",
            "mscale_all_dim",
            "truncate",
        )
    ),
}
"""rope_type -> the settings that it takes, beside those of ANY_ROPE."""

# Text has one position for all sections of mrope, so they change nothing. "type" is the older name of "rope_type";
# "finetuned" is a note.
ANY_ROPE = frozenset(
    ("rope_type", "type", "rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved", "finetuned")
)

ROPE_PLACES = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")
"""Keys under which a configuration has rope settings."""

# A wrapper may state these beside its text_config: huggingface.py has a rule for each.
_OF_EITHER = frozenset(
    (
        "model_type",
        "text_config",
        "quantization_config",
        "tie_word_embeddings",
        "dtype",
        "torch_dtype",
        "eos_token_id",
        "mtp_num_hidden_layers",
        "mtp_use_dedicated_embeddings",
        "num_nextn_predict_layers",
    )
)


def check_keys(raw: Mapping[str, Any], generation: frozenset[str]) -> None:
    """Raises ValueError for a key of config.json, or of its text_config, with a value that is not computed.

    `generation` are keys of generation_config.json, which older files have here. Unknown keys are logged by name.
    """
    unknown = []
    honoured, fixed = honoured_by(raw["model_type"]), fixed_of(raw["model_type"])
    for where, section in (("", raw), ("text_config.", raw.get("text_config") or {})):
        for name, value in section.items():
            if name in fixed and not _is_one_of(value, fixed[name]):
                allowed = ", ".join(json.dumps(one) for one in fixed[name])
                raise ValueError(f"unsupported {where}{name} {json.dumps(value)}; supported: {allowed}")
            if not (name in honoured or name in fixed or name in WITHOUT_EFFECT or name in generation):
                unknown.append(where + name)
    aliases = FAMILIES[raw["model_type"]].aliases if raw["model_type"] in FAMILIES else {}
    for alias, name in aliases.items():
        if alias in raw and name in raw and raw[alias] != raw[name]:
            raise ValueError(f"{name} is {raw[name]!r}, and {alias}, which is another name of it, {raw[alias]!r}")
    if unknown:
        log.warning("config.json has keys that are not known here, and without effect: %s", ", ".join(unknown))


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    # 0 == False and 1 == True: a number is no truth value.
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed)


def check_rope_places(raw: Mapping[str, Any]) -> None:
    """Raises ValueError where rope settings are given twice and differ: transformers would take one in silence."""
    for where, section in (("", raw), ("text_config.", raw.get("text_config") or {})):
        both = [section.get(name) for name in ("rope_parameters", "rope_scaling")]
        if all(both) and both[0] != both[1]:
            raise ValueError(
                f"both {where}rope_parameters and {where}rope_scaling are given, and differ; put all of them into "
                "rope_parameters"
            )
        rope = next((one for one in both if isinstance(one, dict)), {})
        for name in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
            values = [given[name] for given in (section, rope) if given.get(name) is not None]
            if len(values) == 2 and values[0] != values[1]:
                raise ValueError(f"{where}{name} is {values[0]!r}, and {values[1]!r} among the rope settings")


def rotates_only_where_stated(model_type: str) -> bool:
    """Whether a family rotates nothing where its configuration has no rope settings."""
    return model_type in FAMILIES and FAMILIES[model_type].rotation_is_stated


def states_rotation(raw: Mapping[str, Any]) -> bool:
    """Whether config.json states a rope_theta. transformers fills one in where the settings are null or absent."""
    return raw.get("rope_theta") is not None or _rope_settings(raw).get("rope_theta") is not None


def check_stated_rotation(raw: Mapping[str, Any]) -> None:
    """Raises ValueError for rope settings from which it does not follow whether anything is rotated."""
    rope = _rope_settings(raw)
    if rope and "rope_theta" not in rope and "rope_theta" not in raw:
        raise ValueError("rope settings without a rope_theta; state it, or null where nothing is rotated")
    more = [name for name in rope if name not in ("rope_theta", "rope_type", "type")]
    if not states_rotation(raw) and (more or rope.get("rope_type", rope.get("type", "default")) != "default"):
        raise ValueError("rope settings with a rope_theta of null, which says that nothing is rotated; leave them out")


def _rope_settings(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    return raw.get("rope_parameters") or raw.get("rope_scaling") or {}


def check_rope_keys(rope: Mapping[str, Any]) -> None:
    """Raises ValueError for a rope type that is not computed, or a setting that it does not take."""
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_KEYS:
        raise ValueError(f"unsupported rope_type {kind!r}; supported: {', '.join(ROPE_KEYS)}")
    unknown = [name for name in rope if name not in ANY_ROPE | ROPE_KEYS[kind]]
    if unknown:
        raise ValueError(
            f"rope_type {kind!r} does not take {', '.join(map(repr, unknown))}; allowed: "
            f"{', '.join(sorted(ANY_ROPE | ROPE_KEYS[kind]))}"
        )


def misplaced(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What a wrapper states beside its text_config although it is the text model's, and transformers reads it there
    alone. Harmless where text_config says the same.
    """
    return {
        name: value
        for name, value in raw.items()
        if name in HONOURED and name not in _OF_EITHER and value not in (None, {}, [])
    }
