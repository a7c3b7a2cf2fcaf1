"""For everybody: keyboard alone, a screen reader, a phone, both themes; and the page's bounds."""

from pathlib import Path

import axe_playwright_python
import pytest
from playwright.sync_api import Browser, Page, expect
from starlette.testclient import TestClient

from klein.entrypoints.http import playground
from klein.entrypoints.http.app import standalone
from tests.page import person
from tests.page.conftest import watched
from tests.support import fakes

AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text()
GRAVE = ("serious", "critical")
MOST_BYTES = 200_000


def _faults(page: Page) -> list[str]:
    """What axe-core finds that is serious or worse."""
    page.evaluate(AXE)
    found = page.evaluate("axe.run()")
    return [
        f"{rule['id']}: {node['html'][:120]}"
        for rule in found["violations"]
        if rule["impact"] in GRAVE
        for node in rule["nodes"]
    ]


@pytest.mark.parametrize("theme", [pytest.param("light", marks=pytest.mark.smoke), "dark"])
def test_axe_finds_nothing_serious(browser: Browser, url: str, theme: str) -> None:
    """On the empty page, in a dialog, and with everything open beside an image."""
    context = browser.new_context(color_scheme=theme, viewport={"width": 1440, "height": 900})
    with watched(context) as page:
        page.goto(f"{url}/ui")
        page.wait_for_selector(".example")
        assert _faults(page) == []
        page.click("#lora-add")
        assert _faults(page) == []
        page.keyboard.press("Escape")
        person.ask(page)
        person.add_lora(page, "zib")
        person.draw(page)
        page.get_by_role("button", name="Edit this").click()
        page.wait_for_selector(".mask canvas")
        page.click("#sweep > summary")
        assert _faults(page) == []
    context.close()


@pytest.mark.smoke
def test_keyboard_only(page: Page) -> None:
    """From the top of the page to a downloaded image without a mouse."""
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#prompt")).to_be_focused()
    page.keyboard.type("a portrait")
    _tab_to(page, "#presets input")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#presets input[value=portrait_hd]")).to_be_checked()
    _tab_to(page, "#advanced > summary")
    page.keyboard.press("Enter")
    _tab_to(page, "#field-num_inference_steps")
    page.keyboard.type("3")
    _tab_to(page, "#draw")
    page.keyboard.press("Enter")
    person.wait_for_image(page)
    _tab_to(page, ".tools-of-result button")
    with page.expect_download():
        page.keyboard.press("Enter")


def _focused(page: Page, selector: str) -> bool:
    return bool(page.evaluate("selector => document.activeElement.matches(selector)", selector))


def _tab_to(page: Page, selector: str) -> None:
    for _ in range(80):
        if _focused(page, selector):
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"{selector} cannot be reached by Tab")


@pytest.mark.parametrize(("width", "height"), [(320, 256), (390, 844), (1280, 800), (1920, 1080)])
def test_nothing_sticks_out(browser: Browser, url: str, width: int, height: int) -> None:
    """From a screen at 400 % up, before and after an image, with everything unfolded."""
    context = browser.new_context(
        viewport={"width": width, "height": height}, has_touch=width < 500
    )
    with watched(context) as page:
        page.goto(f"{url}/ui")
        page.wait_for_selector(".example")
        person.ask(page)
        person.add_lora(page, "zib")
        page.click("#edit > summary")
        expect(page.locator("#draw")).to_be_in_viewport()
        page.click("#draw")
        person.wait_for_image(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        if width < 900:
            expect(page.locator(person.DRAWN)).to_be_in_viewport()
    context.close()


def test_the_theme_can_be_chosen(page: Page) -> None:
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme-button")
    chosen = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert chosen != before
    page.reload()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == chosen


def test_progress_is_announced(page: Page) -> None:
    person.ask(page, steps=60)
    page.click("#draw")
    expect(page.locator("#live[aria-live=polite]")).to_contain_text("step")
    page.click("#cancel")
    expect(page.locator("#live")).to_contain_text("Cancelled")


@pytest.mark.smoke
def test_the_page_is_small_and_its_policy_strict() -> None:
    assert sum(map(len, playground.FILES.values())) <= MOST_BYTES
    assert "unsafe" not in playground.POLICY
    assert "default-src 'self'" in playground.POLICY


def test_the_page_loads_nothing_from_elsewhere() -> None:
    for name, data in playground.FILES.items():
        if not name.endswith(".webp"):
            text = data.decode().replace("http://www.w3.org/2000/svg", "")
            assert "//cdn" not in text
            assert 'src="http' not in text
            assert "url(http" not in text


def test_files_are_served_without_a_key_and_nothing_else_is() -> None:
    generator = fakes.generator(fakes.FakePipeline(), KLEIN_API_KEYS="anna:0123456789abcdef")
    client = TestClient(standalone(generator))
    page = client.get("/ui")
    assert page.headers["content-security-policy"] == playground.POLICY
    assert client.get("/ui/app.js").headers["content-type"].startswith("text/javascript")
    again = client.get(
        "/ui/app.js", headers={"if-none-match": client.get("/ui/app.js").headers["etag"]}
    )
    assert again.status_code == 304
    assert client.get("/ui/").url.path == "/ui"
    for path in ("/ui/__init__.py", "/ui/%2e%2e/__init__.py", "/ui//etc/passwd", "/ui/none.js"):
        assert client.get(path).status_code in (401, 404), path
    assert client.get("/uix").status_code == 401
