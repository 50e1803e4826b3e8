"""A small state geometry with uneven sizes."""

from gdnjax.memory import StateGeometry

SMALL_GEOMETRY = StateGeometry(
    delta_layers=3,
    value_heads=6,
    state_size=16 * 24,
    conv_rows=3,
    conv_dim=208,
    attention_layers=2,
    kv_heads=2,
    head_dim=32,
    hidden_size=40,
    vocab_size=401,
    block_size=16,
    ssm_dtype="float32",
    conv_dtype="bfloat16",
    kv_dtype="bfloat16",
    hidden_dtype="bfloat16",
)
