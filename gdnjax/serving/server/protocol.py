"""What clients send and get: OpenAI's requests with vLLM's further fields, and the form of the answers.

Requests are checked here for their form; what values mean is checked where they are used. Answers are built as plain
dictionaries: their types here are what the OpenAPI document says of them.
"""

import re
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from gdnjax.serving.server.errors import ApiError, from_validation
from gdnjax.serving.server.fields import param_of

LARGEST = (1 << 31) - 1

Integer = Annotated[int, Field(ge=-LARGEST, le=LARGEST)]
Name = Annotated[str, Field(pattern=r"^[!-~]{1,256}$")]
Each = Field(fail_fast=True)
"""Of a list: what is wrong with its first bad element is told. All of them may be a million."""

TokenIds = Annotated[list[Integer], Each]
Texts = Annotated[list[str], Each]
Objects = Annotated[list[dict[str, Any]], Each]
# What the values are SamplingParams checks, one by one.
Bias = Annotated[dict[str, Any], WithJsonSchema({"type": "object", "additionalProperties": {"type": "number"}})]


class Body(BaseModel):
    """Of a request. Fields that nobody knows are ignored, as clients expect; see `refuse_unserved` for known ones."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())


class Answer(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())


class StreamOptions(Body):
    include_usage: bool | None = Field(None, description="one more chunk at the end, with the usage and no choices")
    continuous_usage_stats: bool | None = Field(None, description="the usage so far in every chunk; implies the last")
    include_obfuscation: Literal[False] | None = Field(None, description="padding of chunks: there is none")


class GenerationBody(Body):
    """What requests for text have in common. A sampling field that is left out, or null, is the checkpoint's default
    (generation_config.json), or else `SamplingParams`'.
    """

    model: str | None = Field(None, description="one of /v1/models; left out: the one that there is")
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    n: Integer | None = Field(None, description="samples of each prompt")
    temperature: float | None = None
    top_p: float | None = None
    top_k: Integer | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | Texts | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    max_tokens: Integer | None = None
    min_tokens: Integer | None = None
    logit_bias: Bias | None = Field(None, description="token id, as text -> what its logit gets")
    bad_words: Texts | None = None
    allowed_token_ids: TokenIds | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Integer | None = Field(None, description="log-probabilities of the prompt; not with stream")

    response_format: dict[str, Any] | None = Field(None, description="type text, json_object or json_schema")
    structured_outputs: dict[str, Any] | None = Field(
        None, description="one of json, regex, choice, grammar and json_object; begins after thinking"
    )

    priority: Integer = Field(0, description="lower comes first, by 64 places in the queue for each step")
    request_id: Name | None = Field(None, description="the answer's id is made of it; so does header x-request-id")
    return_token_ids: bool | None = Field(None, description="token_ids of choices, and prompt_token_ids")
    return_tokens_as_token_ids: bool | None = Field(None, description="token_id:N for each token of logprobs")

    user: str | None = Field(None, description="a label of the client's; changes nothing")
    metadata: dict[str, Any] | None = Field(None, description="labels of the client's; change nothing")
    safety_identifier: str | None = Field(None, description="a label of the client's; changes nothing")
    prompt_cache_key: str | None = Field(None, description="a label for routers; prefixes are found by their tokens")

    def asks_usage(self) -> tuple[bool, bool]:
        """Whether a stream ends with the usage, and whether each chunk has it."""
        options = self.stream_options
        every = bool(options and options.continuous_usage_stats)
        return every or bool(options and options.include_usage), every


class CompletionRequest(GenerationBody):
    prompt: str | TokenIds | Annotated[list[str | TokenIds], Each] = Field(
        description="a text, token ids, or a list of either; each is continued as it stands"
    )
    echo: bool | None = Field(None, description="the prompt stands before its completion; with max_tokens 0 alone")
    logprobs: Integer | None = Field(None, description="of the tokens drawn, and of so many of the most probable")
    best_of: Integer | None = Field(None, description="n, or nothing")
    add_special_tokens: bool = Field(True, description="those that the tokenizer puts around a text")


class ChatCompletionRequest(GenerationBody):
    messages: Objects = Field(min_length=1, description="text only; the last one is to be answered")
    max_completion_tokens: Integer | None = Field(None, description="most tokens of the answer, thinking included")
    logprobs: bool | None = None
    top_logprobs: Integer | None = Field(None, description="so many of the most probable, with logprobs")
    echo: bool | None = Field(None, description="the last message stands before the answer that continues it")
    add_generation_prompt: bool = True
    continue_final_message: bool = Field(False, description="the last message is gone on with, and not answered")
    chat_template: str | None = Field(None, description="in place of the model's; only of a server that trusts it")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="keywords of the model's template")
    documents: Objects | None = Field(None, description="a keyword of some templates")
    enable_thinking: bool | None = Field(None, description="a keyword of some templates")
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = Field(
        None,
        description="a keyword of some templates; where one knows enable_thinking alone, none switches thinking off",
    )
    thinking_token_budget: Annotated[int, Field(ge=0, le=LARGEST)] | None = Field(
        None, description="tokens after which thinking is ended"
    )
    include_reasoning: bool = Field(True, description="false: thinking is not shown")
    tools: Objects | None = Field(None, description="functions that may be called")
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = Field(
        None, description="required, or one by its name: the output is a call, of the form of the tool's schema"
    )
    parallel_tool_calls: bool | None = Field(None, description="false: calls after the first are left out")


def chat_request(asked: dict[str, Any]) -> ChatCompletionRequest:
    """What a request of another API asks of chat completions. Raises ApiError that names the field."""
    try:
        return ChatCompletionRequest.model_validate(asked)
    except ValidationError as error:
        raise from_validation(error.errors()) from error


TEXT_ONLY = "this server gives text only"
VERSIONS_BEFORE = "use structured_outputs"

UNSERVED_FIELDS: dict[str, tuple[tuple[Any, ...], str]] = {
    "suffix": (("",), "a text is continued at its end"),
    "audio": ((), TEXT_ONLY),
    "modalities": ((["text"],), TEXT_ONLY),
    "prediction": ((), "nothing is predicted by the client"),
    "functions": (([],), "use tools"),
    "function_call": (("none", "auto"), "use tool_choice"),
    "web_search_options": ((), "the server searches nothing"),
    "store": ((False,), "the server keeps no answers"),
    "service_tier": (("auto", "default"), "there is one tier; use priority"),
    "verbosity": (("medium",), "say so in the prompt"),
    "prompt_cache_retention": (("in_memory", "in-memory"), "prefixes stay for as long as there is room"),
    "prompt_cache_options": ((), "prefixes stay for as long as there is room"),
    "moderation": ((), "nothing is moderated"),
    "use_beam_search": ((False,), "there is sampling only"),
    "length_penalty": ((1, 1.0), "there is no beam search"),
    "early_stopping": ((False,), "there is no beam search"),
    "truncate_prompt_tokens": ((), "cut the prompt"),
    "truncation_side": ((), "cut the prompt"),
    "spaces_between_special_tokens": ((True,), "tokens are joined as the tokenizer does"),
    "logits_processors": (([],), "use logit_bias, bad_words or allowed_token_ids"),
    "mm_processor_kwargs": (({},), TEXT_ONLY),
    "media_io_kwargs": (({},), TEXT_ONLY),
    "prompt_embeds": (([],), "a prompt is a text or token ids"),
    "cache_salt": ((), "the prefix cache is one for all"),
    "kv_transfer_params": (({},), "keys and values stay here"),
    "vllm_xargs": (({},), "they are vLLM's own"),
    "logprob_token_ids": (([],), "ask for the most probable ones"),
    "repetition_detection": ((), "use the penalties"),
    "guided_json": ((), VERSIONS_BEFORE),
    "guided_regex": ((), VERSIONS_BEFORE),
    "guided_choice": ((), VERSIONS_BEFORE),
    "guided_grammar": ((), VERSIONS_BEFORE),
    "guided_whitespace_pattern": ((), VERSIONS_BEFORE),
    "guided_decoding_backend": ((), VERSIONS_BEFORE),
    "structural_tag": ((), VERSIONS_BEFORE),
    "lora_path": ((), "there are no adapters"),
    "regex": ((), VERSIONS_BEFORE),
    "ebnf": ((), VERSIONS_BEFORE),
    "json_schema": ((), "use response_format"),
}
"""Fields of the published interfaces that are not served -> the values that ask for nothing, and what to do instead."""


def refuse_unserved(body: GenerationBody) -> None:
    """Raises ApiError for a field that other servers know and this one does not honour, unless it asks for nothing."""
    refuse(body.model_extra or {}, UNSERVED_FIELDS)


def refuse(given: Mapping[str, Any], unserved: Mapping[str, tuple[tuple[Any, ...], str]], place: str = "") -> None:
    """Raises ApiError for a field of `unserved` (as UNSERVED_FIELDS) that asks for something. `place`: of the object
    whose fields they are, where that is not the body.
    """
    for name, value in given.items():
        if name not in unserved or value is None:
            continue
        allowed, why = unserved[name]
        if not any(value == one and type(value) is type(one) for one in allowed):
            instead = f"; allowed: {', '.join(map(repr, allowed))}" if allowed else ""
            whole = f"{place}.{name}" if place else name
            raise ApiError(400, f"{whole} is not served: {why}{instead}", param=param_of(whole))


def refuse_foreign(given: Mapping[str, Any], own: Collection[str], api: str) -> None:
    """Raises ApiError for a field of chat completions in a request of another API that has none of that name: whoever
    sends it expects it to do something.
    """
    for name, value in given.items():
        known = name in ChatCompletionRequest.model_fields or name in UNSERVED_FIELDS
        if known and name not in own and value is not None:
            raise ApiError(400, f"{name} is no field of {api}, but of /v1/chat/completions", param=name)


def renamed(error: ApiError, names: Mapping[str, str]) -> ApiError:
    """An error about a field of chat completions, which another API calls otherwise."""
    if error.param is None or error.param not in names:
        return error
    message = re.sub(rf"\b{error.param}\b", names[error.param], error.message)
    return ApiError(error.status, message, param=param_of(names[error.param]), headers=error.headers)


class TokenizeRequest(Body):
    """One of `prompt` and `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: Objects | None = Field(None, min_length=1)
    add_special_tokens: bool | None = Field(
        None, description="of a prompt (default: true); a chat's are its template's"
    )
    return_token_strs: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Objects | None = None


class DetokenizeRequest(Body):
    model: str | None = None
    tokens: TokenIds


class AbortRequest(Body):
    request_ids: Texts | None = Field(None, description="ids of answers, or request ids; left out: all")


class Error(Answer):
    message: str
    type: str
    param: str | None
    code: int


class ErrorAnswer(Answer):
    error: Error


class PromptTokensDetails(Answer):
    cached_tokens: int


class CompletionTokensDetails(Answer):
    reasoning_tokens: int


class Usage(Answer):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens_details: CompletionTokensDetails | None = None


class CompletionLogprobs(Answer):
    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(Answer):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None = None


class CompletionAnswer(Answer):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ChatMessage(Answer):
    role: str
    content: str | None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class ChatChoice(Answer):
    index: int
    message: ChatMessage
    logprobs: dict[str, Any] | None
    finish_reason: str | None
    stop_reason: int | str | None = None


class ChatAnswer(Answer):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Model(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


class ModelList(Answer):
    object: Literal["list"]
    data: list[Model]


class TokenizeAnswer(Answer):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeAnswer(Answer):
    prompt: str


class Message(Answer):
    """Anthropic's."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: str | None
    stop_sequence: str | None
    usage: dict[str, Any]


class MessageError(Answer):
    """Anthropic's."""

    type: Literal["error"]
    error: dict[str, Any]


class CountedTokens(Answer):
    input_tokens: int


class Response(Answer):
    """OpenAI's, of the Responses API."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["completed", "incomplete", "failed", "in_progress"]
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None


class RenderedPrompt(Answer):
    """A prompt as the engine would get it."""

    request_id: str
    model: str
    token_ids: list[int]
    sampling_params: dict[str, Any]


class VersionAnswer(Answer):
    version: str


class LoadAnswer(Answer):
    server_load: int


class AbortAnswer(Answer):
    aborted: list[str]


class ResetAnswer(Answer):
    reset: bool
