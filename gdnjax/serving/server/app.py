"""`make_app`: the routes of the server over an AsyncLLM."""

import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Path, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware.cors import CORSMiddleware

from gdnjax.serving.async_llm import AsyncLLM
from gdnjax.serving.server import chat, completions, errors, messages, pages, protocol, responses, status, tokens
from gdnjax.serving.server.bodies import Route
from gdnjax.serving.server.errors import ApiError, json_response
from gdnjax.serving.server.events import ClientGoneError, EventStream, frames, named_frames, unless_gone
from gdnjax.serving.server.guards import Guard
from gdnjax.serving.server.service import Chunks, Service
from gdnjax.serving.server.settings import ServerConfig
from gdnjax.version import __version__

CLIENT_CLOSED_REQUEST = 499
"""For logs: nobody gets it."""

MAX_ID = 256

ERROR = {"model": protocol.ErrorAnswer}
ERRORS: dict[int | str, dict[str, Any]] = dict.fromkeys((400, 401, 403, 404, 408, 413, 503), ERROR)
GENERATION_ERRORS = ERRORS | dict.fromkeys((429, 500, 504), ERROR)

DESCRIPTION = """\
Text generation with OpenAI's endpoints and vLLM's further fields. Fields that nobody knows are ignored; fields of the
published interfaces that are not served are an error that names them. A stream is server-sent events, `data: [DONE]`
the last; an error after it has begun is an event with `error`.
"""

router = APIRouter(route_class=Route)


def make_app(llm: AsyncLLM | None, config: ServerConfig) -> FastAPI:
    """The application. Without `llm` it is alive and not ready, until `app.state.service.begin(llm)` is called.

    Whoever ends it calls `await app.state.service.end()`, and closes `llm`.
    """
    # The pages that FastAPI has for its documents load what they are made of from another host.
    app = FastAPI(title="gdnjax", version=__version__, description=DESCRIPTION, docs_url=None, redoc_url=None)
    app.state.service = Service(llm, config)
    errors.install(app)
    app.include_router(router)
    app.include_router(pages.router)
    app.openapi = functools.partial(_document, app, app.openapi)
    app.add_middleware(Guard, config=config)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    # FastAPI makes models and checks of all routes at the first request, which took a quarter of a second longer.
    for route in app.routes:
        route.matches({"type": "http", "method": "GET", "path": "/live", "root_path": "", "headers": []})
    return app


def _document(app: FastAPI, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The OpenAPI document, without what FastAPI says of errors that it would answer itself."""
    if app.openapi_schema is None:
        found = make()
        for operations in found["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            found["components"]["schemas"].pop(name, None)
        app.openapi_schema = found
    return app.openapi_schema


def service_of(request: Request) -> Service:
    return request.app.state.service


def given_id(request: Request) -> str | None:
    """The client's name for its request, of header x-request-id. Raises ApiError for what cannot be one."""
    name = request.headers.get("x-request-id")
    if name is not None and not (0 < len(name) <= MAX_ID and all("!" <= character <= "~" for character in name)):
        raise ApiError(
            400, f"x-request-id must be 1 to {MAX_ID} printable ASCII characters without spaces", param="x-request-id"
        )
    return name or None


async def answer(request: Request, work: Awaitable[dict[str, Any] | Chunks]) -> Response:
    """The response of what is created: a stream, or one object. Ends the work when the client leaves."""
    try:
        made = await unless_gone(request, work)
    except ClientGoneError:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    if isinstance(made, Chunks):
        keep_alive = service_of(request).config.keep_alive_interval
        return EventStream(
            frames(made.framed()), made, keep_alive=keep_alive, headers={"x-request-id": made.run.answer_id}
        )
    return json_response(made, headers={"x-request-id": made["id"]})


async def translated(
    request: Request,
    asked: dict[str, Any],
    whole: Callable[[dict[str, Any]], dict[str, Any]],
    stream: Callable[[AsyncIterator[dict[str, Any]]], AsyncIterator[dict[str, Any]]],
    names: Mapping[str, str],
) -> Response:
    """The response to a request of another API, which asks for `asked` of chat completions: what is made of the answer
    by `whole`, or of its chunks by `stream`. `names`: what fields of chat completions are called there.
    """
    service = service_of(request)
    try:
        made = await unless_gone(request, chat.create(service, protocol.chat_request(asked), given_id(request)))
    except ClientGoneError:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    except ApiError as error:
        raise protocol.renamed(error, names) from error
    if isinstance(made, Chunks):
        keep_alive = service.config.keep_alive_interval
        headers = {"x-request-id": made.run.answer_id}
        return EventStream(named_frames(stream(aiter(made))), made, keep_alive=keep_alive, headers=headers)
    return json_response(whole(made), headers={"x-request-id": made["id"]})


def _answers(model: Any, description: str = "the answer", *, streams: bool = False) -> dict[int | str, dict[str, Any]]:
    """What OpenAPI says of a route that generates."""
    found: dict[str, Any] = {"model": model, "description": description}
    if streams:
        # Without a schema: an event is a chunk, an error or a mark of the end.
        found["content"] = {"text/event-stream": {}}
    return {**(GENERATION_ERRORS if streams else ERRORS), 200: found}


def _as_messages(found: dict[int | str, dict[str, Any]]) -> dict[int | str, dict[str, Any]]:
    """The same where errors have Anthropic's form."""
    return {
        status: entry if status == 200 else {**entry, "model": protocol.MessageError} for status, entry in found.items()
    }


@router.post("/v1/chat/completions", responses=_answers(protocol.ChatAnswer, streams=True))
async def create_chat_completion(body: protocol.ChatCompletionRequest, request: Request) -> Response:
    """Answers a conversation."""
    return await answer(request, chat.create(service_of(request), body, given_id(request)))


@router.post("/v1/completions", responses=_answers(protocol.CompletionAnswer, streams=True))
async def create_completion(body: protocol.CompletionRequest, request: Request) -> Response:
    """Continues one prompt or several."""
    return await answer(request, completions.create(service_of(request), body, given_id(request)))


@router.post("/v1/messages", responses=_as_messages(_answers(protocol.Message, streams=True)))
async def create_message(body: dict[str, Any], request: Request) -> Response:
    """Anthropic's way of asking for the answer to a conversation."""
    asked = messages.to_chat(body, chat.template_text(service_of(request)))
    return await translated(request, asked, messages.from_chat, messages.stream, messages.NAMES)


@router.post("/v1/messages/count_tokens", responses=_as_messages(_answers(protocol.CountedTokens)))
async def count_message_tokens(body: dict[str, Any], request: Request) -> Response:
    """How many tokens a conversation of Anthropic's form is."""
    service = service_of(request)
    asked = protocol.chat_request(messages.to_chat(body, chat.template_text(service), counts=True))
    rendered = await tokens.render_chat(service, asked)
    return json_response({"input_tokens": len(rendered["token_ids"])})


@router.post("/v1/responses", responses=_answers(protocol.Response, streams=True))
async def create_response(body: dict[str, Any], request: Request) -> Response:
    """OpenAI's other way of asking for the answer to a conversation. Nothing is kept."""
    asked = responses.to_chat(body)
    whole = functools.partial(responses.from_chat, body=body)
    return await translated(request, asked, whole, functools.partial(responses.stream, body=body), responses.NAMES)


@router.api_route("/v1/responses/{name:path}", methods=["GET", "POST", "DELETE"], include_in_schema=False)
async def refuse_response(name: Annotated[str, Path()], request: Request) -> Response:
    """What is asked of stored responses, cancelling among it: there are none."""
    message = f"{request.url.path}: {responses.KEEPS_NOTHING}"
    if name.endswith("/cancel"):
        message = f"{request.url.path}: no response runs in the background here; one that is streamed ends when its "
        message += "connection is closed"
    raise ApiError(404, message)


@router.post("/v1/chat/completions/render", responses=_answers(protocol.RenderedPrompt))
async def render_chat_completion(body: protocol.ChatCompletionRequest, request: Request) -> Response:
    """The tokens of a conversation, without an answer."""
    return json_response(await tokens.render_chat(service_of(request), body, given_id(request)))


@router.post("/v1/completions/render", responses=_answers(list[protocol.RenderedPrompt]))
async def render_completion(body: protocol.CompletionRequest, request: Request) -> Response:
    """The tokens of each prompt, without a completion."""
    return json_response(await tokens.render_completion(service_of(request), body, given_id(request)))


@router.post("/tokenize", responses=_answers(protocol.TokenizeAnswer))
async def tokenize(body: protocol.TokenizeRequest, request: Request) -> Response:
    """The tokens of a text or of a conversation."""
    return json_response(await tokens.tokenize(service_of(request), body))


@router.post("/detokenize", responses=_answers(protocol.DetokenizeAnswer))
async def detokenize(body: protocol.DetokenizeRequest, request: Request) -> Response:
    """The text of tokens."""
    return json_response(await tokens.detokenize(service_of(request), body))


@router.get("/v1/models", responses=_answers(protocol.ModelList))
async def models(request: Request) -> Response:
    """The names of the model, and how long its requests may be."""
    return json_response(status.models(service_of(request)))


@router.get("/v1/models/{name:path}", responses=_answers(protocol.Model))
async def model(name: Annotated[str, Path()], request: Request) -> Response:
    """One of them."""
    return json_response(status.model(service_of(request), name))


@router.get("/health", response_class=Response, responses={200: {"description": "ready"}, 503: ERROR})
@router.get("/ping", response_class=Response, responses={200: {"description": "ready"}, 503: ERROR})
async def health(request: Request) -> Response:
    """Whether requests are served: 503 while the model is loaded and compiled, when the server is to end, and when the
    engine has failed.
    """
    service_of(request).check_ready()
    return Response()


@router.get("/live", response_class=Response, responses={200: {"description": "alive"}, 503: ERROR})
async def live(request: Request) -> Response:
    """Whether the server is worth waiting for: 503 when the engine has failed, which only a new process mends."""
    if (failure := service_of(request).failure) is not None:
        raise ApiError(503, f"the engine has failed: {failure}")
    return Response()


@router.get("/version", responses={200: {"model": protocol.VersionAnswer}})
async def version() -> Response:
    """Which gdnjax this is."""
    return json_response({"version": __version__})


@router.get("/load", responses={200: {"model": protocol.LoadAnswer}})
async def load(request: Request) -> Response:
    """How many samples clients wait for."""
    return json_response({"server_load": service_of(request).load})


@router.get("/metrics", responses={**ERRORS, 200: {"content": {"text/plain": {"schema": {"type": "string"}}}}})
def metrics(request: Request) -> Response:
    """What the engine holds and has done, for Prometheus; also while it drains, and after it has failed."""
    return Response(service_of(request).metrics(), media_type=CONTENT_TYPE_LATEST)


@router.get("/server_info", responses=ERRORS)
async def server_info(request: Request) -> Response:
    """Version, settings, and what the engine holds and has done."""
    return json_response(await status.information(service_of(request)))


@router.post("/reset_prefix_cache", responses=_answers(protocol.ResetAnswer))
async def reset_prefix_cache(request: Request) -> Response:
    """Forgets every cached prefix."""
    return json_response({"reset": await service_of(request).llm.reset_prefix_cache()})


@router.post("/abort_requests", responses=_answers(protocol.AbortAnswer))
async def abort_requests(request: Request, body: protocol.AbortRequest | None = None) -> Response:
    """Ends answers by their ids, or all of them: they end with finish_reason "abort"."""
    service = service_of(request)
    service.check_ready()
    return json_response({"aborted": await service.abort(body.request_ids if body else None)})
