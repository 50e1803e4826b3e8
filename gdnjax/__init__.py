"""gdnjax: inference for Qwen3.5-style hybrid models in JAX. The public API, nothing else.

Names are imported at their first use: `import gdnjax` does not import jax, so a program can still configure it, and
`python -m gdnjax.doctor` can say what is wrong with an installation that does not import.
"""

import importlib

from gdnjax.version import __version__

# Type checkers know it by its name; typing would take as long to import as all the rest.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from gdnjax.config import EngineConfig, LayerKind, ModelConfig
    from gdnjax.generation import BatchOutput, batch_generate, draft_logits, full_logits
    from gdnjax.loading import load_model
    from gdnjax.models import abstract_params, build_model, random_params
    from gdnjax.sampling_params import SamplingParams, StructuredOutputsParams
    from gdnjax.serving.async_llm import AsyncLLM
    from gdnjax.serving.following import follow, follow_model
    from gdnjax.serving.llm import LLM
    from gdnjax.serving.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput, StreamOutput

_HOMES = {
    "AsyncLLM": "gdnjax.serving.async_llm",
    "BatchOutput": "gdnjax.generation",
    "CompletionOutput": "gdnjax.serving.outputs",
    "EngineConfig": "gdnjax.config",
    "LLM": "gdnjax.serving.llm",
    "LayerKind": "gdnjax.config",
    "Logprob": "gdnjax.serving.outputs",
    "ModelConfig": "gdnjax.config",
    "RequestMetrics": "gdnjax.serving.outputs",
    "RequestOutput": "gdnjax.serving.outputs",
    "SamplingParams": "gdnjax.sampling_params",
    "StreamOutput": "gdnjax.serving.outputs",
    "StructuredOutputsParams": "gdnjax.sampling_params",
    "abstract_params": "gdnjax.models",
    "batch_generate": "gdnjax.generation",
    "build_model": "gdnjax.models",
    "draft_logits": "gdnjax.generation",
    "follow": "gdnjax.serving.following",
    "follow_model": "gdnjax.serving.following",
    "full_logits": "gdnjax.generation",
    "load_model": "gdnjax.loading",
    "random_params": "gdnjax.models",
}


# A type checker that saw it would take every name for one of the package's.
if not TYPE_CHECKING:

    def __getattr__(name: str):
        if name not in _HOMES:
            raise AttributeError(f"module 'gdnjax' has no attribute {name!r}; it has {', '.join(sorted(_HOMES))}")
        try:
            return getattr(importlib.import_module(_HOMES[name]), name)
        except AttributeError as error:
            # Python would report an AttributeError from here as a missing name and hide what it was about.
            raise ImportError(
                f"gdnjax.{name} cannot be imported: {error} (python -m gdnjax.doctor says what fits together)"
            ) from error


def __dir__() -> list[str]:
    return sorted(__all__)


__all__ = [
    "LLM",
    "AsyncLLM",
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
    "StructuredOutputsParams",
    "__version__",
    "abstract_params",
    "batch_generate",
    "build_model",
    "draft_logits",
    "follow",
    "follow_model",
    "full_logits",
    "load_model",
    "random_params",
]
