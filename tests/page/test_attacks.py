"""What others write, files that somebody made up, and browsers and networks that fail."""

import io
import json
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect

from tests.page import person
from tests.page.conftest import watched

MARKUP = '"><img src=x onerror=document.title="caught"><script>document.title="caught"</script>'
DENIED = """
const get = () => { throw new DOMException("no", "SecurityError"); };
for (const name of ["localStorage", "sessionStorage"]) Object.defineProperty(window, name, { get });
IDBFactory.prototype.open = get;
"""
FULL = """
const full = () => { throw new DOMException("full", "QuotaExceededError"); };
IDBObjectStore.prototype.put = full;
Storage.prototype.setItem = full;
"""


def _png(text: str = "", size: tuple[int, int] = (64, 64)) -> bytes:
    """A PNG with parameters inside."""
    info, out = PngInfo(), io.BytesIO()
    info.add_text("parameters", text)
    Image.new("RGB", size).save(out, "PNG", pnginfo=info)
    return out.getvalue()


def _kleins(prompt: str, **fields: Any) -> str:
    """Parameters as klein writes them, for any fields."""
    told = {"prompt": len(prompt), "negative_prompt": 0, **fields}
    return f"{prompt}\nNegative prompt: \nSteps: 4, klein: {json.dumps(json.dumps(told))}"


def _chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def _with_chunk(kind: bytes, data: bytes) -> bytes:
    """A small PNG with one more chunk behind its header."""
    png = _png()
    return png[:33] + _chunk(kind, data) + png[33:]


def _vast() -> bytes:
    """The header of a PNG of 30,000 × 30,000, and next to nothing behind it."""
    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    rows = _chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", head) + rows + _chunk(b"IEND", b"")


def _is_unharmed(page: Page) -> None:
    """No markup became elements, none ran, and nothing was asked of the network for it."""
    assert page.title() in ("klein", "drawing … klein")
    assert page.locator("img[src='x'], body script").count() == 0


@pytest.mark.smoke
def test_words_of_others_are_text(page: Page) -> None:
    """A prompt, a LoRA's name and trigger word, a report, an error, a file's settings."""
    row = {"name": MARKUP, "bytes": 1, "base": MARKUP, "rank": 1, "error": None}
    row |= {"trigger_words": [f"{MARKUP} zib"], "defaults": {}}
    page.route("**/loras", lambda route: route.fulfill(json={"loras": [row]}))
    page.reload()
    page.wait_for_selector(".example")
    person.ask(page, MARKUP)
    page.click("#lora-add")
    page.locator(".pick").click()
    expect(page.locator("#triggers")).to_have_text(f"{MARKUP} zib")
    person.draw(page)
    expect(page.locator("#report")).to_contain_text("was left out")
    expect(page.locator("#report")).to_contain_text("onerror")
    expect(page.locator(".prompt-told")).to_have_text(MARKUP)
    person.drop(page, _png(_kleins(MARKUP)))
    expect(page.locator("dialog blockquote")).to_have_text(MARKUP)
    page.get_by_role("button", name="Use its settings").click()
    page.select_option("#field-lora_error", "fail")
    page.click("#lora-add")
    page.locator(".pick").click()
    page.keyboard.press("Control+Enter")
    expect(page.locator(".empty.bad p")).to_contain_text("onerror", timeout=person.PATIENCE)
    _is_unharmed(page)


def test_a_prompt_of_any_script_comes_back_as_it_was(page: Page, url: str) -> None:
    prompt = "קוף עם כובע אדום \u2028 👩‍🚀 \u202eabc\u202c\u0085 “q” \\ \t end"
    person.ask(page, prompt)
    assert page.locator("#prompt").evaluate("box => getComputedStyle(box).direction") == "rtl"
    person.draw(page)
    assert person.newest_job(url)["input"]["prompt"] == prompt
    assert page.locator(".prompt-told").evaluate("told => told.textContent") == prompt


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"no image at all", "image/png"),
        (b"no image at all", "application/zip"),
        (_vast(), "image/png"),
        (_png()[:60], "image/png"),
        (b"\xff\xd8\xff\xe1\x00\x08Exif\x00\x00II*\x00\xff\xff\xff\xff", "image/jpeg"),
        (b"RIFF\xff\xff\xff\xffWEBPEXIF\xff\xff\xff\xff", "image/webp"),
    ],
    ids=["text", "another type", "vast", "cut off", "broken exif", "broken webp"],
)
def test_a_file_that_cannot_be_read_is_refused(page: Page, data: bytes, kind: str) -> None:
    person.drop(page, data, kind)
    expect(page.locator(".toast")).to_contain_text("not an image that this browser can read")
    expect(page.locator("dialog")).to_have_count(0)


def test_a_broken_image_changes_nothing_that_is_edited(page: Page) -> None:
    page.click("#edit > summary")
    page.get_by_label("Image to change").set_input_files(
        {"name": "x.png", "mimeType": "image/png", "buffer": _vast()}
    )
    page.wait_for_selector("text=not an image that this browser can read")
    page.get_by_label("References").set_input_files(
        [{"name": "x.png", "mimeType": "image/png", "buffer": b"no"}] * 5
    )
    person.ask(page)
    person.draw(page)


@pytest.mark.parametrize(
    "data",
    [
        _with_chunk(b"zTXt", b"parameters\0\0" + zlib.compress(bytes(200_000_000), 9)),
        _with_chunk(b"iTXt", b"x" * 3_000_000),
        _png("a " * 1_000_000 + "\nSteps: 4"),
        _png("x\n" + "word " * 50_000 + 'Steps: 4, a: "' * 5000),
    ],
    ids=["bomb", "no keyword", "long text", "long line"],
)
def test_parameters_made_to_exhaust_the_page(page: Page, data: bytes) -> None:
    """The image can still be edited; the page answers within seconds."""
    person.drop(page, data)
    expect(page.get_by_role("button", name="Edit it")).to_be_visible(timeout=5000)


def test_settings_of_a_file_are_held_against_the_schema(page: Page, url: str) -> None:
    """What fits is taken, what would be refused is named, what is unknown is not there."""
    loras = [{"path": "zibbo.safetensors", "scale": 99}, {"path": 5}, None, "x"]
    fields = {"num_inference_steps": 1e9, "seed": 7, "preset": "__proto__", "sampler": {"a": 1}}
    fields |= {"guidance_scale": 3, "loras": loras, "constructor": 1, "return_type": "url"}
    person.drop(page, _png(_kleins("a cat", **fields)))
    told = page.locator("dialog .help")
    expect(told).to_contain_text("num inference steps, preset, sampler, a LoRA’s scale")
    page.get_by_role("button", name="Use its settings").click()
    expect(page.locator("#seed")).to_have_value("7")
    person.ask(page, "a cat", steps=2)
    person.draw(page)
    given = person.newest_job(url)["input"]
    assert [lora["path"] for lora in given["loras"]] == ["zibbo.safetensors"]
    assert (given["guidance_scale"], given["preset"]) == (3, "realistic_character")


def test_a_number_out_of_bounds_is_named_where_it_is(page: Page) -> None:
    """Also when its panel is folded."""
    person.ask(page, steps=1000)
    page.click("#advanced > summary")
    page.click("#draw")
    expect(page.locator(".toast")).to_have_text("Steps: a number from 1 to 100")
    expect(page.locator("#field-num_inference_steps")).to_be_focused()


@pytest.mark.smoke
def test_a_double_click_draws_once(page: Page) -> None:
    person.ask(page, steps=20)
    box = page.locator("#draw").bounding_box()
    assert box
    page.mouse.dblclick(box["x"] + 9, box["y"] + 9, delay=60)
    person.wait_for_image(page)


def test_cancel_while_the_request_is_on_its_way(troubled: Page, url: str) -> None:
    """A slow network: klein has not heard of the job, and must not draw it later."""
    held: list[Route] = []
    troubled.route("**/jobs/*", lambda route: held.append(route))
    person.ask(troubled, "held up", steps=100)
    troubled.click("#draw")
    troubled.wait_for_selector("text=asking klein")
    troubled.wait_for_timeout(600)
    troubled.click("#cancel")
    troubled.get_by_role("heading", name="Cancelled").wait_for(timeout=5000)
    assert len(held) == 1
    assert person.newest_job(url).get("input", {}).get("prompt") != "held up"


def test_a_stream_that_is_cut_goes_on_where_it_was(troubled: Page) -> None:
    asked: list[str | None] = []

    def cut(route: Route) -> None:
        asked.append(route.request.headers.get("last-event-id"))
        if len(asked) == 1:
            event = {"status": "processing", "queue_position": None, "seconds_left": None}
            body = f"id: 2\nevent: status\ndata: {json.dumps(event)}\n\n: half a comm"
            route.fulfill(body=body, content_type="text/event-stream")
        elif len(asked) == 2:
            route.abort()
        else:
            route.continue_()

    troubled.route("**/jobs/*/events", cut)
    person.ask(troubled, steps=20)
    troubled.click("#draw")
    expect(troubled.locator(".state")).to_contain_text("the connection broke off")
    person.wait_for_image(troubled)
    assert asked[:3] == [None, "2", "2"]


def test_a_server_that_was_restarted_says_so(troubled: Page) -> None:
    gone = {"error": {"code": "not_found", "message": "no such job", "field": None}}
    troubled.route("**/jobs/*/events", lambda route: route.fulfill(status=404, json=gone))
    person.ask(troubled)
    troubled.click("#draw")
    troubled.get_by_role("heading", name="klein no longer knows this job").wait_for()
    troubled.unroute_all()
    troubled.get_by_role("button", name="Try again").click()
    person.wait_for_image(troubled)


def test_two_tabs_have_one_gallery(page: Page, context: BrowserContext, url: str) -> None:
    with watched(context) as other:
        other.goto(f"{url}/ui")
        other.wait_for_selector(".example")
        person.ask(page)
        person.draw(page)
        expect(other.locator(".tile-of-gallery")).to_have_count(1)
        person.ask(other)
        person.draw(other)
        expect(page.locator(".tile-of-gallery")).to_have_count(2)
        page.get_by_role("button", name="Clear").click()
        page.get_by_role("button", name="Delete them").click()
        expect(other.locator(".tile-of-gallery")).to_have_count(0)


@pytest.fixture
def troubled(context: BrowserContext, url: str) -> Iterator[Page]:
    """The page, whose console may tell of refused requests."""
    with watched(context, refusals=True) as page:
        page.goto(f"{url}/ui")
        page.wait_for_selector(".example")
        yield page


@pytest.fixture
def crippled(browser: Browser, url: str, request: pytest.FixtureRequest) -> Iterator[Page]:
    context = browser.new_context()
    context.add_init_script(request.param)
    with watched(context) as page:
        page.goto(f"{url}/ui")
        page.wait_for_selector(".example")
        yield page
    context.close()


@pytest.mark.parametrize("crippled", [DENIED], indirect=True)
def test_a_browser_that_keeps_nothing_draws(crippled: Page) -> None:
    expect(crippled.locator(".toast")).to_contain_text("keeps no gallery")
    person.ask(crippled)
    person.draw(crippled)
    crippled.click("#theme-button")
    expect(crippled.locator(".tile-of-gallery")).to_have_count(1)


@pytest.mark.parametrize("crippled", [FULL], indirect=True)
def test_a_browser_that_is_full_draws(crippled: Page) -> None:
    person.ask(crippled)
    person.draw(crippled)
    expect(crippled.locator(".toast")).to_contain_text("export the gallery and clear it")


def test_what_was_written_outlasts_a_reload(page: Page) -> None:
    person.ask(page, "a half-written", steps=9)
    person.add_lora(page, "zib")
    page.fill("#seed", "5")
    page.click("#seed-lock")
    page.reload()
    page.wait_for_selector(".example")
    expect(page.locator("#prompt")).to_have_value("a half-written")
    expect(page.locator("#field-num_inference_steps")).to_have_value("9")
    expect(page.locator(".lora .name")).to_have_text("zibbo")
    expect(page.locator("#seed")).to_have_value("5")
    expect(page.locator("#seed-lock")).to_have_attribute("aria-pressed", "true")


def test_the_key_is_in_no_address(page: Page, url: str) -> None:
    """It goes in a header, to this server only, and into no copied request."""
    addresses: list[str] = []
    page.on("request", lambda asked: addresses.append(asked.url))
    page.click("#key-button")
    page.fill("#key", "secret-secret-secret")
    page.get_by_role("button", name="Use it").click()
    person.ask(page)
    person.draw(page)
    assert addresses
    assert not any("secret" in address for address in [*addresses, page.url])
    assert all(address.startswith((url, "blob:", "data:")) for address in addresses)
    expect(page.locator("#snippet")).not_to_contain_text("secret")
