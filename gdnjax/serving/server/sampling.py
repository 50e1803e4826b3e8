"""Sampling parameters of a request's fields."""

from collections.abc import Collection
from typing import Any

from gdnjax.sampling_params import SamplingParams
from gdnjax.serving.frontend import Frontend
from gdnjax.serving.server.errors import ApiError, bad_request
from gdnjax.serving.server.protocol import GenerationBody

FIELDS = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "max_tokens",
    "min_tokens",
    "bad_words",
    "allowed_token_ids",
    "skip_special_tokens",
    "prompt_logprobs",
)
"""Of a request: sampling parameters under their own names."""


def sampling_params(body: GenerationBody, frontend: Frontend, **others: Any) -> SamplingParams:
    """The parameters that `body` asks for, `others` in place of its own, the checkpoint's defaults where it asks none.

    Raises ApiError that names the field.
    """
    given = {name: getattr(body, name) for name in FIELDS if getattr(body, name) is not None}
    if given.get("stop") == "":
        # Other servers take it for none, and so do their clients.
        del given["stop"]
    if body.logit_bias:
        given["logit_bias"] = _by_token_id(body.logit_bias)
    try:
        return frontend.default_sampling_params(**given, **others)
    except ValueError as error:
        raise bad_request(error, fields_of(body)) from error


def fields_of(body: GenerationBody) -> Collection[str]:
    return type(body).model_fields


def _by_token_id(bias: dict[str, Any]) -> dict[int, Any]:
    for key in bias:
        if not (key.isascii() and key.isdigit()) or len(key) > 10:
            raise ApiError(400, f"logit_bias: {key!r} is no token id; allowed: a number, as text", param="logit_bias")
    return {int(key): value for key, value in bias.items()}
