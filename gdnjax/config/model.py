"""What a model is: its geometry, frozen and validated at construction, read by everything else. No jax."""

import dataclasses
import enum
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from gdnjax.cache_kinds import ITEMSIZE, CacheKind, CacheSpec, LeafSpec, Paged, Slot
from gdnjax.config.checks import check_choice, check_positive
from gdnjax.config.quantization import Quantization, cell_of


@dataclasses.dataclass(frozen=True)
class MtpKeys:
    """Where a family's config.json, or the text_config in it, describes the multi-token-prediction head.

    layers      key that counts the head's decoder layers
    default     that count where the key is absent or null
    dedicated   key that is true where the head has an embedding of its own; None: the family has no such key
    alias       another name of `layers`, which transformers reads as well
    as_layers   the head's tensors are named as layers behind the last one, in place of mtp.
    """

    layers: str
    default: int
    dedicated: str | None
    alias: str | None = None
    as_layers: bool = False


_QWEN3_5_MTP = MtpKeys(layers="mtp_num_hidden_layers", default=0, dedicated="mtp_use_dedicated_embeddings")

MTP_KEYS: dict[str, MtpKeys] = {
    "deepseek_v3": MtpKeys(
        layers="num_nextn_predict_layers", default=1, dedicated=None, alias="num_mtp_layers", as_layers=True
    ),
    "kimi_linear": MtpKeys(layers="num_nextn_predict_layers", default=0, dedicated=None, as_layers=True),
    "qwen3_5": _QWEN3_5_MTP,
    "qwen3_5_moe": _QWEN3_5_MTP,
    "qwen3_5_moe_text": _QWEN3_5_MTP,
    "qwen3_5_text": _QWEN3_5_MTP,
    # Published files have the head's tensors and do not count its layers; vLLM takes one, under this key, too.
    "qwen3_next": MtpKeys(layers="num_nextn_predict_layers", default=1, dedicated=None),
}
"""model_type -> how the MTP head is configured; families without such a head are not here. Tables of its own beside
shared ones are found by the loader.
"""


class LayerKind(enum.Enum):
    """The token mixer of a layer. The tuple of kinds is the hybrid pattern of a model."""

    DELTA = "linear_attention"
    ATTENTION = "full_attention"


DELTA = "delta"
ATTENTION = "attention"
"""Names of the kinds of cache that layers of either LayerKind have; see `gdnjax.cache_kinds`."""


class MlpKind(enum.Enum):
    """The feed-forward part of a layer."""

    DENSE = "dense"
    MOE = "moe"


@dataclasses.dataclass(frozen=True)
class Projection:
    """A matrix of one rank that may be held as codes of eight bits and scales.

    split      what ranks share out: "outputs", "inputs", or "" where each has all of it
    matrices   such matrices in one: experts
    """

    outputs: int
    inputs: int
    split: str = ""
    matrices: int = 1

    @property
    def num_weights(self) -> int:
        return self.matrices * self.outputs * self.inputs

    def num_scales(self, grid: tuple[int, int], tp: int) -> int:
        """Scales of one of `tp` ranks where (rows, columns) of weights share one."""
        count = self.matrices
        for axis, size, cell in (("outputs", self.outputs, grid[0]), ("inputs", self.inputs, grid[1])):
            cut = tp > 1 and axis == self.split
            count *= -(-size // cell_of(size, cell, cut=cut))
        return count


def _gated_mlp(width: int, intermediate: int) -> tuple[Projection, ...]:
    up = Projection(intermediate, width, "outputs")
    return (up, up, Projection(width, intermediate, "inputs"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeltaConfig:
    """Geometry of the Gated DeltaNet layers.

    beta_scale    what write strengths are multiplied by; with 2 a state's eigenvalues reach from -1 to 1
    norm_eps      of the gated norm; None: the model's rms_norm_eps
    """

    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel: int
    beta_scale: float = 1.0
    norm_eps: float | None = None

    def __post_init__(self) -> None:
        check_positive(self)
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

    def num_weights(self, width: int) -> int:
        """Parameters of a layer of a model so wide, without those that are always float32."""
        inputs = self.conv_dim + self.value_dim + 2 * self.num_value_heads
        return width * (inputs + self.value_dim) + self.conv_dim * self.conv_kernel + self.value_head_dim

    def projections(self, width: int) -> tuple[Projection, ...]:
        """Those of a layer that FP8 checkpoints have as codes."""
        return _delta_projections(self, width, self.conv_dim, self.value_dim)

    @property
    def num_float32_weights(self) -> int:
        """A_log and dt_bias."""
        return 2 * self.num_value_heads

    @property
    def activation_width(self) -> int:
        """Numbers of a token that a layer holds at once, about, beside the residual stream."""
        return self.conv_dim + self.value_dim

    def cache_kind(self, layers: int, *, dtype: str, ssm_dtype: str, pending_rows: int) -> Slot:
        """What a request keeps of so many layers.

        ssm         [value heads, k * v] flat, because K and V may differ between the orders
        conv        [window + pending, channels] the last raw inputs of the convolution, oldest first, and behind them
                    those of pending tokens
        pending_ab  [pending, 2 value heads] the gate inputs of pending tokens: a, then b
        """
        shape = (pending_rows, 2 * self.num_value_heads)
        gates = LeafSpec(name="pending_ab", layers=layers, shape=shape, dtype=dtype, split=1)
        return _delta_slot(self, layers, dtype, ssm_dtype, pending_rows, gates)

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
class KimiDeltaConfig:
    """Geometry of the layers of Kimi Delta Attention: a decay for each key channel; keys and values are as wide."""

    num_heads: int
    head_dim: int
    conv_kernel: int

    def __post_init__(self) -> None:
        check_positive(self)
        if self.conv_kernel < 2:
            raise ValueError(f"short_conv_kernel_size must be at least 2, got {self.conv_kernel}")

    @property
    def key_head_dim(self) -> int:
        return self.head_dim

    @property
    def value_head_dim(self) -> int:
        return self.head_dim

    @property
    def key_dim(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def value_dim(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: q, k and v side by side."""
        return 2 * self.key_dim + self.value_dim

    def num_weights(self, width: int) -> int:
        """Parameters of a layer of a model so wide, without those that are always float32."""
        inputs = self.conv_dim + self.num_heads + 2 * self.head_dim
        low_rank = 2 * self.head_dim * self.value_dim
        return width * (inputs + self.value_dim) + low_rank + self.conv_dim * self.conv_kernel + self.head_dim

    def projections(self, width: int) -> tuple[Projection, ...]:
        """Those of a layer that FP8 checkpoints have as codes."""
        return _delta_projections(self, width, self.conv_dim)

    @property
    def num_float32_weights(self) -> int:
        """A_log and dt_bias."""
        return self.num_heads + self.value_dim

    @property
    def activation_width(self) -> int:
        """Numbers of a token that a layer holds at once, about, beside the residual stream."""
        return self.conv_dim + 2 * self.value_dim

    def cache_kind(self, layers: int, *, dtype: str, ssm_dtype: str, pending_rows: int) -> Slot:
        """What a request keeps of so many layers: states and windows as those of DeltaConfig, and

        pending_f  [pending, head_dim] the low-rank inputs of pending tokens' decays, whole on every rank
        pending_b  [pending, heads] the inputs of their write strengths
        """
        low_rank, strengths = (pending_rows, self.head_dim), (pending_rows, self.num_heads)
        gates = (
            LeafSpec(name="pending_f", layers=layers, shape=low_rank, dtype=dtype),
            LeafSpec(name="pending_b", layers=layers, shape=strengths, dtype=dtype, split=1),
        )
        return _delta_slot(self, layers, dtype, ssm_dtype, pending_rows, *gates)

    def shard(self, tp: int) -> "KimiDeltaConfig":
        """The part of one rank."""
        if self.num_heads % tp:
            raise ValueError(
                f"tensor_parallel_size={tp} does not divide the {self.num_heads} heads of linear attention; "
                f"allowed: divisors of {self.num_heads}"
            )
        return dataclasses.replace(self, num_heads=self.num_heads // tp)


def _delta_projections(delta: DeltaConfig | KimiDeltaConfig, width: int, *outputs: int) -> tuple[Projection, ...]:
    inputs = tuple(Projection(size, width, "outputs") for size in outputs)
    return (*inputs, Projection(width, delta.value_dim, "inputs"))


def _delta_slot(
    delta: DeltaConfig | KimiDeltaConfig, layers: int, dtype: str, ssm_dtype: str, pending_rows: int, *gates: LeafSpec
) -> Slot:
    """What all layers of the delta rule keep, and the `gates` of pending tokens where there are such."""
    state = (delta.value_dim // delta.value_head_dim, delta.key_head_dim * delta.value_head_dim)
    window = (delta.conv_kernel - 1 + pending_rows, delta.conv_dim)
    leaves = (
        LeafSpec(name="ssm", layers=layers, shape=state, dtype=ssm_dtype, split=0),
        LeafSpec(name="conv", layers=layers, shape=window, dtype=dtype, split=1),
    )
    return Slot(name=DELTA, leaves=leaves + (gates if pending_rows else ()), ordered=True)


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

    def __post_init__(self) -> None:
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
    """Geometry of the full-attention layers, and their rotary frequencies: those of `rope_theta`, with `yarn` changed
    for a longer context.

    rotary_dim    the part of a head that is rotated; None, as `rope_theta` then is: nothing is rotated
    output_gate   queries come with a gate of their own width, by which what is read is multiplied
    whole_norms   queries and keys are normalised over all heads together, not head by head
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int | None
    rope_theta: float | None
    yarn: YarnConfig | None = None
    output_gate: bool = True
    whole_norms: bool = False

    def __post_init__(self) -> None:
        check_positive(self)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads must be a multiple of num_key_value_heads, "
                f"got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.rotary_dim is None or self.rope_theta is None:
            if (self.rotary_dim, self.rope_theta, self.yarn) != (None, None, None):
                raise ValueError("without rotation rotary_dim, rope_theta and yarn are None, all three")
            return
        if self.yarn and self.rope_theta <= 1:
            raise ValueError(f"YaRN needs a rope_theta above 1, got {self.rope_theta}")
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim:
            raise ValueError(
                f"the rotary part of a head must be even and at most head_dim={self.head_dim}, got {self.rotary_dim}"
            )

    def num_weights(self, width: int) -> int:
        """Parameters of a layer of a model so wide."""
        norms = self.num_heads + self.num_kv_heads if self.whole_norms else 2
        return (width * self._num_projected_heads + norms) * self.head_dim

    def projections(self, width: int) -> tuple[Projection, ...]:
        """Those of a layer that FP8 checkpoints have as codes."""
        heads = ((1 + self.output_gate) * self.num_heads, self.num_kv_heads, self.num_kv_heads)
        inputs = tuple(Projection(count * self.head_dim, width, "outputs") for count in heads)
        return (*inputs, Projection(width, self.num_heads * self.head_dim, "inputs"))

    @property
    def _num_projected_heads(self) -> int:
        """Queries, keys, values and outputs, with the queries' gates if they have any."""
        return (2 + self.output_gate) * self.num_heads + 2 * self.num_kv_heads

    @property
    def num_float32_weights(self) -> int:
        return 0

    @property
    def activation_width(self) -> int:
        """Numbers of a token that a layer holds at once, about, beside the residual stream."""
        return self._num_projected_heads * self.head_dim

    def cache_kind(self, layers: int, *, dtype: str) -> Paged:
        """Keys and values of so many layers, 8-bit ones with a float32 scale for each token and head."""
        shape = (self.num_kv_heads, self.head_dim)
        leaves = [LeafSpec(name=name, layers=layers, shape=shape, dtype=dtype, split=0) for name in ("k", "v")]
        if ITEMSIZE[dtype] == 1:
            leaves += [
                LeafSpec(name=f"{name}_scale", layers=layers, shape=shape[:1], dtype="float32", split=0)
                for name in ("k", "v")
            ]
        return Paged(name=ATTENTION, leaves=tuple(leaves))

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
class LatentAttentionConfig:
    """Geometry of multi-head latent attention (MLA, arXiv:2405.04434), whose heads share one latent a token.

    q_lora_rank           width of the queries' own latent; None: one product makes them
    kv_lora_rank          width of the latent that keys and values are made of
    qk_nope_head_dim      width of a head's query and key that the latent makes
    qk_rope_head_dim      and of the part that stands beside it, which all heads share as keys
    v_head_dim            width of a head's value
    rope_theta            of the rotation of that part; None: nothing is rotated
    interleaved_rotary    the checkpoint has the rotated pairs side by side, (0, 1), (2, 3), ...; the modules never see
                          it, the loader undoes it
    score_factor          what scores are multiplied by beside 1 / sqrt(width of a query)
    norm_eps              of the norms of the latents
    """

    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope_theta: float | None = None
    yarn: YarnConfig | None = None
    interleaved_rotary: bool = False
    score_factor: float = 1.0
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_positive(self)
        if self.rope_theta is None and (self.yarn is not None or self.interleaved_rotary):
            raise ValueError("with rope_theta=None nothing is rotated: neither yarn nor interleaved_rotary may be set")
        if self.yarn and self.rope_theta is not None and self.rope_theta <= 1:
            raise ValueError(f"YaRN needs a rope_theta above 1, got {self.rope_theta}")
        if self.rope_theta is not None and self.qk_rope_head_dim % 2:
            raise ValueError(f"the rotary part of a head must be even, got qk_rope_head_dim={self.qk_rope_head_dim}")

    @property
    def rotary_dim(self) -> int:
        return 0 if self.rope_theta is None else self.qk_rope_head_dim

    @property
    def qk_head_dim(self) -> int:
        """Width of a head's query before it is absorbed."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Width of a token's entry."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def scale(self) -> float:
        """Of the scores."""
        return self.score_factor * self.qk_head_dim**-0.5

    def num_weights(self, width: int) -> int:
        """Parameters of a layer of a model so wide."""
        queries = self.num_heads * self.qk_head_dim
        rank = self.q_lora_rank
        size = width * queries if rank is None else rank * (width + 1 + queries)
        size += width * self.latent_dim + self.kv_lora_rank
        size += self.kv_lora_rank * self.num_heads * (self.qk_nope_head_dim + self.v_head_dim)
        return size + self.num_heads * self.v_head_dim * width

    def projections(self, width: int) -> tuple[Projection, ...]:
        """Those of a layer that stay codes: not what makes keys and values of latents, which is absorbed."""
        heads, rank = self.num_heads * self.qk_head_dim, self.q_lora_rank
        queries = (Projection(heads, width, "outputs"),)
        if rank is not None:
            queries = (Projection(rank, width), Projection(heads, rank, "outputs"))
        out = Projection(width, self.num_heads * self.v_head_dim, "inputs")
        return (*queries, Projection(self.latent_dim, width), out)

    @property
    def num_float32_weights(self) -> int:
        return 0

    @property
    def activation_width(self) -> int:
        """Numbers of a token that a layer holds at once, about, beside the residual stream: absorbed queries, and what
        is read for them.
        """
        return self.num_heads * (self.latent_dim + self.kv_lora_rank)

    def cache_kind(self, layers: int, *, dtype: str) -> Paged:
        """A latent a token in each of so many layers: what keys and values are made of, then the shared part of the
        keys. Every rank holds all of it. Raises ValueError for an 8-bit dtype.
        """
        if ITEMSIZE[dtype] == 1:
            raise ValueError(
                f"latents are not stored in 8 bits, got kv_cache_dtype={dtype!r}; "
                "allowed: 'auto', 'float32', 'bfloat16'"
            )
        latent = LeafSpec(name="latent", layers=layers, shape=(self.latent_dim,), dtype=dtype)
        return Paged(name=ATTENTION, leaves=(latent,))

    def shard(self, tp: int) -> "LatentAttentionConfig":
        """The part of one rank: heads are shared out, latents are not."""
        if self.num_heads % tp:
            raise ValueError(
                f"tensor_parallel_size={tp} does not divide num_attention_heads={self.num_heads}; "
                f"allowed: divisors of {self.num_heads}"
            )
        return dataclasses.replace(self, num_heads=self.num_heads // tp)


SPLIT_WIDTHS = ("intermediate_size", "shared_intermediate_size")
"""Widths of experts that ranks share out, each a slice of every expert."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """Geometry of the mixture-of-experts layers, and how their router chooses.

    scoring            what makes scores of the router's logits: "softmax" over all experts, or "sigmoid" of each
    normalise_top_k    the weights of a token's experts are divided by their sum
    routed_scaling     what the weights are multiplied by then
    correction_bias    each expert has a bias that is added to its score for the choice, and for nothing else
    num_groups         groups of neighbouring experts, of which only `top_k_groups` are chosen from: those whose two
                       best scores have the largest sum
    shared_gate        the shared expert is multiplied by a gate of its own
    expert_parallel    ranks share out the routed experts whole; else each has a slice of every expert. Not a part of a
                       config.json: see `ModelConfig.with_expert_parallel`
    num_held           routed experts that a rank holds weights of; None: all. Set by `shard`
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    shared_intermediate_size: int
    normalise_top_k: bool
    scoring: str = "softmax"
    routed_scaling: float = 1.0
    correction_bias: bool = False
    num_groups: int = 1
    top_k_groups: int = 1
    shared_gate: bool = True
    expert_parallel: bool = False
    num_held: int | None = None

    def __post_init__(self) -> None:
        check_choice("scoring", self.scoring, ("softmax", "sigmoid"))
        if not 0 < self.experts_per_token <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok must be between 1 and num_experts={self.num_experts}, "
                f"got {self.experts_per_token}"
            )
        if self.num_groups < 1 or self.num_experts % self.num_groups:
            raise ValueError(f"n_group={self.num_groups} does not divide the {self.num_experts} experts")
        if not 0 < self.top_k_groups <= self.num_groups:
            raise ValueError(f"topk_group must be between 1 and n_group={self.num_groups}, got {self.top_k_groups}")
        size = self.num_experts // self.num_groups
        if self.num_groups > 1 and size < 2:
            raise ValueError(f"a group needs two experts or more, got n_group={self.num_groups} of {self.num_experts}")
        if self.experts_per_token > self.top_k_groups * size:
            raise ValueError(
                f"num_experts_per_tok={self.experts_per_token} of {self.top_k_groups} groups of {size} experts: "
                f"allowed: 1 to {self.top_k_groups * size}"
            )

    @property
    def held_experts(self) -> int:
        """`num_held`, or all."""
        return self.num_experts if self.num_held is None else self.num_held

    def num_weights(self, width: int) -> int:
        """Parameters of a layer of a model so wide, without those that are always float32."""
        experts = 3 * (self.held_experts * self.intermediate_size + self.shared_intermediate_size)
        # The router, and the gate of the shared expert.
        return width * (experts + self.num_experts + self.shared_gate)

    def projections(self, width: int) -> tuple[Projection, ...]:
        """Those of a layer that FP8 checkpoints have as codes."""
        outputs, inputs = ("", "") if self.expert_parallel else ("outputs", "inputs")
        up = Projection(2 * self.intermediate_size, width, outputs, self.held_experts)
        down = Projection(width, self.intermediate_size, inputs, self.held_experts)
        return (up, down, *_gated_mlp(width, self.shared_intermediate_size))

    @property
    def num_float32_weights(self) -> int:
        """The biases of the choice."""
        return self.num_experts if self.correction_bias else 0

    def shard(self, tp: int) -> "MoeConfig":
        """The part of one rank: a slice of every expert, or some of them whole. Of the shared expert it is a slice."""
        split = ("shared_intermediate_size",) if self.expert_parallel else SPLIT_WIDTHS
        for name in split:
            if getattr(self, name) % tp:
                raise ValueError(f"tensor_parallel_size={tp} does not divide moe {name}={getattr(self, name)}")
        if self.expert_parallel and self.num_experts % tp:
            raise ValueError(
                f"enable_expert_parallel: tensor_parallel_size={tp} does not divide num_experts={self.num_experts}; "
                f"allowed: divisors of {self.num_experts}, or enable_expert_parallel=False"
            )
        part = {name: getattr(self, name) // tp for name in split}
        held = self.num_experts // tp if self.expert_parallel else None
        return dataclasses.replace(self, **part, num_held=held)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What the engine needs to know of a hybrid model, whatever its family.

    `max_position_embeddings` is the longest context: with YaRN that which it is meant for, if it is longer than what
    the file says.

    `interleaved_projections` says that the checkpoint stores q, k, v, z (and b, a) grouped by key head, as
    Qwen3-Next does; the modules never see it, the loader undoes it. `zero_centred_norms`: the norms of the residual
    stream multiply by 1 + w, not by w. `separate_projections`: the checkpoint has q, k and v of the delta layers as
    tensors of their own, with Olmo-Hybrid's names for these layers; the loader joins them. Layers of `post_norm_kinds`
    normalise what mixer and MLP give, the others what these are given. `mtp_layers` counts the decoder layers of the
    checkpoint's multi-token-prediction head, 0 where it has none; `mtp_dedicated_embeddings` says that this head has
    an embedding of its own. Both are read by `MTP_KEYS`, and what the engine cannot run is refused by `require_mtp`:
    without the head such a checkpoint is as good as any other. `quantization` is how the checkpoint stores its large
    matrices, None where as they are.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layer_kinds: tuple[LayerKind, ...]
    mlp_kinds: tuple[MlpKind, ...]
    delta: DeltaConfig | KimiDeltaConfig | None = None
    attention: AttentionConfig | LatentAttentionConfig | None = None
    moe: MoeConfig | None = None
    mtp_layers: int = 0
    mtp_dedicated_embeddings: bool = False
    rms_norm_eps: float = 1e-6
    zero_centred_norms: bool = True
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768
    dtype: str = "bfloat16"
    interleaved_projections: bool = False
    separate_projections: bool = False
    post_norm_kinds: tuple[LayerKind, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        if not self.layer_kinds:
            raise ValueError("a model needs at least one layer, got an empty layer_types")
        if len(self.layer_kinds) != len(self.mlp_kinds):
            raise ValueError(f"{len(self.layer_kinds)} token mixers but {len(self.mlp_kinds)} MLPs")
        for kind, name in ((LayerKind.DELTA, "delta"), (LayerKind.ATTENTION, "attention")):
            if kind in self.layer_kinds and getattr(self, name) is None:
                raise ValueError(f"layer_kinds names {kind.value}, but {name} is None")
        if self.interleaved_projections and self.separate_projections:
            raise ValueError("projections of the checkpoint are interleaved or separate, not both")
        if self.mtp_layers and self.attention is None:
            raise ValueError(f"mtp_layers={self.mtp_layers} are attention layers, but attention is None")
        if MlpKind.MOE in self.mlp_kinds and self.moe is None:
            raise ValueError("mlp_kinds names a mixture of experts, but moe is None")
        if not self.rms_norm_eps > 0 or math.isinf(self.rms_norm_eps):
            raise ValueError(f"rms_norm_eps must be a finite number above 0, got {self.rms_norm_eps!r}")

    def cache_spec(
        self,
        *,
        tp: int,
        block_size: int,
        dtype: str,
        ssm_dtype: str,
        kv_cache_dtype: str = "auto",
        pending_rows: int = 0,
        mtp: bool = False,
    ) -> CacheSpec:
        """What one of `tp` ranks keeps of its requests, with the layers of the MTP head if `mtp`. `kv_cache_dtype`
        "auto" means `dtype`. Raises ValueError for another one where there is nothing that it is of.
        """
        rank = self.shard(tp)
        kinds: list[CacheKind] = []
        if rank.delta is not None and rank.num_delta_layers:
            options = {"dtype": dtype, "ssm_dtype": ssm_dtype, "pending_rows": pending_rows}
            kinds.append(rank.delta.cache_kind(rank.num_delta_layers, **options))
        paged = [kind for kind, _ in rank.layers(mtp=mtp)].count(LayerKind.ATTENTION)
        if rank.attention is not None and paged:
            kinds.append(rank.attention.cache_kind(paged, dtype=dtype if kv_cache_dtype == "auto" else kv_cache_dtype))
        elif kv_cache_dtype != "auto":
            raise ValueError(
                f"kv_cache_dtype={kv_cache_dtype!r} is of no use with a model without attention layers; allowed: 'auto'"
            )
        return CacheSpec(tuple(kinds), block_size)

    def layers(self, *, mtp: bool = False) -> list[tuple[LayerKind, MlpKind]]:
        """Token mixer and MLP of each layer, with those of the MTP head behind them if `mtp`."""
        head = [(LayerKind.ATTENTION, self.mlp_kinds[-1])] * self.mtp_layers if mtp else []
        return [*zip(self.layer_kinds, self.mlp_kinds, strict=True), *head]

    def mixer(self, kind: LayerKind) -> DeltaConfig | KimiDeltaConfig | AttentionConfig | LatentAttentionConfig:
        """The geometry of the token mixers of a kind."""
        found = self.delta if kind is LayerKind.DELTA else self.attention
        assert found is not None, "checked at construction for every kind that occurs"
        return found

    def projections(self, mixer: LayerKind, mlp: MlpKind) -> tuple[Projection, ...]:
        """Those of a layer that FP8 checkpoints have as codes."""
        found = self.mixer(mixer).projections(self.hidden_size)
        if mlp is MlpKind.DENSE:
            return (*found, *_gated_mlp(self.hidden_size, self.intermediate_size))
        assert self.moe is not None, "checked at construction"
        return (*found, *self.moe.projections(self.hidden_size))

    @property
    def num_layers(self) -> int:
        return len(self.layer_kinds)

    @property
    def num_delta_layers(self) -> int:
        return self.layer_kinds.count(LayerKind.DELTA)

    @property
    def num_attention_layers(self) -> int:
        return self.layer_kinds.count(LayerKind.ATTENTION)

    @property
    def mtp_layer_names(self) -> range | None:
        """Numbers under which the checkpoint names the MTP head's layers, where it does not name them mtp."""
        stored_so = self.model_type in MTP_KEYS and MTP_KEYS[self.model_type].as_layers
        return range(self.num_layers, self.num_layers + self.mtp_layers) if stored_so else None

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

    @property
    def expert_parallel(self) -> bool:
        """Whether ranks share out the routed experts whole."""
        return self.moe is not None and self.moe.expert_parallel

    def with_layers(self, layers: Sequence[int]) -> "ModelConfig":
        """The same model with these of its layers alone, in this order. Raises IndexError for one that it lacks."""
        kinds = tuple(self.layer_kinds[layer] for layer in layers)
        return dataclasses.replace(self, layer_kinds=kinds, mlp_kinds=tuple(self.mlp_kinds[layer] for layer in layers))

    def with_expert_parallel(self) -> "ModelConfig":
        """The same model, its routed experts shared out whole over the ranks. On one rank that changes nothing.

        Raises ValueError for a model without a mixture of experts.
        """
        if self.moe is None or MlpKind.MOE not in self.mlp_kinds:
            raise ValueError(
                f"enable_expert_parallel=True needs a model with a mixture of experts, and this {self.model_type} has "
                "none; allowed: False"
            )
        return dataclasses.replace(self, moe=dataclasses.replace(self.moe, expert_parallel=True))

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
            delta=None if self.delta is None else self.delta.shard(tp),
            attention=None if self.attention is None else self.attention.shard(tp),
            moe=None if self.moe is None else self.moe.shard(tp),
        )

    @classmethod
    def from_hf(cls, source: str | pathlib.Path | dict[str, Any]) -> "ModelConfig":
        """Reads a Hugging Face `config.json` (a directory that holds one, the file itself, or its parsed dict).

        Multimodal wrappers are read through their `text_config`. A count of MTP layers is what the file says, whether
        or not the tensors are there: the loader sees those, where the head is wanted. What becomes of each key is in
        gdnjax.config.keys; keys that are not known there are named in a warning. Raises FileNotFoundError where there
        is no config.json, and ValueError for an unknown model_type, a way of quantising or a feature that the engine
        does not compute, or what transformers refuses.
        """
        # At the call, because what reads a model's geometry is built on it.
        from gdnjax.config import huggingface

        return huggingface.read_model_config(source)
