import urllib.request

import pytest

from klein.errors import BadSetting, DeliveryFailed
from klein.output.delivery import Bucket
from klein.settings import Settings
from tests.support import servers

KEYS = {"KLEIN_S3_BUCKET": "pictures", "KLEIN_S3_KEY_ID": "id1", "KLEIN_S3_SECRET": "topsecret"}


def _bucket(endpoint: str) -> Bucket:
    made = Bucket.from_settings(Settings.from_env({**KEYS, "KLEIN_S3_ENDPOINT": endpoint}))
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


def test_a_refusing_bucket_is_named() -> None:
    """The caller learns which bucket, not its keys."""
    with (
        servers.serve(lambda _: (403, {}, b"")) as server,
        pytest.raises(DeliveryFailed, match="'pictures' did not take") as caught,
    ):
        _bucket(server.url).put("k", b"x", "image/png")
    assert "topsecret" not in str(caught.value)


def test_half_a_bucket_stops_the_start() -> None:
    """And none at all is none."""
    assert Bucket.from_settings(Settings.from_env({})) is None
    with pytest.raises(BadSetting, match="KLEIN_S3_ENDPOINT missing"):
        Bucket.from_settings(Settings.from_env(KEYS))
