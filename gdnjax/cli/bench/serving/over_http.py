"""Runs a workload on a server that speaks as OpenAI's does, and notes when what came. Needs nothing but Python.

Each request has a connection of its own. A client of many streams has to be light: what it spends on a chunk it would
measure as the server's time.
"""

import asyncio
import dataclasses
import json
import ssl
import time
import urllib.parse
from collections.abc import AsyncIterator, Sequence
from typing import Any

from gdnjax.cli.bench.serving.driver import Log, Sample, Trace
from gdnjax.cli.bench.serving.workloads import Conversation
from gdnjax.progress import Progress

LIMIT = 1 << 24
"""Bytes of the longest line of an answer."""


class ServerError(RuntimeError):
    """The server has refused a request, or ended it by an error."""


@dataclasses.dataclass(frozen=True)
class Server:
    """Where a server is and what it calls its model. `api_key`: the bearer token that it wants."""

    url: str
    model: str
    temperature: float = 0.0
    api_key: str | None = None

    @property
    def parts(self) -> urllib.parse.SplitResult:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"--url {self.url}: expected http://HOST:PORT or https://HOST:PORT")
        return parts

    async def models(self) -> list[str]:
        """What it calls its models."""
        text = b"".join([data async for data in self._ask("GET", "/v1/models", None)])
        return [item["id"] for item in json.loads(text)["data"]]

    async def complete(self, prompt: Sequence[int], max_tokens: int) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a completion. All output tokens are asked for: EOS is ignored. Raises ServerError."""
        body = {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": self.temperature,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        left = b""
        async for data in self._ask("POST", "/v1/completions", body):
            *events, left = (left + data).split(b"\n\n")
            for event in events:
                if not event.startswith(b"data: ") or event == b"data: [DONE]":
                    continue
                chunk = json.loads(event[len(b"data: ") :])
                if "error" in chunk:
                    raise ServerError(f"the server ended a request: {chunk['error']['message']}")
                yield chunk

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> AsyncIterator[bytes]:
        """The body of an answer, as its pieces come. Raises ServerError where its status is not 200."""
        parts, content = self.parts, b"" if body is None else json.dumps(body).encode()
        secure = ssl.create_default_context() if parts.scheme == "https" else None
        port = parts.port or (443 if secure else 80)
        reader, writer = await asyncio.open_connection(parts.hostname, port, ssl=secure, limit=LIMIT)
        try:
            head = [
                f"{method} {parts.path.rstrip('/')}{path} HTTP/1.1",
                f"Host: {parts.netloc}",
                "Connection: close",
                "Content-Type: application/json",
                f"Content-Length: {len(content)}",
                *([f"Authorization: Bearer {self.api_key}"] if self.api_key else []),
            ]
            writer.write("\r\n".join([*head, "", ""]).encode() + content)
            status = int((await reader.readline()).split()[1])
            headers = {}
            while (line := (await reader.readline()).strip()) != b"":
                name, _, value = line.partition(b":")
                headers[name.strip().lower()] = value.strip()
            pieces = _chunks(reader) if headers.get(b"transfer-encoding") == b"chunked" else _rest(reader)
            if status != 200:
                text = b"".join([piece async for piece in pieces]).decode(errors="replace")
                raise ServerError(f"the server answered {path} with status {status}: {text[:500]}")
            async for piece in pieces:
                yield piece
        finally:
            writer.close()


async def _rest(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    yield await reader.read()


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int((await reader.readline()).split(b";")[0], 16):
        yield (await reader.readexactly(size + 2))[:-2]


async def run(
    server: Server, conversations: Sequence[Conversation], *, description: str = "", progress: bool = False
) -> Log:
    """Serves all conversations, every turn when it is due. Its `stats` are empty: they are the server's own."""
    traces: list[Trace] = []
    # (when, how many more run, how many tokens came).
    events: list[tuple[float, int, int]] = []
    total = sum(len(item.turns) for item in conversations)
    with Progress(description, total, "request", enabled=progress) as bar:
        began = time.monotonic()

        async def converse(index: int, conversation: Conversation) -> None:
            history: list[int] = []
            due = conversation.arrival
            for number, turn in enumerate(conversation.turns):
                await asyncio.sleep(max(0.0, began + due - time.monotonic()))
                history += turn.token_ids
                trace = Trace(index, number, due, len(history))
                traces.append(trace)
                events.append((time.monotonic() - began, 1, 0))
                history += await _turn(server, history, turn.max_tokens, trace, began, events)
                due = time.monotonic() - began
                events.append((due, -1, 0))
                bar.update(1)

        async with asyncio.TaskGroup() as group:
            for index, conversation in enumerate(conversations):
                group.create_task(converse(index, conversation))
        seconds = time.monotonic() - began
    return Log(traces, _samples(events), seconds, {})


async def _turn(
    server: Server, prompt: list[int], max_tokens: int, trace: Trace, began: float, events: list
) -> list[int]:
    """Has one request served; its output tokens. Raises ServerError where they are not those that were asked for."""
    output: list[int] = []
    async for chunk in server.complete(prompt, max_tokens):
        now = time.monotonic() - began
        for choice in chunk["choices"]:
            token_ids = choice.get("token_ids")
            if token_ids is None:
                raise ServerError("the server does not send token ids (return_token_ids); gdnjax and vLLM do")
            if token_ids:
                output += token_ids
                trace.times.append(now)
                events.append((now, 0, len(token_ids)))
        usage = chunk.get("usage")
        if usage is not None:
            trace.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    trace.output_tokens = len(output)
    if len(output) != max_tokens:
        raise ServerError(f"{max_tokens} output tokens were asked for, and {len(output)} came")
    return output


def _samples(events: list[tuple[float, int, int]]) -> list[Sample]:
    running, found = 0, []
    for when, more, tokens in sorted(events):
        # A sample says what ran up to it.
        found.append(Sample(when, running, 0, tokens))
        running += more
    return found
