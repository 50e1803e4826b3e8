"""What a model is and how the engine is set up: frozen, validated at construction, read by everything else.

Imports neither jax nor flax, so that plans and errors can be had without a device.
"""

import copy
import dataclasses
import enum
import json
import math
import pathlib
from typing import Any

from gdnjax import config_keys

CHUNK = 64
"""Tokens in a chunk of the chunked delta rule, and the grid on which prefill pieces are cut."""

LONG_ROWS = 8
"""Prompts of which each may end within a chunk in a prefill step that is full of whole ones."""

SUPPORTED_MODEL_TYPES = (
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_next",
)

WRAPPERS = {"qwen3_5": "qwen3_5_text", "qwen3_5_moe": "qwen3_5_moe_text"}
"""model_type of a multimodal wrapper -> that of its text_config."""

DEFAULT_MAX_MODEL_LEN = 8192
"""The most tokens of a request where nobody says: memory is not promised to lengths that nobody uses."""

DTYPES = ("auto", "float32", "bfloat16")
KERNELS = ("auto", "pallas", "interpret", "reference")
STATE_LAYOUTS = ("kv", "vk", "mixed")
DRAFT_ACCEPTANCES = ("shared_noise", "rejection")

MAX_SPECULATIVE_TOKENS = 7
"""Draft tokens of a step: with the token before them a verification has at most 8 rows."""


@dataclasses.dataclass(frozen=True)
class MtpKeys:
    """Where a family's config.json, or the text_config in it, describes the multi-token-prediction head.

    layers      key that counts the head's decoder layers
    default     that count where the key is absent or null
    dedicated   key that is true where the head has an embedding of its own; None: the family has no such key
    """

    layers: str
    default: int
    dedicated: str | None


_QWEN3_5_MTP = MtpKeys(layers="mtp_num_hidden_layers", default=0, dedicated="mtp_use_dedicated_embeddings")

MTP_KEYS: dict[str, MtpKeys] = {
    "qwen3_5": _QWEN3_5_MTP,
    "qwen3_5_moe": _QWEN3_5_MTP,
    "qwen3_5_moe_text": _QWEN3_5_MTP,
    "qwen3_5_text": _QWEN3_5_MTP,
    # Published files have the head's tensors and do not count its layers; vLLM takes one, under this key, too.
    "qwen3_next": MtpKeys(layers="num_nextn_predict_layers", default=1, dedicated=None),
}
"""model_type -> how the MTP head is configured. Tables of its own beside shared ones are found by the loader."""


class LayerKind(enum.Enum):
    """The token mixer of a layer. The tuple of kinds is the hybrid pattern of a model."""

    DELTA = "linear_attention"
    ATTENTION = "full_attention"


class MlpKind(enum.Enum):
    """The feed-forward part of a layer."""

    DENSE = "dense"
    MOE = "moe"


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaConfig:
    """Geometry of the Gated DeltaNet layers."""

    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel: int

    def __post_init__(self):
        _check_positive(self)
        if self.num_value_heads % self.num_key_heads:
            raise ValueError(
                f"linear_num_value_heads must be a multiple of linear_num_key_heads, "
                f"got {self.num_value_heads} and {self.num_key_heads}"
            )
        if self.conv_kernel < 2:
            raise ValueError(f"linear_conv_kernel_dim must be at least 2, got {self.conv_kernel}")

    @property
    def key_dim(self) -> int:
        return self.num_key_heads * self.key_head_dim

    @property
    def value_dim(self) -> int:
        return self.num_value_heads * self.value_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: q, k and v side by side."""
        return 2 * self.key_dim + self.value_dim

    def shard(self, tp: int) -> "DeltaConfig":
        """The part of one rank. Heads cannot be padded: a padded head would still cost its whole state."""
        if self.num_key_heads % tp:
            raise ValueError(
                f"tensor_parallel_size={tp} does not divide linear_num_key_heads={self.num_key_heads}; "
                f"allowed: divisors of {self.num_key_heads}"
            )
        return dataclasses.replace(
            self, num_key_heads=self.num_key_heads // tp, num_value_heads=self.num_value_heads // tp
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """YaRN, arXiv:2309.00071: rotary frequencies for a context `factor` times as long as that of the training.

    original_context   tokens of the training's context
    beta_fast          rotations within it from which on a frequency stays as it is
    beta_slow          rotations up to which it is divided by `factor`; in between it is a mixture
    attention_factor   what cos and sin are multiplied by
    truncate           whether the two bounds are rounded to whole dimensions
    """

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float
    truncate: bool = True

    @classmethod
    def of(cls, rope: dict[str, Any], max_position_embeddings: int) -> "YarnConfig":
        """From rope settings under transformers' names, with its defaults. Raises ValueError for a bad value."""
        original = rope.get("original_max_position_embeddings", max_position_embeddings)
        _check_int("original_max_position_embeddings", original, 1)
        stated = rope.get("factor")
        factor = _number("factor", max_position_embeddings / original if stated is None else stated, 1.0)
        names = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
        given = {name: _number(name, rope[name], 0.0) for name in names if rope.get(name) is not None}
        # One of the two alone counts for nothing, in transformers too.
        above, below = given.pop("mscale", 0.0), given.pop("mscale_all_dim", 0.0)
        above, below = (above, below) if above and below else (1.0, 0.0)
        longer = 0.1 * math.log(factor)
        given.setdefault("attention_factor", (above * longer + 1) / (below * longer + 1))
        truncate = rope.get("truncate", True)
        if not isinstance(truncate, bool):
            raise ValueError(f"truncate must be true or false, got {truncate!r}")
        return cls(factor=factor, original_context=original, truncate=truncate, **given)

    def __post_init__(self):
        for name in ("beta_fast", "beta_slow", "attention_factor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)!r}")
        if self.beta_fast < self.beta_slow:
            raise ValueError(f"beta_fast must be at least beta_slow, got {self.beta_fast} and {self.beta_slow}")

    @property
    def context(self) -> int:
        """Tokens that it is meant for."""
        return int(self.original_context * self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Geometry of the gated full-attention layers, and their rotary frequencies: those of `rope_theta`, with `yarn`
    changed for a longer context.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    rope_theta: float
    yarn: YarnConfig | None = None

    def __post_init__(self):
        _check_positive(self)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads must be a multiple of num_key_value_heads, "
                f"got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.yarn and self.rope_theta <= 1:
            raise ValueError(f"YaRN needs a rope_theta above 1, got {self.rope_theta}")
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise ValueError(
                f"the rotary part of a head must be even and at most head_dim={self.head_dim}, got {self.rotary_dim}"
            )

    def shard(self, tp: int) -> "AttentionConfig":
        """The part of one rank. Where tp exceeds the kv heads, each kv head is held by tp / num_kv_heads ranks."""
        if self.num_heads % tp:
            raise ValueError(
                f"tensor_parallel_size={tp} does not divide num_attention_heads={self.num_heads}; "
                f"allowed: divisors of {self.num_heads}"
            )
        if self.num_kv_heads % tp and tp % self.num_kv_heads:
            raise ValueError(
                f"tensor_parallel_size={tp} and num_key_value_heads={self.num_kv_heads}: one must divide the other, "
                "so that kv heads are either split evenly or replicated evenly"
            )
        return dataclasses.replace(self, num_heads=self.num_heads // tp, num_kv_heads=max(1, self.num_kv_heads // tp))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Geometry of the mixture-of-experts layers."""

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    shared_intermediate_size: int
    normalise_top_k: bool

    def __post_init__(self):
        if not 0 < self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok must be between 1 and num_experts={self.num_experts}, "
                f"got {self.experts_per_token}"
            )

    def shard(self, tp: int) -> "MoeConfig":
        """The part of one rank: every rank holds a slice of every expert."""
        for name in ("intermediate_size", "shared_intermediate_size"):
            if getattr(self, name) % tp:
                raise ValueError(f"tensor_parallel_size={tp} does not divide moe {name}={getattr(self, name)}")
        return dataclasses.replace(
            self,
            intermediate_size=self.intermediate_size // tp,
            shared_intermediate_size=self.shared_intermediate_size // tp,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What the engine needs to know of a hybrid model, whatever its family.

    `max_position_embeddings` is the longest context: with YaRN that which it is meant for, if it is longer than what
    the file says.

    `interleaved_projections` says that the checkpoint stores q, k, v, z (and b, a) grouped by key head, as
    Qwen3-Next does; the modules never see it, the loader undoes it. `mtp_layers` counts the decoder layers of the
    checkpoint's multi-token-prediction head, 0 where it has none; `mtp_dedicated_embeddings` says that this head has
    an embedding of its own. Both are read by `MTP_KEYS`, and what the engine cannot run is refused by `require_mtp`:
    without the head such a checkpoint is as good as any other.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layer_kinds: tuple[LayerKind, ...]
    mlp_kinds: tuple[MlpKind, ...]
    delta: DeltaConfig
    attention: AttentionConfig
    moe: MoeConfig | None = None
    mtp_layers: int = 0
    mtp_dedicated_embeddings: bool = False
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768
    dtype: str = "bfloat16"
    interleaved_projections: bool = False
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self):
        if not self.layer_kinds:
            raise ValueError("a model needs at least one layer, got an empty layer_types")
        if len(self.layer_kinds) != len(self.mlp_kinds):
            raise ValueError(f"{len(self.layer_kinds)} token mixers but {len(self.mlp_kinds)} MLPs")
        if MlpKind.MOE in self.mlp_kinds and self.moe is None:
            raise ValueError("mlp_kinds names a mixture of experts, but moe is None")
        if not self.rms_norm_eps > 0 or math.isinf(self.rms_norm_eps):
            raise ValueError(f"rms_norm_eps must be a finite number above 0, got {self.rms_norm_eps!r}")

    @property
    def num_layers(self) -> int:
        return len(self.layer_kinds)

    @property
    def num_delta_layers(self) -> int:
        return self.layer_kinds.count(LayerKind.DELTA)

    @property
    def num_attention_layers(self) -> int:
        return self.layer_kinds.count(LayerKind.ATTENTION)

    def require_mtp(self) -> None:
        """Raises ValueError unless the model has an MTP head that the engine runs: one layer, which shares the
        embedding and the head of the target.
        """
        key = MTP_KEYS[self.model_type].layers if self.model_type in MTP_KEYS else "mtp_layers"
        needs = "num_speculative_tokens above 0 needs a model with an MTP head"
        if self.mtp_layers == 0:
            raise ValueError(f"{needs}, and config.json counts none ({key}); allowed: num_speculative_tokens=0")
        if self.mtp_layers != 1:
            raise ValueError(f"{needs} of one layer, got {key}={self.mtp_layers}; allowed: num_speculative_tokens=0")
        if self.mtp_dedicated_embeddings:
            raise ValueError(
                f"{needs} that shares the target's embedding, and config.json asks for one of its own "
                "(mtp_use_dedicated_embeddings=true); allowed: num_speculative_tokens=0"
            )

    def padded_vocab_size(self, tp: int) -> int:
        """Vocabulary rounded up to a multiple of `tp`; the padding never wins a sampling step."""
        return -(-self.vocab_size // tp) * tp

    def shard(self, tp: int) -> "ModelConfig":
        """The configuration of one of `tp` ranks. Raises a ValueError that names what does not divide."""
        if tp < 1:
            raise ValueError(f"tensor_parallel_size must be at least 1, got {tp}")
        if MlpKind.DENSE in self.mlp_kinds and self.intermediate_size % tp:
            raise ValueError(f"tensor_parallel_size={tp} does not divide intermediate_size={self.intermediate_size}")
        return dataclasses.replace(
            self,
            vocab_size=self.padded_vocab_size(tp) // tp,
            intermediate_size=self.intermediate_size // tp if MlpKind.DENSE in self.mlp_kinds else 0,
            delta=self.delta.shard(tp),
            attention=self.attention.shard(tp),
            moe=None if self.moe is None else self.moe.shard(tp),
        )

    @classmethod
    def from_hf(cls, source: str | pathlib.Path | dict[str, Any]) -> "ModelConfig":
        """Reads a Hugging Face `config.json` (a directory that holds one, the file itself, or its parsed dict).

        Multimodal wrappers are read through their `text_config`. A count of MTP layers is what the file says, whether
        or not the tensors are there: the loader sees those, where the head is wanted. What becomes of each key is in
        gdnjax.config_keys; keys that are not known there are named in a warning. Raises FileNotFoundError where there
        is no config.json, and ValueError for an unknown model_type, a quantised checkpoint, a feature that the engine
        does not compute, or what transformers refuses.
        """
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
            "(config.json, *.safetensors, tokenizer files) or one written by scripts/convert.py"
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


def _from_hf_dict(raw: dict[str, Any]) -> ModelConfig:
    model_type = raw.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ValueError(f"unsupported model_type {model_type!r}; supported: {', '.join(SUPPORTED_MODEL_TYPES)}")
    for name in ("text_config", "quantization_config"):
        if not isinstance(raw.get(name) or {}, dict):
            raise ValueError(f"{name} must be a JSON object, got {raw[name]!r}")
    quantisation = raw.get("quantization_config") or (raw.get("text_config") or {}).get("quantization_config")
    if quantisation:
        raise ValueError(
            f"quantised checkpoints are not supported yet (quantization_config: "
            f"{quantisation.get('quant_method', 'unknown')}); use the bfloat16 or float32 checkpoint"
        )
    config_keys.check_rope_places(raw)
    hf = _read_by_transformers(raw)
    rope = hf.rope_parameters or {}
    nested = [name for name, value in rope.items() if isinstance(value, dict)]
    if nested:
        raise ValueError(f"rope settings by layer type are not supported, got {', '.join(nested)}")
    config_keys.check_rope_keys(rope)
    unknown = sorted(set(hf.layer_types) - {kind.value for kind in LayerKind})
    if unknown:
        raise ValueError(f"unsupported layer_types {unknown}; supported: {[kind.value for kind in LayerKind]}")
    layer_kinds = tuple(LayerKind(kind) for kind in hf.layer_types)
    if len(layer_kinds) != hf.num_hidden_layers:
        raise ValueError(f"num_hidden_layers={hf.num_hidden_layers}, but layer_types has {len(layer_kinds)} entries")
    for name in ("vocab_size", "hidden_size", "max_position_embeddings"):
        _check_int(name, getattr(hf, name), 1)
    moe = _moe(hf)
    mtp_layers, mtp_dedicated_embeddings = _mtp_head(raw)
    eos = hf.eos_token_id if hf.eos_token_id is not None else raw.get("eos_token_id")
    partial = _number("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0), 0.0)
    yarn = YarnConfig.of(rope, hf.max_position_embeddings) if rope.get("rope_type") == "yarn" else None
    return ModelConfig(
        model_type=model_type,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=getattr(hf, "intermediate_size", 0),
        layer_kinds=layer_kinds,
        mlp_kinds=tuple(_mlp_kind(hf, i, moe) for i in range(len(layer_kinds))),
        delta=DeltaConfig(
            num_key_heads=hf.linear_num_key_heads,
            num_value_heads=hf.linear_num_value_heads,
            key_head_dim=hf.linear_key_head_dim,
            value_head_dim=hf.linear_value_head_dim,
            conv_kernel=hf.linear_conv_kernel_dim,
        ),
        attention=AttentionConfig(
            num_heads=hf.num_attention_heads,
            num_kv_heads=hf.num_key_value_heads,
            head_dim=hf.head_dim,
            rotary_dim=int(hf.head_dim * partial),
            rope_theta=_number("rope_theta", rope.get("rope_theta"), 0.0),
            yarn=yarn,
        ),
        moe=moe,
        mtp_layers=mtp_layers,
        mtp_dedicated_embeddings=mtp_dedicated_embeddings,
        rms_norm_eps=_number("rms_norm_eps", hf.rms_norm_eps, 0.0),
        # A wrapper may state the tying outside its text_config; either place counts.
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", hf.tie_word_embeddings) or hf.tie_word_embeddings),
        max_position_embeddings=max(hf.max_position_embeddings, yarn.context if yarn else 0),
        dtype=_dtype_name(raw, hf),
        interleaved_projections=hf.model_type == "qwen3_next",
        eos_token_ids=checked_eos(eos, hf.vocab_size),
    )


def _read_by_transformers(raw: dict[str, Any]) -> Any:
    """The text model's configuration as transformers reads it: it knows defaults and older spellings.

    Raises ValueError for what it refuses, for keys with a value that is not computed, and where a wrapper states
    something beside its text_config that the text_config does not say.
    """
    # Imported here because it is slow.
    import transformers

    of_files = transformers.GenerationConfig._get_default_generation_params()
    config_keys.check_keys(raw, frozenset(of_files))
    model_type, text = raw["model_type"], raw.get("text_config")
    inner = WRAPPERS.get(model_type)
    if inner is None and text is not None:
        raise ValueError(f"model_type {model_type!r} is a text model's, which has no text_config")
    named = (text or {}).get("model_type")
    if named not in (None, model_type, inner):
        raise ValueError(f"text_config of model_type {model_type!r} must be of {inner!r}, got {named!r}")
    beside = {} if inner is None else config_keys.misplaced(raw)
    try:
        # A copy, because it changes what it is given.
        given = copy.deepcopy({name: value for name, value in raw.items() if name not in beside})
        hf = transformers.AutoConfig.for_model(**given).get_text_config()
        hf.standardize_rope_params()
    except Exception as error:  # Its own kinds of errors, KeyError and TypeError among them.
        raise ValueError(f"transformers refuses this configuration: {' '.join(str(error).split())}") from error
    _check_misplaced(beside, hf)
    return hf


def _check_misplaced(beside: dict[str, Any], hf: Any) -> None:
    rope = hf.rope_parameters or {}
    for name, value in beside.items():
        if name in ("rope_parameters", "rope_scaling"):
            same = isinstance(value, dict) and all(rope.get(key) == one for key, one in value.items() if key != "type")
        elif name in config_keys.ROPE_PLACES:
            same = rope.get(name) == value
        else:
            same = getattr(hf, name, None) == value
        if not same:
            raise ValueError(
                f"{name} stands beside text_config, which says otherwise or nothing; put it into text_config, where "
                "the language model's settings are read"
            )


def _moe(hf: Any) -> MoeConfig | None:
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


def _mtp_head(raw: dict[str, Any]) -> tuple[int, bool]:
    """Decoder layers of the MTP head, and whether it has an embedding of its own, by the table of families."""
    keys = MTP_KEYS[raw["model_type"]]
    # What a wrapper's text_config states counts before what the wrapper states.
    stated = raw | (raw.get("text_config") or {})
    layers = stated.get(keys.layers)
    layers = keys.default if layers is None else layers
    _check_int(keys.layers, layers, 0)
    dedicated = keys.dedicated is not None and stated.get(keys.dedicated)
    if not isinstance(dedicated, bool | None):
        raise ValueError(f"{keys.dedicated} must be true or false, got {dedicated!r}")
    return layers, bool(dedicated)


def _mlp_kind(hf: Any, layer: int, moe: MoeConfig | None) -> MlpKind:
    sparse = (
        moe is not None
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the engine runs. Every field has a default that works; a bad value is an error at construction.

    Capacity
      max_num_seqs            requests that run at once: live slots of the state pool.
      num_checkpoint_slots    slots of the state pool for the prefix cache, beside the live ones; None: what a quarter
                              of the memory that is left holds, at most twice max_num_seqs (0 without the cache).
      max_num_batched_tokens  prompt tokens that one step may prefill; longer prompts are cut into pieces.
      max_model_len           prompt + output tokens of one request; None: min(the model's context, 8192).
      block_size              tokens in a KV block.
      num_kv_blocks           KV blocks besides the null one; None: what memory allows, at most what as many requests
                              of max_model_len as there are slots can use.
      gpu_memory_utilization  share of the device's memory that is left for weights, pools and workspace.
      max_logit_rows          running requests that may use logit_bias, bad_words or allowed_token_ids at once (each
                              holds a row of the vocabulary's size); further ones wait. None: min(max_num_seqs, 16).
                              Penalties need none: there is a row of token counts for every running request.
      max_num_prefill_seqs    prompts that may share a prefill step of the largest bucket. None: 8, and one for each 64
                              tokens of the bucket, as in the others; never more than max_num_seqs. A step draws behind
                              as many prompts as it has rows for, and beyond the default each costs a chunk, too,
                              whether there are so many or not.
    Numerics
      dtype                   "auto" (the checkpoint's), "float32" or "bfloat16": weights, activations and KV.
      ssm_dtype               the recurrent state: "float32" (default) or "bfloat16".
      state_layout            how a slot's recurrent state is stored: "vk" (the fastest on an H100), "kv", or "mixed"
                              (prefill writes KV, decode writes VK, a bit per slot says which).
      seed                    seeds requests that bring no seed of their own.
    Execution
      tensor_parallel_size    devices that share one model.
      kernels                 "auto", "pallas", "interpret" or "reference"; see gdnjax.backend.
      prefill_buckets         packed prompt tokens a step is compiled for; empty: 64, 256 and max_num_batched_tokens.
      decode_buckets          rows a decode step is compiled for; empty: 1, 8, 32, twice that and so on, below
                              max_num_seqs, and that.
      max_logprobs            the most alternatives a request may ask log-probabilities of.
      warmup                  compile every step at start; False compiles each at its first use.
      compilation_cache_dir   JAX's persistent compilation cache; None: the one JAX is configured with, or
                              ~/.cache/gdnjax; "" switches it off.
    Prefix cache
      enable_prefix_caching   keep KV blocks and states of what has been computed, for requests that begin alike.
      state_checkpoint_interval  tokens between checkpoints of the recurrent state within a long sequence, a multiple of
                              block_size; None: the larger of 1024 and block_size. Checkpoints at the end of a prompt,
                              before a chat's generation prompt, at a branch and at the end of a turn come on top.
      batch_invariant         the same tokens whatever the load, the cache and the neighbours: one prefill bucket, one
                              decode bucket, one sampler, states checkpointed on the grid of chunks only, and all blocks
                              reserved at admission, so that nothing is preempted. Costs throughput; README.md has how
                              much.
    Speculation, by the model's MTP head
      num_speculative_tokens  tokens drafted and verified in each decode step, 0 to 7; 0: no speculation.
      draft_acceptance        "shared_noise": drafts and target draw with the same noise, and a draft is kept if it is
                              the target's own token, so that a seed gives the same tokens with and without speculation;
                              "rejection": classic rejection sampling, which keeps more drafts at a temperature, and
                              gives the same distribution, not the same tokens.
      adaptive_speculation    draft in those steps only where that pays, by what the engine measures as it runs.
      spec_acceptance_length  force this many tokens a step on average, 1 to 1 + num_speculative_tokens, for benchmarks
                              with random weights. The outputs are marked: they are not the model's.
    """

    max_num_seqs: int = 8
    max_num_batched_tokens: int = 1024
    max_model_len: int | None = None
    block_size: int = 16
    num_kv_blocks: int | None = None
    gpu_memory_utilization: float = 0.9
    max_logit_rows: int | None = None
    max_num_prefill_seqs: int | None = None
    dtype: str = "auto"
    ssm_dtype: str = "float32"
    state_layout: str = "vk"
    seed: int = 0
    tensor_parallel_size: int = 1
    kernels: str = "auto"
    prefill_buckets: tuple[int, ...] = ()
    decode_buckets: tuple[int, ...] = ()
    max_logprobs: int = 20
    warmup: bool = True
    compilation_cache_dir: str | None = None
    enable_prefix_caching: bool = True
    num_checkpoint_slots: int | None = None
    state_checkpoint_interval: int | None = None
    batch_invariant: bool = False
    num_speculative_tokens: int = 0
    draft_acceptance: str = "shared_noise"
    adaptive_speculation: bool = False
    spec_acceptance_length: float | None = None

    def __post_init__(self):
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size", "tensor_parallel_size"):
            _check_int(name, getattr(self, name), 1)
        for name in ("max_model_len", "num_kv_blocks", "max_logit_rows", "max_num_prefill_seqs"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 1)
        _check_int("max_logprobs", self.max_logprobs, 0)
        _check_int("seed", self.seed, 0)
        if self.num_checkpoint_slots is not None:
            _check_int("num_checkpoint_slots", self.num_checkpoint_slots, 0)
        for name in ("enable_prefix_caching", "batch_invariant", "warmup", "adaptive_speculation"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.block_size & (self.block_size - 1):
            raise ValueError(f"block_size must be a power of two, got {self.block_size}")
        if self.max_num_batched_tokens % CHUNK:
            raise ValueError(
                f"max_num_batched_tokens must be a multiple of {CHUNK} (prompts are cut there), "
                f"got {self.max_num_batched_tokens}"
            )
        share = self.gpu_memory_utilization
        if not isinstance(share, int | float) or not 0 < share <= 1:
            raise ValueError(f"gpu_memory_utilization must be in (0, 1], got {share!r}")
        _check_choice("dtype", self.dtype, DTYPES)
        _check_choice("ssm_dtype", self.ssm_dtype, ("float32", "bfloat16"))
        _check_choice("state_layout", self.state_layout, STATE_LAYOUTS)
        _check_choice("kernels", self.kernels, KERNELS)
        if self.num_checkpoint_slots and not self.enable_prefix_caching:
            raise ValueError(
                f"num_checkpoint_slots={self.num_checkpoint_slots} are of no use with enable_prefix_caching=False; "
                "allowed: None or 0"
            )
        if self.state_checkpoint_interval is not None:
            _check_int("state_checkpoint_interval", self.state_checkpoint_interval, 1)
            if self.state_checkpoint_interval % self.block_size:
                raise ValueError(
                    f"state_checkpoint_interval must be a multiple of block_size={self.block_size}, "
                    f"got {self.state_checkpoint_interval}"
                )
        self._check_speculation()
        _set_buckets(self, "prefill_buckets", self.max_num_batched_tokens, () if self.batch_invariant else (64, 256))
        # Up to 32 rows the weights are what a step costs, so few sizes will do; from there on it is the rows.
        doubled = tuple(32 << i for i in range(self.max_num_seqs.bit_length()))
        _set_buckets(self, "decode_buckets", self.max_num_seqs, () if self.batch_invariant else (1, 8, *doubled))
        if self.batch_invariant and (len(self.prefill_buckets) > 1 or len(self.decode_buckets) > 1):
            raise ValueError(
                f"batch_invariant=True needs one prefill bucket and one decode bucket, got {self.prefill_buckets} and "
                f"{self.decode_buckets}"
            )

    def _check_speculation(self) -> None:
        drafts = self.num_speculative_tokens
        _check_int("num_speculative_tokens", drafts, 0)
        if drafts > MAX_SPECULATIVE_TOKENS:
            raise ValueError(f"num_speculative_tokens must be at most {MAX_SPECULATIVE_TOKENS}, got {drafts}")
        _check_choice("draft_acceptance", self.draft_acceptance, DRAFT_ACCEPTANCES)
        if self.adaptive_speculation and (not drafts or self.batch_invariant):
            raise ValueError(
                "adaptive_speculation=True needs num_speculative_tokens above 0 and batch_invariant=False, "
                f"got {drafts} and {self.batch_invariant}"
            )
        length = self.spec_acceptance_length
        if length is not None and (not isinstance(length, int | float) or not drafts or not 1 <= length <= 1 + drafts):
            raise ValueError(
                f"spec_acceptance_length must be between 1 and 1 + num_speculative_tokens={1 + drafts}, and needs "
                f"speculation, got {length!r}"
            )
        if self.checkpoint_interval < 1 + drafts:
            raise ValueError(
                f"state_checkpoint_interval must be at least the {1 + drafts} tokens that a step may produce, "
                f"got {self.checkpoint_interval}"
            )

    @property
    def num_logit_rows(self) -> int:
        """`max_logit_rows`, or its default."""
        return min(self.max_num_seqs, 16) if self.max_logit_rows is None else self.max_logit_rows

    def length_within(self, context: int) -> int:
        """`max_model_len`, or its default, for a model of so many tokens of context. Raises ValueError beyond that."""
        if self.max_model_len is None:
            return min(context, DEFAULT_MAX_MODEL_LEN)
        if self.max_model_len > context:
            raise ValueError(f"max_model_len={self.max_model_len} exceeds the model's context of {context} tokens")
        return self.max_model_len

    @property
    def checkpoint_interval(self) -> int:
        """`state_checkpoint_interval`, or its default."""
        return self.state_checkpoint_interval or max(1024, self.block_size)

    @property
    def checkpoint_grid(self) -> int:
        """Checkpoints within a prompt stand at multiples of this many tokens. On multiples of CHUNK, too, a sequence
        that goes on from a checkpoint is cut into the chunks of one that was never cut.
        """
        return max(CHUNK, self.block_size) if self.batch_invariant else self.block_size

    @property
    def prefill_rows(self) -> int:
        """Requests whose prompt tokens may share one prefill step, of the largest bucket."""
        return min(self.max_num_seqs, self.max_num_prefill_seqs or _prompts_within(self.max_num_batched_tokens))

    def prefill_rows_of(self, bucket: int) -> int:
        """Requests whose prompt tokens may share a prefill step of so many tokens: one of `prefill_buckets`."""
        most = self.prefill_rows
        return most if bucket == self.max_num_batched_tokens else min(most, _prompts_within(bucket))


def _prompts_within(tokens: int) -> int:
    """Prompts that a step of so many tokens has rows for, unless it is said otherwise."""
    return LONG_ROWS + tokens // CHUNK


def _check_positive(geometry: Any) -> None:
    """Raises ValueError for a field of a geometry that is not above 0."""
    for field in dataclasses.fields(geometry):
        value = getattr(geometry, field.name)
        if isinstance(value, int | float) and not 0 < value < math.inf:
            raise ValueError(f"{type(geometry).__name__}.{field.name} must be above 0, got {value!r}")


def _number(name: str, value: Any, least: float) -> float:
    """A finite number of at least `least`, as a float."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value < math.inf:
        raise ValueError(f"{name} must be a finite number of at least {least:g}, got {value!r}")
    return float(value)


def _check_int(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _set_buckets(config: EngineConfig, name: str, largest: int, defaults: tuple[int, ...]) -> None:
    """Fills in the default buckets and checks given ones: ascending, the largest covering what one step may need."""
    buckets = tuple(getattr(config, name)) or (*(size for size in defaults if size < largest), largest)
    object.__setattr__(config, name, buckets)
    for size in buckets:
        _check_int(name, size, 1)
    if list(buckets) != sorted(set(buckets)) or buckets[-1] != largest:
        raise ValueError(f"{name} must ascend and end with {largest}, got {buckets}")
