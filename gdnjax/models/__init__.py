"""Models behind one small interface, `Model`: what a step needs of them, and nothing else."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

from gdnjax import sharding
from gdnjax.backend import REFERENCE, Backend
from gdnjax.cache import Cache
from gdnjax.cache_kinds import CacheSpec
from gdnjax.config import EngineConfig, ModelConfig
from gdnjax.memory import StateGeometry
from gdnjax.models import partition
from gdnjax.models.causal_lm import CausalLM
from gdnjax.models.context import DecodeContext, FoldContext, PrefillContext
from gdnjax.pallas_kernels import paged_attention
from gdnjax.quantized import CodeFormat, Quantized
from gdnjax.shapes import Array, Float, Float32, Int32, Params


@runtime_checkable
class Model(Protocol):
    """What a step calls. Sizes are those of one of `tp` ranks; implementations are stateless and hashable."""

    @property
    def tp(self) -> int: ...

    @property
    def vocab_size(self) -> int:
        """Tokens that exist, without padding, over all ranks."""
        ...

    @property
    def expert_parallel(self) -> bool:
        """Whether its ranks share out routed experts whole: how its parameters are split (`partition.specs_of`)."""
        ...

    @property
    def mtp(self) -> bool:
        """Whether it has a head that drafts. `draft` is called only then, `fold` only where something speculates."""
        ...

    @property
    def backend(self) -> Backend:
        """What runs its ops, and draws from its logits."""
        ...

    def on(self, backend: Backend) -> "Model":
        """The same model, its ops run by `backend`."""
        ...

    @property
    def hidden_size(self) -> int:
        """Numbers of a token's final hidden state, whole on every rank."""
        ...

    @property
    def hidden_dtype(self) -> str:
        """Their dtype."""
        ...

    def cache_spec(
        self, *, block_size: int, ssm_dtype: str, kv_cache_dtype: str = "auto", pending_rows: int = 0
    ) -> CacheSpec:
        """What one rank keeps of its requests; the head's layers are among the others of their kind.

        `ssm_dtype` is that of recurrent states, `kv_cache_dtype` that of entries in blocks ("auto": the model's own),
        and `pending_rows` how many tokens a slot may hold that are not folded in.
        """
        ...

    def forward(
        self, params: Params, tokens: Any, context: PrefillContext | DecodeContext, cache: Cache
    ) -> tuple[Any, Cache]:
        """Final hidden states [t, d] of the step's tokens, and the pools, which are consumed. An engine with the
        reference keeps bfloat16 pools as bits: see `engine_geometry`.

        Where the context's chunks have checkpoints, the states behind each chunk are stored there, too.
        """
        ...

    def fold(self, params: Params, context: FoldContext, cache: Cache) -> Cache:
        """The pools, which are consumed, with pending rows folded into the states."""
        ...

    def draft(
        self, params: Params, tokens: Any, previous: Any, context: PrefillContext | DecodeContext, cache: Cache
    ) -> tuple[Any, Cache]:
        """The head's hidden states [t, d] of tokens, given the hidden state before each, and the pools, which are
        consumed.

        `draft_logits` of them are those of the token after each. At index 0 there is no hidden state before a token,
        and `previous` may hold anything finite there.
        """
        ...

    def logits(self, params: Params, hidden: Any) -> Any:
        """[n, V] float32 of this rank's part of the vocabulary; entries that pad it are -inf."""
        ...

    def draft_logits(self, params: Params, hidden: Any) -> Any:
        """The same of the head's hidden states: what drafts are drawn from, `logits` or near them. Called only where
        something drafts.
        """
        ...


def geometry_of(
    model: Model,
    *,
    block_size: int,
    ssm_dtype: str,
    kv_cache_dtype: str = "auto",
    speculation: EngineConfig | None = None,
) -> StateGeometry:
    """Of one rank of everything that outlives a step, with room for the drafts of an engine that speculates."""
    engine = speculation or EngineConfig()
    return StateGeometry(
        cache=model.cache_spec(
            block_size=block_size,
            ssm_dtype=ssm_dtype,
            kv_cache_dtype=kv_cache_dtype,
            pending_rows=engine.pending_rows,
        ),
        hidden_size=model.hidden_size,
        vocab_size=-(-model.vocab_size // model.tp),
        hidden_dtype=model.hidden_dtype,
        num_drafts=engine.num_speculative_tokens,
        keep_draft_hidden=engine.keeps_draft_hidden,
    )


def engine_geometry(model: Model, config: EngineConfig) -> StateGeometry:
    """Of one rank of an engine's state: with speculation, and as bits where the ops are the reference.

    Raises ValueError for a dtype that the model's entries in blocks or its device cannot have.
    """
    geometry = geometry_of(
        model,
        block_size=config.block_size,
        ssm_dtype=config.ssm_dtype,
        kv_cache_dtype=config.kv_cache_dtype,
        speculation=config,
    )
    paged_attention.check_device(config.kv_cache_dtype, model.backend)
    return geometry.as_bits() if model.backend.is_reference else geometry


@dataclasses.dataclass(frozen=True)
class HybridModel:
    """A model of one rank of any family that is supported, with its MTP head if `mtp`, and with a draft head in its
    parameters if `draft_head` (`gdnjax.models.draft_head`). Build it with `build_model`.
    """

    config: ModelConfig
    dtype: str
    tp: int
    mtp: bool
    backend: Backend
    graphdef: nnx.GraphDef[CausalLM]
    draft_head: bool = False

    def on(self, backend: Backend) -> "HybridModel":
        return build_model(self.config, self.dtype, self.tp, mtp=self.mtp, backend=backend, draft_head=self.draft_head)

    def with_draft_head(self) -> "HybridModel":
        """The same model, whose drafts are drawn by a head of their own."""
        return build_model(self.config, self.dtype, self.tp, mtp=self.mtp, backend=self.backend, draft_head=True)

    @property
    def expert_parallel(self) -> bool:
        return self.config.expert_parallel

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def hidden_dtype(self) -> str:
        return self.dtype

    def cache_spec(
        self, *, block_size: int, ssm_dtype: str, kv_cache_dtype: str = "auto", pending_rows: int = 0
    ) -> CacheSpec:
        return self.config.cache_spec(
            tp=self.tp,
            block_size=block_size,
            dtype=self.dtype,
            ssm_dtype=ssm_dtype,
            kv_cache_dtype=kv_cache_dtype,
            pending_rows=pending_rows,
            mtp=self.mtp,
        )

    def forward(
        self, params: Params, tokens: Int32[Array, "t"], context: PrefillContext | DecodeContext, cache: Cache
    ) -> tuple[Array, Cache]:
        return nnx.merge(self.graphdef, params)(tokens, context, cache)

    def expert_choices(
        self, params: Params, tokens: Int32[Array, "t"], context: PrefillContext | DecodeContext, cache: Cache
    ) -> Int32[Array, "layers t top"]:
        """Only for a model with experts; see `gdnjax.routing`."""
        return nnx.merge(self.graphdef, params).expert_choices(tokens, context, cache)

    def fold(self, params: Params, context: FoldContext, cache: Cache) -> Cache:
        return nnx.merge(self.graphdef, params).fold(context, cache)

    def draft(
        self,
        params: Params,
        tokens: Int32[Array, "t"],
        previous: Float[Array, "t d"],
        context: PrefillContext | DecodeContext,
        cache: Cache,
    ) -> tuple[Float[Array, "t d"], Cache]:
        """Only for a model built with `mtp`."""
        return nnx.merge(self.graphdef, params).draft(tokens, previous, context, cache)

    def logits(self, params: Params, hidden: Array) -> Float32[Array, "n V"]:
        return nnx.merge(self.graphdef, params).logits(hidden)

    def draft_logits(self, params: Params, hidden: Array) -> Float32[Array, "n V"]:
        return nnx.merge(self.graphdef, params).draft_logits(hidden)


def build_model(
    config: ModelConfig,
    dtype: str,
    tp: int = 1,
    *,
    mtp: bool = False,
    backend: Backend = REFERENCE,
    draft_head: bool = False,
) -> HybridModel:
    """The model of one rank, without parameters; `mtp` adds its multi-token-prediction head, and `draft_head` another
    head for its drafts, which `draft_head.with_draft_head` makes of parameters.

    Only the reference implementation of the ops, the default, can be differentiated. An LLM chooses by its `kernels`.

    Raises ValueError where the ranks do not divide its heads, or where the configuration has no MTP head to add.
    """
    graphdef = nnx.split(_abstract(config, dtype, tp, mtp, backend, draft_head))[0]
    return HybridModel(
        config=config, dtype=dtype, tp=tp, mtp=mtp, backend=backend, graphdef=graphdef, draft_head=draft_head
    )


def abstract_params(
    config: ModelConfig,
    tp: int,
    dtype: str,
    *,
    mtp: bool = False,
    coded: Mapping[str, CodeFormat] = MappingProxyType({}),
) -> Params:
    """The nested dict of parameters as ShapeDtypeStructs with global shapes, keyed by the checkpoint's names.

    `coded` says which are codes and scales, by name: there a `Quantized` stands. Raises ValueError for a name that is
    none of such a parameter.
    """
    local = nnx.to_pure_dict(nnx.split(_abstract(config, dtype, tp, mtp, REFERENCE))[1])
    names = {sharding.path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(local)[0]}
    other = [name for name in coded if name not in names or not partition.CODED.fullmatch(name)]
    if other:
        raise ValueError(f"parameters that cannot be held as codes: {', '.join(other)}")

    def as_held(path, leaf):
        form = coded.get(sharding.path_name(path))
        return leaf if form is None else form.abstract(leaf.shape)

    local = jax.tree_util.tree_map_with_path(as_held, local)

    def global_shape(path, leaf):
        spec = partition.spec_of(sharding.path_name(path), expert_parallel=config.expert_parallel)
        shape = [size * tp if i < len(spec) and spec[i] else size for i, size in enumerate(leaf.shape)]
        return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(global_shape, local)


@functools.lru_cache(maxsize=2)
def _abstract(
    config: ModelConfig, dtype: str, tp: int, mtp: bool, backend: Backend, draft_head: bool = False
) -> CausalLM:
    """The module with shapes in place of parameters; `build_model` and `abstract_params` both start from it."""
    return nnx.eval_shape(lambda: CausalLM(config, dtype, tp, mtp, backend, draft_head))


def random_params(
    config: ModelConfig,
    tp: int,
    dtype: str,
    key: Array,
    *,
    mtp: bool = False,
    coded: Mapping[str, CodeFormat] = MappingProxyType({}),
    shardings: Any = None,
) -> Params:
    """Random parameters (global shapes) under which state matters: half-lives of 1 to 200 tokens, uneven norms.

    Traceable. For benchmarks and tests; with the usual initialisation a state forgets within a token, so that a
    corrupted one changes nothing. With `shardings`, a tree like the result's, every leaf is made where it stays, and
    one function is compiled for all that are alike: a large model as one function takes minutes to compile. Weights of
    `coded` are made as codes and scales.
    """
    abstract = abstract_params(config, tp, dtype, mtp=mtp, coded=coded)
    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract, is_leaf=_is_coded)
    keys = jax.random.split(key, len(leaves))
    places = [None] * len(leaves) if shardings is None else jax.tree.leaves(shardings, is_leaf=_is_coded)
    values = [
        _random_leaf_maker(_kind(sharding.path_name(path), config), leaf, place)(k)
        for (path, leaf), place, k in zip(leaves, places, keys, strict=True)
    ]
    return jax.tree_util.tree_unflatten(tree, values)


NORMS = (
    "norm",
    "q_norm",
    "k_norm",
    "q_heads_norm",
    "k_heads_norm",
    "input_layernorm",
    "post_attention_layernorm",
    "post_feedforward_layernorm",
    "pre_fc_norm_embedding",
    "pre_fc_norm_hidden",
)


def _kind(name: str, config: ModelConfig) -> str:
    kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if name.endswith(("linear_attn.norm.weight", "a_layernorm.weight")):
        return "plain norm"
    if kind in NORMS:
        return "zero-centred norm" if config.zero_centred_norms else "plain norm"
    return kind


@functools.cache
def _random_leaf_maker(kind: str, leaf: Any, place: Any) -> Callable[[Array], Any]:
    make = functools.partial(_random_leaf, kind, leaf)
    return make if place is None else jax.jit(make, out_shardings=place)


def _is_coded(leaf: Any) -> bool:
    return isinstance(leaf, Quantized)


def random_codes(leaf: Quantized, key: Array) -> Quantized:
    """Codes and scales of such shapes, of the size of other weights. Codes are made of random bits, which takes no more
    memory than they do.
    """
    bits = jax.random.bits(key, leaf.codes.shape, jnp.uint8)
    if leaf.codes.dtype == jnp.int8:
        codes, size = jax.lax.bitcast_convert_type(bits, jnp.int8), 74.0
    else:
        # Any sign and mantissa, and four of the exponents: 1/8 to 15/8.
        codes, size = jax.lax.bitcast_convert_type(bits & 0x9F | 0x20, jnp.float8_e4m3fn), 0.83
    spread = jax.random.uniform(jax.random.fold_in(key, 1), leaf.scale.shape, minval=0.7, maxval=1.3)
    return Quantized(codes, spread * (leaf.shape[-1] ** -0.5 / size), leaf.grid)


def _random_leaf(kind: str, leaf: Any, key: Array) -> Any:
    if isinstance(leaf, Quantized):
        return random_codes(leaf, key)
    normal = jax.random.normal(key, leaf.shape, jnp.float32)
    match kind:
        case "A_log":
            value = jnp.zeros(leaf.shape)
        case "dt_bias":
            # With A = 1 a token keeps exp(-softplus(dt_bias)); half-lives are log-uniform in 1..200.
            half_life = 200.0 ** jax.random.uniform(key, leaf.shape)
            value = jnp.log(jnp.expm1(jnp.log(2.0) / half_life))
        case "plain norm":
            value = 1 + 0.3 * normal
        case "zero-centred norm":
            value = 0.3 * normal
        case "e_score_correction_bias":
            value = 0.1 * normal
        case "in_proj_a" | "f_b_proj":
            value = 0.1 * normal * leaf.shape[-1] ** -0.5
        case "conv1d":
            value = 0.5 * normal
        case "embed_tokens":
            value = normal
        case _:
            value = normal * leaf.shape[-1] ** -0.5
    return value.astype(leaf.dtype)


__all__ = ["HybridModel", "Model", "abstract_params", "build_model", "engine_geometry", "geometry_of", "random_params"]
