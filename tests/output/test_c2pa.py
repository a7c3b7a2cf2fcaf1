import asyncio
import io
import struct
import zlib
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from klein import pixels
from klein.core import EditInputs, GenerationResult, InputImage, InputInfo
from klein.errors import BadSetting, InternalError
from klein.output import images, response
from klein.output.marks import DRAWN, EDITED, Marks
from klein.request.formats import FORMATS
from klein.settings import Settings
from tests.support import certificates, fakes, marks, pictures, servers

c2pa = pytest.importorskip("c2pa", reason="c2pa-python is not there: pip install 'klein[c2pa]'")

TEXT_ONLY = fakes.result(fakes.params(prompt="my secret"))
LOOK = pictures.noise(64, 64)
PIXELS = (b"IDAT", b"scan", b"VP8 ", b"VP8L")
UNKNOWN_CURVE = """-----BEGIN PRIVATE KEY-----
MEECAQAwEwYHKoZIzj0CAQYIKoEcz1UBgi0EJzAlAgEBBCARERERERERERERERER
EREREREREREREREREREREREREQ==
-----END PRIVATE KEY-----
"""
"""A key of 0x11 again and again, of SM2."""


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Marks:
    made = certificates.chain(tmp_path_factory.mktemp("chain"))
    return Marks.from_settings(Settings.from_env(made.settings))


def _file(result: GenerationResult, signed: Marks, name: str = "png") -> bytes:
    (encoded,) = response.encode(result, fakes.delivery(output_format=name), signed)
    return encoded.data


def _read(data: bytes, name: str = "png") -> tuple[dict[str, Any], set[str]]:
    """The manifest by the library's own reader, and what it finds wrong beside a root that it does
    not know."""
    with c2pa.Reader(FORMATS[name].mime_type, io.BytesIO(data)) as reader:
        failures = reader.get_validation_results()["activeManifest"]["failure"]
        manifest: dict[str, Any] = reader.get_active_manifest()
    return manifest, {each["code"] for each in failures} - {"signingCredential.untrusted"}


def _actions(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    (found,) = (x for x in manifest["assertions"] if x["label"].startswith("c2pa.actions"))
    actions: list[dict[str, Any]] = found["data"]["actions"]
    return actions


def _sent(data: bytes = b"") -> InputImage:
    return InputImage(LOOK, "ab" * 32, 64, 64, data or pictures.data(LOOK))


def _edited(inputs: EditInputs) -> GenerationResult:
    info = InputInfo("ab" * 32, 64, 64, 64, 64, 16)
    params = replace(
        fakes.params(),
        images=(info,) * len(inputs.references),
        init_image=info if inputs.start else None,
    )
    return replace(fakes.result(params), inputs=inputs)


@pytest.mark.parametrize("name", FORMATS)
def test_a_manifest_is_signed_and_says_that_ai_made_it(name: str, signed: Marks) -> None:
    """It holds for the file as it leaves, beside the mark and the parameters."""
    data = _file(TEXT_ONLY, signed, name)
    manifest, failures = _read(data, name)
    assert failures == set()
    assert manifest["claim_generator_info"][0]["name"] == "klein"
    (created,) = _actions(manifest)
    assert created["action"] == "c2pa.created"
    assert created["digitalSourceType"] == marks.PREFIX + DRAWN
    assert "my secret" not in str(manifest)
    assert manifest.get("ingredients", []) == []
    assert marks.source_type(data) == DRAWN
    assert "my secret" in images.read_text(data)


@pytest.mark.parametrize("name", FORMATS)
def test_tampering_is_found(name: str, signed: Marks) -> None:
    """One bit of the picture, or one letter of the mark."""
    data = _file(TEXT_ONLY, signed, name)
    pixels = max((chunk[1] for chunk in marks.chunks(data) if chunk[0] in PIXELS), key=len)
    (xmp,) = (chunk[1] for chunk in marks.chunks(data) if marks.is_xmp(chunk))
    lie = xmp.replace(DRAWN.encode(), b"D" * len(DRAWN))
    darker = pixels[:-9] + bytes([pixels[-9] ^ 1]) + pixels[-8:]
    for before, after in ((pixels, darker), (xmp, lie)):
        assert data.count(before) == 1
        assert _read(data.replace(before, after), name)[1] == {"assertion.dataHash.mismatch"}


def test_references_are_ingredients(signed: Marks) -> None:
    """Each under the name of its field."""
    manifest, failures = _read(_file(_edited(EditInputs((_sent(), _sent()))), signed))
    assert failures == set()
    told = [(each["title"], each["relationship"]) for each in manifest["ingredients"]]
    assert told == [("images.0", "inputTo"), ("images.1", "inputTo")]
    (created,) = _actions(manifest)
    assert (created["action"], len(created["parameters"]["ingredients"])) == ("c2pa.created", 2)
    assert created["digitalSourceType"] == marks.PREFIX + EDITED
    assert "thumbnail" not in str(manifest)


def test_a_picture_that_was_edited_is_the_parent(signed: Marks) -> None:
    """It is opened and edited; its own manifest comes along, and it is named once though it is the
    first reference too."""
    start = _sent(_file(TEXT_ONLY, signed, "webp"))
    mask = pictures.spot(64, 64, (8, 8, 32, 32))
    repaint = pixels.repaint(LOOK, mask, (0, 0, 64, 64), (64, 64), 0)
    inputs = EditInputs((start, _sent()), start, repaint)
    manifest, failures = _read(_file(_edited(inputs), signed))
    assert failures == set()
    told = {each["title"]: each for each in manifest["ingredients"]}
    assert set(told) == {"init_image", "images.0"}
    assert told["init_image"]["relationship"] == "parentOf"
    assert "active_manifest" in told["init_image"]
    opened, edited = _actions(manifest)
    assert (opened["action"], edited["action"]) == ("c2pa.opened", "c2pa.edited")
    assert edited["digitalSourceType"] == marks.PREFIX + EDITED


def test_a_manifest_that_cannot_be_read_costs_no_image(signed: Marks) -> None:
    """A caller's picture with a broken one is named without it."""
    body = b"caBX" + b"garbage" * 10
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    whole = pictures.data(LOOK)
    broken = _sent(whole[:33] + chunk + whole[33:])
    manifest, failures = _read(_file(_edited(EditInputs((), broken)), signed))
    assert failures == set()
    (ingredient,) = manifest["ingredients"]
    assert "cannot be read" in ingredient["description"]


def test_what_a_picture_says_of_itself_can_be_left_out(tmp_path: Path) -> None:
    """Its own manifest may hold a prompt or a name, its XMP an id: with KLEIN_METADATA=minimal or
    none both stay outside, as everything of the caller's does."""
    settings = certificates.chain(tmp_path).settings
    xmp = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/">
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about=""
xmlns:xmpMM="http://ns.adobe.com/xap/1.0/mm/"
xmpMM:InstanceID="xmp.iid:anna"/></rdf:RDF></x:xmpmeta>"""
    for metadata, has in (("full", True), ("minimal", False), ("none", False)):
        made = Marks.from_settings(Settings.from_env(settings | {"KLEIN_METADATA": metadata}))
        start, reference = _file(TEXT_ONLY, made), pictures.data(LOOK, "JPEG", xmp=xmp)
        data = _file(_edited(EditInputs((_sent(reference),), _sent(start))), made)
        manifest, failures = _read(data)
        assert failures == set()
        told = {each["title"]: each for each in manifest["ingredients"]}
        assert set(told) == {"init_image", "images.0"}
        assert ("active_manifest" in told["init_image"]) is has
        assert (b"xmp.iid:anna" in data) is has


def test_no_address_in_a_picture_is_asked(signed: Marks) -> None:
    """A manifest that lies elsewhere stays there."""
    xmp = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/">
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about=""
xmlns:dcterms="http://purl.org/dc/terms/" dcterms:provenance="%s/a.c2pa"/></rdf:RDF></x:xmpmeta>"""
    with servers.serve(lambda _: (200, {}, b"")) as server:
        sent = _sent(pictures.data(LOOK, "JPEG", xmp=xmp % server.url.encode()))
        manifest, failures = _read(_file(_edited(EditInputs((sent,))), signed))
        assert server.seen == []
    assert failures == set()
    assert "manifest.inaccessible" in str(manifest["ingredients"])


def test_a_chain_that_cannot_sign_stops_the_start(tmp_path: Path) -> None:
    """The sentence names the setting, and no key."""
    (tmp_path / "other").mkdir()
    good, other = certificates.chain(tmp_path), certificates.chain(tmp_path / "other")
    old = certificates.chain(tmp_path / "other", ends_in=timedelta(days=-1))
    cert, key = "KLEIN_C2PA_CERT", "KLEIN_C2PA_KEY"
    junk, curve = tmp_path / "junk.pem", tmp_path / "curve.pem"
    junk.write_text("junk")
    curve.write_text(UNKNOWN_CURVE)
    for values, says in (
        ({cert: str(good.cert)}, "set both or none"),
        (good.settings | {cert: "/no/such"}, "KLEIN_C2PA_CERT: /no/such cannot be read"),
        (good.settings | {key: str(junk)}, "KLEIN_C2PA_KEY: not a private key"),
        (good.settings | {key: str(curve)}, "KLEIN_C2PA_KEY: not a private key"),
        (good.settings | {cert: str(junk)}, "cannot sign"),
        (good.settings | {key: str(other.key)}, "cannot sign"),
        (old.settings, "cannot sign"),
    ):
        with pytest.raises(BadSetting, match=says) as caught:
            Marks.from_settings(Settings.from_env(values))
        assert "PRIVATE KEY" not in str(caught.value)


def test_what_cannot_be_signed_does_not_leave(signed: Marks) -> None:
    """Neither unsigned nor with the library's own words."""
    with pytest.raises(InternalError, match="could not be signed"):
        signed.sign(b"no picture", "image/png", TEXT_ONLY)


def test_the_pictures_of_a_request_become_its_ingredients(tmp_path: Path) -> None:
    """From what the caller sends to what the file says, off the GPU's thread."""
    generator = fakes.generator(
        fakes.FakePipeline(),
        **certificates.chain(tmp_path).settings | {"KLEIN_AI_MARK": "off"},
    )
    sent = pictures.text(LOOK, "JPEG")
    request = fakes.request(images=[sent], init_image=sent, output_format="webp")
    generated = asyncio.run(generator.run(request, generator.context()))
    generator.stop()
    (image,) = response.encode(generated.result, generated.delivery, generated.marks)
    manifest, failures = _read(image.data, "webp")
    assert failures == set()
    told = [(each["title"], each["format"]) for each in manifest["ingredients"]]
    assert told == [("init_image", "image/jpeg"), ("images.0", "image/jpeg")]
    assert marks.source_type(image.data) is None
    assert generated.marks.as_dict() == {"ai": False, "c2pa": True, "metadata": "full"}
