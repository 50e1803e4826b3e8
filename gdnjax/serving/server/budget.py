"""A bound on thinking: what has not ended by then is ended, and the answer goes on behind it.

The engine knows nothing of it: the request ends, and another one goes on from its prompt, its tokens up to the bound
and the end of thinking. What was computed of them is in the prefix cache.
"""

import dataclasses
from collections.abc import Callable, Sequence

from gdnjax.sampling_params import SamplingParams
from gdnjax.serving.async_llm import Stream
from gdnjax.serving.outputs import RequestOutput, StreamOutput
from gdnjax.serving.parsing import THINK_CLOSE, THINK_OPEN, begins_thinking
from gdnjax.serving.submission import Submission
from gdnjax.serving.tokenizer import Tokenizer

END = f"\n{THINK_CLOSE}\n\n"
"""How templates of models that think end it."""

LATEST_START = 4
"""Tokens into an output in which the prompt has not begun to think, before which the model may begin."""


def check(params: SamplingParams, tokenizer: Tokenizer) -> None:
    """Raises ValueError for what cannot be had with a budget."""
    for tag in (THINK_OPEN, THINK_CLOSE):
        if tag not in tokenizer.added_token_ids:
            raise ValueError(f"thinking_token_budget needs a tokenizer with a token {tag}, and this model's has none")
    for name, nothing in (
        ("n", 1),
        ("logprobs", None),
        ("prompt_logprobs", None),
        ("presence_penalty", 0),
        ("frequency_penalty", 0),
    ):
        if getattr(params, name) != nothing:
            raise ValueError(f"thinking_token_budget and {name}={getattr(params, name)} are not served together")


class BudgetedStream:
    """A stream of one sample, read as AsyncLLM's are, whose thinking takes `budget` tokens at most.

    stream  of the request.
    go_on   a stream that goes on from token ids, with other parameters.
    """

    def __init__(
        self,
        stream: Stream,
        go_on: Callable[[list[int], SamplingParams], Stream],
        params: SamplingParams,
        tokenizer: Tokenizer,
        budget: int,
        max_model_len: int,
    ):
        self._first, self._go_on, self._params, self._tokenizer = stream, go_on, params, tokenizer
        self._budget, self._max_model_len = budget, max_model_len
        self._open, self._close = (tokenizer.added_token_ids[tag] for tag in (THINK_OPEN, THINK_CLOSE))
        self._second: Stream | None = None
        self._ended = False
        # What was given out of the first stream, and then with the end of thinking behind it.
        self._token_ids: list[int] = []
        self._text = ""
        # Tokens of the output before the first one of the budget; None where thinking has ended, or never was.
        self._start: int | None = None
        self._begun = False
        self.aborted = False

    @property
    def submission(self) -> Submission | None:
        return self._first.submission

    async def prepared(self) -> Submission:
        submission = await self._first.prepared()
        self._begun = begins_thinking(self._tokenizer, submission.token_ids)
        self._start = 0 if self._begun else None
        return submission

    def __aiter__(self) -> "BudgetedStream":
        return self

    async def __anext__(self) -> StreamOutput:
        if self._ended:
            raise StopAsyncIteration
        if self._second is not None:
            return self._whole(await anext(self._second))
        piece = await anext(self._first)
        self._look(piece.token_ids)
        over = self._start is not None and len(self._token_ids) >= self._start + self._budget
        if piece.finish_reason is not None or not over:
            self._text += piece.text
            self._ended = piece.finish_reason is not None
            return piece
        return await self._cut(len(piece.token_ids))

    def _look(self, token_ids: Sequence[int]) -> None:
        """Takes the next tokens, and sees thinking begin and end. An end past the budget comes too late."""
        for token in token_ids:
            self._token_ids.append(token)
            count = len(self._token_ids)
            if self._start is None:
                if token == self._open and count <= LATEST_START and not self._begun:
                    self._start, self._begun = count, True
            elif token == self._close and count - self._start <= self._budget:
                self._start = None

    async def _cut(self, num_new: int) -> StreamOutput:
        """Ends thinking, and begins what comes behind it."""
        assert self._start is not None
        assert self.submission is not None
        await self._first.aclose()
        shown = len(self._token_ids) - num_new
        kept = self._token_ids[: self._start + self._budget]
        text = self._tokenizer.decode(kept, self._params.skip_special_tokens).rstrip("\ufffd") + END
        self._token_ids = kept + self._tokenizer.encode(END, add_special_tokens=False)
        new = text[len(self._text) :]
        self._text = text
        reason = self._begin_second()
        piece = StreamOutput(new, tuple(self._token_ids[shown:]), reason)
        if reason is not None:
            self._ended = True
            output = self.submission.output()
            piece = piece._replace(output=self._output(output, output, "", (), reason, None))
        return piece

    def _begin_second(self) -> str | None:
        """Why there will be none, if there is no room for it."""
        assert self.submission is not None
        if self.aborted:
            return "abort"
        prompt = [*self.submission.token_ids, *self._token_ids]
        most = self._params.max_tokens
        left = None if most is None else most - len(self._token_ids)
        if len(prompt) >= self._max_model_len or (left is not None and left <= 0):
            return "length"
        least = max(0, self._params.min_tokens - len(self._token_ids))
        self._second = self._go_on(prompt, dataclasses.replace(self._params, max_tokens=left, min_tokens=least))
        return None

    def _whole(self, piece: StreamOutput) -> StreamOutput:
        """A piece of what comes behind; the last one with the output of both."""
        assert self.submission is not None
        self._ended = piece.finish_reason is not None
        if piece.output is None:
            return piece
        (sample,) = piece.output.outputs
        output = self._output(
            self.submission.output(), piece.output, sample.text, sample.token_ids, sample.finish_reason,
            sample.stop_reason,
        )  # fmt: skip
        return piece._replace(output=output)

    def _output(
        self,
        first: RequestOutput,
        last: RequestOutput,
        text: str,
        token_ids: Sequence[int],
        finish_reason: str | None,
        stop_reason: int | str | None,
    ) -> RequestOutput:
        """The prompt and times of the first request, the end of the last, and the output of both."""
        whole = (*self._token_ids, *token_ids)
        sample = dataclasses.replace(
            first.outputs[0],
            text=self._text + text,
            token_ids=whole,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
        )
        assert first.metrics is not None
        assert last.metrics is not None
        metrics = dataclasses.replace(
            first.metrics, finished_time=last.metrics.finished_time, num_output_tokens=len(whole)
        )
        return dataclasses.replace(first, outputs=(sample,), finished=True, metrics=metrics)

    async def aclose(self) -> None:
        self._ended = True
        await self._first.aclose()
        if self._second is not None:
            await self._second.aclose()
