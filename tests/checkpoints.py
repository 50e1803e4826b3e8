"""Random checkpoints of every family, written by transformers itself, and what transformers computes from them.

As transformers initialises these models, recurrent state carries nothing (half-lives below one token), norms are the
identity and gates are closed alike, so that swapped norms or a lost state leave the logits as they are. Here every
parameter is random, and each layer's heads forget at half-lives spread over 1 to 200 tokens. The geometry is awkward
on purpose: nothing that can differ is equal.

torch is imported inside the functions: the table and the prompts can be had without it.
"""

import dataclasses
import functools
import json
import math
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors.numpy

from tests import quantised

HALF_LIVES = (1.0, 200.0)
"""Tokens after which the heads of a layer have forgotten half: the first and the last of a geometric series."""

DDDA = ("linear_attention",) * 3 + ("full_attention",)

_TEXT = {
    "vocab_size": 401,
    "hidden_size": 48,
    "num_hidden_layers": 6,
    "layer_types": [*DDDA, *DDDA[:2]],
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_conv_kernel_dim": 4,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 399,
}
_SEVEN_LAYERS = {"num_hidden_layers": 7, "layer_types": [*DDDA, *DDDA[1:]]}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
_MROPE = {"rope_parameters": {**ROPE, "mrope_section": [2, 1, 1], "mrope_interleaved": True}}
_DENSE = {"intermediate_size": 72}
_MOE = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
}
_FOUR_WAYS = {
    "hidden_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 12,
}
# Three groups of four experts, of which two are chosen from; scores and angles both get a factor from YaRN.
_LATENT = {
    "vocab_size": 401,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "intermediate_size": 72,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "q_lora_rank": 20,
    "kv_lora_rank": 28,
    "qk_nope_head_dim": 14,
    "qk_rope_head_dim": 10,
    "v_head_dim": 18,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "n_group": 3,
    "topk_group": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 16,
    "routed_scaling_factor": 1.7,
    "norm_topk_prob": True,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 399,
    "num_nextn_predict_layers": 0,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 16.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.6,
        "original_max_position_embeddings": 64,
    },
}
# As published: the first layer dense, one group. Of the rest every layer is of another mixture.
_KIMI = {
    "vocab_size": 401,
    "hidden_size": 48,
    "num_hidden_layers": 6,
    "layer_types": [*DDDA, *DDDA[:2]],
    "intermediate_size": 72,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "kv_lora_rank": 28,
    "qk_nope_head_dim": 14,
    "qk_rope_head_dim": 10,
    "v_head_dim": 18,
    "linear_num_heads": 3,
    "linear_head_dim": 20,
    "linear_conv_kernel_dim": 4,
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 2,
    "moe_intermediate_size": 16,
    "routed_scaling_factor": 1.7,
    "norm_topk_prob": True,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 399,
    "bos_token_id": 398,
    "pad_token_id": 400,
}
# As many heads of either kind, keys narrower than values, nothing rotated; and an epsilon that is not the gated norm's.
_PLAIN = {
    **_TEXT,
    **_DENSE,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 3,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
    "rms_norm_eps": 1e-3,
    "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": None},
}
del _PLAIN["head_dim"]
_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "num_position_embeddings": 16,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of checkpoint: the transformers class that writes it, and the arguments of its configuration.

    `wrapper` holds the arguments of a multimodal wrapper around `text`; None: the text model alone. `fused_experts`
    writes the experts of a layer as one stack, as published Qwen3.5 checkpoints do; otherwise one by one, as published
    Qwen3-Next checkpoints and transformers' save_pretrained by default do. Of Olmo-Hybrid it writes the convolutions of
    a layer as one, and norms under transformers' own names.
    """

    model_class: str
    text: Mapping[str, Any]
    wrapper: Mapping[str, Any] | None = None
    fused_experts: bool = False


FAMILIES: dict[str, Family] = {
    "qwen3_5_text": Family(model_class="Qwen3_5ForCausalLM", text={**_TEXT, **_SEVEN_LAYERS, **_MROPE, **_DENSE}),
    "qwen3_5": Family(
        model_class="Qwen3_5ForConditionalGeneration",
        text={**_TEXT, **_MROPE, **_DENSE},
        wrapper={"vision_config": _VISION},
    ),
    # The wrapper alone says that the embeddings are tied.
    "qwen3_5_tied": Family(
        model_class="Qwen3_5ForConditionalGeneration",
        text={**_TEXT, **_MROPE, **_DENSE},
        wrapper={"vision_config": _VISION, "tie_word_embeddings": True},
    ),
    "qwen3_5_moe_text": Family(model_class="Qwen3_5MoeForCausalLM", text={**_TEXT, **_MROPE, **_MOE}),
    "qwen3_5_moe": Family(
        model_class="Qwen3_5MoeForConditionalGeneration",
        text={**_TEXT, **_SEVEN_LAYERS, **_MROPE, **_MOE},
        wrapper={"vision_config": _VISION},
        fused_experts=True,
    ),
    # Experts in layers 1 and 5 of 0 to 6, by both ways of saying so.
    "qwen3_next": Family(
        model_class="Qwen3NextForCausalLM",
        text={
            **_TEXT,
            **_SEVEN_LAYERS,
            **_DENSE,
            **_MOE,
            "rope_parameters": ROPE,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "norm_topk_prob": False,
        },
    ),
    "deepseek_v3": Family(model_class="DeepseekV3ForCausalLM", text=_LATENT),
    # What the other one has, left out: a latent of the queries, pairs side by side, groups, renormalised weights.
    "deepseek_v3_tp": Family(
        model_class="DeepseekV3ForCausalLM",
        text={
            **_LATENT,
            "num_attention_heads": 12,
            "num_key_value_heads": 12,
            "q_lora_rank": None,
            "rope_interleave": False,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "kimi_linear": Family(model_class="KimiLinearForCausalLM", text=_KIMI),
    "kimi_linear_tp": Family(
        model_class="KimiLinearForCausalLM",
        text={
            **_KIMI,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "linear_num_heads": 4,
            "intermediate_size": 80,
        },
    ),
    "olmo_hybrid": Family(model_class="OlmoHybridForCausalLM", text=_PLAIN),
    # More queries than keys of either kind, rotated, and write strengths up to 1.
    "olmo_hybrid_tp": Family(
        model_class="OlmoHybridForCausalLM",
        text={
            **_PLAIN,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 12,
            "intermediate_size": 80,
            "linear_allow_neg_eigval": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        fused_experts=True,
    ),
    "qwen3_5_tp": Family(
        model_class="Qwen3_5ForCausalLM", text={**_TEXT, **_MROPE, **_FOUR_WAYS, "intermediate_size": 80}
    ),
    "qwen3_next_tp": Family(
        model_class="Qwen3NextForCausalLM",
        text={
            **_TEXT,
            **_FOUR_WAYS,
            **_MOE,
            "intermediate_size": 80,
            "rope_parameters": ROPE,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
        },
    ),
    "qwen3_5_moe_tp": Family(
        model_class="Qwen3_5MoeForConditionalGeneration",
        text={**_TEXT, **_MROPE, **_FOUR_WAYS, **_MOE},
        wrapper={"vision_config": _VISION},
        fused_experts=True,
    ),
}

PARITY_FAMILIES = tuple(name for name in FAMILIES if not name.endswith("_tp"))
"""The families that parity is asked of one by one; the others are for tensor parallelism."""


def prompt_tokens(length: int, vocab_size: int = _TEXT["vocab_size"], seed: int = 0) -> list[int]:
    """A random prompt, another one for every length."""
    return np.random.default_rng([seed, length]).integers(0, vocab_size, length).tolist()


def write_checkpoint(
    family: str, directory: pathlib.Path, seed: int = 0, text_overrides: Mapping[str, Any] | None = None
) -> None:
    """Writes a float32 checkpoint of `FAMILIES[family]` by transformers' save_pretrained.

    The directory then holds config.json, generation_config.json (two EOS ids) and model.safetensors, no tokenizer.
    The weights depend on `seed` and on the parameters' names alone. `text_overrides` replaces arguments of the text
    configuration. Needs torch.
    """
    model = _build(family, text_overrides or {})
    _fill(model, seed)
    eos = model.config.get_text_config().eos_token_id
    model.generation_config.eos_token_id = [eos, eos - 3]
    model.save_pretrained(directory, save_original_format=not FAMILIES[family].fused_experts)


def write_checkpoint_with_head(family: str, directory: pathlib.Path, seed: int = 0) -> None:
    """`write_checkpoint` with an MTP head as published DeepSeek-V3 has it: as the layer behind the last one.

    That is a decoder layer, the parts around it, and copies of embedding and head.
    """
    layers = FAMILIES[family].text["num_hidden_layers"]
    write_checkpoint(family, directory, seed, {"num_hidden_layers": layers + 1})
    file = directory / "model.safetensors"
    tensors, layer = safetensors.numpy.load_file(file), f"model.layers.{layers}"
    width, rng = tensors["model.norm.weight"].shape[0], np.random.default_rng(seed + 1)
    for name in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{layer}.{name}.weight"] = 1 + 0.3 * rng.standard_normal(width, dtype=np.float32)
    projection = rng.standard_normal((width, 2 * width), dtype=np.float32)
    tensors[f"{layer}.eh_proj.weight"] = projection / np.float32(math.sqrt(2 * width))
    tensors[f"{layer}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    tensors[f"{layer}.shared_head.head.weight"] = tensors["lm_head.weight"]
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config |= {"num_hidden_layers": layers, "num_nextn_predict_layers": 1}
    (directory / "config.json").write_text(json.dumps(config))


def quantise_in_place(directory: pathlib.Path, block: tuple[int, int], scale: Any = np.float32) -> int:
    """Makes FP8 of the matrices that published FP8 checkpoints have in it. Returns how many that were."""
    file, count = directory / "model.safetensors", 0
    tensors = {}
    for name, tensor in safetensors.numpy.load_file(file).items():
        if quantised.is_quantised(name, tensor):
            tensors |= quantised.fp8(name, tensor, rows=block[0], columns=block[1], scale=scale)[0]
            count += 1
        else:
            tensors[name] = tensor
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(block),
        "modules_to_not_convert": ["lm_head"],
    }
    (directory / "config.json").write_text(json.dumps(config))
    return count


def reference_draft_logits(directory: pathlib.Path, token_ids: Sequence[int]) -> np.ndarray:
    """Logits [len(token_ids) - 1, vocab] of the first draft at every position but the first, by transformers' own MTP
    module over the target's hidden states after the final norm.
    """
    import torch
    from transformers.modeling_layers import MtpModel

    model = load_reference(directory)
    ids = torch.tensor([list(token_ids)])
    # transformers knows the heads of a checkpoint by the published number of their layer.
    model._keys_to_ignore_on_load_unexpected = [rf"model\.layers\.{model.config.num_hidden_layers}.*"]
    with torch.inference_mode():
        head = MtpModel.from_pretrained(model).eval()
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        position = torch.arange(1, ids.shape[1])[None]
        drafted = head.forward_layer(0, hidden, position, None, input_ids=ids[:, 1:])
        return model.lm_head(drafted)[0].numpy()


def _build(family: str, text_overrides: Mapping[str, Any]) -> Any:
    import transformers

    spec = FAMILIES[family]
    model_class = getattr(transformers, spec.model_class)
    text = {**spec.text, **text_overrides}
    arguments = text
    if spec.wrapper is not None:
        vision = {**spec.wrapper["vision_config"], "out_hidden_size": text["hidden_size"]}
        arguments = {**spec.wrapper, "text_config": text, "vision_config": vision}
    # The configuration names the dtype, so that config.json does.
    return model_class(model_class.config_class(**arguments, dtype="float32"))


def _fill(model: Any, seed: int) -> None:
    """Gives every parameter its random values, in place."""
    import torch

    text = model.config.get_text_config()
    with torch.no_grad():
        biases = [(n, b) for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")]
        for name, parameter in [*model.named_parameters(), *biases]:
            rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
            if "forget_gate." in name and name.endswith(("A_log", "dt_bias")):
                layer = name.rpartition(".")[0]
                draw = np.random.default_rng([seed, zlib.crc32(layer.encode())])
                a_log, dt_bias = _channel_gates(draw, text.linear_num_heads, text.linear_head_dim)
                values = (a_log if name.endswith("A_log") else dt_bias).reshape(parameter.shape)
            elif name.endswith(("A_log", "dt_bias")):
                # The two halves of one draw, so seeded by the layer and not by the parameter.
                layer = name.rpartition(".")[0]
                a_log, dt_bias = _gates(np.random.default_rng([seed, zlib.crc32(layer.encode())]), len(parameter))
                values = a_log if name.endswith("A_log") else dt_bias
            else:
                values = _draw(name, tuple(parameter.shape), rng, text)
            parameter.copy_(torch.from_numpy(np.asarray(values, np.float32)))


def _gates(rng: np.random.Generator, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """A_log and dt_bias such that exp(-exp(A_log) softplus(dt_bias)) halves the state once per half-life."""
    half_lives = rng.permutation(np.geomspace(*HALF_LIVES, heads))
    rate = np.exp(rng.uniform(math.log(0.5), math.log(8.0), heads))
    step = math.log(2.0) / (half_lives * rate)
    return np.log(rate), np.log(np.expm1(step))


def _channel_gates(rng: np.random.Generator, heads: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The same where each channel of a head decays by itself: A_log [heads], dt_bias [heads, width]."""
    half_lives = rng.permutation(np.geomspace(*HALF_LIVES, heads * width)).reshape(heads, width)
    rate = np.exp(rng.uniform(math.log(0.5), math.log(8.0), heads))
    step = math.log(2.0) / (half_lives * rate[:, None])
    return np.log(rate), np.log(np.expm1(step))


def _draw(name: str, shape: tuple[int, ...], rng: np.random.Generator, text: Any) -> np.ndarray:
    """Values that keep activations near one, let the router decide clearly, and the gate inputs stay small."""
    noise = rng.standard_normal(shape)
    if name.endswith("e_score_correction_bias"):
        # Scores are sigmoids: so large that it decides a part of the choices.
        return 0.3 * noise
    if len(shape) == 1:
        plain = name.endswith("linear_attn.norm.weight") or text.model_type in ("deepseek_v3", "olmo_hybrid")
        centre = 1.0 if plain else 0.0
        return centre + 0.3 * noise
    if name.endswith(("conv1d.weight", "embed_tokens.weight")):
        return 0.5 * noise
    # Stacked experts are [experts, out, in]; everything else has its inputs in all axes but the first.
    fan_in = shape[-1] if ".experts." in name else math.prod(shape[1:])
    weight = noise / math.sqrt(fan_in)
    if name.endswith(("in_proj_a.weight", "linear_attn.a_proj.weight", "f_b_proj.weight")):
        return 0.3 * weight
    if name.endswith("in_proj_ba.weight"):
        # Grouped by key head: the b rows of its value heads, then their a rows.
        grouped = weight.reshape(text.linear_num_key_heads, 2, -1, shape[1])
        grouped[:, 1] *= 0.3
        return grouped.reshape(shape)
    if name.endswith("mlp.gate.weight"):
        return 3.0 * weight
    return weight


@functools.lru_cache(maxsize=2)
def load_reference(directory: pathlib.Path) -> Any:
    """The checkpoint as a transformers model: float32, eager attention, plain torch operations."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory)
    (name,) = config.architectures
    model_class = getattr(transformers, name)
    return model_class.from_pretrained(directory, dtype="float32", attn_implementation="eager").eval()


def reference_logits(directory: pathlib.Path, token_ids: Sequence[int]) -> np.ndarray:
    """Logits [len(token_ids), vocab] at every position, of one forward pass over all tokens without a cache."""
    import torch

    with torch.inference_mode():
        output = load_reference(directory)(input_ids=torch.tensor([list(token_ids)]), use_cache=False)
    return output.logits[0].numpy()


def reference_logits_resumed(
    directory: pathlib.Path, token_ids: Sequence[int], split: int, forget: Sequence[tuple[int, str]] = ()
) -> np.ndarray:
    """Logits [len(token_ids) - split, vocab] of the tokens from `split` on, resumed from the cache of those before.

    `forget` names (layer, "conv" or "recurrent") states that are zeroed in between, or (layer, "keys") of latents.
    """
    import torch

    model = load_reference(directory)
    ids = torch.tensor([list(token_ids)])
    with torch.inference_mode():
        cache = model(input_ids=ids[:, :split], use_cache=True).past_key_values
        for layer, kind in forget:
            pool = cache.layers[layer].keys if kind == "keys" else getattr(cache.layers[layer], f"{kind}_states")[0]
            pool.zero_()
        output = model(input_ids=ids[:, split:], past_key_values=cache, use_cache=True)
    return output.logits[0].numpy()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Greedy:
    """A greedy continuation, and how near each of its choices was.

    tokens      [steps] the most probable token of each step.
    runners_up  [steps] the second most probable.
    gaps        [steps] the difference of their logits, relative to the largest absolute logit of the step.
    """

    tokens: np.ndarray
    runners_up: np.ndarray
    gaps: np.ndarray


def reference_greedy(directory: pathlib.Path, prompts: Sequence[Sequence[int]], steps: int) -> list[Greedy]:
    """Greedy continuations of the prompts, one by one and without a cache: each step is a pass over all tokens."""
    return [_continue_greedily(directory, list(prompt), steps) for prompt in prompts]


def _continue_greedily(directory: pathlib.Path, token_ids: list[int], steps: int) -> Greedy:
    rows: list[np.ndarray] = []
    for _ in range(steps):
        rows.append(reference_logits(directory, token_ids)[-1])
        token_ids = [*token_ids, int(rows[-1].argmax())]
    return _chosen(np.stack(rows))


def reference_along(directory: pathlib.Path, prompt: Sequence[int], tokens: Sequence[int]) -> Greedy:
    """What `reference_greedy` would choose behind the prompt and behind each of the tokens but the last, by one pass.

    Up to the first token that is not the choice there, these are the choices of `reference_greedy`.
    """
    logits = reference_logits(directory, [*prompt, *tokens][:-1])
    return _chosen(logits[len(prompt) - 1 :])


def _chosen(logits: np.ndarray) -> Greedy:
    """The greedy choices by logits [steps, vocab]."""
    second, first = np.argsort(logits, axis=-1)[:, -2:].T
    steps = np.arange(len(logits))
    gaps = (logits[steps, first] - logits[steps, second]) / np.abs(logits).max(-1)
    return Greedy(tokens=first.astype(np.int32), runners_up=second.astype(np.int32), gaps=gaps.astype(np.float32))


def relative_error(actual: np.ndarray, reference: np.ndarray) -> float:
    """The largest over positions of max|difference| / max|reference|; both [positions, vocab]. NaN stays NaN."""
    return float(np.max(np.abs(actual - reference).max(-1) / np.abs(reference).max(-1)))
