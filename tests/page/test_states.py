"""A server with a key and a short queue, from its start to its end."""

import json
import os
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.page import person
from tests.page.conftest import server, watched

KEY = "0123456789abcdef"


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, object]]:
    """Alive, not yet ready."""
    home = tmp_path_factory.mktemp("keyed")
    with server(home, wait=False, KLEIN_API_KEYS=f"anna:{KEY}", KLEIN_QUEUE_SIZE="1") as running:
        yield running


@pytest.fixture(scope="module")
def page(browser: Browser, keyed: tuple[str, object]) -> Iterator[Page]:
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    with watched(context, refusals=True) as page:
        page.goto(f"{keyed[0]}/ui")
        yield page
    context.close()


def test_loading_then_a_key_is_wanted(page: Page) -> None:
    expect(page.locator("#banner")).to_contain_text("The model is loading")
    expect(page.get_by_role("dialog")).to_contain_text("Key", timeout=person.PATIENCE)
    page.fill("#key", "wrong")
    page.get_by_role("button", name="Use it").click()
    expect(page.get_by_role("dialog")).to_contain_text("not one of this server’s")
    page.fill("#key", KEY)
    page.get_by_role("button", name="Use it").click()
    page.wait_for_selector(".example")


def test_draws_with_the_key(page: Page, tmp_path: Path) -> None:
    """And so does the copied request, which reads it from the environment."""
    person.ask(page)
    person.draw(page)
    expect(page.locator("#snippet")).to_contain_text("$API_KEY")
    expect(page.locator("#snippet")).not_to_contain_text(KEY)
    command = page.locator("#snippet").inner_text()
    env = os.environ | {"API_KEY": KEY}
    subprocess.run(["bash", "-c", command], cwd=tmp_path, env=env, check=True, timeout=100)
    assert (tmp_path / "image.png").stat().st_size > 1000


def test_queue_full(page: Page, keyed: tuple[str, object]) -> None:
    jobs = [_job(keyed[0]) for _ in range(2)]
    page.click("#draw")
    page.get_by_role("heading", name="The queue is full").wait_for()
    for job in jobs:
        _post(f"{keyed[0]}/jobs/{job}/cancel", {})
    page.get_by_role("button", name="Try again").click()
    person.wait_for_image(page)


def test_the_place_in_the_queue(page: Page, keyed: tuple[str, object]) -> None:
    job = _job(keyed[0])
    page.click("#draw")
    page.wait_for_selector("text=in the queue: next")
    _post(f"{keyed[0]}/jobs/{job}/cancel", {})
    person.wait_for_image(page)


def test_offline(page: Page, keyed: tuple[str, object]) -> None:
    """The last one: the server ends."""
    keyed[1].terminate()  # type: ignore[attr-defined]
    keyed[1].wait(30)  # type: ignore[attr-defined]
    page.click("#draw")
    page.get_by_role("heading", name="klein does not answer").wait_for()
    expect(page.locator("#banner")).to_contain_text("does not answer")
    expect(page.locator("#prompt")).to_have_value(person.PROMPT)


def _job(url: str) -> str:
    body = {"input": {"prompt": "a portrait", "num_inference_steps": 100, "num_images": 4}}
    return str(_post(f"{url}/jobs", body)["id"])


def _post(url: str, body: object) -> dict[str, object]:
    headers = {"content-type": "application/json", "x-api-key": KEY}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as answer:
        return dict(json.load(answer))
