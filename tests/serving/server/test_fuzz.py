"""Requests that the OpenAPI document allows, and some that it does not, as schemathesis makes them: no failure of the
server, and answers as the document says.
"""

import warnings

import pytest
import schemathesis
from hypothesis import HealthCheck, settings

document = schemathesis.pytest.from_fixture("api_document")

HEAVY = ("/v1/completions", "/v1/chat/completions")


@pytest.fixture(scope="module")
def api_document(url):
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


@document.parametrize()
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
def test_no_request_fails_the_server(case):
    if isinstance(case.body, dict) and case.operation.path in HEAVY:
        # What is drawn takes long and says nothing.
        case.body = {**case.body, "max_tokens": 2, "stream": bool(case.body.get("stream"))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        case.call_and_validate(
            timeout=120,
            checks=[NOT_A_SERVER_ERROR],
        )
