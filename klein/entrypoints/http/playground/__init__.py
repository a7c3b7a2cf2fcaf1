"""The page at `/ui`: static files of this package, served with a strict content security policy."""

import hashlib
from importlib.resources import files
from pathlib import PurePosixPath
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import RedirectResponse, Response

from klein.entrypoints.http.errors import described
from klein.errors import NotFound

router = APIRouter(tags=["page"])

MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".webp": "image/webp",
}
"""What the page is made of, by suffix; nothing else is served."""
POLICY = "; ".join(
    (
        "default-src 'self'",
        "img-src 'self' data: blob:",
        "object-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
FOLDERS = ("", "presets")


def _read() -> dict[str, bytes]:
    """Every file of the page by its path below `/ui/`."""
    root = files(__package__) / "static"
    return {
        str(PurePosixPath(folder, file.name)): file.read_bytes()
        for folder in FOLDERS
        for file in (root / folder).iterdir()
        if PurePosixPath(file.name).suffix in MEDIA_TYPES
    }


FILES = _read()
ETAGS = {name: f'"{hashlib.sha256(data).hexdigest()[:16]}"' for name, data in FILES.items()}


ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/html": {}}},
    413: described()[413],
    503: described()[503],
}


@router.get(
    "/ui",
    summary="A page to draw, edit and compare on",
    response_class=Response,
    responses=ANSWERS,
)
async def page(request: Request) -> Response:
    """The page that draws, edits and compares without a line of code.

    [Open it](ui).
    """
    return _file(request, "index.html")


@router.get("/ui/", include_in_schema=False)
async def page_with_slash() -> Response:
    """To where the page's relative addresses hold."""
    return RedirectResponse("../ui")


@router.get("/ui/{name:path}", include_in_schema=False)
async def asset(request: Request, name: str) -> Response:
    """A file of the page; raises NotFound for any other."""
    return _file(request, name)


def _file(request: Request, name: str) -> Response:
    data = FILES.get(name)
    if data is None:
        raise NotFound(f"the page has no file {name[:80]!r}")
    headers = {**HEADERS, "etag": ETAGS[name]}
    if request.headers.get("if-none-match") == ETAGS[name]:
        return Response(status_code=304, headers=headers)
    return Response(data, headers=headers, media_type=MEDIA_TYPES[PurePosixPath(name).suffix])
