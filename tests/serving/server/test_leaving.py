"""Clients that leave: what they asked for ends, and nothing of it stays."""

import asyncio
import random
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from gdnjax.serving.server.app import make_app
from tests.serving.server.asking import CHAT, answer, error
from tests.serving.server.conftest import serving
from tests.serving.server.test_errors import config

PATHS = ("/v1/completions", "/v1/chat/completions")


def held(llm):
    """Slots, blocks and requests that the engine has."""
    stats = llm.stats()
    return {name: stats[name] for name in ("slots_used", "blocks_used", "num_running", "num_waiting")}


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


NOTHING = {"slots_used": 0, "blocks_used": 0, "num_running": 0, "num_waiting": 0}


@pytest.mark.short_cases("20")
@pytest.mark.parametrize("count", [20, 100])
def test_clients_that_leave_at_random_moments_leave_nothing(count, url, llm, async_llm, client):
    draw = random.Random(5)
    expected = answer(client, "/v1/completions", {"prompt": "Hello", "max_tokens": 8, "temperature": 0})
    ends = []

    async def leave(session, index):
        path, streams = draw.choice(PATHS), draw.random() < 0.7
        body = {"max_tokens": 200, "ignore_eos": True, "stream": streams, "n": draw.choice((1, 1, 2))}
        body |= {"prompt": "Hello " * draw.randint(1, 30)} if path == PATHS[0] else CHAT
        # Some leave after a while, whatever there is by then, and others after so many reads of their stream.
        reads = draw.randint(1, 8) if streams and draw.random() < 0.5 else None
        patience = None if reads else draw.choice((0.01, 0.1, 1.0)) * draw.random()

        async def read():
            async with session.stream("POST", path, json=body) as response:
                count = 0
                async for _ in response.aiter_bytes():
                    count += 1
                    if count == reads:
                        return "left a stream"
            return "was served"

        try:
            ends.append(await asyncio.wait_for(read(), patience))
        except TimeoutError:
            ends.append("left waiting")

    async def everybody():
        limits = httpx.Limits(max_connections=16)
        async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as session:
            await asyncio.gather(*(leave(session, index) for index in range(count)))

    asyncio.run(everybody())
    assert len(ends) == count
    assert {"left a stream", "left waiting"} <= set(ends)
    wait_until(lambda: held(llm) == NOTHING and async_llm.num_unfinished == 0)
    assert client.get("/load").json() == {"server_load": 0}
    # And the server is none the worse for it.
    again = answer(client, "/v1/completions", {"prompt": "Hello", "max_tokens": 8, "temperature": 0})
    assert again["choices"] == expected["choices"]


def test_answers_can_be_ended_by_their_id(client, llm):
    body = {"prompt": "Hello", "max_tokens": 240, "ignore_eos": True, "temperature": 0, "stream": True}
    with client.stream("POST", "/v1/completions", json=body, headers={"x-request-id": "long"}) as response:
        lines = response.iter_lines()
        next(lines)
        assert answer(client, "/abort_requests", {"request_ids": ["other"]}) == {"aborted": []}
        assert answer(client, "/abort_requests", {"request_ids": ["long"]}) == {"aborted": ["cmpl-long"]}
        text = "\n".join(lines)
    assert '"finish_reason":"abort"' in text
    assert text.rstrip().endswith("data: [DONE]")
    wait_until(lambda: held(llm) == NOTHING)


def test_full_queue_is_told_and_empties(async_llm):
    app = make_app(async_llm, config(max_queue=0))
    body = {"prompt": "Hello", "max_tokens": 240, "ignore_eos": True}
    with serving(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        with client.stream("POST", "/v1/completions", json={**body, "n": 4, "stream": True}) as response:
            # Held: dropping it would close the stream.
            lines = response.iter_lines()
            next(lines)
            assert client.get("/load").json() == {"server_load": 4}
            refused = client.post("/v1/completions", json={"prompt": "Hello", "max_tokens": 1})
            assert error(refused, 429)["type"] == "RateLimitError"
            assert 1 <= int(refused.headers["retry-after"]) <= 60
        wait_until(lambda: client.get("/load").json() == {"server_load": 0})
        answer(client, "/v1/completions", {"prompt": "Hello", "max_tokens": 1})
        # What could never have room is no matter of waiting.
        assert error(client.post("/v1/completions", json={**body, "n": 5}), 400)["param"] == "n"


@pytest.mark.parametrize("ends", ["in time", "cut off"])
def test_end_lets_answers_finish_within_its_bound(ends, async_llm, llm):
    app = make_app(async_llm, config(shutdown_timeout=60.0 if ends == "in time" else 0.0, keep_alive_interval=0.05))
    body = {"prompt": "Hello", "max_tokens": 60, "ignore_eos": True, "stream": True, "temperature": 0}
    with serving(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            ender = ThreadPoolExecutor(1).submit(lambda: asyncio.run(app.state.service.end()))
            wait_until(lambda: client.get("/health").status_code == 503)
            error(client.post("/v1/completions", json=body), 503)
            text = "\n".join(lines)
        assert ender.result(60) == (ends == "in time")
        assert text.rstrip().endswith("data: [DONE]")
        assert ('"finish_reason":"length"' in text) == (ends == "in time")
        assert ("the server is shutting down" in text) == (ends == "cut off")
    wait_until(lambda: held(llm) == NOTHING)
