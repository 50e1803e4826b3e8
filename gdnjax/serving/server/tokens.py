"""Prompts as tokens, without generating: /tokenize, /detokenize, and both endpoints' /render."""

import asyncio
import dataclasses
from typing import Any

from gdnjax.sampling_params import SamplingParams
from gdnjax.serving.server import chat, completions
from gdnjax.serving.server.errors import ApiError, bad_request
from gdnjax.serving.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    refuse_unserved,
)
from gdnjax.serving.server.service import Service


async def tokenize(service: Service, body: TokenizeRequest) -> dict[str, Any]:
    """The tokens of a text or of a conversation."""
    llm = service.llm.llm
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "exactly one of prompt and messages is wanted", param="prompt")
    try:
        tokenizer = llm.frontend.require_tokenizer("tokenize")
        if body.messages is None:
            assert body.prompt is not None
            special = body.add_special_tokens is not False
            token_ids = await asyncio.to_thread(llm.frontend.encode, body.prompt, "prompt", add_special_tokens=special)
        else:
            if body.add_special_tokens:
                raise ApiError(400, "the special tokens of a chat are its template's", param="add_special_tokens")
            asked = ChatCompletionRequest.model_construct(
                **{name: getattr(body, name) for name in CHAT_FIELDS if getattr(body, name) is not None}
            )
            token_ids = await asyncio.to_thread(_render_chat, service, asked)
    except ValueError as error:
        raise bad_request(error, type(body).model_fields) from error
    return {
        "count": len(token_ids),
        "max_model_len": llm.max_model_len,
        "tokens": token_ids,
        "token_strs": tokenizer.hf.convert_ids_to_tokens(token_ids) if body.return_token_strs else None,
    }


CHAT_FIELDS = (
    "messages",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "chat_template_kwargs",
    "tools",
)


async def detokenize(service: Service, body: DetokenizeRequest) -> dict[str, Any]:
    """The text of tokens, special ones among them."""
    llm = service.llm.llm
    service.check_model(body.model)
    try:
        tokenizer = llm.frontend.require_tokenizer("detokenize")
        if len(body.tokens) > llm.max_model_len:
            raise ValueError(f"tokens are {len(body.tokens)}; allowed: at most max_model_len={llm.max_model_len}")
        llm.frontend.check_token_ids("tokens", body.tokens)
    except ValueError as error:
        raise bad_request(error, type(body).model_fields) from error
    return {"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens, skip_special_tokens=False)}


async def render_completion(
    service: Service, body: CompletionRequest, request_id: str | None = None
) -> list[dict[str, Any]]:
    """What the engine would get for each prompt of a request."""
    frontend = service.llm.llm.frontend
    model = service.check_model(body.model)
    refuse_unserved(body)
    params = completions.parameters(service, body)
    prompts = [await completions.given(service, body, prompt) for prompt in completions.prompts_of(body)]
    name = service.answer_id("cmpl", body.request_id or request_id)
    try:
        tokens = [
            await asyncio.to_thread(frontend.token_ids, prompt, f"prompt {index}")
            for index, prompt in enumerate(prompts)
        ]
    except ValueError as error:
        raise bad_request(error, type(body).model_fields) from error
    return [_rendered(name, model, token_ids, params) for token_ids in tokens]


async def render_chat(service: Service, body: ChatCompletionRequest, request_id: str | None = None) -> dict[str, Any]:
    """What the engine would get for a conversation."""
    model = service.check_model(body.model)
    refuse_unserved(body)
    params = chat.parameters(service, body)
    try:
        token_ids = await asyncio.to_thread(_render_chat, service, body)
    except ValueError as error:
        raise bad_request(error, type(body).model_fields) from error
    return _rendered(service.answer_id("chatcmpl", body.request_id or request_id), model, token_ids, params)


def _rendered(name: str, model: str, token_ids: list[int], params: SamplingParams) -> dict[str, Any]:
    given = {name: value for name, value in dataclasses.asdict(params).items() if value is not None}
    return {"request_id": name, "model": model, "token_ids": token_ids, "sampling_params": given}


def _render_chat(service: Service, body: ChatCompletionRequest) -> list[int]:
    frontend = service.llm.llm.frontend
    options = chat.template_arguments(service, body)
    keywords = options.pop("chat_template_kwargs")
    prompt = options.pop("add_generation_prompt")
    others = {name: value for name, value in options.items() if value}
    text = frontend.require_tokenizer("chat").render_chat(
        chat.history(service, body.messages), prompt, **keywords, **others
    )
    return frontend.encode(text, "messages", add_special_tokens=False)
