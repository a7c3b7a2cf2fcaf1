"""The page's screenshots in docs/images, drawn anew: `python -m tests.page.screenshots`.

`--thumbnails` draws the presets' thumbnails anew too; `--all FOLDER` also leaves every width and
theme in FOLDER, to be looked at.
"""

import argparse
import base64
import io
import json
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from tests.page import person
from tests.page.conftest import CHROMIUM, SWITCHES, server
from tests.support import live

IMAGES = live.ROOT / "docs" / "images"
PRESETS = live.ROOT / "klein/entrypoints/http/playground/static/presets"
PROMPT = "zibbo with a red hat, on a blue background with rays"
SIZES = {"phone": (390, 844), "laptop": (1280, 800), "wide": (1920, 1080)}
THUMBNAIL = 112
QUALITY = 85

THUMBNAILS = {
    "realistic_character": "a smiling woman with long brown hair and a sweater, gray background",
    "portrait_hd": "a woman with long black hair and a red turtleneck, green background",
    "cinematic_full": "a serious man with a brimmed hat and a red scarf, orange background",
    "fast_preview": "a laughing woman with curly red hair and a yellow hoodie, blue background",
    "maximum_quality": "a woman with a white bun, earrings and a purple sweater, yellow background",
    "edit": "a winking man with spiky blonde hair, sunglasses and a red t-shirt, pink background",
    "edit_fast": "a winking man with spiky blue hair, sunglasses, a green t-shirt, pink background",
    "match_training_preview": "a woman with a pink ponytail and a black t-shirt, white background",
    "turbo_lora": "a laughing man with short gray hair and a blue hoodie, green background",
}


def thumbnails(url: str) -> None:
    """One image a preset, as the loaded model draws it."""
    for preset, prompt in THUMBNAILS.items():
        asked = {"prompt": prompt, "preset": preset, "seed": 5, "width": 256, "height": 256}
        status, body = live.post(f"{url}/generate_json", asked)
        assert status == 200, body
        data = base64.b64decode(json.loads(body)["images"][0]["base64"])
        image = Image.open(io.BytesIO(data)).resize(
            (THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS
        )
        image.save(PRESETS / f"{preset}.webp", quality=72, method=6)


def drawn(browser: Browser, url: str, size: tuple[int, int], theme: str) -> Page:
    """The page with an image that a LoRA acted on."""
    width, height = size
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme)
    page.goto(f"{url}/ui")
    page.wait_for_selector(".example")
    page.fill("#prompt", PROMPT)
    person.add_lora(page, "zib")
    page.click("#seed-lock")
    for seed in ("7", "12", "3"):
        page.fill("#seed", seed)
        person.draw(page)
    page.locator(".scroll").evaluate("box => box.scrollTo(0, 0)")
    page.mouse.move(0, 0)
    return page


def paint(page: Page) -> None:
    """Begin to repaint the hat."""
    page.get_by_role("button", name="Edit this").click()
    box = page.locator(".mask canvas").bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] * 0.32, box["y"] + box["height"] * 0.22)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.68, box["y"] + box["height"] * 0.22, steps=8)
    page.mouse.up()


def save(page: Page, path: Path) -> None:
    """A screenshot, small enough for a repository."""
    page.evaluate("document.activeElement.blur()")
    page.wait_for_timeout(300)
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    image.save(path, quality=QUALITY, method=6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--thumbnails", action="store_true")
    parser.add_argument("--all", type=Path, metavar="FOLDER")
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as home,
        server(Path(home)) as (url, _),
        sync_playwright() as playwright,
    ):
        if args.thumbnails:
            thumbnails(url)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        save(drawn(browser, url, (1600, 900), "light"), IMAGES / "page.webp")
        dark = drawn(browser, url, SIZES["wide"], "dark")
        paint(dark)
        save(dark, IMAGES / "page-dark.webp")
        phone = drawn(browser, url, SIZES["phone"], "light")
        phone.locator("#stage").evaluate("stage => stage.scrollIntoView()")
        save(phone, IMAGES / "page-phone.webp")
        for name, size in SIZES.items() if args.all else ():
            for theme in ("light", "dark"):
                page = drawn(browser, url, size, theme)
                page.screenshot(path=args.all / f"{name}-{theme}.png", full_page=True)


if __name__ == "__main__":
    main()
