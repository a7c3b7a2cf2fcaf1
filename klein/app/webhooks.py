"""Webhooks: signed as Standard Webhooks says, retried with backoff, never on the event loop.

https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

import asyncio
import base64
import binascii
import hashlib
import hmac
import json
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

from klein.errors import BadSetting, InvalidRequest
from klein.settings import Settings
from klein.sources.fetch import Fetcher
from klein.sources.transport import FetchFailed

log = logging.getLogger(__name__)

DELAYS = (0.0, 2.0, 10.0, 60.0, 300.0)
"""Seconds before each attempt; there are no more than these."""
ATTEMPT_SECONDS = 15.0
THREADS = 8
ATTEMPTS_AT_ONCE = 2
"""Of one owner's messages, so that nobody's slow receiver holds up everybody's."""
MAX_PENDING = 1000
"""Messages of one owner that are on their way; more fail at once."""
STOP_SECONDS = 3.0
"""How long deliveries may still take when klein stops."""
PREFIX = "whsec_"
GONE = 410
"""The status by which a receiver says that it wants no more."""


class Sender(Protocol):
    """What webhooks need of the fetcher."""

    def require_allowed(self, url: str) -> None:
        """Raise FetchFailed for an address that is never asked."""
        ...

    def post(self, url: str, body: bytes, headers: Mapping[str, str], deadline: float) -> int:
        """The answer's status; raises FetchFailed for a host that is never asked, and
        ConnectionError for one that cannot be reached before `deadline`."""
        ...


@dataclass(slots=True)
class Delivery:
    """One message on its way, as the job tells it; `error` is why the last attempt failed."""

    event: str
    status: Literal["pending", "delivered", "failed"] = "pending"
    attempts: int = 0
    error: str | None = None


class Webhooks:
    """Delivers messages, a few at a time."""

    def __init__(self, secret: bytes, sender: Sender, delays: Sequence[float] = DELAYS) -> None:
        self._secret = secret
        self._sender = sender
        self._delays = delays
        self._threads = ThreadPoolExecutor(THREADS, "klein-webhook")
        self._tasks: set[asyncio.Task[None]] = set()
        self._pending = Counter[str | None]()
        self._turns: defaultdict[str | None, asyncio.Semaphore] = defaultdict(
            lambda: asyncio.Semaphore(ATTEMPTS_AT_ONCE)
        )

    @classmethod
    def from_settings(cls, settings: Settings) -> "Webhooks | None":
        """None without a secret; raises BadSetting for one that is not of the standard's form."""
        if settings.webhook_secret is None:
            return None
        secret = secret_bytes(settings.webhook_secret.value)
        return cls(secret, Fetcher(settings.fetch_hosts))

    def require_allowed(self, url: str) -> None:
        """Raise InvalidRequest for an address that is never asked."""
        try:
            self._sender.require_allowed(url)
        except FetchFailed as error:
            raise InvalidRequest(f"webhook: {error}", field="webhook") from error

    def send(
        self, owner: str | None, url: str, id: str, event: str, payload: dict[str, Any]
    ) -> Delivery:
        """Start to deliver `payload`; what becomes of it is seen in the Delivery. A receiver knows
        a message that it is sent twice by `id`."""
        delivery = Delivery(event)
        if self._pending[owner] >= MAX_PENDING:
            delivery.status = "failed"
            delivery.error = f"{MAX_PENDING} messages were on their way already"
            return delivery
        body = json.dumps(payload).encode()
        self._pending[owner] += 1
        task = asyncio.create_task(self._deliver(owner, url, id, body, delivery))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return delivery

    async def stop(self) -> None:
        """Give what is on its way a moment, then give it up."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=STOP_SECONDS)
        left = list(self._tasks)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _deliver(
        self, owner: str | None, url: str, id: str, body: bytes, delivery: Delivery
    ) -> None:
        try:
            for delay in self._delays:
                await asyncio.sleep(delay)
                async with self._turns[owner]:
                    over = await self._attempt(url, id, body, delivery)
                if over:
                    break
        except asyncio.CancelledError:
            delivery.error = f"klein was stopped; before that: {delivery.error or 'no answer'}"
            raise
        finally:
            self._pending[owner] -= 1
            if delivery.status != "delivered":
                delivery.status = "failed"
                log.warning("webhook %s was not delivered: %s", id, delivery.error)

    async def _attempt(self, url: str, id: str, body: bytes, delivery: Delivery) -> bool:
        """Try once; whether there is nothing more to try."""
        delivery.attempts += 1
        loop = asyncio.get_running_loop()
        try:
            status = await loop.run_in_executor(self._threads, self._post, url, id, body)
        except FetchFailed as error:
            delivery.error = str(error)
            return True
        except ConnectionError as error:
            delivery.error = str(error)
            return False
        except Exception as error:
            log.exception("webhook %s", id)
            delivery.error = f"{type(error).__name__} inside klein: see its log"
            return True
        if 200 <= status < 300:
            delivery.status, delivery.error = "delivered", None
            return True
        delivery.error = f"{urlsplit(url).hostname} answered with status {status}"
        return status == GONE

    def _post(self, url: str, id: str, body: bytes) -> int:
        timestamp = int(time.time())
        headers = {
            "content-type": "application/json",
            "webhook-id": id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": sign(self._secret, id, timestamp, body),
        }
        return self._sender.post(url, body, headers, time.monotonic() + ATTEMPT_SECONDS)


def sign(secret: bytes, id: str, timestamp: int, body: bytes) -> str:
    """The value of `webhook-signature`."""
    signed = b"%s.%d.%s" % (id.encode(), timestamp, body)
    return "v1," + base64.b64encode(hmac.digest(secret, signed, hashlib.sha256)).decode()


def secret_bytes(text: str) -> bytes:
    """The key inside `whsec_…`; raises BadSetting, which does not show it."""
    try:
        secret = base64.b64decode(text.removeprefix(PREFIX), validate=True)
    except binascii.Error:
        secret = b""
    if not text.startswith(PREFIX) or not 24 <= len(secret) <= 64:
        raise BadSetting(
            f"KLEIN_WEBHOOK_SECRET: must be {PREFIX} and base64 of 24 to 64 bytes, such as "
            f"`echo {PREFIX}$(openssl rand -base64 32)` makes",
            field="KLEIN_WEBHOOK_SECRET",
        )
    return secret
