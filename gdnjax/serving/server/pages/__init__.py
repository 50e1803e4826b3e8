"""The page at `/`, a chat and a view of the engine as plain files, and `/stats`, which the view reads."""

import hashlib
import importlib.resources
import pathlib
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response

MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

HEADERS = {
    # Nothing from another host, nothing inline, no HTML made of text (trusted types), and no frame around it.
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self'",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Asked for again each time, by its ETag: the files of a newer version are not mixed with those of an older one.
    "Cache-Control": "no-cache",
}


def make_router(stats: Callable[[], Awaitable[dict[str, Any]]]) -> APIRouter:
    """Routes of the page and its files, which are read once, and of `/stats`: what `stats` gives, as JSON.

    Files are named one by one; no path of a request reaches the disk.
    """
    router = APIRouter()
    files = _files()

    @router.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        return _answer(request, *files["index.html"])

    @router.get("/page/{name}", include_in_schema=False)
    async def file(name: str, request: Request) -> Response:
        if name not in files:
            raise HTTPException(404, f"the page has no file {name!r}")
        return _answer(request, *files[name])

    @router.get("/stats", summary="What the engine has done and holds: LLM.stats()")
    async def engine_stats() -> dict[str, Any]:
        return await stats()

    return router


def _files() -> dict[str, tuple[bytes, str]]:
    """Content and media type of each file of the page, by name."""
    found = {}
    for file in importlib.resources.files(__name__).iterdir():
        media_type = MEDIA_TYPES.get(pathlib.PurePath(file.name).suffix)
        if media_type:
            found[file.name] = (file.read_bytes(), media_type)
    return found


def _answer(request: Request, content: bytes, media_type: str) -> Response:
    tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    headers = {**HEADERS, "ETag": tag}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=media_type)
