"""Downloads that are bounded, resumable and cannot reach into the operator's own network.

Every host, at every redirect, is looked up once, checked, and connected to by the address that was
checked, so that a name cannot change its meaning between the check and the use.
"""

import ipaddress
import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpcore

MAX_BYTES = 4 * 1024**3
"""The largest LoRA, wherever it comes from."""
MAX_JSON_BYTES = 2 * 1024**2
MAX_SECONDS = 900.0
MAX_REDIRECTS = 5
TIMEOUTS = {"connect": 15.0, "read": 30.0, "write": 30.0, "pool": 30.0}

OnBytes = Callable[[int, int | None], None]
"""Called with bytes so far and in all (None where the server does not say); may raise to stop."""


class FetchFailed(Exception):
    """One sentence on why nothing was fetched; it names the host, never the whole address.

    `retryable` is for faults of the network, which may be gone the next time.
    """

    def __init__(self, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.retryable = retryable


@dataclass(frozen=True, slots=True)
class Fetcher:
    """Fetches over https. `own_hosts` may also be private and answer over plain http."""

    own_hosts: frozenset[str] = frozenset()

    def json(self, url: str, headers: Mapping[str, str]) -> Any:
        """A small JSON document."""
        with self._open(url, headers) as response:
            body = b""
            for chunk in response.iter_stream():
                body += chunk
                if len(body) > MAX_JSON_BYTES:
                    raise FetchFailed(f"{_host(url)} answered with too much")
        try:
            return json.loads(body)
        except ValueError as error:
            raise FetchFailed(f"{_host(url)} did not answer with JSON") from error

    def read(self, url: str, max_bytes: int, on_bytes: OnBytes) -> bytes:
        """A small file of at most `max_bytes`, in memory; raises FetchFailed."""
        body = bytearray()
        with self._open(url, {}) as response:
            answer = {name.lower(): value for name, value in response.headers}
            length = answer.get(b"content-length", b"")
            total = int(length) if length.isdigit() else None
            for chunk in response.iter_stream():
                body += chunk
                if max(len(body), total or 0) > max_bytes:
                    raise FetchFailed(f"{_host(url)} offers more than {max_bytes} bytes")
                on_bytes(len(body), total)
        return bytes(body)

    def download(self, url: str, part: Path, headers: Mapping[str, str], on_bytes: OnBytes) -> None:
        """Fetch `url` into `part`, going on where an earlier attempt with the same tag stopped.

        Raises FetchFailed; what was received stays in `part` for the next attempt.
        """
        tag_file = part.with_suffix(".tag")
        tag = tag_file.read_text() if tag_file.exists() and part.exists() else ""
        have = part.stat().st_size if tag else 0
        ranged = {"range": f"bytes={have}-", "if-range": tag} if have else {}
        ends = time.monotonic() + MAX_SECONDS
        with self._open(url, {**headers, **ranged}) as response:
            answer = {k.decode().lower(): v.decode("latin-1") for k, v in response.headers}
            resumed = response.status == 206
            have = have if resumed else 0
            length = answer.get("content-length")
            total = have + int(length) if length and length.isdigit() else None
            check_size(_host(url), total or 0)
            tag_file.write_text(answer.get("etag", ""))
            with part.open("ab" if resumed else "wb") as out:
                for chunk in response.iter_stream():
                    out.write(chunk)
                    have += len(chunk)
                    on_bytes(have, total)
                    if have > MAX_BYTES or time.monotonic() > ends:
                        raise FetchFailed(f"{_host(url)} sends too much, or too slowly")
        if total is not None and have != total:
            raise FetchFailed(f"{_host(url)} hung up after {have} of {total} bytes; try again")
        tag_file.unlink(missing_ok=True)

    @contextmanager
    def _open(self, url: str, headers: Mapping[str, str]) -> Iterator[httpcore.Response]:
        """The answer to a GET after at most five checked redirects."""
        with httpcore.ConnectionPool(network_backend=_Guard(self.own_hosts)) as pool:
            sent = {"user-agent": "klein", "accept-encoding": "identity", **headers}
            for _ in range(MAX_REDIRECTS + 1):
                self._check_scheme(url)
                try:
                    with pool.stream(
                        "GET", url, headers=list(sent.items()), extensions={"timeout": TIMEOUTS}
                    ) as response:
                        if response.status in (301, 302, 303, 307, 308):
                            url, sent = _follow(url, response, sent)
                            continue
                        _check_status(url, response.status)
                        yield response
                        return
                except (httpcore.NetworkError, httpcore.TimeoutException) as error:
                    raise FetchFailed(
                        f"{_host(url)} cannot be reached ({type(error).__name__})",
                        retryable=True,
                    ) from error
                except httpcore.ProtocolError as error:
                    raise FetchFailed(
                        f"{_host(url)} broke off; try again", retryable=True
                    ) from error
            raise FetchFailed(f"{_host(url)} redirects without end")

    def require_allowed(self, url: str) -> None:
        """Raise FetchFailed for an address that says itself that it is never asked."""
        self._check_scheme(url)
        parts = urlsplit(url)
        try:
            public = is_public(parts.hostname or "")
        except ValueError:  # a name, which is looked up when it is asked
            return
        if not public and not {parts.hostname, parts.netloc} & self.own_hosts:
            raise FetchFailed(f"{_host(url)} is inside this network and is not asked")

    def post(self, url: str, body: bytes, headers: Mapping[str, str], deadline: float) -> int:
        """The status with which a POST is answered; redirects are not followed.

        `deadline` is on the clock of time.monotonic. Raises FetchFailed for a host that is never
        asked, and ConnectionError for one that cannot be reached.
        """
        self.require_allowed(url)
        left = max(0.1, deadline - time.monotonic())
        timeouts = {name: min(seconds, left) for name, seconds in TIMEOUTS.items()}
        sent = {"user-agent": "klein", **headers}
        try:
            with (
                httpcore.ConnectionPool(network_backend=_Guard(self.own_hosts)) as pool,
                pool.stream(
                    "POST",
                    url,
                    headers=list(sent.items()),
                    content=body,
                    extensions={"timeout": timeouts},
                ) as response,
            ):
                return response.status
        except (
            httpcore.NetworkError,
            httpcore.TimeoutException,
            httpcore.ProtocolError,
        ) as error:
            raise ConnectionError(
                f"{_host(url)} cannot be reached ({type(error).__name__})"
            ) from error

    def _check_scheme(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.username or parts.password:
            raise FetchFailed("addresses with a user name in them are not taken")
        if parts.scheme != "https" and (parts.scheme, parts.netloc in self.own_hosts) != (
            "http",
            True,
        ):
            raise FetchFailed(f"{_host(url)} must be reached over https")


class _Guard(httpcore.NetworkBackend):
    """Connects to checked addresses only."""

    def __init__(self, own_hosts: frozenset[str]) -> None:
        self._own_hosts = own_hosts
        self._real = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Any = None,
    ) -> httpcore.NetworkStream:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise httpcore.ConnectError(f"{host} has no address") from error
        addresses = [str(entry[4][0]) for entry in found]
        if not {host, f"{host}:{port}"} & self._own_hosts:
            for address in addresses:
                if not is_public(address):
                    raise FetchFailed(
                        f"{host} is inside this network and is not asked; "
                        "name it in KLEIN_FETCH_HOSTS if it is yours"
                    )
        return self._real.connect_tcp(addresses[0], port, timeout, local_address, socket_options)


def check_size(who: str, size: int) -> None:
    """Raise FetchFailed when `who` offers a file of more than MAX_BYTES."""
    if size > MAX_BYTES:
        raise FetchFailed(f"{who} offers {size} bytes; {MAX_BYTES} are the most")


def is_public(address: str) -> bool:
    """Whether an IP address lies outside, also when it wraps another one."""
    ip = ipaddress.ip_address(address.split("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is not None:
            return is_public(str(inner))
        if ip in ipaddress.ip_network("64:ff9b::/32"):
            return False
    return ip.is_global and not ip.is_multicast


def _follow(
    url: str, response: httpcore.Response, sent: dict[str, str]
) -> tuple[str, dict[str, str]]:
    location = next((v for k, v in response.headers if k.lower() == b"location"), None)
    if location is None:
        raise FetchFailed(f"{_host(url)} redirects to nowhere")
    target = urljoin(url, location.decode("latin-1"))
    if urlsplit(target).netloc != urlsplit(url).netloc:
        sent = {name: value for name, value in sent.items() if name.lower() != "authorization"}
    return target, sent


def _check_status(url: str, status: int) -> None:
    if status in (401, 403):
        raise FetchFailed(f"{_host(url)} wants a token, or another one (status {status})")
    if status not in (200, 206):
        raise FetchFailed(
            f"{_host(url)} answered with status {status}",
            retryable=status in (408, 429) or status >= 500,
        )


def _host(url: str) -> str:
    return urlsplit(url).hostname or "the address"
