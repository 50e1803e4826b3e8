"""Reinforcement learning in a few lines: sample with log-probabilities, take a step, give the engine new weights."""

import argparse
import sys
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from gdnjax import LLM, SamplingParams, full_logits

DESCRIPTION = """\
REINFORCE on the embedded model with a toy reward, the share of the letter "e" in a text. Sampler and learner share one
device and one copy of the weights.
"""

EXAMPLES = """\
examples:
  python examples/reinforce.py --steps 5
"""


def reward_of(text: str) -> float:
    return text.count("e") / max(len(text), 1)


class Learner:
    """A step of gradient ascent on reward-weighted log-likelihoods, through the model's own forward pass.

    Sequences are padded to `width` tokens, so that one compilation serves all.
    """

    def __init__(self, llm: LLM, width: int, learning_rate: float):
        model = llm.model

        def loss(params, tokens, length, first, advantage):
            logits = full_logits(model, params, tokens, length)
            places = jnp.arange(tokens.shape[0] - 1)
            chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:-1]), tokens[1:, None], axis=-1)[:, 0]
            drawn = (places >= first - 1) & (places < length - 1)
            return -advantage * jnp.sum(jnp.where(drawn, chosen, 0.0))

        def step(params, *sequence):
            grads = jax.grad(loss)(params, *sequence)
            return jax.tree.map(lambda p, g: (p - learning_rate * g.astype(jnp.float32)).astype(p.dtype), params, grads)

        # The old parameters are not donated: the engine uses them until it gets the new ones.
        self._width, self._step = width, jax.jit(step)

    def learn(self, params, prompt: Sequence[int], output: Sequence[int], advantage: float):
        """New parameters."""
        tokens = [*prompt, *output]
        padded = jnp.array([*tokens, *[0] * (self._width - len(tokens))], jnp.int32)
        return self._step(params, padded, len(tokens), len(prompt), advantage)


def train(
    llm: LLM,
    prompt: str,
    reward: Callable[[str], float],
    *,
    steps: int,
    samples: int = 4,
    max_tokens: int = 24,
    learning_rate: float = 3e-3,
) -> list[float]:
    """The mean reward of each step's samples. `llm` has the trained weights afterwards."""
    # logprobs: of the tokens as they were drawn, for those who weight samples by how old their weights are.
    params = SamplingParams(n=samples, temperature=1.0, max_tokens=max_tokens, logprobs=0)
    prompt_tokens = llm.get_tokenizer().encode(prompt)
    learner = Learner(llm, len(prompt_tokens) + max_tokens, learning_rate / samples)
    means = []
    for _ in range(steps):
        (output,) = llm.generate([prompt_tokens], params, use_tqdm=False)
        rewards = [reward(sample.text) for sample in output.outputs]
        means.append(sum(rewards) / samples)
        weights = llm.params
        for sample, value in zip(output.outputs, rewards, strict=True):
            weights = learner.learn(weights, prompt_tokens, sample.token_ids, value - means[-1])
        # What was cached is forgotten; requests that run would go on from their tokens.
        llm.update_weights(weights)
    return means


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="of the learner (default: 5)")
    given = parser.parse_args(arguments)
    with LLM("tiny", dtype="float32", max_num_seqs=4, max_model_len=256, warmup=False, use_tqdm=False) as llm:
        for number, mean in enumerate(train(llm, "Once upon a time", reward_of, steps=given.steps)):
            print(f"step {number}: mean reward {mean:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
