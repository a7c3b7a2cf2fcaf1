"""Fetching that is bounded in bytes and time, can be resumed, and follows no redirect unchecked."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpcore

from klein.sources.address import Address, BadAddress, is_public
from klein.sources.transport import (
    UNWATCHED,
    Bounds,
    FetchFailed,
    GuardedNetwork,
    Watch,
    ignore_bytes,
    tls,
)

MAX_BYTES = 4 * 1024**3
"""The largest file, wherever it comes from, unless a fetcher is made for larger ones."""
MAX_JSON_BYTES = 2 * 1024**2
MAX_SECONDS = 900.0
"""Of one exchange whose caller names no earlier deadline."""
MAX_REDIRECTS = 5
STEP_BYTES = 8 * 1024**2
"""What is reserved at a time for a file of untold size."""
FREE_PIECES = 10_000
"""Pieces of a body that may be of any size."""
MIN_PIECE = 64
"""Bytes that the pieces beyond those have on average: each costs a processor as much as a full one,
and a server that sends a byte at a time would slow down everything else in the process."""
_ETAG = re.compile(r'"[\x21\x23-\x7e]{0,200}"')
_RETRYABLE = frozenset({408, 425, 429})

Reserve = Callable[[int], None]
"""Called with the bytes that a file will have taken, before they are written; may raise."""


def ignore_size(_: int) -> None:
    """Of a fetch that nobody counts."""


class Refused(FetchFailed):
    """An answer that is no success. `reason` is the Hub's code for it, where there is one."""

    def __init__(self, host: str, status: int, reason: str = "") -> None:
        why = f"{host} answered with status {status}"
        if status in (401, 403):
            why = f"{host} wants a token, or another one (status {status})"
        super().__init__(why, retryable=status in _RETRYABLE or status >= 500)
        self.status = status
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Offer:
    """A file that can be fetched: its address, what is sent along, and what it must be."""

    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    sha256: str | None = None
    size: int | None = None


@dataclass(frozen=True, slots=True)
class _Answer:
    """The head of an answer, and its body in pieces."""

    host: str
    status: int
    headers: Mapping[str, str]
    body: Iterator[bytes]

    @property
    def length(self) -> int | None:
        """Bytes of the body, as told."""
        told = self.headers.get("content-length", "")
        return int(told) if re.fullmatch(r"\d{1,15}", told) else None

    @property
    def span(self) -> tuple[int | None, int | None]:
        """First byte and whole size of a partial answer."""
        hit = re.fullmatch(
            r"bytes (?:(\d{1,15})-\d{1,15}|\*)/(\d{1,15}|\*)", self.headers.get("content-range", "")
        )
        if hit is None:
            return None, None
        return int(hit[1]) if hit[1] else None, int(hit[2]) if hit[2] != "*" else None


@dataclass(frozen=True, slots=True)
class Fetcher:
    """Fetches over https. `own_hosts` may also be private and answer over plain http; no file is
    larger than `max_bytes`, and no exchange takes more than `max_seconds`. `on_received` is called
    with the bytes of bodies as they come, in any thread."""

    own_hosts: frozenset[str] = frozenset()
    max_bytes: int = MAX_BYTES
    max_seconds: float = MAX_SECONDS
    on_received: Callable[[int], None] = ignore_size

    def json(self, url: str, headers: Mapping[str, str], watch: Watch = UNWATCHED) -> Any:
        """A small JSON document; raises FetchFailed."""
        quiet = replace(watch, on_bytes=ignore_bytes)
        body = self.read(url, MAX_JSON_BYTES, quiet, headers)
        try:
            return json.loads(body)
        except (ValueError, RecursionError) as error:
            raise FetchFailed(f"{_parsed(url).host} did not answer with JSON") from error

    def read(
        self,
        url: str,
        max_bytes: int,
        watch: Watch = UNWATCHED,
        headers: Mapping[str, str] | None = None,
    ) -> bytes:
        """A small file, in memory; raises FetchFailed if it has more than `max_bytes`."""
        body = bytearray()
        with self._open("GET", url, headers or {}, watch) as answer:
            for chunk in answer.body:
                body += chunk
                if max(len(body), answer.length or 0) > max_bytes:
                    raise FetchFailed(
                        f"{answer.host} answered with too much, more than {max_bytes} bytes"
                    )
                watch.on_bytes(len(body), answer.length)
        return bytes(body)

    def post(self, url: str, body: bytes, headers: Mapping[str, str], deadline: float) -> int:
        """The status with which a POST is answered; redirects are not followed.

        `deadline` is on the clock of time.monotonic. Raises FetchFailed for a host that is never
        asked, and ConnectionError for one that cannot be reached.
        """
        try:
            with self._open("POST", url, headers, Watch(deadline), body) as answer:
                return answer.status
        except Refused as error:
            return error.status
        except FetchFailed as error:
            if error.retryable:
                raise ConnectionError(str(error)) from error
            raise

    def require_allowed(self, url: str) -> None:
        """Raise FetchFailed for an address that says itself that it is never asked."""
        address = self._checked(_parsed(url))
        try:
            public = is_public(address.host)
        except ValueError:  # a name, which is looked up when it is asked
            return
        if not public and not self._is_own(address):
            raise FetchFailed(f"{address.host} is inside this network and is not asked")

    def download(
        self,
        offer: Offer,
        part: Path,
        watch: Watch = UNWATCHED,
        reserve: Reserve = lambda _: None,
    ) -> None:
        """Fetch a file into `part`, going on where an earlier attempt with the same tag stopped.

        Raises FetchFailed, and OSError as the disk does; what was received stays in `part` for
        the next attempt.
        """
        check_size(_parsed(offer.url).host, offer.size or 0, self.max_bytes)
        for _ in range(2):
            if self._resume(offer, part, watch, reserve):
                part.with_suffix(".tag").unlink(missing_ok=True)
                return
            forget(part)
        raise FetchFailed(f"{_parsed(offer.url).host} gives parts that do not fit together")

    def _resume(self, offer: Offer, part: Path, watch: Watch, reserve: Reserve) -> bool:
        """Whether `part` is whole now; if not, it cannot become so and must begin anew."""
        tag, have = _begun(part)
        ranged = {"range": f"bytes={have}-", "if-range": tag} if have else {}
        with self._open("GET", offer.url, {**offer.headers, **ranged}, watch) as answer:
            start, whole = answer.span
            if answer.status == 416:
                return have > 0 and whole == have
            if answer.status == 206 and (not have or start != have):
                return False
            have = have if answer.status == 206 else 0
            total = None if answer.length is None else have + answer.length
            check_size(answer.host, total or 0, self.max_bytes)
            reserve(total or STEP_BYTES)
            if not have:  # first, so that a kill leaves no tag beside bytes of another file
                part.unlink(missing_ok=True)
            part.with_suffix(".tag").write_text(answer.headers.get("etag", ""))
            have = self._write(answer, part, have, total, watch, reserve)
        if have != (total or have) or have != (offer.size or have):
            raise FetchFailed(
                f"{answer.host} sent {have} of {offer.size or total} bytes", retryable=True
            )
        return True

    def _write(
        self,
        answer: _Answer,
        part: Path,
        have: int,
        total: int | None,
        watch: Watch,
        reserve: Reserve,
    ) -> int:
        """Write the body behind the first `have` bytes of `part`; returns how many there are."""
        reserved = total or STEP_BYTES
        with part.open("ab" if have else "wb") as out:
            for chunk in answer.body:
                have += len(chunk)
                check_size(answer.host, have, self.max_bytes)
                if have > reserved:
                    reserved = have + STEP_BYTES
                    reserve(reserved)
                out.write(chunk)
                watch.on_bytes(have, total)
        return have

    def start(self, offer: Offer, count: int) -> tuple[bytes, int]:
        """The first `count` bytes of a file, or all if it has fewer, and its size; raises
        FetchFailed, also where the server does not tell a size."""
        body = bytearray()
        headers = {**offer.headers, "range": f"bytes=0-{count - 1}"}
        with self._open("GET", offer.url, headers, UNWATCHED) as answer:
            for chunk in answer.body:
                body += chunk
                if len(body) >= count:
                    break
            size = answer.span[1] if answer.status == 206 else answer.length
        size = offer.size or size
        if size is None:
            raise FetchFailed(f"{answer.host} does not say how large the file is")
        check_size(answer.host, size, self.max_bytes)
        return bytes(body[:count]), size

    @contextmanager
    def _open(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        watch: Watch,
        content: bytes | None = None,
    ) -> Iterator[_Answer]:
        """The answer after at most five checked redirects, of a GET; raises FetchFailed."""
        address = _parsed(url)
        sent = {"user-agent": "klein", "accept-encoding": "identity", **headers}
        bounds = Bounds(watch, self.max_seconds)
        network = GuardedNetwork(self.own_hosts, bounds)
        with httpcore.ConnectionPool(tls(), network_backend=network) as pool:
            for _ in range(MAX_REDIRECTS + 1):
                self._checked(address)
                bounds.expect_head()
                with (
                    _mapped(address.host),
                    pool.stream(
                        method, str(address), headers=list(sent.items()), content=content
                    ) as response,
                ):
                    bounds.expect_body()
                    answer = _answer(address.host, response, self.on_received)
                    if method == "GET" and response.status in (301, 302, 303, 307, 308):
                        address, sent = _follow(address, answer, sent)
                        continue
                    if not (200 <= response.status < 300 or _is_late(response.status, sent)):
                        reason = answer.headers.get("x-error-code", "")
                        raise Refused(address.host, response.status, reason)
                    yield answer
                    return
        raise FetchFailed(f"{address.host} redirects without end")

    def _checked(self, address: Address) -> Address:
        if address.scheme != "https" and not (address.scheme == "http" and self._is_own(address)):
            raise FetchFailed(f"{address.host} must be reached over https")
        return address

    def _is_own(self, address: Address) -> bool:
        return bool({address.host, address.netloc} & self.own_hosts)


@contextmanager
def _mapped(host: str) -> Iterator[None]:
    """The errors of the HTTP library as FetchFailed."""
    try:
        yield
    except (httpcore.NetworkError, httpcore.TimeoutException) as error:
        raise FetchFailed(
            f"{host} cannot be reached ({type(error).__name__})", retryable=True
        ) from error
    except httpcore.ProtocolError as error:
        raise FetchFailed(f"{host} broke off; try again", retryable=True) from error


def _answer(host: str, response: httpcore.Response, on_received: Callable[[int], None]) -> _Answer:
    headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in response.headers}
    body = _counted(host, response.iter_stream(), on_received)
    return _Answer(host, response.status, headers, body)


def _counted(
    host: str, chunks: Iterable[bytes], on_received: Callable[[int], None]
) -> Iterator[bytes]:
    size = 0
    for number, chunk in enumerate(chunks):
        size += len(chunk)
        if number >= FREE_PIECES and size < number * MIN_PIECE:
            raise FetchFailed(f"{host} sends its answer in pieces of a few bytes")
        on_received(len(chunk))
        yield chunk


def _is_late(status: int, sent: Mapping[str, str]) -> bool:
    """Whether a server says that there is nothing after the part that is here already."""
    return status == 416 and "range" in sent


def _begun(part: Path) -> tuple[str, int]:
    """The tag and the size of what an earlier attempt left; nothing without a strong tag that can
    be sent back."""
    with suppress(OSError, ValueError):
        tag = part.with_suffix(".tag").read_text()
        if _ETAG.fullmatch(tag):
            return tag, part.stat().st_size
    return "", 0


def forget(part: Path) -> None:
    """Delete what was received of a file."""
    part.unlink(missing_ok=True)
    part.with_suffix(".tag").unlink(missing_ok=True)


def check_size(who: str, size: int, most: int = MAX_BYTES) -> None:
    """Raise FetchFailed when `who` offers a file of more than `most` bytes."""
    if size > most:
        raise FetchFailed(f"{who} offers {size} bytes; {most} are the most")


def _parsed(url: str) -> Address:
    try:
        return Address.parse(url)
    except BadAddress as error:
        raise FetchFailed(str(error)) from error


def _follow(
    address: Address, answer: _Answer, sent: dict[str, str]
) -> tuple[Address, dict[str, str]]:
    location = answer.headers.get("location")
    if location is None:
        raise FetchFailed(f"{address.host} redirects to nowhere")
    try:
        target = address.join(location)
    except BadAddress as error:
        raise FetchFailed(f"{address.host} redirects to what is no address") from error
    if (target.scheme, target.netloc) != (address.scheme, address.netloc):
        sent = {name: value for name, value in sent.items() if name.lower() != "authorization"}
    return target, sent
