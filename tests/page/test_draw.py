"""Drawing, watching, cancelling, and finding everything again."""

import asyncio
import io
import json
import re
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import BrowserContext, Page, expect

from klein.entrypoints.runpod import Worker
from klein.output import response
from klein.output.images import read_text
from klein.output.marks import Marks
from klein.settings import Metadata
from tests.page import person
from tests.support import fakes, live


def _downloaded(page: Page, name: str) -> bytes:
    with page.expect_download() as waiting:
        page.get_by_role("button", name=name, exact=True).click()
    return Path(waiting.value.path()).read_bytes()


@pytest.mark.smoke
def test_draw_and_watch(page: Page) -> None:
    """Previews and steps come while it is drawn; the file carries its settings."""
    person.ask(page, steps=28)
    page.keyboard.press("Control+Enter")
    preview = page.get_by_alt_text("Preview")
    preview.wait_for(timeout=person.PATIENCE)
    assert preview.get_attribute("src").startswith("data:image/jpeg;base64,")
    expect(page.locator(".state")).to_contain_text(re.compile(r"step \d+ of 28"))
    person.wait_for_image(page)
    expect(page.locator(person.DRAWN)).to_have_attribute("alt", person.PROMPT)
    seed = person.fact(page, "Seed")
    assert f"Seed: {seed}" in read_text(_downloaded(page, "Download"))


def test_seconds_left_are_told_once_klein_knows(page: Page) -> None:
    person.ask(page, steps=4)
    person.draw(page)
    page.fill("#field-num_inference_steps", "60")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".state")).to_contain_text(re.compile(r"step \d+ of 60, [\d.]+ s left"))
    page.click("#cancel")
    page.wait_for_selector("text=Nothing was kept of it")


@pytest.mark.smoke
def test_cancel(page: Page, url: str) -> None:
    person.ask(page, steps=100)
    page.click("#draw")
    page.wait_for_selector("text=/step \\d+ of 100/")
    page.click("#cancel")
    page.get_by_role("heading", name="Cancelled").wait_for(timeout=10_000)
    assert person.newest_job(url)["status"] == "canceled"
    expect(page.locator("#draw")).to_be_visible()


def test_a_job_that_failed_says_why(page: Page) -> None:
    person.ask(page)
    page.click("#lora-add")
    page.fill("#lora-path", "nobody/nothing")
    page.get_by_role("button", name="Use", exact=True).click()
    page.select_option("#field-lora_error", "fail")
    page.click("#draw")
    page.get_by_role("heading", name="That did not work").wait_for(timeout=person.PATIENCE)
    expect(page.locator("#stage")).to_contain_text("nobody/nothing")
    expect(page.get_by_role("button", name="Try again")).to_be_visible()


@pytest.mark.smoke
def test_a_lora_and_its_report(page: Page) -> None:
    person.ask(page)
    person.add_lora(page, "zib")
    page.locator("#triggers button").click()
    expect(page.locator("#prompt")).to_have_value(f"zibbo, {person.PROMPT}")
    page.get_by_label("Scale of zibbo as a number").fill("-0.5")
    person.draw(page)
    expect(page.locator("#report")).to_contain_text(
        re.compile(r"zibbo at -0.5: 24 of 24 layers, changes the weights by [\d.]+ %")
    )


def test_a_lora_that_is_left_out_is_a_warning(page: Page) -> None:
    person.ask(page)
    page.click("#lora-add")
    page.fill("#lora-path", "missing.safetensors")
    page.keyboard.press("Enter")
    person.draw(page)
    expect(page.locator("#report")).to_contain_text("was left out")


def test_upload_a_lora(page: Page, tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    file.write_bytes((live.ROOT / "klein/nano/loras/pixelkin.safetensors").read_bytes())
    page.click("#lora-add")
    page.set_input_files("#lora-file", file)
    expect(page.locator(".lora .name")).to_have_text("mine")


def test_the_seed(page: Page) -> None:
    """Locked it stays; unlocked it was for once, and the last one can be used again."""
    person.ask(page)
    page.fill("#seed", "7")
    page.click("#seed-lock")
    person.draw(page)
    expect(page.locator("#seed")).to_have_value("7")
    page.click("#seed-lock")
    person.draw(page)
    expect(page.locator("#seed")).to_have_value("")
    page.click("#seed-reuse")
    expect(page.locator("#seed")).to_have_value("7")
    page.click("#seed-dice")
    expect(page.locator("#seed")).not_to_have_value("7")


def test_sizes_and_fields_reach_the_job(page: Page, url: str) -> None:
    person.ask(page)
    page.locator("#ratios").get_by_text("3:2").click()
    page.locator("#presets").get_by_text("Fast preview").click()
    page.select_option("#field-sampler", "ab2")
    page.fill("#negative_prompt", "hat")
    person.draw(page)
    given = person.newest_job(url)["input"]
    assert (given["width"], given["height"]) == (320, 208)
    assert (given["preset"], given["sampler"]) == ("fast_preview", "ab2")
    assert given["negative_prompt"] == "hat"
    assert given["num_inference_steps"] == 4


def test_several_images_of_one_job(page: Page) -> None:
    person.ask(page)
    page.fill("#seed", "5")
    page.fill("#field-num_images", "2")
    person.draw(page)
    page.get_by_role("button", name="Image 2, seed 6").click()
    assert person.fact(page, "Seed") == "6"
    expect(page.locator(".tile-of-gallery")).to_have_count(2)


def test_docs_lead_to_the_page(context: BrowserContext, url: str) -> None:
    page = context.new_page()
    page.goto(f"{url}/docs")
    assert page.get_by_role("link", name="the page").evaluate("link => link.href") == f"{url}/ui"


@pytest.mark.smoke
def test_sweep(page: Page) -> None:
    """One seed, several values, a labelled strip."""
    person.ask(page)
    person.add_lora(page, "zib")
    page.click("#sweep > summary")
    page.fill("#sweep-values", "0.6, 1.2")
    page.click("#sweep-go")
    page.wait_for_selector("#draw:visible", timeout=person.PATIENCE)
    labels = page.locator(".sweep figcaption")
    expect(labels).to_have_text(["zibbo 0.6", "zibbo 1.2"])
    seeds = set()
    for n in (0, 1):
        page.locator(".tile-of-gallery").nth(n).click()
        seeds.add(person.fact(page, "Seed"))
    assert len(seeds) == 1


def test_a_sweep_that_is_cancelled_keeps_what_is_drawn(page: Page) -> None:
    person.ask(page, steps=20)
    page.click("#sweep > summary")
    page.fill("#sweep-values", "1, 2, 3")
    page.click("#sweep-go")
    page.wait_for_selector(".sweep .bare", timeout=person.PATIENCE)
    page.keyboard.press("Escape")
    page.get_by_role("heading", name="Cancelled").wait_for()
    expect(page.locator("#stage")).to_contain_text("1 of 3 were drawn before")
    expect(page.locator(".tile-of-gallery")).to_have_count(1)


@pytest.mark.smoke
def test_reload_finds_the_gallery_and_exports_it(page: Page) -> None:
    person.ask(page)
    person.draw(page)
    person.draw(page)
    page.reload()
    expect(page.locator(".tile-of-gallery")).to_have_count(2)
    with zipfile.ZipFile(io.BytesIO(_downloaded(page, "Export"))) as packed:
        assert packed.testzip() is None
        assert all("Steps: 4" in read_text(packed.read(name)) for name in packed.namelist())
        assert len(packed.namelist()) == 2
    page.locator(".tile-of-gallery").first.click()
    expect(page.locator(person.DRAWN)).to_be_visible()
    page.get_by_role("button", name="Delete from the gallery").click()
    page.get_by_role("button", name="Clear").click()
    page.get_by_role("button", name="Delete them").click()
    expect(page.locator(".tile-of-gallery")).to_have_count(0)


def test_reload_while_drawing_goes_on_watching(page: Page) -> None:
    person.ask(page, steps=20)
    page.click("#draw")
    page.wait_for_selector("text=/step \\d+ of 20/")
    page.reload()
    page.wait_for_selector("text=/step \\d+ of 20/")
    person.wait_for_image(page)
    assert person.fact(page, "Steps").startswith("20,")


def test_compare_two(page: Page) -> None:
    person.ask(page)
    for seed in ("1", "2"):
        page.fill("#seed", seed)
        person.draw(page)
    page.click("#compare")
    page.locator(".tile-of-gallery").nth(1).click()
    page.locator(".tile-of-gallery").nth(0).click()
    slider = page.get_by_label("Where the images divide")
    slider.focus()
    page.keyboard.press("Home")
    assert page.locator(".compared").evaluate("box => box.style.getPropertyValue('--at')") == "0%"
    expect(page.locator(".differences tbody tr")).to_have_text(["Seed12"])


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_drop_an_image_to_get_its_settings_back(page: Page, url: str, format: str) -> None:
    """Also with a prompt whose characters are two units of JavaScript's."""
    prompt = "a man with a green hat 😀, café"
    asked = {"prompt": prompt, "seed": 99, "num_inference_steps": 3, "output_format": format}
    asked |= {
        "loras": [{"path": "zibbo.safetensors", "scale": 0.7}],
        "negative_prompt": "a scarf 😀",
    }
    status, data = live.post(f"{url}/generate", asked)
    assert status == 200
    person.drop(page, data, f"image/{format}")
    page.get_by_role("button", name="Use its settings").click()
    expect(page.locator("#prompt")).to_have_value(prompt)
    expect(page.locator("#negative_prompt")).to_have_value("a scarf 😀")
    expect(page.locator("#seed")).to_have_value("99")
    expect(page.locator("#field-num_inference_steps")).to_have_value("3")
    expect(page.get_by_label("Scale of zibbo as a number")).to_have_value("0.7")


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("metadata", ["minimal", "none"])
def test_drop_an_image_that_has_no_settings(page: Page, format: str, metadata: Metadata) -> None:
    """klein's own is told as such: there is nothing to use, and the form stays as it is."""
    delivery, marks = fakes.delivery(output_format=format), Marks(metadata=metadata)
    (image,) = response.encode(fakes.result(fakes.params()), delivery, marks)
    page.fill("#prompt", "my own")
    person.drop(page, image.data, image.mime_type)
    expect(page.locator("dialog")).to_contain_text("klein drew it, on a server that keeps prompts")
    expect(page.get_by_role("button", name="Use its settings")).to_have_count(0)
    expect(page.locator("#prompt")).to_have_value("my own")


def test_drop_an_image_of_another_program(page: Page) -> None:
    """A1111's text, as it writes it."""
    from PIL.PngImagePlugin import PngInfo

    info, out = PngInfo(), io.BytesIO()
    text = (
        "a cat,\nsitting <lora:zibbo:0.6>\nNegative prompt: dog\n"
        "Steps: 150, Sampler: Euler a, CFG scale: 7, Seed: 0, Size: 512x768, "
        'Lora hashes: "zibbo: ab, x: cd", Version: v1.10'
    )
    info.add_text("parameters", text)
    Image.new("RGB", (64, 64)).save(out, "PNG", pnginfo=info)
    person.drop(page, out.getvalue())
    expect(page.locator("dialog")).to_contain_text("refuse it: num inference steps.")
    page.get_by_role("button", name="Use its settings").click()
    expect(page.locator("#prompt")).to_have_value("a cat,\nsitting")
    expect(page.locator("#seed")).to_have_value("0")
    expect(page.get_by_label("Scale of zibbo as a number")).to_have_value("0.6")
    expect(page.locator("#negative_prompt")).to_have_value("dog")
    expect(page.locator("#field-guidance_scale")).to_have_value("7")
    expect(page.locator("#width")).to_have_value("512")


def test_each_snippet_runs_as_it_is(page: Page, context: BrowserContext, tmp_path: Path) -> None:
    """And draws the same image."""
    person.ask(page, 'it\'s a woman with a "blue" hat')
    page.fill("#seed", "3")
    person.draw(page)
    wanted = Image.open(io.BytesIO(_downloaded(page, "Download"))).tobytes()
    texts = {}
    for name in page.locator("[role=tab]").all_inner_texts():
        page.get_by_role("tab", name=name).click()
        page.click("#copy")
        texts[name] = page.evaluate("navigator.clipboard.readText()")
    assert set(texts) == {"curl", "Python", "OpenAI client", "RunPod"}
    answer = _on_runpod(json.loads(texts.pop("RunPod")))
    assert (answer["parameters"]["seed"], answer["images"][0]["seed"]) == (3, 3)
    for name, text in texts.items():
        argv = ["bash", "-c"] if name == "curl" else [sys.executable, "-c"]
        subprocess.run([*argv, text], cwd=tmp_path, check=True, timeout=100)
        image = tmp_path / "image.png"
        assert Image.open(image).tobytes() == wanted, name
        image.unlink()


def _on_runpod(job: dict[str, Any]) -> dict[str, Any]:
    """What RunPod's worker answers to a job; it draws nothing."""

    async def send(job: dict[str, Any], update: dict[str, Any]) -> None: ...

    generator = fakes.generator(fakes.FakePipeline())
    handle = Worker(generator, send).handle
    with ThreadPoolExecutor() as beside:  # Playwright has an event loop in this thread
        answer = beside.submit(lambda: asyncio.run(handle({"id": "job", **job}))).result()
    generator.stop()
    return answer


def test_bentomls_own_page_leads_to_the_page(context: BrowserContext, url: str) -> None:
    """`/` is BentoML's; /ui is one of its routes there, with a link."""
    page = context.new_page()
    page.goto(url)
    page.get_by_text("A page to draw, edit and compare on").click()
    link = page.get_by_role("link", name="Open it")
    assert link.evaluate("link => link.href") == f"{url}/ui"
