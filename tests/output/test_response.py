import base64
import hashlib
import io
import json
from dataclasses import fields

import pytest
from PIL import Image

from klein.core import Delivery, GenerationParams, GenerationResult
from klein.errors import InvalidRequest, OutputTooLarge
from klein.output import response
from klein.output.delivery import Bucket
from klein.output.marks import Marks
from klein.settings import Secret
from tests.support import fakes, servers

PNG, MARKS = fakes.delivery(), Marks()


def test_the_answer_is_whole() -> None:
    """Pictures with seed, type and hash; parameters with mu and sigmas; valid strict JSON."""
    answer = response.to_json(
        fakes.result(fakes.params(num_images=2, seed=3), warnings=("told",)),
        fakes.delivery(),
        MARKS,
    )
    assert [image["seed"] for image in answer["images"]] == [3, 4]
    for image in answer["images"]:
        data = base64.b64decode(image["base64"])
        assert image["bytes"] == len(data)
        assert image["sha256"] == hashlib.sha256(data).hexdigest()
        assert image["mime_type"] == "image/png"
        assert Image.open(io.BytesIO(data)).size == (image["width"], image["height"])
    assert answer["parameters"]["num_inference_steps"] == 28
    assert len(answer["parameters"]["sigmas"]) == 28
    assert answer["warnings"] == ["told"]
    assert answer["model"]["name"] == "nano"
    json.dumps(answer, allow_nan=False)


def test_every_parameter_is_in_the_answer() -> None:
    """Drawing and delivery, under the names of a request."""
    params = fakes.params(loras=[{"path": "a.safetensors", "scale": 0.5}])
    told = response.parameters_json(params, PNG)
    names = {f.name for f in (*fields(GenerationParams), *fields(Delivery))}
    assert set(told) == names
    assert told["loras"] == [{"path": "a.safetensors", "scale": 0.5}]


def test_links_need_a_bucket() -> None:
    """Never base64 where a link was asked for."""
    result, delivery = fakes.result(fakes.params()), fakes.delivery(return_type="url")
    with pytest.raises(InvalidRequest, match="KLEIN_S3_ENDPOINT"):
        response.to_json(result, delivery, MARKS)
    with servers.serve(servers.bucket()) as server:
        bucket = Bucket(server.url, "b", Secret("i"), Secret("s"), 60)
        (image,) = response.to_json(result, delivery, MARKS, bucket)["images"]
    assert "base64" not in image
    assert image["url"].startswith(f"{server.url}/b/klein/r1/0.png?")


def _noisy() -> GenerationResult:
    return fakes.result(fakes.params(width=512, height=512), noise=True)


def test_too_large_becomes_smaller_and_says_so() -> None:
    """Without a bucket a result over the limit is written as WebP; nothing is lost in silence."""
    result = _noisy()
    exact = response.to_json_within(result, PNG, MARKS, None, 10e6)
    assert exact["images"][0]["mime_type"] == "image/png"
    assert exact["warnings"] == []
    smaller = response.to_json_within(result, PNG, MARKS, None, 0.9e6)
    assert smaller["images"][0]["mime_type"] == "image/webp"
    assert smaller["parameters"]["output_format"] == "webp"
    assert "over the limit of 0.9 MB" in smaller["warnings"][0]
    assert len(json.dumps(smaller)) < 0.9e6


def test_too_large_goes_into_the_bucket_if_there_is_one() -> None:
    """Exact bytes by link are better than fewer bytes."""
    with servers.serve(servers.bucket()) as server:
        bucket = Bucket(server.url, "b", Secret("i"), Secret("s"), 60)
        answer = response.to_json_within(_noisy(), PNG, MARKS, bucket, 0.3e6)
    assert answer["images"][0]["mime_type"] == "image/png"
    assert "url" in answer["images"][0]
    assert "return_type became 'url'" in answer["warnings"][0]


def test_much_too_large_is_an_error_with_a_way_out() -> None:
    """Better than a job that is COMPLETED without output."""
    with pytest.raises(OutputTooLarge, match="KLEIN_S3_"):
        response.to_json_within(_noisy(), PNG, MARKS, None, 0.12e6)
