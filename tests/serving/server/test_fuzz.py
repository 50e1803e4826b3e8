"""Requests that the OpenAPI document allows, and some that it does not, as schemathesis makes them: no failure of the
server, and answers as the document says.
"""

import functools

import pytest
from hypothesis import HealthCheck, given, settings

from gdnjax.serving.server.app import make_app
from tests.serving.server.conftest import CONFIG

DOCUMENT = make_app(None, CONFIG).openapi()
LABELS = [f"{method.upper()} {path}" for path, methods in DOCUMENT["paths"].items() for method in methods]

GENERATE = ("/v1/completions", "/v1/chat/completions")


@functools.cache
def operations() -> dict:
    """Of schemathesis, which is imported where it is used: runs that leave this file out need not wait for it."""
    import schemathesis

    document = schemathesis.openapi.from_dict(DOCUMENT)
    return {operation.label: operation for operation in (found.ok() for found in document.get_all_operations())}


@pytest.mark.thorough
def test_every_operation_has_its_label():
    assert sorted(operations()) == sorted(LABELS)


@pytest.mark.thorough
@pytest.mark.parametrize("label", LABELS)
def test_no_request_fails_the_server(label, url):
    import schemathesis
    from schemathesis import checks

    operation = operations()[label]
    promised = [
        checks.not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
    ]
    takes_body = bool(list(operation.body))

    @settings(
        max_examples=15 if takes_body else 3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(
        case=operation.as_strategy() | operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)
        if takes_body
        else operation.as_strategy()
    )
    def check(case):
        if operation.path in GENERATE and isinstance(case.body, dict) and isinstance(case.body.get("max_tokens"), int):
            # What is drawn takes long, and says nothing.
            case.body["max_tokens"] = min(case.body["max_tokens"], 2)
        case.call_and_validate(base_url=url, timeout=120, checks=promised)

    check()
