"""POST /v1/chat/completions: a conversation, answered through the model's chat template."""

import dataclasses
import functools
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

from gdnjax.sampling_params import SamplingParams
from gdnjax.serving.async_llm import Stream
from gdnjax.serving.outputs import CompletionOutput, Logprob, RequestOutput, StreamOutput
from gdnjax.serving.parsing import (
    Content,
    OutputParser,
    ParsedOutput,
    Part,
    Reasoning,
    State,
    ToolCallStart,
    begins_thinking,
)
from gdnjax.serving.server import answers, budget, logprobs
from gdnjax.serving.server.budget import BudgetedStream
from gdnjax.serving.server.errors import ApiError, bad_request
from gdnjax.serving.server.events import Pattern
from gdnjax.serving.server.protocol import ChatCompletionRequest, refuse_unserved
from gdnjax.serving.server.sampling import fields_of, sampling_params
from gdnjax.serving.server.service import Chunks, Run, Service
from gdnjax.serving.server.structures import demanded_call, structured_outputs
from gdnjax.serving.submission import Submission

KIND = "chat.completion"

OWN_FIELDS = ("chat_template", "tools", "continue_final_message")
"""Of a request, that LLM.chat would take among the keywords of the template, too."""


async def create(
    service: Service, body: ChatCompletionRequest, request_id: str | None = None
) -> dict[str, Any] | Chunks:
    """The answer, or with `stream` its chunks. `request_id` is the client's name for it, if it has one.

    Raises ApiError; with `stream` what goes wrong later comes out of the chunks.
    """
    service.check_ready()
    model = service.check_model(body.model)
    refuse_unserved(body)
    make_parser = parser_of(service, body)
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
        (submission,) = await run.prepare([_beginning(service, body, run, params, begin)], body)
        tokenizer = service.llm.llm.frontend.require_tokenizer("chat")
        parser = make_parser(begins_thinking=begins_thinking(tokenizer, submission.token_ids))
        writer = _Writer(service, body, run, model, submission, parser)
        if body.stream:
            return Chunks(writer.chunks, run)
        (output,) = await run.outputs()
    await run.close()
    return writer.whole(output)


def _beginning(
    service: Service, body: ChatCompletionRequest, run: Run, params: SamplingParams, begin: Callable[..., Stream]
) -> Callable[[str], Stream | BudgetedStream]:
    """What begins the stream of a name in the engine. Raises ApiError for a budget that cannot be had."""
    count = body.thinking_token_budget
    if count is None:
        return lambda name: begin(request_id=name)
    llm = service.llm
    tokenizer = llm.llm.frontend.require_tokenizer("thinking_token_budget")
    try:
        budget.check(params, tokenizer)
    except ValueError as error:
        raise bad_request(error, fields_of(body)) from error

    def go_on(prompt: list[int], params: SamplingParams) -> Stream:
        return llm.generate(
            prompt,
            params,
            priority=body.priority,
            timeout=service.config.request_timeout,
            request_id=run.new_engine_id(),
        )

    return lambda name: BudgetedStream(begin(request_id=name), go_on, params, tokenizer, count, llm.llm.max_model_len)


def choice_of(body: ChatCompletionRequest) -> str | Mapping[str, Any]:
    """Whether tools are called: auto where there are any and nothing is said."""
    return body.tool_choice or ("auto" if body.tools else "none")


def parser_of(service: Service, body: ChatCompletionRequest) -> functools.partial[OutputParser]:
    """Makes the parser of a request's outputs, once the prompt is known. Raises ApiError for bad tools."""
    choice = choice_of(body)
    if choice != "none" and not body.tools and body.tool_choice != "auto":
        raise ApiError(400, f"tool_choice {choice!r} needs tools, and there are none", param="tool_choice")
    make = functools.partial(
        OutputParser,
        service.llm.llm.tokenizer,
        tools=body.tools,
        tool_choice=choice,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        skip_special_tokens=body.skip_special_tokens is not False,
    )
    try:
        make()
    except ValueError as error:
        raise bad_request(error, fields_of(body)) from error
    return make


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
    given = {
        "logprobs": (body.top_logprobs or 0) if body.logprobs else None,
        "max_tokens": next(iter(limits), frontend.default_max_tokens),
        "structured_outputs": _structure(body),
    }
    return sampling_params(body.model_copy(update={"max_tokens": None}), frontend, **given)


def _structure(body: ChatCompletionRequest) -> Any:
    """What the output's text has to be: what was asked for, or a call that was demanded."""
    structure, choice = structured_outputs(body), choice_of(body)
    if structure is None:
        return demanded_call(body.tools or (), choice, body.parallel_tool_calls is not False)
    if body.tools and choice != "none":
        name = "structured_outputs" if body.structured_outputs is not None else "response_format"
        raise ApiError(
            400,
            f"{name} and tool calls in one answer are not served; allowed: tool_choice 'none', or no {name}",
            param=name,
        )
    return structure


def template_arguments(service: Service, body: ChatCompletionRequest) -> dict[str, Any]:
    """How the conversation becomes a prompt: arguments of AsyncLLM.chat. Raises ApiError that names the field."""
    if body.chat_template is not None and not service.config.trust_request_chat_template:
        raise ApiError(
            400,
            "chat_template is not taken from requests here (the server was not told --trust-request-chat-template)",
            param="chat_template",
        )
    keywords = dict(body.chat_template_kwargs or {})
    for name in OWN_FIELDS:
        # What is checked of the field would not be of the keyword: who may bring a template, what a tool is.
        if name in keywords:
            raise ApiError(
                400, f"chat_template_kwargs may not have {name}, a field of the request", param="chat_template_kwargs"
            )
    given = {"enable_thinking": body.enable_thinking, "documents": body.documents}
    for name, value in (given | _effort(body, str(body.chat_template or template_text(service)))).items():
        if value is None:
            continue
        if name in keywords:
            raise ApiError(400, f"{name} stands in chat_template_kwargs and beside it; give it once", param=name)
        keywords[name] = value
    return {
        "add_generation_prompt": body.add_generation_prompt,
        "continue_final_message": body.continue_final_message,
        "chat_template": body.chat_template,
        "chat_template_kwargs": keywords,
        "tools": body.tools or None,
    }


def _effort(body: ChatCompletionRequest, template: str) -> dict[str, Any]:
    """Keywords of the template that say how much to think."""
    name, effort = "reasoning_effort", body.reasoning_effort
    if effort is None:
        return {}
    found: dict[str, Any] = {name: effort} if name in template else {}
    if "enable_thinking" in template:
        if body.enable_thinking is not None and body.enable_thinking != (effort != "none"):
            raise ApiError(400, f"{name} {effort!r} contradicts enable_thinking", param=name)
        found["enable_thinking"] = effort != "none"
    if not found:
        raise ApiError(400, f"{name}: the model's chat template knows neither {name} nor enable_thinking", param=name)
    return found


def template_text(service: Service) -> str:
    """The model's chat template, empty where it has none."""
    tokenizer = service.llm.llm.tokenizer
    return str(tokenizer.hf.chat_template or "") if tokenizer is not None else ""


def history(service: Service, messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages as templates know them.

    Reasoning of earlier answers may be called `reasoning`; what newer clients call a developer is a system to a
    template that does not know one.
    """
    knows_developer = "developer" in template_text(service)
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
    parser: OutputParser

    def whole(self, output: RequestOutput) -> dict[str, Any]:
        parsed = [self.parser.parse(sample.token_ids, sample.text) for sample in output.outputs]
        num_output = answers.num_output_tokens([output])
        answer: dict[str, Any] = {
            **answers.head(self.run, KIND, self.model),
            "choices": [self._choice(sample, each) for sample, each in zip(output.outputs, parsed, strict=True)],
            "usage": answers.whole_usage([output], num_output, sum(each.num_reasoning_tokens for each in parsed)),
            "metrics": answers.times([output]),
        }
        if self.body.prompt_logprobs is not None:
            answer["prompt_logprobs"] = logprobs.of_prompt(output.prompt_logprobs or ())
        if self.body.return_token_ids:
            answer["prompt_token_ids"] = list(output.prompt_token_ids)
        return answer

    def _choice(self, sample: CompletionOutput, parsed: ParsedOutput) -> dict[str, Any]:
        reasoning = parsed.reasoning if self.body.include_reasoning else None
        content = parsed.content
        if content is not None or not (parsed.tool_calls or parsed.reasoning):
            content = self._echo() + (content or "")
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if reasoning is not None:
            message |= _reasoning(reasoning)
        if parsed.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in parsed.tool_calls
            ]
        choice: dict[str, Any] = {
            "index": sample.index,
            "message": message,
            "logprobs": self._logprobs(sample.token_ids, sample.logprobs),
            "finish_reason": _finish_reason(sample.finish_reason, bool(parsed.tool_calls)),
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

    async def chunks(self, framed: bool) -> AsyncGenerator[dict[str, Any] | bytes, None]:
        """The chunks of the answer; those that add nothing but text may come `framed`."""
        body = self.body
        asks_usage, every = body.asks_usage()
        framed = framed and not (every or body.return_token_ids or body.logprobs)
        meter = answers.Meter(len(self.submission.token_ids), every=every)
        head = answers.head(self.run, KIND + ".chunk", self.model)
        samples: dict[int, _Sample] = {}
        output: RequestOutput | None = None

        def chunk(choice: dict[str, Any]) -> dict[str, Any]:
            made = {**head, "choices": [choice]}
            if asks_usage:
                meter.note(made)
            return made

        async for _, piece in self.run.pieces():
            output = piece.output or output
            sample = samples.get(piece.index)
            if sample is None:
                sample = samples[piece.index] = _Sample(self.parser.initial.copy())
                if framed:
                    sample.patterns = {
                        kind: Pattern(chunk(_choice(piece.index, delta)))
                        for kind in (Content, Reasoning)
                        if (delta := self._delta([kind(Pattern.HOLE)]))
                    }
                first = chunk(_choice(piece.index, {"role": "assistant", "content": self._echo()}))
                if body.return_token_ids:
                    first["prompt_token_ids"] = list(self.submission.token_ids)
                yield first
            meter.num_output += len(piece.token_ids)
            parts = self.parser.advance(sample.state, piece.token_ids, piece.text)
            said: Any = parts[0] if len(parts) == 1 else None
            if type(said) in sample.patterns and piece.finish_reason is None:
                yield sample.patterns[type(said)].frame(said.text)
            elif (choice := self._piece(piece, sample, parts)) is not None:
                yield chunk(choice)
        if asks_usage and output is not None:
            num_reasoning = sum(self.parser.num_reasoning_tokens(sample.state) for sample in samples.values())
            found = answers.whole_usage([output], meter.num_output, num_reasoning)
            yield {**head, "choices": [], "usage": found, "metrics": answers.times([output])}

    def _piece(self, piece: StreamOutput, sample: "_Sample", parts: Sequence[Part]) -> dict[str, Any] | None:
        """What a piece, which says `parts`, adds to its choice; None where that is nothing yet."""
        if piece.finish_reason:
            parts = [*parts, *self.parser.finish(sample.state)]
        delta = self._delta(parts)
        sample.has_called |= "tool_calls" in delta
        wanted = piece.token_ids and (self.body.return_token_ids or self.body.logprobs)
        if not (delta or wanted or piece.finish_reason):
            return None
        choice = _choice(piece.index, delta)
        if self.body.logprobs:
            choice["logprobs"] = self._logprobs(piece.token_ids, piece.logprobs)
        if piece.finish_reason:
            choice["finish_reason"] = _finish_reason(piece.finish_reason, sample.has_called)
            choice["stop_reason"] = piece.stop_reason
        if self.body.return_token_ids:
            choice["token_ids"] = list(piece.token_ids)
        return choice

    def _delta(self, parts: Sequence[Part]) -> dict[str, Any]:
        """Parts as one addition to a message."""
        delta: dict[str, Any] = {}
        for part in parts:
            if isinstance(part, Content):
                delta["content"] = delta.get("content", "") + part.text
            elif isinstance(part, Reasoning):
                if self.body.include_reasoning:
                    delta |= _reasoning(delta.get("reasoning", "") + part.text)
            elif isinstance(part, ToolCallStart):
                function = {"name": part.name, "arguments": ""}
                call = {"index": part.index, "id": part.id, "type": "function", "function": function}
                delta.setdefault("tool_calls", []).append(call)
            else:
                calls = delta.setdefault("tool_calls", [])
                if not calls or calls[-1]["index"] != part.index:
                    calls.append({"index": part.index, "function": {"arguments": ""}})
                calls[-1]["function"]["arguments"] += part.text
        return delta


@dataclasses.dataclass
class _Sample:
    """How far a stream is with one sample. `patterns`: of chunks that one part alone makes, by its kind."""

    state: State
    has_called: bool = False
    patterns: dict[type[Part], Pattern] = dataclasses.field(default_factory=dict)


def _finish_reason(reason: str | None, has_called: bool) -> str | None:
    return "tool_calls" if has_called and reason == "stop" else reason


def _reasoning(text: str) -> dict[str, str]:
    """Under both names that clients read."""
    return {"reasoning": text, "reasoning_content": text}


def _choice(index: int, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
