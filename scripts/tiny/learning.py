"""What is trained and how: the model's configuration, its start, the loss, the optimizer, one step."""

import dataclasses
import functools
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax

    from gdnjax.models import HybridModel

WIDTH = 192
HEAD_DIM = 64
LAYERS = 8
VOCABULARY = 1024
MTP_DEPTH = 3
MTP_WEIGHT = 0.3

MUON_RATE = 0.01
ADAM_RATE = 0.003
WARMUP_STEPS = 100
DECAY_SHARE = 0.35
"""Share of the steps at the end over which the learning rate falls to zero."""


def model_config(eos_token_ids: list[int]) -> dict[str, Any]:
    """config.json, as the published text models spell it."""
    return {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "dtype": "bfloat16",
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 512,
        "num_hidden_layers": LAYERS,
        "layer_types": ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(LAYERS)],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": HEAD_DIM,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": HEAD_DIM,
        "linear_value_head_dim": HEAD_DIM,
        "linear_conv_kernel_dim": 4,
        "mtp_num_hidden_layers": 1,
        "mtp_use_dedicated_embeddings": False,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "eos_token_id": eos_token_ids,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [3, 3, 2],
            "mrope_interleaved": True,
        },
    }


def initial_params(abstract: Any, key: "jax.Array") -> Any:
    """Float32 parameters to start from. Decays are slow, so that the state has something to remember with.

    With A = 1 a token's decay is exp(-dt), dt = softplus(dt_bias) log-uniform in 0.001 to 0.1: half-lives of 7 to 700
    tokens. The usual initialisation (A up to 16) makes them forget within a few.
    """
    import jax
    import jax.numpy as jnp

    from gdnjax import sharding

    def leaf(path, shape, key):
        name = sharding.path_name(path)
        kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
        size = shape.shape
        normal = jax.random.normal(key, size)
        if kind == "A_log":
            return jnp.zeros(size)
        if kind == "dt_bias":
            dt = jnp.exp(jax.random.uniform(key, size, minval=math.log(0.001), maxval=math.log(0.1)))
            return jnp.log(jnp.expm1(dt))
        if name.endswith("linear_attn.norm.weight"):
            return jnp.ones(size)
        if len(size) == 1:
            return jnp.zeros(size)
        if kind == "embed_tokens":
            return 0.05 * normal
        if kind == "conv1d":
            return 0.5 * normal
        scale = {"in_proj_a": 0.1, "o_proj": 0.25, "out_proj": 0.25, "down_proj": 0.25}.get(kind, 1.0)
        return scale * size[-1] ** -0.5 * normal

    leaves, tree = jax.tree_util.tree_flatten_with_path(abstract)
    keys = jax.random.split(key, len(leaves))
    return jax.tree_util.tree_unflatten(tree, [leaf(path, x, k) for (path, x), k in zip(leaves, keys, strict=True)])


def optimizer(params: Any, steps: int) -> Any:
    """Muon for the matrices of the layers, AdamW for embedding, gates, convolutions and vectors."""
    import jax
    import optax
    from optax.contrib import MuonDimensionNumbers, muon

    from gdnjax import sharding

    def dimensions(path, leaf):
        name = sharding.path_name(path)
        by_adam = leaf.ndim != 2 or name.endswith(("embed_tokens.weight", "in_proj_a.weight", "in_proj_b.weight"))
        return None if by_adam else MuonDimensionNumbers(reduction_axis=1, output_axis=0)

    decay = max(1, int(DECAY_SHARE * steps))
    warmup = min(WARMUP_STEPS, max(1, steps // 10))
    shape = optax.join_schedules(
        [
            optax.linear_schedule(0.0, 1.0, warmup),
            optax.constant_schedule(1.0),
            optax.linear_schedule(1.0, 0.0, decay),
        ],
        [warmup, steps - decay],
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            learning_rate=lambda step: MUON_RATE * shape(step),
            adam_learning_rate=lambda step: ADAM_RATE * shape(step),
            adam_b2=0.98,
            weight_decay=0.1,
            muon_weight_dimension_numbers=jax.tree_util.tree_map_with_path(dimensions, params),
        ),
    )


def hidden_states(model: "HybridModel", params: Any, longest: int, sequence: dict[str, Any]) -> Any:
    """Final hidden states of one packed sequence, and those of the MTP head: [1 + MTP_DEPTH, t, d].

    The same layers as in serving, over pools of this sequence alone. A document that attention does not see has its
    queries masked, which makes the layers' outputs zero.
    """
    import jax.numpy as jnp

    from gdnjax import step
    from gdnjax.batch import PrefillBatch
    from gdnjax.config import EngineConfig
    from gdnjax.memory import MemoryPlan
    from gdnjax.models import geometry_of
    from gdnjax.models.context import prefill_context
    from gdnjax.state import empty_state
    from gdnjax.step import StepOptions
    from tiny.batches import CHUNK

    rows, chunks = sequence["start"].shape[0], sequence["chunk_row"].shape[0]
    # Gradients of keys and values that several queries read are summed in the pool's dtype.
    geometry = geometry_of(model, block_size=CHUNK, ssm_dtype="float32", kv_cache_dtype="float32")
    plan = MemoryPlan.of_counts(geometry, num_slots=rows, num_blocks=chunks, num_logit_rows=0)
    state = empty_state(geometry, plan, EngineConfig(max_num_seqs=rows, block_size=CHUNK), longest)
    table = jnp.pad(sequence["block_table"], ((1, 0), (0, 0)))
    state = dataclasses.replace(state, slots=dataclasses.replace(state.slots, block_table=table))
    names = ("tokens", "token_row", "token_valid", "start", "length", "chunk_row", "chunk_start", "chunk_length")
    batch = PrefillBatch(
        **{name: sequence[name] for name in names},
        slot=jnp.arange(1, rows + 1, dtype=jnp.int32),
        is_last=jnp.ones((rows,), bool),
        target=sequence["tokens"],
    )
    context = prefill_context(step.pools_of(state, StepOptions()), batch)
    seen = sequence["attends"][sequence["chunk_row"]][:, None]
    tiles = dataclasses.replace(context.tiles, position=jnp.where(seen, context.tiles.position, -1), longest=longest)
    context = dataclasses.replace(context, tiles=tiles)
    hidden, cache = model.forward(params, batch.tokens, context, state.cache)
    outputs, previous = [hidden], jnp.roll(hidden, 1, axis=0)
    for depth in range(MTP_DEPTH):
        drafted, cache = model.draft(params, batch.tokens, previous, context, cache)
        outputs.append(drafted)
        # The next draft feeds this one's output, where so many tokens lie before it.
        previous = jnp.where((context.position > depth + 1)[:, None], jnp.roll(drafted, 1, axis=0), previous)
    return jnp.stack(outputs), context.position


def loss_and_counts(model: "HybridModel", abstract: Any, longest: int, params: Any, batch: dict[str, Any]) -> Any:
    """The loss, and for each kind of document: learned targets, and how many the model and each draft got right."""
    import jax
    import jax.numpy as jnp

    import tiny.data

    rounded = jax.tree.map(lambda p, shape: p.astype(shape.dtype), params, abstract)
    hidden, position = jax.vmap(functools.partial(hidden_states, model, rounded, longest))(batch)
    # [1 + depth, sequences, tokens, V]
    logits = model.logits(rounded, hidden.swapaxes(0, 1).reshape(-1, hidden.shape[-1]))
    logits = logits.reshape(1 + MTP_DEPTH, *batch["tokens"].shape, -1)
    target = jnp.roll(batch["tokens"], -1, axis=1)
    chosen = jnp.take_along_axis(logits, target[None, ..., None], axis=-1)[..., 0]
    entropy = jax.nn.logsumexp(logits, axis=-1) - chosen
    # Draft d exists where d tokens lie before.
    depth = jnp.arange(1 + MTP_DEPTH)[:, None, None]
    weight = jnp.where(position >= depth, batch["weight"], 0.0)
    mean = jnp.sum(entropy * weight, axis=(1, 2)) / jnp.sum(weight, axis=(1, 2))
    loss = mean[0] + MTP_WEIGHT * jnp.mean(mean[1:])
    learned = weight == 1.0
    right = learned & (jnp.argmax(logits, axis=-1) == target)
    kinds = jax.nn.one_hot(batch["kind"], len(tiny.data.KINDS))
    counts = {
        "learned": jnp.einsum("dnt,ntk->dk", learned.astype(jnp.float32), kinds),
        "right": jnp.einsum("dnt,ntk->dk", right.astype(jnp.float32), kinds),
        "losses": mean,
        "tokens": jnp.sum(batch["token_valid"]),
    }
    return loss, counts


def make_step(model: "HybridModel", abstract: Any, transform: Any, longest: int) -> Any:
    """Jits one training step: (params, optimizer state, batch) -> the same two, donated, and the counts."""
    import jax
    import optax

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, state, batch):
        gradient_of = jax.grad(functools.partial(loss_and_counts, model, abstract, longest), has_aux=True)
        gradient, counts = gradient_of(params, batch)
        updates, state = transform.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, counts

    return train_step
