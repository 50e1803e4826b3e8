"""The page at `/`: a chat with the model, and a view of the engine, which reads `/server_info`. Plain files."""

import functools
import hashlib
import importlib.resources
import pathlib

from fastapi import APIRouter, Request, Response

from gdnjax.serving.server.errors import ApiError

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

router = APIRouter(include_in_schema=False)


@router.get("/")
async def index(request: Request) -> Response:
    """The page."""
    return _answer(request, *files()["index.html"])


@router.get("/pages/{name}")
async def file(name: str, request: Request) -> Response:
    """One of its files."""
    if name not in files():
        raise ApiError(404, f"the page has no file {name!r}")
    return _answer(request, *files()[name])


@functools.cache
def files() -> dict[str, tuple[bytes, str]]:
    """Content and media type of each file of the page, by name. Read once: no request's path reaches the disk."""
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
