"""A real server of the built-in model and a real Chromium on its page."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, sync_playwright

from tests.support import live

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
"""A browser's path; None where there is none."""
SWITCHES = ["--no-sandbox"]
"""A container allows no sandbox, and only klein's own page is opened."""
NETWORK = "Failed to load resource"
"""How Chromium begins its own line on every answer of 400 and above."""


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "smoke: what CI runs where a minute is all there is")


@contextmanager
def server(
    home: Path, wait: bool = True, **extra: str
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`bentoml serve` on a free port with LoRAs of its own, once it is ready."""
    loras = home / "loras"
    loras.mkdir()
    for lora in (live.ROOT / "klein/nano/loras").glob("*.safetensors"):
        shutil.copy(lora, loras)
    port = live.free_port()
    url, log = f"http://localhost:{port}", home / "serve.log"
    env = live.environment(home, OMP_WAIT_POLICY="PASSIVE", KLEIN_LORA_DIR=str(loras), **extra)
    argv = [str(live.BIN / "bentoml"), "serve", "service:Klein", "--port", str(port)]
    with live.process(argv, env, log) as running:
        live.wait_for(f"{url}/readyz" if wait else f"{url}/livez", 200, running, log)
        yield url, running


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.fail("no Chromium here: `apt-get install chromium`, or set CHROMIUM to its path")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that everybody may use and add LoRAs to."""
    with server(tmp_path_factory.mktemp("open"), KLEIN_LORA_UPLOADS="on") as (url, _):
        yield url


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """A browser that knows nothing yet."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext, url: str) -> Iterator[Page]:
    """The page once it is connected; a test fails for anything that the console complains of."""
    with watched(context) as page:
        page.goto(f"{url}/ui")
        page.wait_for_selector(".example")
        yield page


@contextmanager
def watched(context: BrowserContext, refusals: bool = False) -> Iterator[Page]:
    """A tab whose console stays clean; `refusals` allows the lines on refused requests."""
    page, faults = context.new_page(), []
    page.on("pageerror", lambda error: faults.append(str(error)))

    def on_console(line: ConsoleMessage) -> None:
        allowed = refusals and line.text.startswith(NETWORK)
        if line.type in ("error", "warning") and not allowed:
            faults.append(line.text)

    page.on("console", on_console)
    yield page
    assert faults == []
