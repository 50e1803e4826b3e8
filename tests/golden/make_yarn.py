"""Writes tests/golden/yarn.json: the rotary frequencies that transformers computes for YaRN settings.

    python -m tests.golden.make_yarn

Needs torch.
"""

import copy
import json
import pathlib
from typing import Any

FILE = pathlib.Path(__file__).parent / "yarn.json"

SMALL = {"head_dim": 32, "max_position_embeddings": 64}
CASES: dict[str, dict[str, Any]] = {
    # As the model cards have it for 1,010,000 tokens.
    "published": {
        "head_dim": 256,
        "max_position_embeddings": 262144,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "rope_type": "yarn",
            "rope_theta": 10000000,
            "partial_rotary_factor": 0.25,
            "factor": 4.0,
            "original_max_position_embeddings": 262144,
        },
    },
    "bounds": {
        **SMALL,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "factor": 8.0,
            "original_max_position_embeddings": 48,
            "beta_fast": 4,
            "beta_slow": 0.5,
            "truncate": False,
        },
    },
    "scales": {
        **SMALL,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 500.0,
            "partial_rotary_factor": 1.0,
            "factor": 40.0,
            "original_max_position_embeddings": 64,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
        },
    },
    "one scale": {
        **SMALL,
        "rope_scaling": {"type": "yarn", "factor": 3, "rope_theta": 1e4, "mscale": 0.7, "beta_fast": 3.0},
    },
    "attention factor": {
        **SMALL,
        "rope_theta": 1e5,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {"type": "yarn", "factor": 2.5, "attention_factor": 1.25, "beta_slow": 2.0},
    },
    # The two bounds are one, and the factor follows from the two lengths.
    "one bound": {
        "head_dim": 32,
        "max_position_embeddings": 256,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.25,
            "factor": None,
            "original_max_position_embeddings": 2,
        },
    },
}
"""Settings of a text model's configuration."""


def rotary_of(case: str) -> Any:
    """transformers' module for a case: `inv_freq`, `attention_scaling`, and cos and sin when called."""
    from transformers import Qwen3_5TextConfig
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5TextRotaryEmbedding

    return Qwen3_5TextRotaryEmbedding(Qwen3_5TextConfig(**copy.deepcopy(CASES[case])))


def main() -> None:
    """Replaces the file."""
    found = {}
    for case in CASES:
        rotary = rotary_of(case)
        found[case] = {"frequencies": rotary.inv_freq.tolist(), "attention_factor": rotary.attention_scaling}
    FILE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
