# Copyright 2026 The DeCo package authors.
# SPDX-License-Identifier: Apache-2.0
"""The page in Chromium, as its users see it: make test-page."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from modeling_deco import SHIPPED_CHECKPOINT
from modeling_deco.worlds.digits.scenes import render

pytestmark = pytest.mark.browser
expect = pytest.importorskip("playwright.sync_api", reason="make test-page installs Playwright").expect
expect.set_options(timeout=30_000)  # milliseconds, for busy machines

BAD_FILE = "its content is not an image of the formats"


def render_upload(index):
    """A scene of held-out handwriting, and its image as a file to upload."""
    scene = render("test", index=index, seed=2026, min_digits=3)
    file = io.BytesIO()
    scene.image.save(file, format="PNG")
    return scene, {"name": f"digits-{index}.png", "mimeType": "image/png", "buffer": file.getvalue()}


def upload(page, file):
    page.locator("#picture input[type=file]").set_input_files(file)


def ask(page, question):
    page.get_by_label("Question").fill(question)
    page.get_by_role("button", name="Ask", exact=True).click()


def answer(page):
    return page.locator("#answer p")


def words(page):
    return page.locator("#answer button")


def rows(page):
    return [re.split(r"\t+", row.inner_text().strip()) for row in page.locator("#costs tr").all()[1:]]


def map_pixels(page):
    """The map that is shown, as `(height, width, 3)`."""
    address = page.locator("#map img").get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(page.request.get(address).body())).convert("RGB")).astype(int)


def peak(page):
    """Where the map is brightest, in the picture's pixels: its greys are at most 142, its peak's green 178."""
    green = map_pixels(page)[..., 1]
    y, x = np.argwhere(green >= green.max() - 8).mean(0) * 96 / np.array(green.shape)
    return x, y


def is_in(point, box):
    return box[0] <= point[0] < box[2] and box[1] <= point[1] < box[3]


def test_an_answer_is_streamed_and_is_right(open_page):
    scene, file = render_upload(22)
    page = open_page()
    page.evaluate(
        """() => {
            window.seen = [];
            new MutationObserver(() => window.seen.push(document.querySelector('#answer p').innerText.trim()))
                .observe(document.querySelector('#answer'), {subtree: true, childList: true, characterData: true});
        }"""
    )
    upload(page, file)
    ask(page, "Read the digits.")
    expect(words(page)).to_have_count(4)
    expect(answer(page)).to_have_text(" ".join(str(digit.value) for digit in scene.digits) + ".")
    assert len({text for text in page.evaluate("window.seen") if text}) >= 3  # "9", "9 1", ...


def test_enter_asks(open_page):
    scene, file = render_upload(46)
    page = open_page()
    upload(page, file)
    page.get_by_label("Question").fill("How many digits are there?")
    page.get_by_label("Question").press("Enter")
    expect(answer(page)).to_have_text("4 digits.")


def test_the_budget_is_shown_used_and_recorded(open_page):
    _, file = render_upload(46)
    page = open_page()
    upload(page, file)
    ask(page, "What colour is the 2?")
    expect(page.locator("#costs td").first).to_have_text("36")
    page.get_by_role("slider").fill("3")
    expect(page.locator("#budget")).to_contain_text("3 x 3 = 9 tokens")
    ask(page, "What colour is the 2?")
    expect(page.locator("#costs td").first).to_have_text("9")
    expect(page.locator("#answer")).to_contain_text("3 x 3 = 9 tokens")
    (first, second) = rows(page)
    # 2 (key and value) * 4 layers * 4 heads * 32 * 4 bytes = 4096 bytes a token
    assert (first[0], first[2], first[3]) == ("9", "36.9 kB", "2 purple.")
    assert (second[0], second[2], second[3]) == ("36", "147 kB", "2 purple.")
    assert all(0 < float(row[1].removesuffix(" *").removesuffix(" ms")) < 10_000 for row in (first, second))


def test_another_question_begins_another_table(open_page):
    _, file = render_upload(46)
    page = open_page()
    upload(page, file)
    ask(page, "What colour is the 2?")
    expect(page.locator("#costs")).to_contain_text("2 purple.")
    ask(page, "What colour is the 4?")
    expect(page.locator("#costs")).to_contain_text("4 white.")
    assert [row[3] for row in rows(page)] == ["4 white."]


def test_budgets_are_compared(open_page):
    _, file = render_upload(46)
    page = open_page()
    upload(page, file)
    page.get_by_label("Question").fill("What colour is the 2?")
    page.get_by_role("button", name="Compare budgets").click()
    expect(page.locator("#costs tr")).to_have_count(5)
    assert [row[0] for row in rows(page)] == ["1", "9", "36", "144"]
    assert [row[3] for row in rows(page)[1:]] == ["2 purple."] * 3


def test_a_clicked_word_shows_its_own_map(open_page):
    scene, file = render_upload(46)
    page = open_page()
    upload(page, file)
    ask(page, "Read the digits.")
    expect(words(page)).to_have_count(4)
    maps = []
    for digit, word in zip(scene.digits, words(page).all(), strict=True):
        word.click()
        expect(page.locator("#caption")).to_contain_text(f"“{digit.value}” is based on")
        expect(word).to_have_attribute("aria-pressed", "true")
        maps.append(map_pixels(page))
    assert page.locator("#answer [aria-pressed=true]").count() == 1
    assert all((one != other).any() for one, other in zip(maps, maps[1:], strict=False))


@pytest.mark.parametrize("value", [1, 2, 4, 7])
def test_the_peak_lies_on_the_digit_that_was_asked_for(open_page, value):
    scene, file = render_upload(46)
    (digit,) = (digit for digit in scene.digits if digit.value == value)
    page = open_page()
    upload(page, file)
    ask(page, f"What colour is the {value}?")
    words(page).nth(1).click()
    expect(page.locator("#caption")).to_contain_text(f"“{digit.colour}” is based on")
    assert is_in(peak(page), digit.box)
    assert "Highest relevance: 100% of the answer's maximum" in page.locator("#map img").get_attribute("alt")


def test_words_are_reached_by_keyboard_and_keep_the_focus(open_page):
    _, file = render_upload(46)
    page = open_page()
    upload(page, file)
    ask(page, "What colour is the 2?")
    words(page).first.focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#caption")).to_contain_text("“purple” is based on")
    expect(words(page).nth(1)).to_be_focused()


def test_a_new_question_removes_the_map_of_an_earlier_answer(open_page):
    _, file = render_upload(46)
    page = open_page()
    upload(page, file)
    ask(page, "What colour is the 2?")
    words(page).first.click()
    expect(page.locator("#map img")).to_be_visible()
    ask(page, "What colour is the 4?")
    expect(answer(page)).to_have_text("4 white.")
    expect(page.locator("#map img")).to_have_count(0)


def test_an_example_is_asked_as_it_is(open_page):
    page = open_page()
    page.locator("#examples button").nth(1).click()
    expect(page.get_by_label("Question")).to_have_value("Read the digits.")
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(answer(page)).to_have_text("9 1 2 3.")


def text_as_png():
    return b"This is not a picture."


def truncated():
    return render_upload(46)[1]["buffer"][:9000]


def bomb():
    """A few kilobytes that would be 675 MB of pixels."""
    file = io.BytesIO()
    Image.new("1", (15_000, 15_000)).save(file, format="PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [(text_as_png, BAD_FILE), (truncated, "it is broken"), (bomb, "pixels")],
    ids=["text", "truncated", "bomb"],
)
def test_a_bad_file_is_reported_and_the_next_one_works(open_page, content, message):
    page = open_page()
    upload(page, {"name": "holiday.png", "mimeType": "image/png", "buffer": content()})
    expect(page.get_by_text(message)).to_be_visible()
    expect(page.locator("#picture img")).to_have_count(0)
    upload(page, render_upload(46)[1])
    ask(page, "What colour is the 2?")
    expect(answer(page)).to_have_text("2 purple.")


def test_a_file_over_the_limit_is_refused(open_page, tmp_path):
    large = tmp_path / "large.png"
    large.write_bytes(bytes(33 * 2**20))
    page = open_page()
    upload(page, large)
    expect(page.get_by_text(re.compile("maximum", re.IGNORECASE))).to_be_visible()


def test_a_missing_image_or_question_is_reported(open_page):
    page = open_page()
    ask(page, "Is there a 7?")
    expect(page.get_by_text("Choose an image first.")).to_be_visible()
    upload(page, render_upload(46)[1])
    ask(page, "  ")
    expect(page.get_by_text("Write a question first.")).to_be_visible()


def test_an_image_token_in_the_question_is_reported(open_page):
    page = open_page()
    upload(page, render_upload(46)[1])
    ask(page, "<image> What colour is the 2?")
    expect(page.get_by_text("which marks an image; leave it out")).to_be_visible()


def test_two_users_at_once_get_their_own_answers(open_page):
    (scene, file), (other_scene, other_file) = render_upload(46), render_upload(35)
    one, other = open_page(), open_page()
    upload(one, file)
    upload(other, other_file)
    ask(one, "What colour is the 2?")
    ask(other, "What colour is the 2?")  # of a picture whose 2 is elsewhere
    one.get_by_label("Question").fill("to be asked later")
    for page, its_scene in ((one, scene), (other, other_scene)):
        (digit,) = (digit for digit in its_scene.digits if digit.value == 2)
        expect(answer(page)).to_have_text(f"2 {digit.colour}.")
        words(page).nth(1).click()
    for page, its_scene in ((one, scene), (other, other_scene)):
        (digit,) = (digit for digit in its_scene.digits if digit.value == 2)
        expect(page.locator("#caption")).to_contain_text("is based on")
        assert is_in(peak(page), digit.box)


def test_a_user_who_leaves_does_not_block_the_others(open_page):
    leaving, staying = open_page(), open_page()
    upload(leaving, render_upload(22)[1])
    upload(staying, render_upload(46)[1])
    ask(leaving, "Read the digits.")
    expect(answer(leaving)).to_contain_text("9")
    leaving.close()
    ask(staying, "What colour is the 2?")
    expect(answer(staying)).to_have_text("2 purple.")


def test_files_that_were_not_uploaded_are_not_served(open_page, server):
    page = open_page()
    upload(page, render_upload(46)[1])
    address = page.locator("#picture img").get_attribute("src")
    assert re.search(r"/[0-9a-f]{64}/digits-46\.png$", address)
    folder = address.rsplit("/", 2)[0]
    for path in ("/gradio_api/file=/etc/passwd", folder.removeprefix(server.url), "/gradio_api/file=pyproject.toml"):
        assert page.request.get(server.url + path).status in (403, 404)


def test_a_request_cannot_name_a_file_of_the_server(open_page, server):
    page = open_page()
    path = str(SHIPPED_CHECKPOINT / "examples" / "1.png")
    for upload in ({"path": path}, {"path": path, "meta": {"_type": "gradio.FileData"}}):
        request = {"data": [upload, "Read the digits.", 6, None], "fn_index": event(page, "ask"), "session_hash": "me"}
        assert page.request.post(f"{server.url}/gradio_api/queue/join", data=request).ok
        said = page.request.get(f"{server.url}/gradio_api/queue/data?session_hash=me").text()
        assert '"success":false' in said.replace(" ", "")
        assert "tokens for the image" not in said


def event(page, name):
    """The number of an event of the page."""
    (number,) = (
        entry["id"] for entry in page.evaluate("window.gradio_config.dependencies") if entry["api_name"] == name
    )
    return number


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(open_page, screenshots, scheme):
    page = open_page(viewport={"width": 390, "height": 844}, color_scheme=scheme, is_mobile=True, has_touch=True)
    show_everything(page)
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    if scheme == "light":
        page.screenshot(path=screenshots / "page-phone.png", full_page=True)


def test_the_whole_page_on_a_desktop(open_page, screenshots):
    page = open_page()
    show_everything(page)
    assert page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")
    page.screenshot(path=screenshots / "page.png", full_page=True)


def show_everything(page):
    """Use everything on the page: an example, a word's map, the comparison of budgets."""
    page.locator("#examples button").first.click()
    expect(page.locator("#picture img")).to_be_visible()
    expect(page.get_by_label("Question")).to_have_value("What colour is the 2?")
    page.get_by_role("button", name="Ask", exact=True).click()
    words(page).nth(1).click()
    expect(page.locator("#caption")).to_contain_text("“purple” is based on")
    page.get_by_role("button", name="Compare budgets").click()
    expect(page.locator("#costs tr")).to_have_count(5)
    page.wait_for_function("[...document.images].every((image) => image.complete)")


def test_the_server_asks_no_other_host(open_page, server):
    page = open_page()
    upload(page, render_upload(46)[1])
    ask(page, "What colour is the 2?")
    words(page).first.click()
    expect(page.locator("#caption")).to_contain_text("is based on")
    assert "FOREIGN" not in server.log.read_text()
