"""Web addresses, read strictly: what is not plainly one is refused before anything is asked."""

import ipaddress
import re
from dataclasses import dataclass
from urllib.parse import parse_qsl, quote, urlencode, urljoin, urlsplit

MAX_LENGTH = 8192
"""Characters; signed addresses have about 2,000."""
HARMLESS = frozenset({"download", "format", "fp", "modelVersionId", "raw", "size", "type"})
"""Parts of a query that choose a file and never hold a token."""
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_PIN = re.compile(r"sha256=[0-9a-fA-F]{64}")
_UNICAST = ipaddress.IPv6Network("2000::/3")
"""What IANA gives out of IPv6 to hosts; all outside of it translates, tunnels or stays local."""
_PROTOCOLS = ipaddress.IPv4Network("192.0.0.0/24")
"""Protocol addresses, which `ipaddress` does not count as private everywhere."""


class BadAddress(ValueError):
    """Why a text is no address that is asked; it shows nothing of the text."""


@dataclass(frozen=True, slots=True)
class Address:
    """An http or https address. `host` is lower-case ASCII without brackets, `target` the path
    and query, percent-encoded."""

    scheme: str
    host: str
    port: int | None
    target: str

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Raises BadAddress for what is no plain address of a host."""
        if len(text) > MAX_LENGTH or not text.isprintable() or " " in text or "\\" in text:
            raise BadAddress("the address is too long, or has characters that no address has")
        try:
            parts = urlsplit(text)
            port = parts.port
        except ValueError as error:
            raise BadAddress("the address is malformed") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadAddress("the address is not one of https")
        if parts.username is not None or parts.password is not None:
            raise BadAddress("addresses with a user name in them are not taken")
        if port == 0:
            raise BadAddress("the address is malformed")
        path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
        query = quote(parts.query, safe="/%:@!$&'()*+,;=~-._?")
        return cls(parts.scheme, _host(parts.hostname), port, f"{path}?{query}" if query else path)

    @property
    def netloc(self) -> str:
        """Host and port, as they stand in an address."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port is None else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.netloc}{self.target}"

    def join(self, location: str) -> "Address":
        """Where a redirect from here to `location` leads; raises BadAddress."""
        try:
            return Address.parse(urljoin(str(self), location).partition("#")[0])
        except ValueError as error:
            raise BadAddress("the address is malformed") from error


def _host(text: str) -> str:
    """A host name in ASCII, or an IP address as written."""
    if "%" in text:
        raise BadAddress("addresses with a zone in them are not taken")
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        pass
    try:
        name = text.encode("idna").decode().lower()
    except UnicodeError as error:
        raise BadAddress("the address has no proper host name") from error
    labels = name.removesuffix(".").split(".")
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise BadAddress("the address has no proper host name")
    return name


def is_public(address: str) -> bool:
    """Whether an IP address lies outside, also when it wraps another one."""
    ip = ipaddress.ip_address(address.split("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is not None:
            return is_public(str(inner))
        if ip not in _UNICAST:
            return False
    elif ip in _PROTOCOLS:
        return False
    return ip.is_global and not ip.is_multicast


def redacted(text: str) -> str:
    """An address as others may see it: host, port, path, what of its query chooses a file and its
    `#sha256=` pin; nothing that can hold a token. Other texts come out as they are."""
    if "://" not in text:
        return text
    address, _, fragment = text.partition("#")
    pin = f"#{fragment}" if _PIN.fullmatch(fragment) else ""
    try:
        parsed = Address.parse(address)
    except BadAddress:
        return f"{address.partition('://')[0][:10]}://…"
    path, _, query = parsed.target.partition("?")
    kept = [
        (k, v) for k, v in parse_qsl(query) if k in HARMLESS and re.fullmatch(r"[\w.-]{1,64}", v)
    ]
    chosen = f"?{urlencode(kept)}" if kept else ""
    return f"{parsed.scheme}://{parsed.netloc}{path}{chosen}{pin}"
