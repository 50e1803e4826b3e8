"""Requests that the OpenAPI document allows, and some that it does not, as schemathesis makes them: no failure of the
server, and answers as the document says.
"""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import checks

from gdnjax.serving.server.app import make_app
from tests.serving.server.conftest import CONFIG

DOCUMENT = schemathesis.openapi.from_dict(make_app(None, CONFIG).openapi())
OPERATIONS = {operation.label: operation for operation in (found.ok() for found in DOCUMENT.get_all_operations())}

GENERATE = ("/v1/completions", "/v1/chat/completions")
CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]


@pytest.mark.thorough
@pytest.mark.parametrize("label", OPERATIONS)
def test_no_request_fails_the_server(label, url):
    operation = OPERATIONS[label]
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
        case.call_and_validate(base_url=url, timeout=120, checks=CHECKS)

    check()
