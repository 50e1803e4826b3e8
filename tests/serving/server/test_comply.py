"""llm-comply, a conformance suite that nobody here wrote, against the served embedded model."""

import json
import subprocess
import sys

import pytest

from tests.serving.server.conftest import serving

KNOWN = {
    "openai-chat": {
        "chat-image-input": "text only",
        "chat-error-handling": "a request without a model is for the one that there is",
    },
    "anthropic": {"anth-image-input": "text only"},
    "open-responses": {"image-input": "text only"},
}
"""What it wants and does not get -> why."""


SEED = 1


class Seeded:
    """An application whose requests all have a seed, so that a model as small as this one says the same each time."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        content, more = b"", True
        while more:
            message = await receive()
            content, more = content + message.get("body", b""), message.get("more_body", False)
        content = json.dumps({**json.loads(content), "seed": SEED}).encode()
        headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
        given = [{"type": "http.request", "body": content, "more_body": False}]

        async def again():
            return given.pop() if given else await receive()

        await self.app({**scope, "headers": headers}, again, send)


@pytest.fixture(scope="module")
def seeded(app):
    with serving(Seeded(app)) as url:
        yield url


@pytest.mark.thorough
@pytest.mark.parametrize("form", KNOWN)
def test_llm_comply_finds_what_is_known(form, seeded):
    command = [
        sys.executable,
        "-m",
        "llm_comply.cli",
        "--base-url",
        f"{seeded}/v1",
        "--api-key",
        "none",
        "--model",
        "tiny",
    ]
    found = subprocess.run([*command, "--format", form, "--json", "-v"], capture_output=True, text=True, timeout=280)
    results = json.loads(found.stdout)["results"]
    assert len(results) >= 9
    failed = {each["id"]: each["errors"] for each in results if each["status"] == "failed"}
    assert failed.keys() == KNOWN[form].keys(), failed
