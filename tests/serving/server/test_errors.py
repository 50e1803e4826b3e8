"""Whatever is wrong is an error in OpenAI's form, with the field that is to blame."""

import asyncio
import itertools
import json
import pkgutil
import typing

import httpx
import pytest

from gdnjax.serving.server.app import make_app
from gdnjax.serving.server.errors import UNSERVED
from gdnjax.serving.server.protocol import UNSERVED_FIELDS, ChatCompletionRequest, CompletionRequest
from gdnjax.serving.server.settings import ServerConfig
from tests.serving.server.asking import CHAT, answer, error, events
from tests.serving.server.conftest import CONFIG

COMPLETION = {"prompt": "Hello", "max_tokens": 1}

BAD = {
    "n": [0, -1, 1.5, "2", True, 5000],
    "temperature": [-1, "hot", 1e400, [1]],
    "top_p": [0, 1.1, -1],
    "top_k": [-2, 1.5, 1 << 40],
    "min_p": [-0.1, 2],
    "presence_penalty": [3],
    "frequency_penalty": [-3],
    "repetition_penalty": [0],
    "seed": [-1, 1 << 64, 1.5],
    "stop": [5, [""], ["a", 1], ["a"] * 65, "a" * 20_000],
    "stop_token_ids": [[-1], [5000], "7"],
    "max_tokens": [0, -5, 1 << 31, "many"],
    "min_tokens": [-1, 2],
    "logit_bias": [{"a": 1}, {"5000": 1}, {"7": "x"}, {"7": True}, [1]],
    "structured_outputs": [{"regex": "a" * 200_000}, {"choice": ["a" * 1000] * 200}, {"json": "[" * 100_000}],
    "bad_words": ["word", [1], ["a" * 2000]],
    "allowed_token_ids": [[], [5000]],
    "logprobs": [-1, 6, "yes"],
    "prompt_logprobs": [-1, 6],
    "priority": ["high", 1.5, 1 << 40],
    "request_id": ["", "with space", "\u00e4", 5],
    "stream": ["yes", 1],
    "stream_options": ["usage", {"include_usage": "yes"}, {"include_obfuscation": True}],
    "model": [5],
    "prompt": [None, 5, [], [5000], [[-1]], ["\ud800"], [1.5], {"text": "Hello"}],
    "best_of": [2],
    "echo": ["yes"],
    "ignore_eos": ["yes"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_bad_values_are_named(name, value, client):
    # Python writes it as Infinity, which is no JSON.
    body = json.dumps({**COMPLETION, name: value}).replace("Infinity", "1e400")
    response = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    found = error(response, 400)
    assert found["type"] == "BadRequestError"
    assert found["param"] == name or name in found["message"], found


CHAT_BAD = {
    "messages": [None, [], "Hello", ["Hello"], [{}], [{"role": "user"}], [{"role": 5, "content": "x"}]],
    "top_logprobs": [1, -1],
    "logprobs": [2],
    "max_completion_tokens": [0],
    "max_tokens": [0],
    "chat_template_kwargs": ["thinking", {"messages": []}],
    "add_generation_prompt": ["yes"],
    "continue_final_message": [True],
    "documents": ["text"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in CHAT_BAD.items() for value in values])
def test_bad_values_of_a_chat_are_named(name, value, client):
    found = error(client.post("/v1/chat/completions", json={**CHAT, name: value}), 400)
    assert found["param"] or found["message"]


def test_images_are_refused_and_not_dropped(client):
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    found = error(client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": [part]}]}), 400)
    assert "messages[0]['content'][0]" in found["message"]
    assert found["param"] == "messages"


def test_two_limits_are_one_too_many(client):
    body = {**CHAT, "max_tokens": 3, "max_completion_tokens": 4}
    assert error(client.post("/v1/chat/completions", json=body), 400)["param"] == "max_tokens"


def test_unknown_fields_are_ignored(client):
    assert answer(client, "/v1/completions", {**COMPLETION, "nobody_knows": {"this": 1}, "user": "me", "metadata": {}})


@pytest.mark.parametrize(
    ("params", "model"),
    [
        ("chat.completion_create_params.CompletionCreateParamsBase", ChatCompletionRequest),
        ("chat.completion_create_params.CompletionCreateParamsStreaming", ChatCompletionRequest),
        ("completion_create_params.CompletionCreateParamsBase", CompletionRequest),
        ("completion_create_params.CompletionCreateParamsStreaming", CompletionRequest),
    ],
)
def test_every_published_field_is_served_or_refused(params, model):
    published = set(typing.get_type_hints(pkgutil.resolve_name(f"openai.types.{params}")))
    assert "model" in published
    assert published <= set(model.model_fields) | set(UNSERVED_FIELDS)


@pytest.mark.parametrize("name", UNSERVED_FIELDS)
def test_fields_that_are_not_served_are_named(name, client):
    found = error(client.post("/v1/completions", json={**COMPLETION, name: {"something": "else"}}), 400)
    assert (found["param"], found["message"].startswith(f"{name} is not served: ")) == (name, True)


def test_fields_that_are_not_served_may_ask_for_nothing(client):
    """Each by every value that asks for nothing, all fields at once."""
    values = [(None, *allowed) for allowed, _ in UNSERVED_FIELDS.values()]
    for asked in itertools.zip_longest(*values):
        answer(client, "/v1/completions", {**COMPLETION, **dict(zip(UNSERVED_FIELDS, asked, strict=True))})


@pytest.mark.parametrize("path", UNSERVED)
def test_endpoints_that_are_not_served_are_named(path, client):
    found = error(client.post(path, json={"input": "x"}), 404)
    assert UNSERVED[path] in found["message"]
    assert found["type"] == "NotFoundError"


def test_other_places_and_methods_are_told(client):
    assert "/nowhere" in error(client.get("/nowhere"), 404)["message"]
    assert "GET" in error(client.get("/v1/completions"), 405)["message"]


def test_models_that_do_not_exist_are_not_found(client):
    for response in (
        client.post("/v1/completions", json={**COMPLETION, "model": "gpt"}),
        client.post("/v1/chat/completions", json={**CHAT, "model": "gp\ud800t"}.copy() | {"model": "gpt"}),
        client.post("/tokenize", json={"prompt": "x", "model": "gpt"}),
        client.get("/v1/models/gpt"),
    ):
        found = error(response, 404)
        assert found["param"] == "model"
        assert "tiny, embedded" in found["message"]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"nothing", b'"x"', b"\xff", b"[" * 100_000, b'{"prompt": NaN}'])
def test_bodies_that_are_no_object_are_told(content, client):
    response = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    error(response, 400)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'{"prompt": NaN}', "NaN is no JSON"),
        (b'{"prompt": "\xff"}', "invalid start byte"),
        (b'{"prompt": ', "Expecting value"),
        (b'{"x": ' + b"[" * 100_000, "nested too deep"),
        (b'{"prompt": "x", "x": ' + b"[" * 128 + b"]" * 128 + b"}", "nested too deep; allowed: 128 levels"),
    ],
)
def test_bodies_that_are_no_json_are_told_why(content, why, client):
    response = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert why in error(response, 400)["message"]


def test_bodies_as_deep_as_allowed_are_read(client):
    """And brackets in texts are none."""
    content = b'{"prompt": "' + b"[" * 200 + b'", "max_tokens": 1, "x": ' + b"[" * 127 + b"]" * 127 + b"}"
    response = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 200, response.text


def test_bodies_of_another_type_are_told_which_is_wanted(client):
    response = client.post("/v1/completions", content=b'{"prompt": "x"}', headers={"content-type": "text/plain"})
    assert "Content-Type: application/json" in error(response, 400)["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": [{}] * 50_000}),
        ("/v1/completions", {"prompt": "x", "stop": [1] * 50_000}),
        ("/v1/completions", {"prompt": "x", "logit_bias": dict.fromkeys(map(str, range(50_000)), "x")}),
        ("/v1/chat/completions", {"messages": [1] * 50_000}),
        ("/v1/chat/completions", {**CHAT, "tools": [1] * 50_000}),
        ("/v1/messages", {**CHAT, "model": "tiny", "max_tokens": 1, "stop_sequences": [1] * 50_000}),
        ("/v1/messages", {"model": "tiny", "max_tokens": 1, "messages": "x" * 500_000}),
        ("/v1/responses", {"model": "tiny", "input": {"x": "x" * 500_000}}),
        ("/v1/completions", {**COMPLETION, "bad_words": ["x" * 500_000]}),
    ],
)
def test_many_mistakes_are_told_in_few_words(path, body, client):
    """Telling each would take the server's only thread for seconds, and megabytes of answer."""
    response = client.post(path, json=body)
    assert response.status_code == 400
    assert len(response.content) < 3000


@pytest.mark.parametrize(
    "call", [{"function": {"name": "f", "arguments": '{"a":' * 100_000}}, {"arguments": '{"a":' * 100_000}]
)
def test_arguments_that_are_too_deep_are_no_json(call, client):
    messages = [*CHAT["messages"], {"role": "assistant", "content": "", "tool_calls": [call]}]
    found = error(client.post("/v1/chat/completions", json={"messages": messages}), 400)
    assert "is not JSON" in found["message"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/chat/completions/render", "/tokenize", "/v1/messages"])
@pytest.mark.parametrize("name", ["chat_template", "tools", "continue_final_message"])
def test_fields_do_not_come_as_keywords_of_the_template(path, name, client):
    """A template is a program: who may bring one is asked of the field."""
    value = {"chat_template": "{{ 7 * 7 }}", "tools": [], "continue_final_message": False}[name]
    body = {**CHAT, "model": "tiny", "max_tokens": 1, "chat_template_kwargs": {name: value}}
    response = client.post(path, json=body)
    assert response.status_code == 400, response.text
    assert f"chat_template_kwargs may not have {name}" in response.json()["error"]["message"]


def test_half_characters_come_back_in_errors(client):
    """UTF-8 has no bytes for them: an error that quotes one must not fail itself."""
    body = '{"prompt": "x", "model": "\\ud800"}'
    response = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert "\\ud800" in error(response, 404)["message"]


def test_prompts_that_are_too_long_are_told(client):
    found = error(client.post("/v1/completions", json={"prompt": [42] * 256}), 400)
    assert (found["param"], "max_model_len=256" in found["message"]) == ("prompt", True)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "Once " * 100_000}),
        ("/v1/completions", {"prompt": "Once " * 100_000, "add_special_tokens": False}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Once " * 100_000}]}),
        ("/v1/completions/render", {"prompt": "Once " * 100_000}),
        ("/v1/chat/completions/render", {"messages": [{"role": "user", "content": "Once " * 100_000}]}),
        ("/tokenize", {"prompt": "Once " * 100_000}),
        ("/tokenize", {"prompt": "Once " * 100_000, "add_special_tokens": False}),
        ("/tokenize", {"messages": [{"role": "user", "content": "Once " * 100_000}]}),
    ],
)
def test_of_texts_that_are_far_too_long_the_beginning_is_tokenised(path, body, client, llm, monkeypatch):
    sizes = []
    encode = type(llm.tokenizer).encode

    def noted(self, text, *args, **kwargs):
        sizes.append(len(text))
        return encode(self, text, *args, **kwargs)

    monkeypatch.setattr(type(llm.tokenizer), "encode", noted)
    message = error(client.post(path, json=body), 400)["message"]
    assert "characters, of which the first" in message
    assert "max_model_len=256" in message
    assert max(sizes) < 10_000


def test_more_tokens_than_a_context_holds_are_no_text(client):
    assert answer(client, "/detokenize", {"tokens": [42] * 256})["prompt"]
    found = error(client.post("/detokenize", json={"tokens": [42] * 257}), 400)
    assert (found["param"], "max_model_len=256" in found["message"]) == ("tokens", True)


@pytest.mark.parametrize("special", [True, False])
def test_texts_without_a_meaning_are_told_however_they_are_tokenised(special, client):
    body = {"prompt": "\ud800", "add_special_tokens": special}
    content = json.dumps(body)
    response = client.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert "lone surrogate" in error(response, 400)["message"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logprobs", 6),
        ("allowed_token_ids", [5000]),
        ("structured_outputs", {"regex": "[a"}),
        ("stop_token_ids", [5000]),
    ],
)
def test_what_a_prompt_cannot_have_is_not_the_prompts_fault(name, value, client):
    body = {**COMPLETION, name: value}
    assert error(client.post("/v1/completions", json=body), 400)["param"] == name


def demanding(parameters):
    """A request for a call of a tool with such parameters."""
    functions = [{"name": "other"}, {"name": "f", "parameters": parameters}]
    tools = [{"type": "function", "function": function} for function in functions]
    return {**CHAT, "tools": tools, "tool_choice": {"type": "function", "function": {"name": "f"}}}


@pytest.mark.parametrize(
    ("body", "name", "why"),
    [
        (demanding({"$ref": "#"}), "tools", "the reference 'tools[1]: #' leads back to itself"),
        (demanding({"type": "objekt"}), "tools", "Invalid type: objekt"),
        (demanding({"$ref": "#/nowhere"}), "tools", "does not exist"),
        (
            {**CHAT, "response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}},
            "response_format",
            "response_format cannot be satisfied: the reference '#' leads back to itself",
        ),
        ({**CHAT, "structured_outputs": {"json": {"$ref": "#"}}}, "structured_outputs", "leads back to itself"),
    ],
)
def test_schemas_that_nothing_satisfies_are_the_fault_of_their_field(body, name, why, client):
    found = error(client.post("/v1/chat/completions", json=body), 400)
    assert found["param"] == name
    assert why in found["message"]


def test_anchors_of_tools_are_found(client):
    schema = {"properties": {"a": {"$ref": "#k"}}, "$defs": {"k": {"$anchor": "k", "type": "integer"}}}
    answer(client, "/v1/chat/completions", {**demanding(schema), "max_tokens": 1})


@pytest.mark.parametrize("structure", [{"grammar": 'start: "a" x\nx: x'}, {"regex": "[0-9]{2}"}], ids=str)
def test_requests_that_leave_themselves_no_token_are_not_the_servers_fault(structure, client):
    """Whose clients would ask again."""
    body = {**CHAT, "structured_outputs": structure}
    if "regex" in structure:
        body["allowed_token_ids"] = [7]
    assert "no token may be drawn" in error(client.post("/v1/chat/completions", json=body), 400)["message"]


def test_structures_that_would_end_the_server_are_refused(client):
    """The stack of the thread that compiles it is not enough."""
    grammar = "start: r0\n" + "".join(f'r{i}: "a" r{i + 1} | "x"\n' for i in range(4000)) + 'r4000: "q"'
    found = error(client.post("/v1/completions", json={**COMPLETION, "structured_outputs": {"grammar": grammar}}), 400)
    assert (found["param"], "nested too deep" in found["message"]) == ("structured_outputs", True)


def test_a_bad_prompt_of_many_stops_all(client, async_llm):
    found = error(client.post("/v1/completions", json={"prompt": ["Hello", [5000]]}), 400)
    assert "5000" in found["message"]
    assert answer_load(client) == 0


def answer_load(client):
    return client.get("/load").json()["server_load"]


def test_request_ids_are_checked(client):
    for name in ("x" * 257, "with space"):
        response = client.post("/v1/completions", json=COMPLETION, headers={"x-request-id": name})
        assert error(response, 400)["param"] == "x-request-id"


def test_prompt_logprobs_do_not_stream(client):
    for path, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
        found = error(client.post(path, json={**body, "prompt_logprobs": 1, "stream": True}), 400)
        assert found["param"] == "prompt_logprobs"


def asked(app, method, path, **options):
    """The response of an application without a socket."""

    async def ask():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **options)

    return asyncio.run(ask())


def config(**changes):
    return ServerConfig(served_model_names=CONFIG.served_model_names, **changes)


def test_keys_are_wanted_but_for_probes(async_llm):
    app = make_app(async_llm, config(api_keys=("first", "second")))
    for headers in ({}, {"authorization": "Bearer third"}, {"authorization": "Basic first"}, {"x-api-key": "no"}):
        found = error(asked(app, "GET", "/v1/models", headers=headers), 401)
        assert found["type"] == "AuthenticationError"
        assert "first" not in found["message"]
    for path in ("/health", "/ping", "/live", "/version", "/load"):
        assert asked(app, "GET", path).status_code == 200
    for headers in ({"authorization": "Bearer first"}, {"authorization": "bearer second"}, {"x-api-key": "second"}):
        assert asked(app, "GET", "/v1/models", headers=headers).status_code == 200
    info = asked(app, "GET", "/server_info", headers={"x-api-key": "first"}).json()
    assert info["server_config"]["api_keys"] == 2


def test_bodies_that_are_too_large_are_refused(async_llm):
    app = make_app(async_llm, config(max_body_bytes=100))
    large = json.dumps({"prompt": "x" * 100}).encode()

    async def pieces():
        for start in range(0, len(large), 10):
            yield large[start : start + 10]

    for content in (large, pieces()):
        found = error(asked(app, "POST", "/v1/completions", content=content), 413)
        assert "allowed: 100 bytes" in found["message"]


def test_bodies_that_do_not_arrive_are_given_up(async_llm):
    app = make_app(async_llm, config(body_timeout=0.05))

    async def slow():
        yield b"{"
        await asyncio.sleep(5)

    assert "within 0.05 s" in error(asked(app, "POST", "/v1/completions", content=slow()), 408)["message"]


def test_answers_that_take_too_long_are_given_up(async_llm):
    app = make_app(async_llm, config(request_timeout=0.001))
    body = {"prompt": "Hello", "max_tokens": 200, "ignore_eos": True}
    found = error(asked(app, "POST", "/v1/completions", json=body), 504)
    assert found["type"] == "TimeoutError"
    *_, last = events(asked(app, "POST", "/v1/completions", json={**body, "stream": True}).text)
    assert last["error"]["code"] == 504


def test_origins_may_be_allowed(async_llm):
    headers = {"origin": "http://page", "access-control-request-method": "POST"}
    closed, opened = make_app(async_llm, config()), make_app(async_llm, config(cors_origins=("http://page",)))
    assert "access-control-allow-origin" not in asked(closed, "OPTIONS", "/v1/completions", headers=headers).headers
    found = asked(opened, "OPTIONS", "/v1/completions", headers=headers)
    assert (found.status_code, found.headers["access-control-allow-origin"]) == (200, "http://page")


OWN = [
    # The server's host, the request's Host, and its Origin.
    ("127.0.0.1", "127.0.0.1:8000", "http://127.0.0.1:8000"),
    ("127.0.0.1", "LocalHost:8000", "http://localhost:8000"),
    ("::1", "[::1]:8000", "http://[::1]:8000"),
    ("0.0.0.0", "a.example", "https://a.example"),
    # As browsers write no origin at all, programs do.
    ("127.0.0.1", "127.0.0.1:8000", None),
    ("127.0.0.1", "a.example", None),
]
FOREIGN = [
    ("127.0.0.1", "127.0.0.1:8000", "http://a.example"),
    ("127.0.0.1", "127.0.0.1:8000", "http://127.0.0.1:3000"),
    ("127.0.0.1", "127.0.0.1:8000", "null"),
    ("127.0.0.1", "127.0.0.1:8000", ""),
    ("0.0.0.0", "a.example", "http://b.example"),
    # A name that somebody has let point here.
    ("127.0.0.1", "a.example:8000", "http://a.example:8000"),
    ("localhost", "a.example:8000", "http://a.example:8000"),
    ("127.0.0.1", "[", "http://["),
]
WRITING = ("/abort_requests", "/reset_prefix_cache", "/v1/completions", "/v1/messages", "/tokenize")


def from_page(async_llm, host, name, origin, path, method="POST", **changes):
    headers = {"host": name} if origin is None else {"host": name, "origin": origin}
    return asked(make_app(async_llm, config(host=host, **changes)), method, path, headers=headers)


@pytest.mark.parametrize(("host", "name", "origin"), FOREIGN)
def test_pages_of_others_may_not_ask(host, name, origin, async_llm):
    """A browser sends a form of theirs here without asking first."""
    for path in WRITING:
        found = from_page(async_llm, host, name, origin, path)
        assert found.status_code == 403, found.text
        assert "--cors-origin" in found.json()["error"]["message"]
    assert from_page(async_llm, host, name, origin, "/health", "GET").status_code == 200


@pytest.mark.parametrize(("host", "name", "origin"), OWN)
def test_pages_of_the_server_and_programs_may_ask(host, name, origin, async_llm):
    assert from_page(async_llm, host, name, origin, "/reset_prefix_cache").json() == {"reset": True}


@pytest.mark.parametrize("origins", [("*",), ("http://b.example", "http://A.example")])
def test_pages_of_origins_that_are_allowed_may_ask(origins, async_llm):
    found = from_page(
        async_llm, "127.0.0.1", "127.0.0.1:8000", "http://a.example", "/reset_prefix_cache", cors_origins=origins
    )
    assert found.json() == {"reset": True}


def test_names_of_a_server_with_keys_are_its_own(async_llm):
    """Who lets a name point here has no key."""
    headers = {"host": "a.example", "origin": "https://a.example", "authorization": "Bearer key"}
    app = make_app(async_llm, config(api_keys=("key",)))
    assert asked(app, "POST", "/reset_prefix_cache", headers=headers).status_code == 200


GETS = (
    "/",
    "/health",
    "/ping",
    "/live",
    "/version",
    "/load",
    "/metrics",
    "/v1/models",
    "/v1/models/tiny",
    "/openapi.json",
)


@pytest.mark.parametrize("path", GETS)
def test_heads_are_those_of_gets(path, client):
    head, get = client.head(path), client.get(path)
    assert (head.status_code, get.status_code) == (200, 200)
    assert head.content == b""
    assert head.headers["content-type"] == get.headers["content-type"] if get.content else True


def test_heads_of_what_is_asked_otherwise_are_refused(client):
    found = client.head("/v1/completions")
    assert (found.status_code, found.content, found.headers["allow"]) == (405, b"", "POST")
    assert client.post("/health").headers["allow"] == "GET, HEAD"
    assert client.head("/nowhere").status_code == 404


def test_server_without_its_engine_is_alive_and_not_ready(async_llm):
    app = make_app(None, config())
    assert asked(app, "GET", "/live").status_code == 200
    for method, path in (("GET", "/health"), ("GET", "/ping"), ("GET", "/v1/models"), ("POST", "/reset_prefix_cache")):
        found = asked(app, method, path)
        assert error(found, 503)["type"] == "ServiceUnavailableError"
        assert int(found.headers["retry-after"]) > 0
    error(asked(app, "POST", "/v1/chat/completions", json=CHAT), 503)
    app.state.service.begin(async_llm)
    assert asked(app, "GET", "/health").status_code == 200


def test_failed_engine_is_not_alive(async_llm, monkeypatch):
    app = make_app(async_llm, config())
    monkeypatch.setattr(type(async_llm), "failure", property(lambda self: RuntimeError("device lost")))
    for path in ("/live", "/health"):
        assert "device lost" in error(asked(app, "GET", path), 503)["message"]


def test_mistakes_of_the_server_are_told_without_a_traceback(async_llm, monkeypatch):
    app = make_app(async_llm, config())

    def fail(service):
        raise KeyError("mistake")

    monkeypatch.setattr("gdnjax.serving.server.status.models", fail)
    found = error(asked(app, "GET", "/v1/models"), 500)
    assert found["type"] == "InternalServerError"
    assert "Traceback" not in found["message"]


def test_connections_end_with_mistakes_of_the_server(async_llm, monkeypatch):
    """uvicorn closes them, so clients have to be told: else they send the next request into the void."""
    app = make_app(async_llm, config())
    monkeypatch.setattr("gdnjax.serving.server.status.models", lambda service: 1 / 0)
    assert asked(app, "GET", "/v1/models").headers["connection"] == "close"


def test_errors_within_a_stream_are_chunks(async_llm, monkeypatch):
    app = make_app(async_llm, config())

    async def fail(self):
        raise RuntimeError("mistake")
        yield

    monkeypatch.setattr("gdnjax.serving.server.service.Run.pieces", fail)
    (chunk,) = events(asked(app, "POST", "/v1/completions", json={**COMPLETION, "stream": True}).text)
    assert chunk["error"]["code"] == 500
    assert "mistake" in chunk["error"]["message"]
    assert app.state.service.load == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"served_model_names": ()}, "served_model_names is empty"),
        ({"served_model_names": ("",)}, "served_model_names must be a tuple of non-empty texts"),
        ({"api_keys": ("a b",)}, "an API key must be of printable ASCII"),
        ({"max_queue": -1}, "max_queue must be an integer of at least 0, got -1"),
        ({"max_body_bytes": 0}, "max_body_bytes must be an integer of at least 1"),
        ({"port": 70000}, "port must be at most 65535, got 70000"),
        ({"request_timeout": 0}, "request_timeout must be a number of seconds above 0, got 0"),
        ({"shutdown_timeout": -1.0}, "shutdown_timeout must be a number of seconds from 0 on, got -1.0"),
        ({"body_timeout": float("nan")}, "body_timeout must be a number of seconds above 0"),
        ({"host": ""}, "host is empty"),
    ],
)
def test_bad_settings_are_named(changes, message, without_type_checks):
    with pytest.raises(ValueError, match=message):
        ServerConfig(**{"served_model_names": ("tiny",), **changes})
