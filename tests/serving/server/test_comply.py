"""llm-comply, a conformance suite that nobody here wrote, against the served embedded model."""

import json
import subprocess
import sys

import pytest

KNOWN = {
    "openai-chat": {
        "chat-image-input": "text only",
        "chat-error-handling": "a request without a model is for the one that there is",
    },
    "anthropic": {"anth-image-input": "text only"},
    "open-responses": {"image-input": "text only"},
}
"""What it wants and does not get -> why."""


@pytest.mark.parametrize("form", KNOWN)
def test_llm_comply_finds_what_is_known(form, url):
    command = [
        sys.executable,
        "-m",
        "llm_comply.cli",
        "--base-url",
        f"{url}/v1",
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
