"""Two servers of one model behind vllm-router: what has the same beginning lands where that is cached."""

import asyncio
import shutil
import socket
import subprocess
import time

import httpx
import pytest

from gdnjax import AsyncLLM
from gdnjax.serving.server.app import make_app
from tests.serving.server.conftest import CONFIG, OPTIONS
from tests.serving.server.sockets import serving

NUM_PREFIXES = 4
ROUNDS = 3
PREFIX_TOKENS = 128
BLOCK_SIZE = 16


@pytest.fixture(scope="module")
def servers(llm, url):
    """Engine and address of each of the two."""
    second = AsyncLLM("tiny", use_tqdm=False, **OPTIONS)
    with serving(make_app(second, CONFIG)) as other:
        yield {url: llm, other: second.llm}
    second.close()


@pytest.fixture
def router(servers, tmp_path):
    """Gives a function that starts one of some policy, and its address."""
    program = shutil.which("vllm-router")
    assert program, 'vllm-router not found: pip install -e ".[test-server]"'
    running = []

    def start(policy, *flags):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            metrics_port = found.getsockname()[1]
        command = [program, "--worker-urls", *servers, "--policy", policy, "--port", str(port), *flags]
        command += ["--prometheus-port", str(metrics_port), "--log-level", "warning"]
        with (tmp_path / "router.log").open("w") as log:
            running.append(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT))
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 60
        while True:
            try:
                if httpx.get(f"{address}/health").status_code == 200:
                    return address
            except httpx.TransportError:
                pass
            assert running[-1].poll() is None, (tmp_path / "router.log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "router.log").read_text()
            time.sleep(0.05)

    yield start
    for process in running:
        process.terminate()
        process.wait(20)


def prefixes():
    """Texts of which no two begin alike, of more than PREFIX_TOKENS tokens each."""
    text = "counts pens and boxes and counts them again and again. " * 8
    return [f"{name} {name} {name} {text}" for name in ("Ann", "Bo", "Cy", "Di")]


def ask_at_once(address, prompts, headers=({},) * NUM_PREFIXES):
    """Usage of a completion of each prompt, all asked for at the same time."""

    async def ask():
        async with httpx.AsyncClient(base_url=address, timeout=300) as client:
            bodies = [{"model": "tiny", "prompt": prompt, "max_tokens": 4, "temperature": 0} for prompt in prompts]
            posts = [client.post("/v1/completions", json=b, headers=h) for b, h in zip(bodies, headers, strict=True)]
            return await asyncio.gather(*posts)

    answers = asyncio.run(ask())
    assert [answer.status_code for answer in answers] == [200] * len(prompts), [answer.text for answer in answers]
    return [answer.json()["usage"] for answer in answers]


def cached(usage):
    return usage["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("policy", "flags", "headers"),
    [
        ("cache_aware", ("--balance-abs-threshold", "64"), [{}] * NUM_PREFIXES),
        ("consistent_hash", (), [{"X-Session-ID": f"session-{number}"} for number in range(NUM_PREFIXES)]),
    ],
)
def test_same_prefix_lands_on_the_same_server(servers, router, policy, flags, headers):
    for address in servers:
        assert httpx.post(f"{address}/reset_prefix_cache", timeout=60).json() == {"reset": True}
    address = router(policy, *flags)
    before = [llm.stats()["num_requests"] for llm in servers.values()]
    assert [cached(usage) for usage in ask_at_once(address, prefixes(), headers)] == [0] * NUM_PREFIXES
    for number in range(ROUNDS):
        # The other server has nothing that begins like it.
        for usage in ask_at_once(address, [f"{prefix}{number}" for prefix in prefixes()], headers):
            assert cached(usage) > usage["prompt_tokens"] - 2 * BLOCK_SIZE
            assert cached(usage) > PREFIX_TOKENS
    asked = [llm.stats()["num_requests"] - count for llm, count in zip(servers.values(), before, strict=True)]
    assert sum(asked) == NUM_PREFIXES * (1 + ROUNDS)
    # Whole prefixes. Sessions may all have come to one server: where they do depends on its address.
    assert all(count % (1 + ROUNDS) == 0 for count in asked)
    if policy == "cache_aware":
        assert min(asked) > 0
