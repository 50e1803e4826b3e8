"""The jitted step in a loop of one's own: no engine, no scheduler, and the state is a pytree that goes through it."""

import argparse
import functools
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from gdnjax import load_model, step
from gdnjax.batch import DecodeBatch
from gdnjax.generation import pack_prompts, start
from gdnjax.state import NO_TOKEN
from gdnjax.step import StepOptions

DESCRIPTION = "Greedy completions of several prompts, a decode step at a time, until each says that it has ended."

EXAMPLES = """\
examples:
  python examples/own_loop.py "Once upon a time" "What is 5 + 6?"
"""


def complete(model, params, prompts: Sequence[Sequence[int]], *, max_tokens: int, stop_token_ids: tuple[int, ...]):
    """Token ids of each prompt's completion. Between two steps the loop may look at tokens, or at any pool of `state`,
    and change what it likes: it is a frozen dataclass of arrays.
    """
    options = StepOptions()
    longest = max(map(len, prompts))
    tokens = jnp.array([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], jnp.int32)
    lengths = jnp.array([len(prompt) for prompt in prompts], jnp.int32)
    # Slot i + 1 and its blocks are prompt i's.
    state = start(model, lengths + max_tokens, longest + max_tokens, stop_token_ids=stop_token_ids)
    # The state is donated: its pools are updated in place.
    prefill = jax.jit(functools.partial(step.prefill, model, options), donate_argnums=1)
    decode = jax.jit(functools.partial(step.decode, model, options), donate_argnums=1)
    state, emitted = prefill(params, state, pack_prompts(tokens, lengths))
    everybody = DecodeBatch(slot=jnp.arange(1, len(prompts) + 1, dtype=jnp.int32))
    completions: list[list[int]] = [[] for _ in prompts]
    while True:
        for completion, token in zip(completions, emitted.tokens[:, 0].tolist(), strict=True):
            # A row that has ended emits nothing more.
            if token != NO_TOKEN:
                completion.append(token)
        if bool(jnp.all(state.slots.done[1 : len(prompts) + 1])):
            return completions
        state, emitted = decode(params, state, everybody)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompts", metavar="TEXT", nargs="+")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="of a completion (default: 64)")
    given = parser.parse_args(arguments)
    from transformers import AutoTokenizer

    from gdnjax.assets import model_directory

    tokenizer = AutoTokenizer.from_pretrained(model_directory("tiny"))
    model, params = load_model("tiny")
    prompts = [tokenizer.encode(text) for text in given.prompts]
    ends = (tokenizer.eos_token_id,)
    for tokens in complete(model, params, prompts, max_tokens=given.max_tokens, stop_token_ids=ends):
        print(tokenizer.decode(tokens, skip_special_tokens=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
