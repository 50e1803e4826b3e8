"""What goes wrong, in the form in which OpenAI's clients expect it."""

import json
import logging
import re
import reprlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

log = logging.getLogger("gdnjax.server")

TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    422: "UnprocessableEntityError",
    429: "RateLimitError",
    500: "InternalServerError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
    504: "TimeoutError",
}
"""HTTP status -> what the error is called."""

MAX_FOUND = 8
"""Mistakes of one body that are told."""

MAX_MESSAGE = 2000
"""Characters of a message, which may quote what a client has sent."""

MESSAGES = "/v1/messages"
"""Where errors have Anthropic's form."""

MESSAGE_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""HTTP status -> what the error is called there."""

UNSERVED = {
    "/v1/embeddings": "embeddings",
    "/v1/audio": "audio",
    "/v1/images": "images",
    "/v1/videos": "videos",
    "/v1/files": "files",
    "/v1/uploads": "uploads",
    "/v1/batches": "batches",
    "/v1/moderations": "moderations",
    "/v1/fine_tuning": "fine-tuning",
    "/v1/assistants": "assistants",
    "/v1/threads": "threads",
    "/v1/vector_stores": "vector stores",
    "/v1/evals": "evals",
    "/v1/realtime": "realtime sessions",
    "/v1/conversations": "stored conversations",
    "/v1/containers": "containers",
    "/v1/rerank": "reranking",
    "/v2/rerank": "reranking",
    "/rerank": "reranking",
    "/v1/score": "scoring of pairs",
    "/score": "scoring of pairs",
    "/pooling": "pooling",
    "/classify": "classification",
    "/v1/load_lora_adapter": "LoRA adapters",
    "/v1/unload_lora_adapter": "LoRA adapters",
}
"""Where other servers have what this one has not -> what that is."""


class ApiError(Exception):
    """An answer that is an error: `status` is HTTP's, `param` the field that is to blame, `headers` go with it."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None
    ):
        message = message if len(message) <= MAX_MESSAGE else f"{message[: MAX_MESSAGE - 3]}..."
        super().__init__(message)
        self.status, self.message, self.param, self.headers = status, message, param, dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """`{"error": {"message", "type", "param", "code"}}`; `code` is the status."""
        kind = TYPES.get(self.status, "BadRequestError" if self.status < 500 else "InternalServerError")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.status}}

    @property
    def message_body(self) -> dict[str, Any]:
        """`{"type": "error", "error": {"type", "message"}}`, as Anthropic's clients expect it."""
        kind = MESSAGE_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}, "request_id": None}

    def response(self, path: str) -> Response:
        """The response to a request for a path."""
        is_message = path == MESSAGES or path.startswith(MESSAGES + "/")
        return json_response(self.message_body if is_message else self.body, self.status, self.headers)


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """In ASCII: what a client sent may hold half characters, which UTF-8 has no bytes for."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return Response(text, status, headers, media_type="application/json")


def bad_request(error: ValueError, fields: Collection[str] = ()) -> ApiError:
    """What a check says about a request, with the field of `fields` that it begins with, or that it quotes a value or a
    place of.
    """
    message = str(error)
    # Whose parameters they are is no field.
    about = re.sub(r"^prompt \d+: ", "", message)
    named = re.findall(r"^every id in \w+|^\w+|\w+(?=[=\[])", about)
    names = (each.removeprefix("every id in ") for each in named)
    return ApiError(400, message, param=next((name for name in names if name in fields), None))


def from_validation(errors: Sequence[Any]) -> ApiError:
    """All that pydantic finds wrong with a body, in one line; the first decides the field.

    Of a field that may have several forms it finds something wrong with each. Beyond MAX_FOUND it is not told.
    """
    found, param = [], None
    for error in errors[:MAX_FOUND]:
        # ("body", field, index, form, ...); JSON that cannot be read has a character's place.
        place = [part for part in error["loc"] if part not in ("body", "query", "path", "header")]
        name = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
        if error["type"] == "json_invalid":
            found.append(f"the body is not JSON: {error.get('ctx', {}).get('error', error['msg'])}")
            continue
        if param is None and place and isinstance(place[0], str):
            param = place[0]
        if isinstance(error.get("input"), bytes) and not place:
            found.append("the body is taken for JSON with the header Content-Type: application/json alone")
            continue
        line = f"{name}: {error['msg']}" if name else error["msg"]
        if error["type"] not in ("missing", "value_error") and name:
            line += f", got {_short(error.get('input'))}"
        found.append(line)
    return ApiError(400, "; ".join(dict.fromkeys(found)), param=param)


_shortener = reprlib.Repr()
_shortener.maxlist = _shortener.maxdict = 8
_shortener.maxstring = _shortener.maxlong = _shortener.maxother = 80


def _short(value: Any, most: int = 80) -> str:
    # Without writing out the whole of it, which may be megabytes.
    text = _shortener.repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def install(app: FastAPI) -> None:
    """Has `app` answer every error in OpenAI's form."""

    @app.exception_handler(ApiError)
    async def _api_error(request: Request, error: ApiError) -> Response:
        return error.response(request.url.path)

    @app.exception_handler(RequestValidationError)
    async def _validation(request: Request, error: RequestValidationError) -> Response:
        return from_validation(error.errors()).response(request.url.path)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        return _of_http(request, error).response(request.url.path)

    @app.exception_handler(Exception)
    async def _other(request: Request, error: Exception) -> Response:
        # Starlette logs it with its traceback, which is for who runs the server and not for its clients.
        # It also has the connection closed: whoever sends the next request on it has to know.
        found = unexpected(error)
        found.headers["Connection"] = "close"
        return found.response(request.url.path)


def _of_http(request: Request, error: HTTPException) -> ApiError:
    path, message = request.url.path, str(error.detail)
    if error.status_code == 404:
        message = f"there is nothing at {path}; what there is stands in /openapi.json"
        for prefix, what in UNSERVED.items():
            if path == prefix or path.startswith(prefix + "/"):
                message = f"{path}: {what} are not served; this server generates text: /v1/chat/completions, "
                message += "/v1/completions"
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "others")
        if "GET" in allowed.split(", "):
            allowed += ", HEAD"
        message = f"{path} does not take {request.method}; allowed: {allowed}"
        return ApiError(405, message, headers={"Allow": allowed})
    return ApiError(error.status_code, message, headers=error.headers)


def unexpected(error: BaseException) -> ApiError:
    """An error that is the server's own."""
    return ApiError(500, f"the server failed: {type(error).__name__}: {error}")
