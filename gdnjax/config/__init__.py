"""What a model is and how the engine is set up.

Imports neither jax nor flax, so that plans and errors can be had without a device.
"""

from gdnjax.config.engine import (
    CHUNK,
    DEFAULT_MAX_MODEL_LEN,
    DRAFT_ACCEPTANCES,
    DRAFT_HEADS,
    DTYPES,
    KERNELS,
    KV_CACHE_DTYPES,
    LONG_ROWS,
    MAX_SPECULATIVE_TOKENS,
    QUANTIZATIONS,
    STATE_LAYOUTS,
    EngineConfig,
)
from gdnjax.config.huggingface import (
    SUPPORTED_MODEL_TYPES,
    as_id_tuple,
    forgo_torch,
    import_transformers,
    read_json_object,
)
from gdnjax.config.model import (
    ATTENTION,
    DELTA,
    MTP_KEYS,
    AttentionConfig,
    DeltaConfig,
    KimiDeltaConfig,
    LatentAttentionConfig,
    LayerKind,
    MlpKind,
    ModelConfig,
    MoeConfig,
    MtpKeys,
    YarnConfig,
)

__all__ = [
    "ATTENTION",
    "CHUNK",
    "DEFAULT_MAX_MODEL_LEN",
    "DELTA",
    "DRAFT_ACCEPTANCES",
    "DRAFT_HEADS",
    "DTYPES",
    "KERNELS",
    "KV_CACHE_DTYPES",
    "LONG_ROWS",
    "MAX_SPECULATIVE_TOKENS",
    "MTP_KEYS",
    "QUANTIZATIONS",
    "STATE_LAYOUTS",
    "SUPPORTED_MODEL_TYPES",
    "AttentionConfig",
    "DeltaConfig",
    "EngineConfig",
    "KimiDeltaConfig",
    "LatentAttentionConfig",
    "LayerKind",
    "MlpKind",
    "ModelConfig",
    "MoeConfig",
    "MtpKeys",
    "YarnConfig",
    "as_id_tuple",
    "forgo_torch",
    "import_transformers",
    "read_json_object",
]
