"""gdnjax: inference for Qwen3.5-style hybrid models in JAX. The public API, nothing else."""

from gdnjax.config import EngineConfig, LayerKind, ModelConfig
from gdnjax.generation import BatchOutput, batch_generate, full_logits
from gdnjax.sampling_params import SamplingParams
from gdnjax.serving.llm import LLM, StreamOutput
from gdnjax.serving.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from gdnjax.version import __version__

__all__ = [
    "LLM",
    "BatchOutput",
    "CompletionOutput",
    "EngineConfig",
    "LayerKind",
    "Logprob",
    "ModelConfig",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "StreamOutput",
    "__version__",
    "batch_generate",
    "full_logits",
]
