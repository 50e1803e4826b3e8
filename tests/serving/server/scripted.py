"""A server that answers by script: what the page shows of any answer can be tested without a model that gives it."""

import asyncio
import json
import time

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from gdnjax.serving.server import pages

KEY = "open sesame"

SCRIPT = '<script>document.title = "taken"</script><img src=x onerror="document.title = \'taken\'"> **bold** &amp;'

MARKDOWN = """\
# A heading

Some **bold**, *slanted*, ~~struck~~ and `code`, snake_case_names and 2 * 3 * 4.

1. one
2. two
   - under two
   - again

> quoted

| name | value |
|------|------:|
| a    | `1`   |

```python
print("<b>not bold</b>")
```

[fine](https://example.org/a) and [not](javascript:alert(1))
"""

CALLS = [
    {"index": 0, "id": "call-1", "type": "function", "function": {"name": "weather", "arguments": ""}},
    {"index": 0, "function": {"arguments": '{"city": '}},
    {"index": 0, "function": {"arguments": '"Oslo"}'}},
    {"index": 1, "id": "call-2", "type": "function", "function": {"name": "clock", "arguments": "{}"}},
]

STATS = {
    "num_running": 3,
    "num_waiting": 5,
    "num_preemptions": 1,
    "num_start_overs": 0,
    "num_compilations": 12,
    "slots_used": 3,
    "slots_total": 12,
    "blocks_used": 40,
    "blocks_total": 384,
    "uptime": 3725.0,
    "output_tokens_per_second": 250.0,
    "padding_waste": 0.39,
    "num_requests": 31,
    "num_ended": {"stop": 20, "length": 3},
    "num_turns": 800,
    "num_prompt_tokens": 3200,
    "num_output_tokens": 18000,
    "num_padded_tokens": 9000,
    "num_device_reads": 790,
    "num_decode_rows": 600,
    "num_draft_tokens": 1100,
    "num_accepted_draft_tokens": 880,
    "drafted_at": [600, 500],
    "accepted_at": [540, 340],
    "prefix_cache": {
        "queried_tokens": 6400,
        "hit_tokens": 4000,
        "lost_tokens": 10,
        "evicted_blocks": 7,
        "evicted_states": 2,
        "orphaned_states": 1,
        "kept_states": 30,
        "skipped_states": 0,
        "hit_rate": 0.625,
        "cached_blocks": 120,
        "evictable_blocks": 100,
        "cached_states": 6,
    },
    "host_cache": {"num_blocks": 64, "num_states": 4, "bytes_used": 3 << 20, "bytes_total": 1 << 30},
    "speculation": {
        "num_speculative_tokens": 2,
        "forced_acceptance": False,
        "num_draft_tokens": 1100,
        "num_accepted_draft_tokens": 880,
        "draft_acceptance_rate": 0.8,
        "acceptance_per_position": [0.9, 0.68],
        "mean_acceptance_length": 2.47,
    },
    "seconds": {
        "plan": 0.5,
        "move": 0.0,
        "pack": 0.25,
        "dispatch": 3.0,
        "read": 60.0,
        "commit": 0.5,
        "detokenise": 0.5,
    },
    "time_to_first_token": {"p50": 0.0312, "p90": 0.25, "p99": 1.5},
    "time_per_output_token": {"p50": 0.0041, "p90": 0.006, "p99": 0.009},
}
"""In the form of `LLM.stats()`; test_pages.py compares the names with an engine's."""


INFORMATION = {
    "version": "1.2.3",
    "models": ["scripted"],
    "max_model_len": 4096,
    "engine_config": {"max_num_seqs": 8, "dtype": "float32", "num_kv_blocks": None, "decode_buckets": [1, 8]},
    "server_config": {"max_queue": 1024, "api_keys": 0},
}
"""In the form of GET /server_info; what the page looks at, and some of the rest."""


def pieces_of(text, size=7):
    return [{"content": text[i : i + size]} for i in range(0, len(text), size)]


class Scripted:
    """The app, what it was asked, and whether somebody left while it answered."""

    def __init__(self, key=None, stats=None):
        self.key = key
        self.is_ready = True
        self.requests = []
        self.left = 0
        self.stats = stats or {}
        self.app = FastAPI()
        self.app.include_router(pages.router)
        self.app.middleware("http")(self._guard)
        self.app.get("/v1/models")(self._models)
        self.app.get("/server_info")(self._information)
        self.app.post("/v1/chat/completions")(self._chat)

    async def _information(self):
        return {**INFORMATION, "stats": self.stats}

    async def _guard(self, request: Request, call_next):
        path = request.url.path
        is_open = self.key is None or path == "/" or path.startswith("/pages/")
        if is_open or request.headers.get("authorization") == f"Bearer {self.key}":
            return await call_next(request)
        return JSONResponse({"error": {"message": "a key is wanted", "type": "AuthenticationError", "code": 401}}, 401)

    async def _models(self):
        if not self.is_ready:
            return JSONResponse({"error": {"message": "the server is starting", "code": 503}}, 503)
        return {"object": "list", "data": [{"id": "scripted", "object": "model", "max_model_len": 4096}]}

    async def _chat(self, request: Request):
        body = await request.json()
        self.requests.append(body)
        if body["messages"][-1]["content"] == "refuse":
            error = {"message": "max_tokens is <too> large", "type": "BadRequestError", "param": None, "code": 400}
            return JSONResponse({"error": error}, 400)
        return StreamingResponse(self._stream(body), media_type="text/event-stream")

    async def _stream(self, body):
        deltas, reason = self._deltas(body)
        count = 0

        def chunk(choices):
            usage = {"prompt_tokens": 12, "completion_tokens": count, "total_tokens": 12 + count}
            usage["prompt_tokens_details"] = {"cached_tokens": 8}
            found = {"id": "1", "object": "chat.completion.chunk", "created": int(time.time()), "model": "scripted"}
            return f"data: {json.dumps({**found, 'choices': choices, 'usage': usage})}\n\n"

        try:
            yield ": a comment, as servers send to keep a connection open\n\n"
            yield chunk([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}])
            for delta in deltas:
                if delta == "error":
                    yield 'data: {"error": {"message": "the engine has failed", "code": 500}}\n\ndata: [DONE]\n\n'
                    return
                if delta == "cut":
                    return
                count += 1
                yield chunk([{"index": 0, "delta": delta, "finish_reason": None}])
                await asyncio.sleep(0.01)
            yield chunk([{"index": 0, "delta": {}, "finish_reason": reason}])
            yield chunk([])
            yield "data: [DONE]\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            self.left += 1
            raise

    def _deltas(self, body):
        last = body["messages"][-1]
        if last["role"] == "tool":
            results = [message["content"] for message in body["messages"] if message["role"] == "tool"]
            return pieces_of(f"The results are {' and '.join(results)}."), "stop"
        match last["content"]:
            case "script":
                return pieces_of(SCRIPT), "stop"
            case "markdown":
                return pieces_of(MARKDOWN), "stop"
            case "think":
                thoughts = [
                    {"reasoning_content": piece, "reasoning": piece} for piece in ("I wonder", " <b>whether</b>")
                ]
                return [*thoughts, *pieces_of("Yes.")], "stop"
            case "call":
                return [{"tool_calls": [call]} for call in CALLS], "tool_calls"
            case "for ever":
                return ({"content": f"{number} "} for number in range(10**9)), "stop"
            case "long":
                return pieces_of("word " * 20, 5), "length"
            case "many lines":
                return pieces_of("\n\n".join(f"line {number}" for number in range(100)), 50), "stop"
            case "break":
                return [*pieces_of("So far"), "error"], "stop"
            case "cut":
                return [*pieces_of("So far"), "cut"], "stop"
        return pieces_of(f"You said: {last['content']}"), "stop"
