"""What a person does on the page, as few words as possible."""

import base64
import json
import urllib.request
from typing import Any

from playwright.sync_api import Page

PROMPT = "a smiling woman with red hair, green eyes and a blue hat, on a yellow background"
DRAWN = ".drawn"
PATIENCE = 60_000
"""Milliseconds for an image on a slow machine."""


def ask(page: Page, prompt: str = PROMPT, steps: int = 4) -> None:
    """Fill in a prompt and the steps."""
    page.fill("#prompt", prompt)
    if not page.locator("#advanced").evaluate("folded => folded.open"):
        page.click("#advanced > summary")
    page.fill("#field-num_inference_steps", str(steps))


def draw(page: Page) -> None:
    """Draw what is asked for and wait for the image."""
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#cancel:visible")
    wait_for_image(page)


def wait_for_image(page: Page) -> None:
    page.wait_for_selector("#draw:visible", timeout=PATIENCE)
    page.wait_for_selector(DRAWN, timeout=1000)


def fact(page: Page, name: str) -> str:
    """A line of how the image was made."""
    return str(page.locator(f"dt:text-is('{name}') + dd").inner_text())


def add_lora(page: Page, search: str) -> None:
    page.click("#lora-add")
    page.get_by_role("searchbox", name="Search LoRAs").fill(search)
    page.locator(".pick").click()


def newest_job(url: str) -> dict[str, Any]:
    """The last job that the server was asked for."""
    with urllib.request.urlopen(f"{url}/jobs?limit=1") as answer:
        return dict(json.load(answer)["results"][0])


def drop(page: Page, data: bytes, kind: str = "image/png") -> None:
    """Drop a file anywhere on the page."""
    page.evaluate(
        """([text, type]) => {
            const data = new DataTransfer();
            const bytes = Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
            data.items.add(new File([bytes], "x", { type }));
            const drop = new DragEvent("drop", { dataTransfer: data, bubbles: true });
            document.body.dispatchEvent(drop);
        }""",
        [base64.b64encode(data).decode(), kind],
    )
