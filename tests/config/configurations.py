"""config.json of every supported model type, as transformers' own classes write them."""

import json

import transformers

from gdnjax import ModelConfig

KINDS = ("linear_attention", "full_attention", "linear_attention")

TEXT = {
    "vocab_size": 401,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 399,
}
HYBRID = {
    "layer_types": list(KINDS),
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_conv_kernel_dim": 5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 12345.0, "partial_rotary_factor": 0.25},
}
DENSE = {**HYBRID, "intermediate_size": 72}
MOE = {
    **HYBRID,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
}
LATENT = {
    "num_key_value_heads": 4,
    "intermediate_size": 72,
    "first_k_dense_replace": 1,
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
    "rope_parameters": {"rope_type": "default", "rope_theta": 12345.0},
}
KIMI = {
    "layer_types": list(KINDS),
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "num_key_value_heads": 4,
    "intermediate_size": 72,
    "kv_lora_rank": 28,
    "qk_nope_head_dim": 14,
    "qk_rope_head_dim": 10,
    "v_head_dim": 18,
    "linear_num_heads": 6,
    "linear_head_dim": 16,
    "linear_conv_kernel_dim": 5,
    "num_local_experts": 12,
    "num_experts_per_tok": 3,
    "n_group": 3,
    "topk_group": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 16,
    "pad_token_id": 0,
}
PLAIN = {
    "intermediate_size": 72,
    "num_key_value_heads": 2,
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_conv_kernel_dim": 5,
    "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": None},
}
CLASSES = {
    "qwen3_5": ("Qwen3_5Config", "Qwen3_5TextConfig", DENSE),
    "qwen3_5_text": (None, "Qwen3_5TextConfig", DENSE),
    "qwen3_5_moe": ("Qwen3_5MoeConfig", "Qwen3_5MoeTextConfig", MOE),
    "qwen3_5_moe_text": (None, "Qwen3_5MoeTextConfig", MOE),
    "deepseek_v3": (None, "DeepseekV3Config", LATENT),
    "kimi_linear": (None, "KimiLinearConfig", KIMI),
    "olmo_hybrid": (None, "OlmoHybridConfig", PLAIN),
    "qwen3_next": (None, "Qwen3NextConfig", {**DENSE, **MOE, "mlp_only_layers": [1], "norm_topk_prob": False}),
}

HYBRIDS = tuple(
    model_type
    for model_type, (_, _, more) in CLASSES.items()
    if "layer_types" in more and "linear_num_key_heads" in more
)
"""Those with the layers of HYBRID."""


def hf_dict(model_type, text=None, **outside):
    """config.json of a model type, as transformers' own class writes it."""
    wrapper, inner, more = CLASSES[model_type]
    arguments = {**TEXT, **more, **(text or {})}
    if wrapper is None:
        config = getattr(transformers, inner)(**arguments, dtype="float32")
    else:
        config = getattr(transformers, wrapper)(text_config=arguments, dtype="float32")
    return json.loads(json.dumps(config.to_dict())) | outside


def from_hf(model_type, **options):
    return ModelConfig.from_hf(hf_dict(model_type, **options))
