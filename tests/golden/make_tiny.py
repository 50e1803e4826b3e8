"""Writes tests/golden/tiny.npz: what the embedded model computes, by transformers and by numpy float64.

    python -m tests.golden.make_tiny

Needs torch. To be run again when scripts/train_tiny.py has made another model, and then alone.
"""

import pathlib

import jax
import numpy as np

from gdnjax import load_model
from gdnjax.assets import EMBEDDED_MODEL, model_directory
from gdnjax.serving.tokenizer import Tokenizer
from tests import checkpoints, float64

FILE = pathlib.Path(__file__).parent / "tiny.npz"

PROMPTS = (
    "A box has 3 apples. 4 more are put in. How many apples are in the box?",
    "Once upon a time, there was a shy girl named Lily. She lived by the lake. Every evening she looked at the stars",
    "Question: Tom has 12 pens. He gives 5 to Ann. How many pens does Tom have?\nAnswer: Tom has 12 - 5 = 7 pens.\n"
    "#### 7\n\nQuestion: Ann has 30 pens and loses 14. How many pens does Ann have?\nAnswer:",
)
GREEDY_STEPS = 64
DEPTH = 3
LAST = 8
"""Positions at the end of each prompt whose logits are stored."""


def main() -> None:
    """Writes the file.

    logits_N          [LAST, vocab] float32 at the last positions of prompt N, by transformers.
    draft_logits_N    [DEPTH, LAST, vocab] float32 of the MTP head there, by tests/float64.py.
    tokens_N          the prompt's tokens.
    greedy_N          [steps] tokens that follow it, by transformers.
    """
    directory = model_directory(EMBEDDED_MODEL)
    tokenizer = Tokenizer.from_directory(directory)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    model, params = load_model(dtype="float32", mtp=True)
    params = jax.tree.map(np.asarray, params)
    stored = {}
    greedy = checkpoints.reference_greedy(directory, prompts, GREEDY_STEPS)
    for i, prompt in enumerate(prompts):
        stored[f"tokens_{i}"] = np.array(prompt, np.int32)
        stored[f"logits_{i}"] = checkpoints.reference_logits(directory, prompt)[-LAST:]
        drafts = float64.drafts(model.config, params, prompt, DEPTH)
        stored[f"draft_logits_{i}"] = drafts[:, -LAST:].astype(np.float32)
        stored[f"greedy_{i}"] = greedy[i].tokens
    np.savez_compressed(FILE, **stored)


if __name__ == "__main__":
    main()
