"""A bound on thinking over streams that are written down: pieces of several tokens, whatever a model would say."""

import asyncio
import types

import pytest

from gdnjax.sampling_params import SamplingParams
from gdnjax.serving.outputs import StreamOutput
from gdnjax.serving.server.budget import END, BudgetedStream
from gdnjax.serving.submission import Submission

OPEN, CLOSE, ENDING = 1, 2, (3, 2, 3)
WORDS = {OPEN: "<think>", CLOSE: "</think>", 3: "\n", 10: "a", 11: "b", 12: "c", 13: "d"}
TOKENIZER = types.SimpleNamespace(
    added_token_ids={"<think>": OPEN, "</think>": CLOSE},
    special_token_ids=frozenset(),
    decode=lambda ids, skip_special_tokens=True: "".join(WORDS[token] for token in ids),
    encode=lambda text, add_special_tokens: {END: list(ENDING)}[text],
)


class Written:
    """A stream of these pieces, each some tokens."""

    def __init__(self, prompt, *pieces):
        self.submission = Submission("x", None, prompt, [])
        self._pieces = iter(pieces)

    async def prepared(self):
        return self.submission

    async def __anext__(self):
        token_ids = next(self._pieces, None)
        if token_ids is None:
            raise StopAsyncIteration
        return StreamOutput(TOKENIZER.decode(token_ids), token_ids, "stop" if token_ids[-1] == 13 else None)

    async def aclose(self):
        self._pieces = iter(())


def read(prompt, *pieces, budget):
    """The tokens that come of it, and the prompts that streams were asked to go on from."""
    prompts = []

    def go_on(prompt, params):
        prompts.append((prompt, params.max_tokens))
        return Written(prompt, (12, 13))

    async def ask():
        params = SamplingParams(max_tokens=50)
        stream = BudgetedStream(Written(prompt, *pieces), go_on, params, TOKENIZER, budget, max_model_len=100)
        await stream.prepared()
        return [token async for piece in stream for token in piece.token_ids]

    return tuple(asyncio.run(ask())), prompts


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("begun", [True, False])
def test_end_of_thinking_counts_within_the_budget_alone(begun):
    """Also where it comes in one piece with what is past the budget, as accepted drafts do."""
    prompt, head = ([9, OPEN], ()) if begun else ([9], (OPEN,))
    assert read(prompt, (*head, 10, CLOSE, 12, 13), budget=2) == ((*head, 10, CLOSE, 12, 13), [])
    for late in ((10, 11, CLOSE, 12), (10, 11, 10, CLOSE)):
        tokens, prompts = read(prompt, head + late, budget=1)
        assert tokens == (*head, 10, *ENDING, 12, 13)
        assert prompts == [([*prompt, *head, 10, *ENDING], 50 - len(head) - 4)]


@pytest.mark.usefixtures("without_type_checks")
def test_output_without_thinking_has_no_budget():
    assert read([9], (10, 11, 10), (11, 13), budget=1) == ((10, 11, 10, 11, 13), [])
