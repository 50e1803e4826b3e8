"""The models in numpy float64, without chunks, pages, batch or ranks. Float32 is held to it."""

import dataclasses
from collections.abc import Collection, Sequence

import numpy as np

from gdnjax.config import KimiDeltaConfig, LatentAttentionConfig, LayerKind, MlpKind, ModelConfig
from gdnjax.models.layers import yarn_frequencies


@dataclasses.dataclass(frozen=True)
class Reference:
    """logits [t, V]; hidden [t, d] after the final norm; states and windows: one [hv, K, V] and one [w, x] for each
    delta layer, after the last token, and in `behind` after as many tokens as its keys say.

    keys, values: one [t, kh, hd] for each attention layer, and behind those for the MTP head, if the parameters have
    one; of latent attention keys [t, lw] are the latents, and values None. Nothing stands before the head's token at
    index 0: what is there means nothing. `head` says whether there is one.
    """

    logits: np.ndarray
    hidden: np.ndarray
    states: list[np.ndarray]
    windows: list[np.ndarray]
    behind: dict[int, tuple[list[np.ndarray], list[np.ndarray]]]
    keys: list[np.ndarray]
    values: list[np.ndarray]
    head: bool

    @property
    def logprobs(self) -> np.ndarray:
        shifted = self.logits - self.logits.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def reference(
    config: ModelConfig, params, tokens, positions: Collection[int] = (), stored: Sequence[tuple] = ()
) -> Reference:
    """One sequence. `params` is the nested dict of one rank (global arrays); `positions` are those of `behind`.

    `stored` has keys and values [n, kh, hd] for each attention layer of the target: those of the first n tokens that
    attention reads in the place of its own, as a cache of few bits holds them.
    """
    params = _as_float64(params)
    embedded = x = params["embed_tokens"]["weight"][np.asarray(tokens)]
    positions = {*positions, len(x)}
    behind = {position: ([], []) for position in positions}
    keys, values = [], []
    for i, (kind, mlp) in enumerate(zip(config.layer_kinds, config.mlp_kinds, strict=True)):
        layer = params["layers"][i]
        behind_norms = kind in config.post_norm_kinds
        given = x if behind_norms else _rms_norm(x, layer["input_layernorm"]["weight"], config)
        if kind is LayerKind.DELTA:
            mixed, kept = _delta(layer["linear_attn"], given, config, positions)
            for position, (state, window) in kept.items():
                behind[position][0].append(state)
                behind[position][1].append(window)
        else:
            mixed, k, v = _attention(layer["self_attn"], given, config, *stored[len(keys) : len(keys) + 1])
            keys.append(k)
            values.append(v)
        weight = layer["post_attention_layernorm"]["weight"]
        x = x + (_rms_norm(mixed, weight, config) if behind_norms else mixed)
        given = x if behind_norms else _rms_norm(x, weight, config)
        out = _moe(layer["mlp"], given, config) if mlp is MlpKind.MOE else _dense(layer["mlp"], given)
        x = x + (_rms_norm(out, layer["post_feedforward_layernorm"]["weight"], config) if behind_norms else out)
    hidden = _rms_norm(x, params["norm"]["weight"], config)
    if "mtp" in params:
        previous = np.concatenate([np.zeros_like(hidden[:1]), hidden[:-1]])
        _, k, v = _mtp_attention(params["mtp"], embedded, previous, config)
        keys.append(k)
        values.append(v)
    return Reference(
        logits=_head(params, hidden, config),
        hidden=hidden,
        states=behind[len(embedded)][0],
        windows=behind[len(embedded)][1],
        behind=behind,
        keys=keys,
        values=values,
        head="mtp" in params,
    )


def drafts(config: ModelConfig, params, tokens, depth: int) -> np.ndarray:
    """[depth, t, V]: the logits of draft d + 1 for the token after each position, one draft after another.

    Where the target has seen the tokens up to c, the head's sequence is (embed(token_i), h_(i-1)) for i = 1..c, then
    one entry a draft, made from the token and the head's own last output. Rows at positions of at most d are zero.
    """
    hidden = reference(config, params, tokens).hidden
    params = _as_float64(params)
    mtp, mlp = params["mtp"], config.mlp_kinds[-1]
    embedded = params["embed_tokens"]["weight"][np.asarray(tokens)]

    def head_over(previous):
        """The head's outputs over the entries 1.. that have these hidden states before them."""
        layer, (x, _, _) = mtp["layers"][0], _mtp_attention(mtp, embedded[1 : 1 + len(previous)], previous, config)
        normal = _rms_norm(x, layer["post_attention_layernorm"]["weight"], config)
        x = x + (_moe(layer["mlp"], normal, config) if mlp is MlpKind.MOE else _dense(layer["mlp"], normal))
        return _rms_norm(x, mtp["norm"]["weight"], config)

    logits = np.zeros((depth, len(tokens), config.vocab_size))
    for seen in range(1, len(tokens)):
        previous = hidden[:seen]
        for draft in range(min(depth, len(tokens) - seen)):
            out = head_over(previous)[-1:]
            logits[draft, seen + draft] = _head(params, out, config)[0]
            previous = np.concatenate([previous, out])
    return logits


def _mtp_attention(mtp, entries, previous, config):
    """The head's residual stream behind its attention, its keys and its values, of embedded tokens and the hidden
    states before them.
    """
    normal = [
        _rms_norm(entries, mtp["pre_fc_norm_embedding"]["weight"], config),
        _rms_norm(previous, mtp["pre_fc_norm_hidden"]["weight"], config),
    ]
    layer, x = mtp["layers"][0], np.concatenate(normal, axis=1) @ mtp["fc"]["weight"].T
    mixed, k, v = _attention(layer["self_attn"], _rms_norm(x, layer["input_layernorm"]["weight"], config), config)
    return x + mixed, k, v


def _head(params, hidden, config):
    head = params["embed_tokens"] if config.tie_word_embeddings else params["lm_head"]
    return hidden @ head["weight"][: config.vocab_size].T


def _as_float64(tree):
    if isinstance(tree, dict):
        return {key: _as_float64(value) for key, value in tree.items()}
    return np.asarray(tree, np.float64)


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _silu(x):
    return x * _sigmoid(x)


def _rms(x, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def _rms_norm(x, weight, config):
    return _rms(x, config.rms_norm_eps) * (weight + config.zero_centred_norms)


def _dense(mlp, x):
    gate, up, down = (mlp[name]["weight"] for name in ("gate_proj", "up_proj", "down_proj"))
    return (_silu(x @ gate.T) * (x @ up.T)) @ down.T


def _moe(mlp, x, config):
    if config.moe.scoring == "sigmoid":
        return _moe_of_groups(mlp, x, config.moe)
    scores = x @ mlp["gate"]["weight"].T
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    out = _sigmoid(x @ mlp["shared_expert_gate"]["weight"].T) * _dense(mlp["shared_expert"], x)
    for i, line in enumerate(scores):
        chosen = np.argsort(-line, kind="stable")[: config.moe.experts_per_token]
        total = line[chosen].sum() if config.moe.normalise_top_k else 1.0
        for expert in chosen:
            gate, up = np.split(mlp["experts"]["gate_up_proj"][expert] @ x[i], 2)
            out[i] += line[expert] / total * (mlp["experts"]["down_proj"][expert] @ (_silu(gate) * up))
    return out


def _moe_of_groups(mlp, x, moe):
    """The biased scores decide the groups, by the sum of their two best, and the experts within, and nothing else."""
    scores = _sigmoid(x @ mlp["gate"]["weight"].T)
    out = _dense(mlp["shared_experts"], x)
    groups = np.split(np.arange(moe.num_experts), moe.num_groups)
    for i, line in enumerate(scores):
        biased = line + mlp["gate"]["e_score_correction_bias"]
        best = sorted(groups, key=lambda group: -np.sort(biased[group])[-2:].sum())[: moe.top_k_groups]
        chosen = sorted(np.concatenate(best), key=lambda expert: -biased[expert])[: moe.experts_per_token]
        total = line[chosen].sum() if moe.normalise_top_k else 1.0
        for expert in chosen:
            gate, up = np.split(mlp["experts"]["gate_up_proj"][expert] @ x[i], 2)
            down = mlp["experts"]["down_proj"][expert] @ (_silu(gate) * up)
            out[i] += moe.routed_scaling * line[expert] / total * down
    return out


def _delta(weights, x, config, positions):
    """The layer's output, and (state, window) behind so many tokens as each of `positions` says."""
    delta = config.delta
    key_dim, value_dim = delta.key_head_dim, delta.value_head_dim
    heads, key_heads = delta.value_dim // value_dim, delta.key_dim // key_dim
    raw = x @ weights["in_proj_qkv"]["weight"].T
    taps = weights["conv1d"]["weight"][:, 0]
    width = taps.shape[1] - 1
    padded = np.concatenate([np.zeros((width, raw.shape[1])), raw])
    qkv = _silu(sum(padded[tap : tap + len(raw)] * taps[:, tap] for tap in range(width + 1)))
    q, k, v = np.split(qkv, [delta.key_dim, 2 * delta.key_dim], axis=-1)
    q, k = (_normalise(y.reshape(len(x), -1, key_dim)).repeat(heads // key_heads, axis=1) for y in (q, k))
    q, v = q * key_dim**-0.5, v.reshape(len(x), heads, value_dim)
    decay, beta, gate, eps = _gates(weights, x, config)
    state, o = np.zeros((heads, key_dim, value_dim)), np.zeros((len(x), heads, value_dim))
    states = {0: state.copy()}
    for t in range(len(x)):
        state *= decay[t][:, :, None]
        new = beta[t][:, None] * (v[t] - (k[t][:, None] @ state)[:, 0])
        state += k[t][:, :, None] * new[:, None, :]
        o[t] = (q[t][:, None] @ state)[:, 0]
        if t + 1 in positions:
            states[t + 1] = state.copy()
    o = _rms(o, eps) * weights["norm"]["weight"] * gate.reshape(o.shape)
    kept = {position: (states[position], padded[position : position + width]) for position in positions}
    return o.reshape(len(x), -1) @ weights["out_proj"]["weight"].T, kept


def _gates(weights, x, config):
    """Decays [t, hv, K], or 1 for K where all channels of a head decay alike; write strengths [t, hv]; what the outputs
    are multiplied by, and the epsilon of their norm.
    """
    delta, beta = config.delta, _sigmoid(x @ weights["in_proj_b"]["weight"].T)
    if isinstance(delta, KimiDeltaConfig):
        forget = weights["forget_gate"]
        a = x @ forget["f_a_proj"]["weight"].T @ forget["f_b_proj"]["weight"].T + forget["dt_bias"]
        rate = np.exp(forget["A_log"].reshape(-1, 1))
        decay = np.exp(-rate * np.log1p(np.exp(a)).reshape(len(x), -1, delta.head_dim))
        gate = _sigmoid(x @ weights["g_a_proj"]["weight"].T @ weights["g_b_proj"]["weight"].T)
        return decay, beta, gate, config.rms_norm_eps
    a = x @ weights["in_proj_a"]["weight"].T + weights["dt_bias"]
    decay = np.exp(-np.exp(weights["A_log"]) * np.log1p(np.exp(a)))[:, :, None]
    eps = config.rms_norm_eps if delta.norm_eps is None else delta.norm_eps
    return decay, delta.beta_scale * beta, _silu(x @ weights["in_proj_z"]["weight"].T), eps


def _normalise(x):
    return x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def _attention(weights, x, config, stored=None):
    """The layer's output, and its keys and values [t, kh, hd], of which `stored` are read instead."""
    if isinstance(config.attention, LatentAttentionConfig):
        return *_latent_attention(weights, x, config.attention), None
    attention, tokens = config.attention, len(x)
    heads, width = attention.num_heads, attention.head_dim
    q, k, v = (x @ weights[name]["weight"].T for name in ("q_proj", "k_proj", "v_proj"))
    if attention.whole_norms:
        q, k = (_rms_norm(y, weights[f"{name}_heads_norm"]["weight"], config) for name, y in (("q", q), ("k", k)))
    q, k, v = q.reshape(tokens, heads, -1), k.reshape(tokens, -1, width), v.reshape(tokens, -1, width)
    gate = 1.0
    if attention.output_gate:
        q, gate = np.split(q, 2, axis=-1)
        gate = _sigmoid(gate)
    if not attention.whole_norms:
        q, k = (_rms_norm(y, weights[f"{name}_norm"]["weight"], config) for name, y in (("q", q), ("k", k)))
    if attention.rope_theta is not None:
        q, k = _rotate(q, attention), _rotate(k, attention)
    read = (k, v) if stored is None else [np.concatenate([s, y[len(s) :]]) for s, y in zip(stored, (k, v), strict=True)]
    spread_k, spread_v = (y.repeat(heads // attention.num_kv_heads, axis=1) for y in read)
    scores = np.einsum("qhd,khd->hqk", q, spread_k) * width**-0.5
    scores = np.where(np.tril(np.ones((tokens, tokens), bool)), scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    o = np.einsum("hqk,khd->qhd", p / p.sum(-1, keepdims=True), spread_v) * gate
    return o.reshape(tokens, -1) @ weights["o_proj"]["weight"].T, k, v


def _latent_attention(weights, x, attention):
    """The layer's output with keys and values made of the latents first, and the latents [t, lw] as they are cached."""
    tokens, heads, rank = len(x), attention.num_heads, attention.kv_lora_rank

    def of(name, y):
        return y @ weights[name]["weight"].T

    def normal(name, y):
        return _rms(y, attention.norm_eps) * weights[name]["weight"]

    if attention.q_lora_rank is None:
        q = of("q_proj", x)
    else:
        q = of("q_b_proj", normal("q_a_layernorm", of("q_a_proj", x)))
    q, turned = np.split(q.reshape(tokens, heads, -1), [attention.qk_nope_head_dim], axis=-1)
    latent, shared = np.split(of("kv_a_proj_with_mqa", x), [rank], axis=-1)
    latent, shared = normal("kv_a_layernorm", latent), shared[:, None]
    if attention.rope_theta is not None:
        turned, shared = _rotate(turned, attention), _rotate(shared, attention)
    k, v = (of(name, latent).reshape(tokens, heads, -1) for name in ("k_b_proj", "v_b_proj"))
    k = np.concatenate([k, shared.repeat(heads, axis=1)], axis=-1)
    scores = np.einsum("qhd,khd->hqk", np.concatenate([q, turned], axis=-1), k)
    scores *= attention.score_factor / np.sqrt(attention.qk_head_dim)
    scores = np.where(np.tril(np.ones((tokens, tokens), bool)), scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    o = np.einsum("hqk,khd->qhd", p / p.sum(-1, keepdims=True), v)
    return of("o_proj", o.reshape(tokens, -1)), np.concatenate([latent, shared[:, 0]], axis=-1)


def _rotate(x, attention):
    size, factor = attention.rotary_dim, 1.0
    frequency = attention.rope_theta ** (-np.arange(0, size, 2) / size)
    if attention.yarn is not None:
        # Held to transformers' by tests of their own.
        frequency = yarn_frequencies(size, attention.rope_theta, attention.yarn).astype(np.float64)
        factor = attention.yarn.attention_factor
    angle = np.tile(np.arange(len(x))[:, None] * frequency, 2)[:, None]
    turned, rest = x[..., :size], x[..., size:]
    first, second = np.split(turned, 2, axis=-1)
    turned = factor * (turned * np.cos(angle) + np.concatenate([-second, first], axis=-1) * np.sin(angle))
    return np.concatenate([turned, rest], axis=-1)
