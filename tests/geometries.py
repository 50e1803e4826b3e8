"""A small state geometry with uneven sizes."""

from gdnjax.cache_kinds import CacheSpec
from gdnjax.config import AttentionConfig, DeltaConfig, EngineConfig
from gdnjax.memory import StateGeometry

DELTA_LAYERS = DeltaConfig(num_key_heads=2, num_value_heads=6, key_head_dim=16, value_head_dim=24, conv_kernel=4)
ATTENTION_LAYERS = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=32, rotary_dim=8, rope_theta=1e4)


def small_geometry(
    *,
    block_size: int = 16,
    vocab_size: int = 401,
    ssm_dtype: str = "float32",
    kv_cache_dtype: str = "bfloat16",
    attention_layers: int = 2,
    speculation: EngineConfig | None = None,
) -> StateGeometry:
    """Three delta layers with a convolution of 208 channels, and attention layers."""
    engine = speculation or EngineConfig()
    kinds = [
        DELTA_LAYERS.cache_kind(3, dtype="bfloat16", ssm_dtype=ssm_dtype, pending_rows=engine.pending_rows),
        ATTENTION_LAYERS.cache_kind(attention_layers, dtype=kv_cache_dtype),
    ]
    return StateGeometry(
        cache=CacheSpec(tuple(kinds[: 1 + bool(attention_layers)]), block_size),
        hidden_size=40,
        vocab_size=vocab_size,
        hidden_dtype="bfloat16",
        num_drafts=engine.num_speculative_tokens,
        keep_draft_hidden=engine.keeps_draft_hidden,
    )


SMALL_GEOMETRY = small_geometry()
