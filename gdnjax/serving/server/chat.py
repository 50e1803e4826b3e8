"""POST /v1/chat/completions: a conversation, answered through the model's chat template."""

import dataclasses
import functools
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from gdnjax.sampling_params import SamplingParams
from gdnjax.serving.outputs import CompletionOutput, Logprob, RequestOutput, StreamOutput
from gdnjax.serving.server import answers, logprobs
from gdnjax.serving.server.errors import ApiError
from gdnjax.serving.server.protocol import ChatCompletionRequest, refuse_unserved
from gdnjax.serving.server.sampling import fields_of, sampling_params
from gdnjax.serving.server.service import Chunks, Run, Service
from gdnjax.serving.submission import Submission

KIND = "chat.completion"


async def create(
    service: Service, body: ChatCompletionRequest, request_id: str | None = None
) -> dict[str, Any] | Chunks:
    """The answer, or with `stream` its chunks. `request_id` is the client's name for it, if it has one.

    Raises ApiError; with `stream` what goes wrong later comes out of the chunks.
    """
    service.check_ready()
    model = service.check_model(body.model)
    refuse_unserved(body)
    params = parameters(service, body)
    options = template_arguments(service, body)
    async with service.admit("chatcmpl", body.request_id or request_id, params.n) as run:
        begin = functools.partial(
            service.llm.chat,
            history(service, body.messages),
            params,
            priority=body.priority,
            timeout=service.config.request_timeout,
            **options,
        )
        (submission,) = await run.prepare([lambda name: begin(request_id=name)], fields_of(body))
        writer = _Writer(service, body, run, model, submission)
        if body.stream:
            return Chunks(writer.chunks(), run)
        (output,) = await run.outputs()
    await run.close()
    return writer.whole(output)


def parameters(service: Service, body: ChatCompletionRequest) -> SamplingParams:
    """The sampling parameters of a request. Raises ApiError that names the field."""
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs need logprobs", param="top_logprobs")
    if body.stream and body.prompt_logprobs is not None:
        raise ApiError(400, "prompt_logprobs do not come in a stream", param="prompt_logprobs")
    limits = {body.max_tokens, body.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise ApiError(400, "max_tokens is an older name of max_completion_tokens; give one", param="max_tokens")
    frontend = service.llm.llm.frontend
    most = next(iter(limits), frontend.default_max_tokens)
    body = body.model_copy(update={"max_tokens": None})
    given = {"logprobs": (body.top_logprobs or 0) if body.logprobs else None, "max_tokens": most}
    return sampling_params(body, frontend, **given)


def template_arguments(service: Service, body: ChatCompletionRequest) -> dict[str, Any]:
    """How the conversation becomes a prompt: arguments of AsyncLLM.chat. Raises ApiError that names the field."""
    if body.chat_template is not None and not service.config.trust_request_chat_template:
        raise ApiError(
            400,
            "chat_template is not taken from requests here (the server was not told --trust-request-chat-template)",
            param="chat_template",
        )
    keywords = dict(body.chat_template_kwargs or {})
    for name in ("enable_thinking", "documents"):
        value = getattr(body, name)
        if value is not None:
            if name in keywords:
                raise ApiError(400, f"{name} stands in chat_template_kwargs and beside it; give it once", param=name)
            keywords[name] = value
    return {
        "add_generation_prompt": body.add_generation_prompt,
        "continue_final_message": body.continue_final_message,
        "chat_template": body.chat_template,
        "chat_template_kwargs": keywords,
    }


def history(service: Service, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages as templates know them.

    Reasoning of earlier answers may be called `reasoning`; what newer clients call a developer is a system to a
    template that does not know one.
    """
    tokenizer = service.llm.llm.tokenizer
    template = tokenizer.hf.chat_template if tokenizer is not None else None
    knows_developer = "developer" in str(template)
    found = []
    for message in messages:
        message = dict(message)
        if message.get("reasoning_content") is None and isinstance(message.get("reasoning"), str):
            message["reasoning_content"] = message["reasoning"]
        if message.get("role") == "developer" and not knows_developer:
            message["role"] = "system"
        found.append(message)
    return found


@dataclasses.dataclass
class _Writer:
    """Writes the answer to one request, whole or in chunks."""

    service: Service
    body: ChatCompletionRequest
    run: Run
    model: str
    submission: Submission

    def whole(self, output: RequestOutput) -> dict[str, Any]:
        answer: dict[str, Any] = {
            **answers.head(self.run, KIND, self.model),
            "choices": [self._choice(sample) for sample in output.outputs],
            "usage": answers.whole_usage([output], answers.num_output_tokens([output])),
            "metrics": answers.times([output]),
        }
        if self.body.prompt_logprobs is not None:
            answer["prompt_logprobs"] = logprobs.of_prompt(output.prompt_logprobs or ())
        if self.body.return_token_ids:
            answer["prompt_token_ids"] = list(output.prompt_token_ids)
        return answer

    def _choice(self, sample: CompletionOutput) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": sample.index,
            "message": {"role": "assistant", "content": self._echo() + sample.text, "refusal": None},
            "logprobs": self._logprobs(sample.token_ids, sample.logprobs),
            "finish_reason": sample.finish_reason,
            "stop_reason": sample.stop_reason,
        }
        if self.body.return_token_ids:
            choice["token_ids"] = list(sample.token_ids)
        return choice

    def _echo(self) -> str:
        """What stands before the answer: the message that it continues, if that is to be shown."""
        last = self.body.messages[-1]
        if not self.body.echo or last.get("role") != "assistant" or self.body.add_generation_prompt:
            return ""
        content = last.get("content")
        if isinstance(content, list):
            return "".join(part["text"] for part in content)
        return content or ""

    def _logprobs(self, token_ids: Sequence[int], found: Sequence[dict[int, Logprob]] | None) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        return logprobs.for_chat(
            self.service.texts,
            token_ids,
            found or (),
            num_top=self.body.top_logprobs or 0,
            as_ids=bool(self.body.return_tokens_as_token_ids),
        )

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        asks_usage, every = self.body.asks_usage()
        meter = answers.Meter(len(self.submission.token_ids), every=every)
        head = answers.head(self.run, KIND + ".chunk", self.model)
        begun: set[int] = set()
        output: RequestOutput | None = None

        def chunk(choice: dict[str, Any]) -> dict[str, Any]:
            made = {**head, "choices": [choice]}
            if asks_usage:
                meter.note(made)
            return made

        async for _, piece in self.run.pieces():
            output = piece.output or output
            if piece.index not in begun:
                begun.add(piece.index)
                first = chunk(_delta(piece.index, {"role": "assistant", "content": self._echo()}))
                if self.body.return_token_ids:
                    first["prompt_token_ids"] = list(self.submission.token_ids)
                yield first
            meter.num_output += len(piece.token_ids)
            if (choice := self._piece(piece)) is not None:
                yield chunk(choice)
        if asks_usage and output is not None:
            found = answers.whole_usage([output], meter.num_output)
            yield {**head, "choices": [], "usage": found, "metrics": answers.times([output])}

    def _piece(self, piece: StreamOutput) -> dict[str, Any] | None:
        """What a piece adds to its choice; None where that is nothing yet."""
        wanted = piece.token_ids and (self.body.return_token_ids or self.body.logprobs)
        if not (piece.text or wanted or piece.finish_reason):
            return None
        choice = _delta(piece.index, {"content": piece.text} if piece.text else {})
        if self.body.logprobs:
            choice["logprobs"] = self._logprobs(piece.token_ids, piece.logprobs)
        if piece.finish_reason:
            choice["finish_reason"], choice["stop_reason"] = piece.finish_reason, piece.stop_reason
        if self.body.return_token_ids:
            choice["token_ids"] = list(piece.token_ids)
        return choice


def _delta(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
