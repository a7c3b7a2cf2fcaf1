import asyncio
import base64
import hashlib
import hmac
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

import pytest

from klein.app import webhooks
from klein.app.job import JobSpec
from klein.app.jobs import JobRegistry
from klein.app.webhooks import Delivery, Webhooks, secret_bytes
from klein.errors import BadSetting, InvalidRequest
from klein.settings import Settings
from klein.sources.fetch import Fetcher
from tests.support import fakes, servers

KEY = b"0123456789abcdef0123456789abcdef"
SECRET = "whsec_" + base64.b64encode(KEY).decode()
QUICK = (0.0, 0.01, 0.01)


def answering(*statuses: int, **headers: str) -> Callable[[servers.Seen], servers.Answer]:
    """These statuses one after another, the last one for ever."""
    left = list(statuses)
    return lambda _: (left.pop(0) if len(left) > 1 else left[0], headers, b"")


async def ended(delivery: Delivery, within: float = 5) -> None:
    """Wait until it is, for `within` seconds at most."""
    ends = time.monotonic() + within
    while delivery.status == "pending" and time.monotonic() < ends:
        await asyncio.sleep(0.005)


def deliver(
    url: str, own_hosts: frozenset[str], delays: tuple[float, ...] = QUICK, stop_after: float = 5
) -> Delivery:
    """What became of one message."""

    async def scenario() -> Delivery:
        hooks = Webhooks(KEY, Fetcher(own_hosts), delays)
        delivery = hooks.send(None, url, "m1", "completed", {"id": "ä"})
        await ended(delivery, stop_after)
        await hooks.stop()
        return delivery

    return asyncio.run(scenario())


def own(server: servers.Server) -> frozenset[str]:
    return frozenset({urlsplit(server.url).netloc})


def require_signed(seen: servers.Seen) -> None:
    """As Standard Webhooks verifies: HMAC-SHA256 of id, time and body by the decoded secret."""
    stamp = seen.headers["webhook-timestamp"]
    signed = f"{seen.headers['webhook-id']}.{stamp}.".encode() + seen.body
    digest = hmac.new(base64.b64decode(SECRET.removeprefix("whsec_")), signed, hashlib.sha256)
    expected = "v1," + base64.b64encode(digest.digest()).decode()
    assert seen.headers["webhook-signature"] == expected
    assert abs(int(stamp) - time.time()) < 60


def test_the_signature_is_the_standards() -> None:
    """The example of the specification's reference implementations."""
    from klein.app.webhooks import sign

    secret = secret_bytes("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    signature = sign(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_a_job_tells_its_receiver() -> None:
    """Its start and its end, signed, with the job as it was; only what was asked for."""
    with servers.serve(answering(204)) as server:
        host = urlsplit(server.url).netloc
        settings = {"KLEIN_WEBHOOK_SECRET": SECRET, "KLEIN_FETCH_HOSTS": host}
        generator = fakes.generator(fakes.FakePipeline(), **settings)

        async def scenario() -> None:
            registry = JobRegistry(generator, Webhooks.from_settings(generator.settings))
            url = f"{server.url}/hook?token=x"
            both = await registry.create(None, JobSpec(fakes.request(), webhook=url))
            await both.finished.wait()
            end = JobSpec(fakes.request(), webhook=url, webhook_events=("completed",))
            one = await registry.create(None, end)
            await one.finished.wait()
            await registry.stop()
            told = both.as_dict()["webhook"]
            assert (told["url"], len(told["deliveries"])) == (f"{server.url}/hook", 2)
            for job, events in ((both, ["start", "completed"]), (one, ["completed"])):
                assert [row.event for row in job.deliveries] == events
                assert {(row.status, row.attempts) for row in job.deliveries} == {("delivered", 1)}

        asyncio.run(scenario())
        generator.stop()
        assert len(server.seen) == 3
        statuses = []
        for seen in server.seen:
            require_signed(seen)
            assert (seen.method, seen.path) == ("POST", "/hook?token=x")
            statuses.append(json.loads(seen.body)["status"])
        assert sorted(statuses) == ["processing", "succeeded", "succeeded"]
        assert len({seen.headers["webhook-id"] for seen in server.seen}) == 3


def test_deliveries_are_repeated() -> None:
    """With the same id and a fresh signature, until one is taken."""
    with servers.serve(answering(500, 429, 200)) as server:
        delivery = deliver(server.url, own(server))
        assert (delivery.status, delivery.attempts, delivery.error) == ("delivered", 3, None)
        assert {seen.headers["webhook-id"] for seen in server.seen} == {"m1"}
        assert len({seen.body for seen in server.seen}) == 1
        for seen in server.seen:
            require_signed(seen)


@pytest.mark.parametrize(("status", "attempts"), [(500, 3), (410, 1)])
def test_deliveries_are_given_up_aloud(
    status: int, attempts: int, caplog: pytest.LogCaptureFixture
) -> None:
    """After the last attempt, or at once when the receiver is gone: in the job and in the log."""
    with (
        servers.serve(answering(status)) as server,
        caplog.at_level(logging.WARNING, "klein.app.webhooks"),
    ):
        delivery = deliver(server.url, own(server))
        assert (delivery.status, delivery.attempts) == ("failed", attempts)
        assert delivery.error == f"127.0.0.1 answered with status {status}"
        assert len(server.seen) == attempts
        assert "webhook m1 was not delivered" in caplog.text


def test_redirects_are_not_followed() -> None:
    """Wherever they lead."""
    with servers.serve(answering(200)) as inside:
        with servers.serve(answering(307, location=f"{inside.url}/x")) as server:
            delivery = deliver(server.url, own(server) | own(inside))
            assert delivery.error == "127.0.0.1 answered with status 307"
        assert inside.seen == []


def test_hosts_inside_are_refused() -> None:
    """An address at once, when the job is made; a name when it is looked up, without a retry."""
    webhooks = Webhooks(KEY, Fetcher())
    with servers.serve(answering(200)) as server:
        for url in (
            server.url,
            server.url.replace("http", "https"),
            "https://[::1]/",
            "https://169.254.169.254/latest",
            "https://user:password@example.com/",
            "ftp://example.com/",
        ):
            with pytest.raises(InvalidRequest) as caught:
                webhooks.require_allowed(url)
            assert caught.value.field == "webhook"
        port = urlsplit(server.url).port
        delivery = deliver(f"https://localhost:{port}/", frozenset())
        assert (delivery.status, delivery.attempts) == ("failed", 1)
        assert "inside this network" in str(delivery.error)
        assert server.seen == []


def test_a_receiver_that_is_not_there() -> None:
    """Is tried again like one that answers badly."""
    with servers.serve(answering(200)) as server:
        pass
    http_closed = "http://127.0.0.1:9"
    delivery = deliver(http_closed, frozenset({"127.0.0.1:9"}))
    assert (delivery.status, delivery.attempts) == ("failed", 3)
    assert "cannot be reached" in str(delivery.error)
    assert server.seen == []


def test_stopping_gives_up_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a moment; the delivery says so."""
    monkeypatch.setattr("klein.app.webhooks.STOP_SECONDS", 0.05)
    with servers.serve(answering(503)) as server:
        delivery = deliver(server.url, own(server), delays=(0.0, 60.0), stop_after=0.1)
        assert (delivery.status, delivery.attempts) == ("failed", 1)
        assert "klein was stopped" in str(delivery.error)
        assert "503" in str(delivery.error)


@pytest.mark.parametrize(
    "secret", ["0123456789abcdef", "whsec_%%%", "whsec_" + base64.b64encode(b"short").decode()]
)
def test_a_secret_of_another_form_stops_the_start(secret: str) -> None:
    """And is not shown."""
    settings = Settings.from_env({"KLEIN_WEBHOOK_SECRET": secret})
    with pytest.raises(BadSetting, match="KLEIN_WEBHOOK_SECRET") as caught:
        Webhooks.from_settings(settings)
    assert secret not in str(caught.value)


class Slow:
    """Takes whatever is sent, from hosts called `slow` only once `gate` is set."""

    def __init__(self) -> None:
        self.gate = threading.Event()

    def require_allowed(self, url: str) -> None:
        """Everything is."""

    def post(self, url: str, body: bytes, headers: Mapping[str, str], deadline: float) -> int:
        if "slow" in url:
            self.gate.wait(10)
        return 200


def test_a_slow_receiver_holds_up_its_owner_only() -> None:
    """Its messages wait for one another, and too many of them fail at once."""

    async def scenario() -> None:
        sender = Slow()
        hooks = webhooks.Webhooks(KEY, sender, QUICK)
        many = webhooks.MAX_PENDING + 1
        slow = [hooks.send("anna", "https://slow/", f"a{n}", "start", {}) for n in range(many)]
        other = hooks.send("bob", "https://quick/", "b", "start", {})
        await ended(other)
        assert other.status == "delivered"
        assert sum(row.attempts for row in slow) == webhooks.ATTEMPTS_AT_ONCE
        assert [row.status for row in slow if row.status != "pending"] == ["failed"]
        sender.gate.set()
        await ended(slow[0])
        await hooks.stop()

    asyncio.run(scenario())
