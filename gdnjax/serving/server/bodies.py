"""How bodies of requests are read: JSON by the standard, of a depth that everything behind can walk."""

import json
from collections.abc import Callable
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from gdnjax.serving.tool_calls import strict_json

MAX_DEPTH = 128
"""Arrays and objects within one another. Templates, schemas and answers are walked by recursion; llguidance reads no
more either.
"""

CONTAINERS = (dict, list)


class JsonRequest(Request):
    """A request whose body, where it is no JSON, is an error that says why."""

    async def json(self) -> Any:
        """Raises JSONDecodeError, and HTTPException for what Python's parser takes and the standard does not."""
        if not hasattr(self, "_json"):
            body = await self.body()
            try:
                self._json = strict_json(body.decode())
            except json.JSONDecodeError:
                raise
            except ValueError as error:
                raise HTTPException(400, f"the body is not JSON: {error}") from error
            # Each level is a bracket: most bodies have fewer of them.
            if body.count(b"[") + body.count(b"{") > MAX_DEPTH and _is_deeper(self._json, MAX_DEPTH):
                raise HTTPException(400, f"the body is nested too deep; allowed: {MAX_DEPTH} levels")
        return self._json


class Route(APIRoute):
    """A route that reads its bodies so."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        handle = super().get_route_handler()

        async def read(request: Request) -> Any:
            return await handle(JsonRequest(request.scope, request.receive))

        return read


def _is_deeper(value: Any, depth: int) -> bool:
    """Whether there are more levels than `depth`, found without recursion."""
    level = [value] if isinstance(value, CONTAINERS) else []
    for _ in range(depth):
        inner = (each for found in level for each in (found.values() if isinstance(found, dict) else found))
        level = [each for each in inner if isinstance(each, CONTAINERS)]
        if not level:
            return False
    return True
