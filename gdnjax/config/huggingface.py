"""From a Hugging Face config.json to a `ModelConfig`; and how files of that kind are read. No jax."""

import copy
import json
import logging
import math
import pathlib
import sys
from typing import Any

from gdnjax.config import keys
from gdnjax.config.checks import check_int, number
from gdnjax.config.model import (
    MTP_KEYS,
    AttentionConfig,
    DeltaConfig,
    KimiDeltaConfig,
    LatentAttentionConfig,
    LayerKind,
    MlpKind,
    ModelConfig,
    MoeConfig,
    YarnConfig,
)
from gdnjax.config.quantization import read_quantization

SUPPORTED_MODEL_TYPES = (
    "deepseek_v3",
    "kimi_linear",
    "olmo_hybrid",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_next",
)

WRAPPERS = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}
"""model_type of a multimodal wrapper -> that of its text_config."""

ZERO_CENTRED = frozenset(("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"))
"""model_type of text models whose norms multiply by 1 + w."""


def read_model_config(source: str | pathlib.Path | dict[str, Any]) -> ModelConfig:
    """`ModelConfig.from_hf`, which says what is read and what is refused."""
    if isinstance(source, dict):
        return _from_hf_dict(source)
    file = _config_json(pathlib.Path(source))
    raw = read_json_object(file)
    try:
        return _from_hf_dict(raw)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _config_json(path: pathlib.Path) -> pathlib.Path:
    file = path if path.suffix == ".json" else path / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{path}: no config.json here; expected a Hugging Face checkpoint directory "
            "(config.json, *.safetensors, tokenizer files) or one written by gdnjax convert"
        )
    return file


def read_json_object(file: pathlib.Path) -> dict[str, Any]:
    """The object of a JSON file. Raises a ValueError that names the file where it holds anything else."""
    try:
        raw = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(raw).__name__}")
    return raw


_without_torch = False


def forgo_torch() -> None:
    """From now on `import_transformers` hides PyTorch, of which nothing is used, from transformers: tokenizers would
    import it, which takes seconds. For processes of our own: models of transformers cannot be had in them then.
    """
    global _without_torch
    _without_torch = True


def import_transformers() -> Any:
    """transformers, imported at its first use because it is slow, and without its advice to install PyTorch. Where
    neither has been imported before, without PyTorch, if `forgo_torch` has been called.
    """
    hidden = _without_torch and not {"torch", "transformers"} & sys.modules.keys()
    adviser = logging.getLogger("transformers")

    def mute(record: logging.LogRecord) -> bool:
        return False

    adviser.addFilter(mute)
    if hidden:
        # What is None cannot be found. transformers looks once and remembers.
        sys.modules["torch"] = None  # pyright: ignore[reportArgumentType]
    try:
        import transformers

        if hidden:
            transformers.is_torch_available()
    finally:
        adviser.removeFilter(mute)
        if hidden:
            del sys.modules["torch"]
    return transformers


def _from_hf_dict(raw: dict[str, Any]) -> ModelConfig:
    model_type = raw.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ValueError(f"unsupported model_type {model_type!r}; supported: {', '.join(SUPPORTED_MODEL_TYPES)}")
    for name in ("text_config", "quantization_config"):
        if not isinstance(raw.get(name) or {}, dict):
            raise ValueError(f"{name} must be a JSON object, got {raw[name]!r}")
    stored_as = raw.get("quantization_config") or (raw.get("text_config") or {}).get("quantization_config")
    if not isinstance(stored_as or {}, dict):
        raise ValueError(f"text_config.quantization_config must be a JSON object, got {stored_as!r}")
    quantization = read_quantization(stored_as) if stored_as else None
    keys.check_rope_places(raw)
    hf = _read_by_transformers(raw)
    rope = getattr(hf, "rope_parameters", None) or {}
    nested = [name for name, value in rope.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(f"rope settings by layer type are not supported, got {', '.join(nested)}")
    keys.check_rope_keys(rope)
    if keys.rotates_only_where_stated(model_type):
        keys.check_stated_rotation(raw)
        rope = rope if keys.states_rotation(raw) else {}
    layer_kinds = _layer_kinds(hf)
    for name in ("vocab_size", "hidden_size", "max_position_embeddings"):
        check_int(name, getattr(hf, name), 1)
    moe = _moe(hf)
    mtp_layers, mtp_dedicated_embeddings = _mtp_head(raw)
    eos = hf.eos_token_id if hf.eos_token_id is not None else raw.get("eos_token_id")
    yarn = _yarn(rope, hf.max_position_embeddings) if rope.get("rope_type") == "yarn" else None
    return ModelConfig(
        model_type=model_type,
        quantization=quantization,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=getattr(hf, "intermediate_size", 0),
        layer_kinds=layer_kinds,
        mlp_kinds=tuple(_mlp_kind(hf, i, moe) for i in range(len(layer_kinds))),
        delta=_delta(hf),
        attention=_attention(hf, rope, yarn),
        moe=moe,
        mtp_layers=mtp_layers,
        mtp_dedicated_embeddings=mtp_dedicated_embeddings,
        rms_norm_eps=number("rms_norm_eps", hf.rms_norm_eps, 0.0),
        zero_centred_norms=hf.model_type in ZERO_CENTRED,
        # A wrapper may state the tying outside its text_config; either place counts.
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", hf.tie_word_embeddings) or hf.tie_word_embeddings),
        max_position_embeddings=max(hf.max_position_embeddings, yarn.context if yarn else 0),
        dtype=_dtype_name(raw, hf),
        interleaved_projections=hf.model_type == "qwen3_next",
        separate_projections=hf.model_type == "olmo_hybrid",
        post_norm_kinds=(LayerKind.ATTENTION,) if hf.model_type == "olmo_hybrid" else (),
        eos_token_ids=checked_eos(eos, hf.vocab_size),
    )


def _read_by_transformers(raw: dict[str, Any]) -> Any:
    """The text model's configuration as transformers reads it: it knows defaults and older spellings.

    Raises ValueError for what it refuses, for keys with a value that is not computed, and where a wrapper states
    something beside its text_config that the text_config does not say.
    """
    transformers = import_transformers()
    of_files = transformers.GenerationConfig._get_default_generation_params()
    keys.check_keys(raw, frozenset(of_files))
    model_type, text = raw["model_type"], raw.get("text_config")
    inner = WRAPPERS.get(model_type)
    if inner is None and text is not None:
        raise ValueError(f"model_type {model_type!r} is a text model's, which has no text_config")
    named = (text or {}).get("model_type")
    if named not in (None, model_type, inner):
        raise ValueError(f"text_config of model_type {model_type!r} must be of {inner!r}, got {named!r}")
    beside = {} if inner is None else keys.misplaced(raw)
    try:
        # A copy, because it changes what it is given.
        given = copy.deepcopy({name: value for name, value in raw.items() if name not in beside})
        hf = transformers.AutoConfig.for_model(**given).get_text_config()
        # Of a model without rotation there is nothing to standardise.
        if hasattr(type(hf), "rope_parameters"):
            hf.standardize_rope_params()
    except Exception as error:  # Its own kinds of errors, KeyError and TypeError among them.
        raise ValueError(f"transformers refuses this configuration: {' '.join(str(error).split())}") from error
    _check_misplaced(beside, hf)
    return hf


def _check_misplaced(beside: dict[str, Any], hf: Any) -> None:
    rope = getattr(hf, "rope_parameters", None) or {}
    for name, value in beside.items():
        if name in ("rope_parameters", "rope_scaling"):
            same = isinstance(value, dict) and all(rope.get(key) == one for key, one in value.items() if key != "type")
        elif name in keys.ROPE_PLACES:
            same = rope.get(name) == value
        else:
            same = getattr(hf, name, None) == value
        if not same:
            raise ValueError(
                f"{name} stands beside text_config, which says otherwise or nothing; put it into text_config, where "
                "the language model's settings are read"
            )


def _layer_kinds(hf: Any) -> tuple[LayerKind, ...]:
    """Of the families that have one kind of token mixer alone, transformers has no layer_types."""
    check_int("num_hidden_layers", hf.num_hidden_layers, 1)
    stated = getattr(hf, "layer_types", None) or [LayerKind.ATTENTION.value] * hf.num_hidden_layers
    with_delta = hasattr(hf, "linear_num_key_heads") or hasattr(hf, "linear_num_heads")
    allowed = [kind.value for kind in LayerKind if kind is LayerKind.ATTENTION or with_delta]
    unknown = sorted(set(stated) - set(allowed))
    if unknown:
        raise ValueError(f"unsupported layer_types {unknown}; supported: {allowed}")
    if len(stated) != hf.num_hidden_layers:
        raise ValueError(f"num_hidden_layers={hf.num_hidden_layers}, but layer_types has {len(stated)} entries")
    return tuple(LayerKind(kind) for kind in stated)


def _delta(hf: Any) -> DeltaConfig | KimiDeltaConfig | None:
    if hasattr(hf, "linear_num_heads"):
        for name in ("linear_num_heads", "linear_head_dim", "linear_conv_kernel_dim"):
            check_int(name, getattr(hf, name), 1)
        return KimiDeltaConfig(
            num_heads=hf.linear_num_heads, head_dim=hf.linear_head_dim, conv_kernel=hf.linear_conv_kernel_dim
        )
    if not hasattr(hf, "linear_num_key_heads"):
        return None
    return DeltaConfig(
        num_key_heads=hf.linear_num_key_heads,
        num_value_heads=hf.linear_num_value_heads,
        key_head_dim=hf.linear_key_head_dim,
        value_head_dim=hf.linear_value_head_dim,
        conv_kernel=hf.linear_conv_kernel_dim,
        beta_scale=2.0 if getattr(hf, "linear_allow_neg_eigval", False) else 1.0,
        # transformers and the library that it was trained with have this one whatever rms_norm_eps is.
        norm_eps=1e-5 if hf.model_type == "olmo_hybrid" else None,
    )


def _attention(hf: Any, rope: dict[str, Any], yarn: YarnConfig | None) -> AttentionConfig | LatentAttentionConfig:
    if hf.model_type == "olmo_hybrid":
        return _plain_attention(hf, rope, yarn)
    # transformers has no such settings for a family that does not rotate, whatever its files say.
    rotates = hasattr(type(hf), "rope_parameters")
    theta = number("rope_theta", rope.get("rope_theta"), 0.0) if rotates else None
    partial = number("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), 0.0)
    if hasattr(hf, "kv_lora_rank"):
        if partial != 1.0:
            raise ValueError(f"partial_rotary_factor={partial:g} of latent attention; allowed: 1")
        return _latent_attention(hf, theta, rope, yarn)
    assert theta is not None, "only latent attention goes without rotation"
    return AttentionConfig(
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=hf.head_dim,
        rotary_dim=int(hf.head_dim * partial),
        rope_theta=theta,
        yarn=yarn,
    )


def _plain_attention(hf: Any, rope: dict[str, Any], yarn: YarnConfig | None) -> AttentionConfig:
    """Without a gate, with norms over all heads, and with rotation only where there are settings of it."""
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"unsupported partial_rotary_factor {rope['partial_rotary_factor']!r}; supported: 1.0")
    # Not a field of transformers' class, but read where a file has it.
    head_dim = getattr(hf, "head_dim", None)
    head_dim = hf.hidden_size // hf.num_attention_heads if head_dim is None else head_dim
    check_int("head_dim", head_dim, 1)
    return AttentionConfig(
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=head_dim,
        rotary_dim=head_dim if rope else None,
        rope_theta=number("rope_theta", rope["rope_theta"], 0.0) if rope else None,
        yarn=yarn,
        output_gate=False,
        whole_norms=True,
    )


def _latent_attention(
    hf: Any, theta: float | None, rope: dict[str, Any], yarn: YarnConfig | None
) -> LatentAttentionConfig:
    """Raises ValueError where a width that follows from others is stated and is another."""
    for name in ("num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        check_int(name, getattr(hf, name), 1)
    if hf.q_lora_rank is not None:
        check_int("q_lora_rank", hf.q_lora_rank, 1)
    follows = {
        "num_key_value_heads": hf.num_attention_heads,
        "qk_head_dim": hf.qk_nope_head_dim + hf.qk_rope_head_dim,
    }
    if theta is not None:
        # The width of what is rotated; without rotation nobody reads it.
        follows["head_dim"] = hf.qk_rope_head_dim
    for name, value in follows.items():
        if getattr(hf, name) not in (None, value):
            raise ValueError(f"{name} of latent attention follows from others: {value}; got {getattr(hf, name)!r}")
    factor = 1.0
    if yarn is not None and rope.get("mscale_all_dim"):
        # Of the scores, whatever cos and sin are multiplied by; transformers' yarn_apply_mscale.
        factor = (0.1 * rope["mscale_all_dim"] * math.log(yarn.factor) + 1) ** 2
    return LatentAttentionConfig(
        num_heads=hf.num_attention_heads,
        q_lora_rank=hf.q_lora_rank,
        kv_lora_rank=hf.kv_lora_rank,
        qk_nope_head_dim=hf.qk_nope_head_dim,
        qk_rope_head_dim=hf.qk_rope_head_dim,
        v_head_dim=hf.v_head_dim,
        rope_theta=theta,
        yarn=yarn,
        interleaved_rotary=theta is not None and bool(hf.rope_interleave),
        score_factor=factor,
    )


def _yarn(rope: dict[str, Any], max_position_embeddings: int) -> YarnConfig:
    """From rope settings under transformers' names, with its defaults. Raises ValueError for a bad value."""
    original = rope.get("original_max_position_embeddings", max_position_embeddings)
    check_int("original_max_position_embeddings", original, 1)
    stated = rope.get("factor")
    factor = number("factor", max_position_embeddings / original if stated is None else stated, 1.0)
    names = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
    given = {name: number(name, rope[name], 0.0) for name in names if rope.get(name) is not None}
    # One of the two alone counts for nothing, in transformers too.
    above, below = given.pop("mscale", 0.0), given.pop("mscale_all_dim", 0.0)
    above, below = (above, below) if above and below else (1.0, 0.0)
    longer = 0.1 * math.log(factor)
    given.setdefault("attention_factor", (above * longer + 1) / (below * longer + 1))
    truncate = rope.get("truncate", True)
    if not isinstance(truncate, bool):
        raise ValueError(f"truncate must be true or false, got {truncate!r}")
    return YarnConfig(factor=factor, original_context=original, truncate=truncate, **given)


def _moe(hf: Any) -> MoeConfig | None:
    if hasattr(hf, "n_shared_experts"):
        return _moe_of_groups(hf, hf.n_routed_experts if hasattr(hf, "n_routed_experts") else hf.num_local_experts)
    if not getattr(hf, "num_experts", 0):
        return None
    if not hasattr(hf, "moe_intermediate_size"):
        raise ValueError(f"model_type {hf.model_type!r} has no experts, got num_experts={hf.num_experts!r}")
    return MoeConfig(
        num_experts=hf.num_experts,
        experts_per_token=hf.num_experts_per_tok,
        intermediate_size=hf.moe_intermediate_size,
        shared_intermediate_size=hf.shared_expert_intermediate_size,
        normalise_top_k=getattr(hf, "norm_topk_prob", True),
    )


def _moe_of_groups(hf: Any, num_experts: int) -> MoeConfig:
    """The router of DeepSeek-V3, arXiv:2412.19437, section 2.1.2."""
    check_int("n_routed_experts", num_experts, 1)
    sizes = ("num_experts_per_tok", "moe_intermediate_size", "n_shared_experts", "n_group")
    for name in (*sizes, "topk_group"):
        check_int(name, getattr(hf, name), 1)
    return MoeConfig(
        num_experts=num_experts,
        experts_per_token=hf.num_experts_per_tok,
        intermediate_size=hf.moe_intermediate_size,
        shared_intermediate_size=hf.n_shared_experts * hf.moe_intermediate_size,
        normalise_top_k=bool(hf.norm_topk_prob),
        scoring="sigmoid",
        routed_scaling=number("routed_scaling_factor", hf.routed_scaling_factor, 0.0),
        correction_bias=True,
        num_groups=hf.n_group,
        top_k_groups=hf.topk_group,
        shared_gate=False,
    )


def _mtp_head(raw: dict[str, Any]) -> tuple[int, bool]:
    """Decoder layers of the MTP head, and whether it has an embedding of its own, by the table of families."""
    named = MTP_KEYS.get(raw["model_type"])
    if named is None:
        return 0, False
    # What a wrapper's text_config states counts before what the wrapper states.
    stated = raw | (raw.get("text_config") or {})
    layers = stated.get(named.layers)
    if layers is None and named.alias is not None:
        layers = stated.get(named.alias)
    layers = named.default if layers is None else layers
    check_int(named.layers, layers, 0)
    dedicated = named.dedicated is not None and stated.get(named.dedicated)
    if not isinstance(dedicated, bool | None):
        raise ValueError(f"{named.dedicated} must be true or false, got {dedicated!r}")
    return layers, bool(dedicated)


def _mlp_kind(hf: Any, layer: int, moe: MoeConfig | None) -> MlpKind:
    stated = getattr(hf, "mlp_layer_types", None)
    if stated is not None:
        if len(stated) != hf.num_hidden_layers or not set(stated) <= {"dense", "sparse"}:
            raise ValueError(f'mlp_layer_types must be "dense" or "sparse" for each layer, got {stated!r}')
        return MlpKind.MOE if stated[layer] == "sparse" else MlpKind.DENSE
    first = getattr(hf, "first_k_dense_replace", 0)
    check_int("first_k_dense_replace", first, 0)
    sparse = (
        moe is not None
        and layer >= first
        and layer not in (getattr(hf, "mlp_only_layers", None) or ())
        and (layer + 1) % getattr(hf, "decoder_sparse_step", 1) == 0
    )
    return MlpKind.MOE if sparse else MlpKind.DENSE


def _dtype_name(raw: dict[str, Any], hf: Any) -> str:
    named = raw.get("dtype") or raw.get("torch_dtype") or getattr(hf, "dtype", None) or "bfloat16"
    name = str(named).removeprefix("torch.")
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"unsupported checkpoint dtype {name!r}; supported: float32, bfloat16")
    return name


def checked_eos(ids: Any, vocab_size: int) -> tuple[int, ...]:
    """`as_id_tuple` of end-of-sequence ids. Raises ValueError for what is no id, or none of the vocabulary."""
    for token in ids if isinstance(ids, list | tuple) else [] if ids is None else [ids]:
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise ValueError(f"eos_token_id must be of ids from 0 to {vocab_size - 1}, the vocabulary's, got {token!r}")
    return as_id_tuple(ids)


def as_id_tuple(ids: int | list[int] | tuple[int, ...] | None) -> tuple[int, ...]:
    """Token ids as configuration files spell them (absent, one, or several), as a tuple."""
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)
