"""References, painting a mask, extending, pasting."""

from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from tests.page import person


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.linear_gradient("L").convert("RGB").save(path)
    return path


def _edit(page: Page, photo: Path) -> None:
    person.ask(page)
    page.click("#edit > summary")
    page.get_by_label("Image to change").set_input_files(photo)
    page.wait_for_selector(".mask canvas")


def _stroke(page: Page) -> None:
    canvas = page.locator(".mask canvas")
    canvas.evaluate("canvas => canvas.scrollIntoView({ block: 'center' })")
    box = canvas.bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] * 0.3, box["y"] + box["height"] * 0.5)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.7, box["y"] + box["height"] * 0.5, steps=5)
    page.mouse.up()


def _painted(page: Page) -> float:
    """The share of the image that the mask covers."""
    return float(
        page.locator(".mask canvas").evaluate(
            """canvas => {
                const { width, height } = canvas;
                const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
                let painted = 0;
                for (let at = 3; at < data.length; at += 4) painted += data[at] > 127;
                return (4 * painted) / data.length;
            }"""
        )
    )


@pytest.mark.smoke
def test_references(page: Page, url: str, photo: Path) -> None:
    person.ask(page)
    page.click("#edit > summary")
    page.get_by_label("References").set_input_files([photo, photo])
    expect(page.locator(".tile figcaption")).to_have_text(["image 1", "image 2"])
    page.get_by_role("button", name="Remove reference 2").click()
    page.fill("#field-reference_megapixels", "0.0625")
    person.draw(page)
    used = person.newest_job(url)["output"]["parameters"]
    assert len(used["images"]) == 1
    assert used["reference_megapixels"] == 0.0625


@pytest.mark.smoke
def test_repaint_what_is_painted(page: Page, photo: Path) -> None:
    """Outside the mask every pixel stays, and the page says so."""
    _edit(page, photo)
    page.click("#draw")
    page.wait_for_selector("text=Paint over what is to be repainted")
    _stroke(page)
    assert 0.05 < _painted(page) < 0.3
    person.draw(page)
    assert "pixels kept bit for bit" in person.fact(page, "Kept")


def test_mask_tools(page: Page, photo: Path) -> None:
    _edit(page, photo)
    _stroke(page)
    painted = _painted(page)
    page.get_by_role("button", name="Invert the mask").click()
    assert _painted(page) == pytest.approx(1 - painted, abs=0.02)
    page.get_by_role("button", name="Undo").click()
    assert _painted(page) == painted
    page.get_by_role("button", name="Eraser").click()
    page.get_by_label("Brush size").fill("128")
    _stroke(page)
    assert _painted(page) == 0
    page.get_by_role("button", name="Undo").click()
    page.get_by_role("button", name="Clear the mask").click()
    assert _painted(page) == 0


def test_mask_by_keys(page: Page, photo: Path) -> None:
    _edit(page, photo)
    page.focus(".mask canvas")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Space")
    assert _painted(page) > 0
    page.keyboard.press("Control+z")
    assert _painted(page) == 0


def test_extend_by_dragging_and_by_number(page: Page, photo: Path) -> None:
    _edit(page, photo)
    page.locator("#editor").get_by_text("Extend", exact=True).click()
    handle = page.get_by_role("slider", name="Extend right")
    handle.evaluate("handle => handle.scrollIntoView({ block: 'center' })")
    box = handle.bounding_box()
    assert box
    page.mouse.move(box["x"] + 5, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + 45, box["y"] + 20, steps=4)
    page.mouse.up()
    right = int(handle.get_attribute("aria-valuenow") or 0)
    assert right >= 16
    page.get_by_label("top", exact=True).fill("32")
    person.draw(page)
    assert person.fact(page, "Size") == f"{256 + right} × {256 + 32}"


def test_edit_a_result_and_get_it_back_with_its_inputs(page: Page, photo: Path) -> None:
    """`Edit this` starts from the image; `Use settings` brings the mask back too."""
    person.ask(page)
    person.draw(page)
    page.get_by_role("button", name="Edit this").click()
    page.wait_for_selector(".mask canvas")
    _stroke(page)
    painted = _painted(page)
    person.draw(page)
    page.get_by_role("button", name="Remove the image").click()
    page.get_by_role("button", name="Use settings").click()
    page.wait_for_selector(".mask canvas")
    page.wait_for_selector("text=Its settings are in the form")
    assert _painted(page) == pytest.approx(painted, abs=0.01)


def test_vary(page: Page, url: str, photo: Path) -> None:
    _edit(page, photo)
    page.locator("#editor").get_by_text("Vary").click()
    page.fill("#field-strength", "0.5")
    person.draw(page)
    assert person.newest_job(url)["output"]["parameters"]["strength"] == 0.5


def test_paste(page: Page, photo: Path) -> None:
    page.evaluate(
        """bytes => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(bytes)], "x.png", { type: "image/png" }));
            dispatchEvent(new ClipboardEvent("paste", { clipboardData: data }));
        }""",
        list(photo.read_bytes()),
    )
    expect(page.locator("dialog")).to_contain_text("no settings inside")
    page.get_by_role("button", name="As reference").click()
    expect(page.get_by_alt_text("Reference 1")).to_be_visible()


def test_a_file_that_is_no_image_is_refused_in_words(page: Page, tmp_path: Path) -> None:
    file = tmp_path / "x.png"
    file.write_text("no image")
    page.click("#edit > summary")
    page.get_by_label("Image to change").set_input_files(file)
    page.wait_for_selector("text=not an image that this browser can read")


def test_another_kind_of_image_is_drawn_anew(page: Page, url: str, tmp_path: Path) -> None:
    """A GIF, which klein does not take."""
    file = tmp_path / "x.gif"
    Image.new("RGB", (128, 128), "red").save(file)
    person.ask(page)
    page.click("#edit > summary")
    page.get_by_label("References").set_input_files(file)
    person.draw(page)
    assert person.newest_job(url)["status"] == "succeeded"
