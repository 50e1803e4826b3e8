"""Writes tests/golden/parity: tiny checkpoints, and what transformers computes from them, for machines without torch.

    python -m tests.golden.make_parity

Needs torch. The weights come from numpy's generators and the parameters' names, so that running it again with another
torch or transformers changes the reference by rounding alone.
"""

import pathlib
import shutil

import numpy as np

from tests import checkpoints

ROOT = pathlib.Path(__file__).parent / "parity"

_TEXT = {
    "vocab_size": 307,
    "hidden_size": 32,
    "num_hidden_layers": 5,
    "layer_types": [*checkpoints.DDDA, checkpoints.DDDA[0]],
    "head_dim": 16,
    "linear_value_head_dim": 12,
    "eos_token_id": 305,
}
_MROPE = {"rope_parameters": {**checkpoints.ROPE, "mrope_section": [1, 1, 0], "mrope_interleaved": True}}
_MOE = {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 12}

GOLDENS = {
    "qwen3_5": {**_TEXT, **_MROPE, "intermediate_size": 40},
    "qwen3_5_moe_text": {**_TEXT, **_MROPE, **_MOE},
    "qwen3_next": {**_TEXT, **_MOE, "intermediate_size": 40, "mlp_only_layers": [1]},
}
"""The families that are stored, with the smaller geometry that they are stored in."""

PROMPT_LENGTH = 200
POSITIONS = (*range(3), 15, 31, 47, *range(60, 67), 95, *range(126, 131), 160, 191, 192, *range(196, 200))
"""Positions whose logits are stored: around the edges of chunks, and some in between."""

GREEDY_LENGTHS = (1, 64, 65, 200)
GREEDY_STEPS = 64


def main() -> None:
    """Replaces every stored golden."""
    for family, overrides in GOLDENS.items():
        directory = ROOT / family
        shutil.rmtree(directory, ignore_errors=True)
        checkpoints.write_checkpoint(family, directory, text_overrides=overrides)
        (directory / "model.safetensors").chmod(0o644)
        _write_reference(directory)


def _write_reference(directory: pathlib.Path) -> None:
    """Writes reference.npz.

    prompt          [200] token ids; the shorter prompts are its beginnings.
    positions       [p] the positions of `logits`.
    logits          [p, vocab] float32 after prompt[: position + 1].
    greedy_lengths  [g] the prompts prompt[:length] that are continued greedily.
    greedy_*        [g, steps] the fields of checkpoints.Greedy.
    """
    prompt = checkpoints.prompt_tokens(PROMPT_LENGTH, _TEXT["vocab_size"])
    greedy = checkpoints.reference_greedy(directory, [prompt[:length] for length in GREEDY_LENGTHS], GREEDY_STEPS)
    np.savez_compressed(
        directory / "reference.npz",
        prompt=np.array(prompt, np.int32),
        positions=np.array(POSITIONS, np.int32),
        logits=checkpoints.reference_logits(directory, prompt)[list(POSITIONS)],
        greedy_lengths=np.array(GREEDY_LENGTHS, np.int32),
        greedy_tokens=np.stack([one.tokens for one in greedy]),
        greedy_runners_up=np.stack([one.runners_up for one in greedy]),
        greedy_gaps=np.stack([one.gaps for one in greedy]),
    )


if __name__ == "__main__":
    main()
