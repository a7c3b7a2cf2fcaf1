import socket
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from klein.errors import BadSetting, DeliveryFailed, DeliveryRefused
from klein.output.delivery import CONNECT_SECONDS, READ_SECONDS, TRIES, Bucket
from klein.settings import Settings
from tests.support import servers

KEYS = {"KLEIN_S3_BUCKET": "pictures", "KLEIN_S3_KEY_ID": "id1", "KLEIN_S3_SECRET": "topsecret"}

REGION = {"KLEIN_S3_REGION": "eu-central-1"}


def _bucket(endpoint: str, **settings: str) -> Bucket:
    chosen = {**KEYS, "KLEIN_S3_ENDPOINT": endpoint, **settings}
    made = Bucket.from_settings(Settings.from_env(chosen))
    assert made is not None
    return made


def test_a_picture_goes_in_and_its_link_works() -> None:
    """Real S3 requests: path style, content type, a presigned link that gives the bytes back."""
    with servers.serve(servers.bucket()) as server:
        url = _bucket(server.url).put("klein/r1/0.png", b"picture", "image/png")
        put = server.seen[0]
        assert (put.method, put.path) == ("PUT", "/pictures/klein/r1/0.png")
        assert put.headers["content-type"] == "image/png"
        assert "topsecret" not in str(server.seen)
        assert "X-Amz-Expires=86400" in url
        assert urllib.request.urlopen(url).read() == b"picture"


@pytest.mark.parametrize(
    ("status", "retryable"), [(400, False), (403, False), (404, False), (429, True), (503, True)]
)
def test_a_refusing_bucket_is_named(status: int, retryable: bool) -> None:
    """The caller learns which bucket, whether to try again, and nothing of its keys."""
    with (
        servers.serve(lambda _: (status, {}, b"")) as server,
        pytest.raises(DeliveryFailed, match=f"'pictures' answered {status}") as caught,
    ):
        _bucket(server.url).put("k", b"x", "image/png")
    assert caught.value.retryable == retryable
    assert "topsecret" not in str(caught.value)


SKEWED = b"<Error><Code>RequestTimeTooSkewed</Code><Message>m</Message></Error>"


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ((403, {}, SKEWED), r"answered 403 \(RequestTimeTooSkewed\) to a picture"),
        ((301, {"x-amz-bucket-region": "eu-west-1"}, b"<Error/>"), "answered 301"),
        ((307, {"location": "http://127.0.0.1:1/"}, b""), "redirects without end"),
    ],
    ids=["clock", "moved", "loop"],
)
def test_what_no_other_try_mends_is_a_refusal(answer: servers.Answer, says: str) -> None:
    """A clock that is wrong, a bucket of another region, redirects in a circle."""
    with (
        servers.serve(lambda _: answer) as server,
        pytest.raises(DeliveryRefused, match=says),
    ):
        _bucket(server.url).put("k", b"x", "image/png")


def test_a_connection_that_drops_is_tried_again_at_once() -> None:
    """By a real server, twice in a row, with a picture on its way."""
    dropped: list[float] = []

    def talk(connection: socket.socket) -> None:
        if len(dropped) < 2:
            connection.recv(1000)
            dropped.append(time.monotonic())
            return
        _, _, body = _until(connection, b"\r\n\r\n").partition(b"\r\n\r\n")
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        while len(body) < SIZE:
            body += connection.recv(100_000)
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")

    with servers.raw(talk) as host:
        began = time.monotonic()
        url = _bucket(f"http://{host}").put("k", b"x" * SIZE, "image/png")
        assert time.monotonic() - began < 8
    assert len(dropped) == 2
    assert url.startswith(f"http://{host}/pictures/k?")


SIZE = 1_000_000


def _until(connection: socket.socket, end: bytes) -> bytes:
    data = b""
    while end not in data:
        data += connection.recv(1000)
    return data


def test_a_bucket_that_does_not_answer_is_given_up() -> None:
    """Nothing hangs on the network for longer than a few tries of seconds."""
    assert TRIES * (CONNECT_SECONDS + READ_SECONDS) < 60
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(DeliveryFailed, match="did not take the picture") as caught:
        _bucket(f"http://127.0.0.1:{port}").put("k", b"x", "image/png")
    assert caught.value.retryable


@pytest.mark.parametrize(("settings", "region"), [({}, "auto"), (REGION, "eu-central-1")])
def test_links_are_signed_for_the_region(settings: dict[str, str], region: str) -> None:
    """AWS refuses those of another one."""
    with servers.serve(servers.bucket()) as server:
        url = _bucket(server.url, **settings).put("k", b"x", "image/png")
        (put,) = server.seen
    assert f"%2F{region}%2Fs3%2Faws4_request" in url
    assert f"/{region}/s3/aws4_request" in put.headers["authorization"]


def test_threads_share_a_bucket() -> None:
    """Each picture arrives under its own key."""
    with servers.serve(servers.bucket()) as server:
        bucket = _bucket(server.url)
        with ThreadPoolExecutor(8) as pool:
            urls = list(pool.map(lambda n: bucket.put(f"k{n}", b"%d" % n, "image/png"), range(24)))
        assert [urllib.request.urlopen(url).read() for url in urls] == [
            b"%d" % n for n in range(24)
        ]


def test_half_a_bucket_stops_the_start() -> None:
    """And none at all is none."""
    assert Bucket.from_settings(Settings.from_env({})) is None
    with pytest.raises(BadSetting, match="KLEIN_S3_ENDPOINT missing"):
        Bucket.from_settings(Settings.from_env(KEYS))
