"""What stands before the routes: keys, whose pages may ask, and how much of a body is taken, and for how long."""

import asyncio
import hmac
import ipaddress
import urllib.parse

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gdnjax.serving.server.errors import ApiError
from gdnjax.serving.server.events import SHORT_SEND
from gdnjax.serving.server.settings import ServerConfig

OPEN_PATHS = frozenset({"/", "/health", "/ping", "/live", "/version", "/load", "/metrics", "/openapi.json"})
"""What is told without a key: probes, metrics, and what the server is. Nobody's texts are there."""

OPEN_PREFIX = "/pages/"
"""Of the plain files of the page."""


MAX_ORIGIN = 80
"""Characters of an origin that are told."""

READING = ("GET", "HEAD", "OPTIONS")
"""Methods that change nothing. What they answer a browser keeps from pages of other origins by itself."""


class _GoneError(Exception):
    """The client has left before its request was there."""


class Guard:
    """Lets requests with a key in, each with its whole body; answers the others itself."""

    def __init__(self, app: ASGIApp, config: ServerConfig):
        self._app, self._config = app, config
        self._keys = [key.encode() for key in config.api_keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            self._check_key(scope)
            self._check_origin(scope)
            body = await self._body(scope, receive)
        except ApiError as error:
            await error.response(scope["path"])(scope, receive, send)
            return
        except _GoneError:
            return
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        if scope["method"] == "HEAD":
            # What the routes for GET say, of which whoever writes it to the socket leaves out the body.
            scope = {**scope, "method": "GET"}
        scope[SHORT_SEND] = send
        await self._app(scope, replay, send)

    def _check_key(self, scope: Scope) -> None:
        path = scope["path"]
        if not self._keys or path in OPEN_PATHS or path.startswith(OPEN_PREFIX):
            return
        headers = dict(scope["headers"])
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        # Anthropic's clients have a header of their own.
        given = given.strip() if kind.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        # Each to its end: how long it takes tells nothing of a key.
        if not any(hmac.compare_digest(given, key) for key in self._keys):
            raise ApiError(
                401,
                "this server wants an API key: Authorization: Bearer KEY",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _check_origin(self, scope: Scope) -> None:
        """A browser sends what a page of any origin has it send, as long as no header is wanted that it would ask for
        first: it says whose page it is, and nobody else does.
        """
        headers = dict(scope["headers"])
        origin = headers.get(b"origin")
        if origin is None or scope["method"] in READING:
            return
        name, allowed = origin.decode("latin-1").lower(), self._config.cors_origins
        if "*" in allowed or name in (each.lower() for each in allowed):
            return
        if not self._is_own(name, headers.get(b"host", b"").decode("latin-1").lower()):
            raise ApiError(
                403,
                f"a page of {name[:MAX_ORIGIN]!r} may not ask here; allowed: the server's, and those of --cors-origin",
            )

    def _is_own(self, origin: str, host: str) -> bool:
        """Whether a page comes from here. Its scheme does not tell: TLS is a proxy's.

        Without keys, what listens for this machine alone is meant for who uses it, and a name for it can be anybody's
        who lets it point here.
        """
        if origin.partition("://")[2] != host or not host:
            return False
        if self._config.api_keys or not _is_loopback(self._config.host):
            return True
        try:
            name = urllib.parse.urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name == self._config.host.lower() or _is_loopback(name)

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        most = self._config.max_body_bytes
        too_large = ApiError(413, f"the request is too large; allowed: {most} bytes", headers={"Connection": "close"})
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > most:
            raise too_large
        found, size, more = [], 0, True
        try:
            async with asyncio.timeout(self._config.body_timeout):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _GoneError
                    found.append(message.get("body", b""))
                    size += len(found[-1])
                    if size > most:
                        raise too_large
                    more = message.get("more_body", False)
        except TimeoutError as error:
            raise ApiError(
                408,
                f"the request did not arrive within {self._config.body_timeout:g} s",
                headers={"Connection": "close"},
            ) from error
        return b"".join(found)


def _is_loopback(name: str) -> bool:
    """Whether a name or an address is this machine's for itself."""
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")
