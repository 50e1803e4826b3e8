"""POST /v1/completions: texts and token ids, continued as they stand."""

import asyncio
import dataclasses
import functools
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from gdnjax.sampling_params import SamplingParams
from gdnjax.serving.frontend import Prompt
from gdnjax.serving.outputs import CompletionOutput, Logprob, RequestOutput, StreamOutput
from gdnjax.serving.server import answers, logprobs
from gdnjax.serving.server.errors import ApiError, bad_request
from gdnjax.serving.server.events import Pattern
from gdnjax.serving.server.protocol import CompletionRequest, refuse_unserved
from gdnjax.serving.server.sampling import fields_of, sampling_params
from gdnjax.serving.server.service import Chunks, Run, Service
from gdnjax.serving.server.structures import structured_outputs
from gdnjax.serving.submission import Submission

KIND = "text_completion"


async def create(service: Service, body: CompletionRequest, request_id: str | None = None) -> dict[str, Any] | Chunks:
    """The answer, or with `stream` its chunks. `request_id` is the client's name for it, if it has one.

    Raises ApiError; with `stream` what goes wrong later comes out of the chunks.
    """
    service.check_ready()
    model = service.check_model(body.model)
    refuse_unserved(body)
    prompts = prompts_of(body)
    params = parameters(service, body)
    async with service.admit("cmpl", body.request_id or request_id, len(prompts) * params.n) as run:
        submissions = await run.prepare(
            [
                functools.partial(_begin, service, body, params, await given(service, body, prompt))
                for prompt in prompts
            ],
            body,
        )
        echoes = [""] * len(prompts)
        if body.echo:
            echoes = await asyncio.to_thread(_texts, service, prompts, submissions, params)
        writer = _Writer(service, body, run, model, params, submissions, echoes)
        if body.stream:
            return Chunks(writer.chunks, run)
        outputs = await run.outputs()
    await run.close()
    return writer.whole(outputs)


def prompts_of(body: CompletionRequest) -> list[Prompt]:
    """One prompt or several, as a list. Raises ApiError where there is none."""
    given: Any = body.prompt
    if isinstance(given, str):
        return [given]
    if not given:
        raise ApiError(400, "prompt is empty; allowed: a text, token ids, or a list of either", param="prompt")
    if isinstance(given[0], int):
        return [given]
    return list(given)


def parameters(service: Service, body: CompletionRequest) -> SamplingParams:
    """The sampling parameters of a request. Raises ApiError that names the field."""
    n = body.n or 1
    if body.best_of not in (None, n):
        raise ApiError(400, f"best_of must be n={n} or left out, got {body.best_of}", param="best_of")
    if body.stream and body.prompt_logprobs is not None:
        raise ApiError(400, "prompt_logprobs do not come in a stream; use echo and logprobs", param="prompt_logprobs")
    given: dict[str, Any] = {"logprobs": body.logprobs, "structured_outputs": structured_outputs(body)}
    if body.echo and body.logprobs is not None and body.prompt_logprobs is None:
        given["prompt_logprobs"] = body.logprobs
    if _shows_prompt_alone(body):
        # The engine draws one, which nobody is shown.
        body = body.model_copy(update={"max_tokens": 1})
    return sampling_params(body, service.llm.llm.frontend, **given)


def _shows_prompt_alone(body: CompletionRequest) -> bool:
    return bool(body.echo and body.max_tokens == 0)


async def given(service: Service, body: CompletionRequest, prompt: Prompt) -> Prompt:
    """What the engine is given: the prompt, or its tokens where the text is to be taken without special ones."""
    if body.add_special_tokens or not isinstance(prompt, str):
        return prompt
    try:
        return await asyncio.to_thread(service.llm.llm.frontend.encode, prompt, "prompt", add_special_tokens=False)
    except ValueError as error:
        raise bad_request(error, fields_of(body)) from error


def _begin(service: Service, body: CompletionRequest, params: SamplingParams, prompt: Prompt, name: str):
    return service.llm.generate(
        prompt, params, priority=body.priority, timeout=service.config.request_timeout, request_id=name
    )


def _texts(
    service: Service, prompts: Sequence[Prompt], submissions: Sequence[Submission], params: SamplingParams
) -> list[str]:
    """The prompts as texts."""
    tokenizer = service.llm.llm.tokenizer
    return [
        prompt
        if isinstance(prompt, str)
        else tokenizer.decode(submission.token_ids, params.skip_special_tokens)
        if tokenizer is not None
        else ""
        for prompt, submission in zip(prompts, submissions, strict=True)
    ]


@dataclasses.dataclass
class _Writer:
    """Writes the answer to one request, whole or in chunks."""

    service: Service
    body: CompletionRequest
    run: Run
    model: str
    params: SamplingParams
    submissions: Sequence[Submission]
    echoes: Sequence[str]

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        choices = [self._choice(i, output, sample) for i, output in enumerate(outputs) for sample in output.outputs]
        num_output = 0 if _shows_prompt_alone(self.body) else answers.num_output_tokens(outputs)
        return {
            **answers.head(self.run, KIND, self.model),
            "choices": choices,
            "usage": answers.whole_usage(outputs, num_output),
            "metrics": answers.times(outputs),
        }

    def _choice(self, number: int, output: RequestOutput, sample: CompletionOutput) -> dict[str, Any]:
        sample = _without_tokens(sample) if _shows_prompt_alone(self.body) else sample
        table, _ = self._logprobs(number, sample.token_ids, sample.logprobs, 0, begins=True)
        choice: dict[str, Any] = {
            "index": number * self.params.n + sample.index,
            "text": self.echoes[number] + sample.text,
            "logprobs": table,
            "finish_reason": sample.finish_reason,
            "stop_reason": sample.stop_reason,
        }
        if self.body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = logprobs.of_prompt(output.prompt_logprobs or ())
        if self.body.return_token_ids:
            choice["prompt_token_ids"] = list(output.prompt_token_ids)
            choice["token_ids"] = list(sample.token_ids)
        return choice

    def _logprobs(
        self,
        number: int,
        token_ids: Sequence[int],
        found: Sequence[dict[int, Logprob]] | None,
        offset: int,
        *,
        begins: bool,
    ) -> tuple[dict[str, Any] | None, int]:
        """The table of some tokens of a choice, the prompt's before the first of them if it is shown."""
        if self.body.logprobs is None:
            return None, offset
        ids, entries = list(token_ids), list(found or ())
        if begins and self.body.echo:
            first = self.submissions[number].requests[0]
            ids, entries = [*first.prompt_token_ids, *ids], [None, *first.prompt_logprobs, *entries]
        return logprobs.for_completion(
            self.service.texts,
            ids,
            entries,
            offset,
            num_top=self.body.logprobs,
            as_ids=bool(self.body.return_tokens_as_token_ids),
        )

    async def chunks(self, framed: bool) -> AsyncGenerator[dict[str, Any] | bytes, None]:
        """The chunks of the answer; those that add nothing but text may come `framed`."""
        body = self.body
        asks_usage, every = body.asks_usage()
        shows_output = not _shows_prompt_alone(body)
        framed = framed and shows_output and not (every or body.return_token_ids or body.logprobs is not None)
        patterns: dict[int, Pattern] = {}
        meter = answers.Meter(sum(len(each.token_ids) for each in self.submissions), every=every)
        head = answers.head(self.run, KIND, self.model)
        # Of each choice that has begun, where the next token stands in its text.
        offsets: dict[int, int] = {}
        outputs: dict[int, RequestOutput] = {}

        def chunk(choice: dict[str, Any]) -> dict[str, Any]:
            made = {**head, "choices": [choice]}
            if asks_usage:
                meter.note(made)
            return made

        async for number, piece in self.run.pieces():
            if piece.output is not None:
                outputs[number] = piece.output
            meter.num_output += len(piece.token_ids) if shows_output else 0
            index = number * self.params.n + piece.index
            if index in patterns and piece.finish_reason is None:
                if piece.text:
                    yield patterns[index].frame(piece.text)
            elif (choice := self._piece(number, piece, offsets)) is not None:
                if framed:
                    patterns[index] = Pattern(chunk(_choice(index, Pattern.HOLE)))
                yield chunk(choice)
        if asks_usage:
            ordered = [outputs[number] for number in sorted(outputs)]
            found = answers.whole_usage(ordered, meter.num_output)
            yield {**head, "choices": [], "usage": found, "metrics": answers.times(ordered)}

    def _piece(self, number: int, piece: StreamOutput, offsets: dict[int, int]) -> dict[str, Any] | None:
        """What a piece adds to its choice; None where that is nothing yet."""
        body, index = self.body, number * self.params.n + piece.index
        begins = index not in offsets
        text, token_ids, found = piece.text, piece.token_ids, piece.logprobs
        if _shows_prompt_alone(body):
            text, token_ids, found = "", (), None
        if begins:
            text = self.echoes[number] + text
        wanted = token_ids and (body.return_token_ids or body.logprobs is not None)
        if not (text or wanted or piece.finish_reason):
            return None
        table, offsets[index] = self._logprobs(number, token_ids, found, offsets.get(index, 0), begins=begins)
        choice = _choice(index, text)
        choice |= {"logprobs": table, "finish_reason": piece.finish_reason, "stop_reason": piece.stop_reason}
        if body.return_token_ids:
            if begins:
                choice["prompt_token_ids"] = list(self.submissions[number].token_ids)
            choice["token_ids"] = list(token_ids)
        return choice


def _choice(index: int, text: str) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": None, "stop_reason": None}


def _without_tokens(sample: CompletionOutput) -> CompletionOutput:
    return dataclasses.replace(sample, text="", token_ids=(), logprobs=None, finish_reason="length", stop_reason=None)
