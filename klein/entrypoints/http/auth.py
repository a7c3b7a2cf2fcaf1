"""API keys: who may call, and who may add or delete LoRAs."""

import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from klein.app.account import CALLER
from klein.entrypoints.http.errors import error_response
from klein.errors import BadSetting, Forbidden, KleinError, Unauthorized
from klein.settings import Settings

OPEN_PATHS = frozenset({"/livez", "/readyz", "/healthz", "/ping", "/ui"})
"""What probes and browsers ask before they can have a key."""
OPEN_FOLDER = "/ui/"
"""The files of the page, which asks for the key."""
UPLOADS = "uploads"
MIN_KEY = 16
"""Characters of a key at least."""
_KEY = re.compile(rf"[!-~]{{{MIN_KEY},}}")
"""What every client can put into a header, in the same bytes."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One caller's key, kept as its SHA-256."""

    name: str
    digest: bytes
    uploads: bool


def read_keys(settings: Settings) -> tuple[ApiKey, ...]:
    """The keys of the settings; raises BadSetting for a line that is none."""
    lines: list[tuple[str, str]] = []
    if settings.api_keys:
        entries = enumerate(settings.api_keys.value.split(","), 1)
        lines += [(f"KLEIN_API_KEYS: entry {n}", entry) for n, entry in entries]
    if settings.api_keys_file:
        try:
            text = settings.api_keys_file.expanduser().read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise BadSetting(
                f"KLEIN_API_KEYS_FILE: cannot be read ({type(error).__name__})",
                field="KLEIN_API_KEYS_FILE",
            ) from error
        entries = enumerate(text.splitlines(), 1)
        lines += [
            (f"KLEIN_API_KEYS_FILE: line {n}", entry)
            for n, entry in entries
            if not entry.lstrip().startswith("#")
        ]
    keys = tuple(_key(place, entry.strip()) for place, entry in lines if entry.strip())
    if (settings.api_keys or settings.api_keys_file) and not keys:
        source = "KLEIN_API_KEYS" if settings.api_keys else "KLEIN_API_KEYS_FILE"
        raise BadSetting(f"{source}: there is no key in it", field=source)
    if len({key.name for key in keys}) < len(keys):
        raise BadSetting("KLEIN_API_KEYS: two keys have the same name", field="KLEIN_API_KEYS")
    if len({key.digest for key in keys}) < len(keys):
        raise BadSetting("KLEIN_API_KEYS: two names have the same key", field="KLEIN_API_KEYS")
    return keys


def _key(place: str, entry: str) -> ApiKey:
    """The key of one entry; an error does not show the entry, which may be nothing but a key."""
    name, _, rest = entry.partition(":")
    key, _, right = rest.partition(":")
    if not name or not _KEY.fullmatch(key) or right not in ("", UPLOADS):
        raise BadSetting(
            f"{place}: write NAME:KEY or NAME:KEY:{UPLOADS}, the key of {MIN_KEY} characters or "
            "more, all of them visible ones of ASCII",
            field=place.split(":")[0],
        )
    return ApiKey(name, _digest(key), right == UPLOADS)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


class RequireKey:
    """ASGI middleware: 401 without one of `keys`, 403 for changes that a caller may not make.

    The caller's name is in `request.state.caller` and in CALLER. Without keys everybody may call,
    but pages of other origins may not change LoRAs.
    """

    def __init__(self, app: ASGIApp, keys: Iterable[ApiKey]) -> None:
        self._app = app
        self._keys = tuple(keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through, or answer it."""
        if scope["type"] == "http" and not is_open(scope["path"]):
            try:
                caller = self._caller(scope)
            except KleinError as error:
                await error_response(error)(scope, receive, send)
                return
            scope.setdefault("state", {})["caller"] = caller
            CALLER.set(caller)
        await self._app(scope, receive, send)

    def _caller(self, scope: Scope) -> str | None:
        headers = Headers(scope=scope)
        changes = scope["path"].startswith("/loras") and scope["method"] not in ("GET", "HEAD")
        if not self._keys:
            if changes and _foreign_origin(headers):
                raise Forbidden("pages of other origins may not change LoRAs here")
            return None
        key = self._find(headers)
        if changes and not key.uploads:
            raise Forbidden(f"the key {key.name!r} may not change LoRAs")
        return key.name

    def _find(self, headers: Headers) -> ApiKey:
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = headers.get("x-api-key") or (bearer.strip() if scheme.lower() == "bearer" else "")
        digest = _digest(given)
        found = [key for key in self._keys if hmac.compare_digest(key.digest, digest)]
        if not found:
            raise Unauthorized(
                "send one of this server's keys as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'"
            )
        return found[0]


def is_open(path: str) -> bool:
    """Whether a path needs no key."""
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDER)


def _foreign_origin(headers: Headers) -> bool:
    """Whether a browser says that another site's page sent this."""
    origin = headers.get("origin")
    if origin is not None:
        return origin.partition("://")[2] != headers.get("host")
    return headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
