"""The page at /, in a real browser: media in, tokens out, and which frames were looked at."""

import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from megatron_vita.inference.server.protocol.limits import Limits
from tests.inference.server.fake_engine import FakeEngine
from tests.inference.server.running_server import RunningServer, running, wait_until
from tests.inference.server.webm import webm

CHROMIUM = shutil.which("chromium")
SCREENSHOTS = os.environ.get("VITA_SCREENSHOTS")
"""A folder for pictures of the page, to be looked at."""
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")

REPLY = (
    "A red circle moves from left to right across a pale background. It starts near the left edge, passes the "
    "middle after about two seconds, and leaves on the right.\n\nNothing else in the scene moves."
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as control:
        browser = control.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A new page; the test fails if its script does, or if the page breaks its own policy."""
    page = browser.new_page(viewport={"width": 1100, "height": 860})
    page.set_default_timeout(20_000)
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on(
        "console",
        lambda message: faults.append(message.text) if "Content Security" in message.text else None,
    )
    yield page
    page.close()
    assert faults == []


def picture() -> bytes:
    image = Image.new("RGB", (480, 320), "#cfe8e4")
    draw = ImageDraw.Draw(image)
    draw.ellipse((150, 70, 330, 250), fill="#d1495b")
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def upload(name: str, kind: str, data: bytes) -> dict[str, Any]:
    return {"name": name, "mimeType": kind, "buffer": data}


def ask(page: Any, question: str) -> None:
    page.get_by_label("Your question").fill(question)
    page.keyboard.press("Enter")


def screenshot(page: Any, name: str) -> None:
    if SCREENSHOTS:
        page.screenshot(path=Path(SCREENSHOTS) / f"{name}.png")


def answer_of(page: Any) -> Callable[[], str]:
    return lambda: page.locator(".turn.assistant .text").last.inner_text()


def test_the_end_stays_in_sight_while_media_grow_unless_the_reader_scrolls_away(page: Any) -> None:
    page.set_viewport_size({"width": 900, "height": 420})
    with running(FakeEngine(reply="red", step_bytes=8)) as server:
        page.goto(server.url)
        page.locator("#files").set_input_files(upload("film.webm", "video/webm", webm(seconds=3)))
        page.locator("#attached video").wait_for()
        ask(page, "What happens?")
        page.locator("figure[data-drawn]").last.wait_for(state="attached")
        top = page.locator(".turn.user")
        page.locator(".facts").wait_for()
        page.locator("#log").evaluate("log => { log.append(document.createElement('hr')); }")
        late = page.locator("#log hr")
        late.evaluate("line => { line.style.marginTop = '300px'; }")
        wait_until(lambda: is_in_sight(page, late) and not is_in_sight(page, top))
        page.mouse.move(400, 200)
        page.mouse.wheel(0, -2000)
        wait_until(lambda: is_in_sight(page, top))
        late.evaluate("line => { line.style.marginTop = '600px'; }")
        page.wait_for_timeout(200)
        assert is_in_sight(page, top)


def is_in_sight(page: Any, element: Any) -> bool:
    """True if an element's upper edge is between the head of the page and the question."""
    box = element.bounding_box()
    return 50 < box["y"] < page.locator("#composer").bounding_box()["y"]


def test_an_image_is_sent_and_the_answer_streams_in(page: Any) -> None:
    with running(FakeEngine(reply=REPLY, step_seconds=0.01)) as server:
        page.goto(server.url)
        screenshot(page, "welcome")
        page.locator("#files").set_input_files(upload("circle.png", "image/png", picture()))
        page.locator("#attached img").wait_for()
        screenshot(page, "attached")
        ask(page, "What is in the picture?")
        answer = answer_of(page)
        wait_until(lambda: 5 < len(answer()) < len(REPLY) - 5, 20)  # some of it, before all of it
        screenshot(page, "streaming")
        page.locator(".facts").wait_for()
        assert answer() == REPLY
        assert "tokens/s" in page.locator(".facts").inner_text()
        screenshot(page, "answered")
    assert server.engine.prompts[-1].images[0].data == picture()
    assert server.engine.samplings[-1].temperature == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_frames_that_were_looked_at_are_drawn_with_their_times(page: Any, scheme: str) -> None:
    with running(FakeEngine(reply=REPLY)) as server:
        page.emulate_media(color_scheme=scheme)
        page.goto(server.url)
        page.locator("#files").set_input_files(upload("circle.webm", "video/webm", webm(seconds=4)))
        page.locator("#attached video").wait_for()
        page.get_by_label("Settings").click()
        page.locator("#max-frames").fill("6")
        screenshot(page, f"settings-{scheme}")
        page.get_by_label("Settings").click()
        ask(page, "What happens?")
        page.locator(".facts").wait_for()
        figures = page.locator(".strip figure")
        assert [text.strip() for text in figures.all_inner_texts()] == [
            "00:00.3", "00:01.0", "00:01.6", "00:02.3", "00:03.0", "00:03.6"
        ]  # fmt: skip
        wait_until(lambda: page.locator(".strip figure[data-drawn]").count() == 6, 20)
        places = page.evaluate(RED_PLACES)
        assert places == sorted(places)
        assert places[0] < 60 < 170 < places[-1]  # the circle moves from left to right
        screenshot(page, f"video-{scheme}")


RED_PLACES = """[...document.querySelectorAll(".strip canvas")].map((canvas) => {
  const {data, width, height} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  let sum = 0, count = 0;
  for (let i = 0; i < width * height; i++) {
    if (data[4 * i] > data[4 * i + 1] + 60) { sum += i % width; count++; }
  }
  return Math.round(sum / count);
})"""
"""The mean column of red pixels in each drawn frame."""


def test_stop_cancels_the_answer(page: Any) -> None:
    with running(FakeEngine(reply="x" * 4000, step_seconds=0.02)) as server:
        page.goto(server.url)
        ask(page, "Tell me everything")
        wait_until(lambda: len(answer_of(page)()) > 3)
        page.get_by_label("Stop").click()
        page.get_by_text("stopped").wait_for()
        wait_until(lambda: not server.engine.requests)
        assert server.engine.cancelled == [0]


def test_what_users_and_models_write_is_never_markup(page: Any) -> None:
    evil = '<img src=x onerror="document.title=1"><script>document.title=2</script><b>bold</b>'
    with running(FakeEngine(step_bytes=1000)) as server:
        page.goto(server.url)
        ask(page, evil)
        page.locator(".facts").wait_for()
        assert page.locator(".turn .text").all_inner_texts() == [evil, evil]
        assert page.title() == "megatron_vita"
        assert page.locator("#log b, #log img, #log script").count() == 0


def test_a_conversation_goes_on_and_begins_anew(page: Any, echo: RunningServer) -> None:
    page.goto(echo.url)
    for question in ("one", "two"):
        ask(page, question)
        page.locator(".facts").nth(0 if question == "one" else 1).wait_for()
    assert [message["role"] for message in echo.engine.prompts[-1].messages] == [
        "user",
        "assistant",
        "user",
    ]
    page.get_by_label("New conversation").click()
    assert page.locator(".turn").count() == 0
    ask(page, "three")
    page.locator(".facts").wait_for()
    assert len(echo.engine.prompts[-1].messages) == 1


def test_refusals_are_shown_and_a_key_opens(page: Any) -> None:
    with running(FakeEngine(), keys=["secret"], limits=Limits(prompt_tokens=20)) as server:
        page.goto(server.url)
        ask(page, "hello")
        page.get_by_role("alert").wait_for()
        assert "API key is needed" in page.get_by_role("alert").inner_text()
        page.locator("#key").fill("secret")
        ask(page, "hello")
        page.locator(".facts").wait_for()
        ask(page, "a question that is too long")
        page.get_by_role("alert").get_by_text("the limit is 20").wait_for()
        screenshot(page, "refused")


def test_a_question_is_kept_with_its_media_when_its_answer_fails(page: Any) -> None:
    with running(FakeEngine(), keys=["secret"]) as server:
        page.goto(server.url)
        page.locator("#files").set_input_files(upload("circle.png", "image/png", picture()))
        ask(page, "What is in the picture?")
        page.get_by_role("alert").wait_for()
        screenshot(page, "needs-key")
        assert page.locator("#question").input_value() == "What is in the picture?"
        assert page.locator("#attached img").count() == 1
        page.locator("#key").fill("secret")
        page.locator("#question").press("Enter")
        page.locator(".facts").wait_for()
        assert page.get_by_role("alert").count() == 0
        assert page.locator(".turn").count() == 2
        assert page.locator("#question").input_value() == ""
        [prompt] = server.engine.prompts
        assert len(prompt.messages) == len(prompt.images) == 1


def test_a_server_that_is_gone_is_told_in_words(page: Any) -> None:
    with running(FakeEngine()) as server:
        page.goto(server.url)
        page.get_by_text("toy").wait_for()
        page.route("**/v1/chat/completions", lambda route: route.abort())
        ask(page, "hello")
        alert = page.get_by_role("alert")
        alert.get_by_text("The server cannot be reached").wait_for()
        assert page.locator("#question").input_value() == "hello"
        page.unroute("**/v1/chat/completions")
        page.locator("#question").press("Enter")
        page.locator(".facts").wait_for()
        assert alert.count() == 0


def test_files_that_are_neither_images_nor_videos_are_named(page: Any, echo: RunningServer) -> None:
    page.goto(echo.url)
    files = [
        upload("report.pdf", "application/pdf", b"%PDF-1.4"),
        upload("circle.png", "image/png", picture()),
        upload("notes", "", b"text"),
    ]
    page.locator("#files").set_input_files(files)
    notice = page.get_by_role("alert")
    notice.wait_for()
    assert "report.pdf, notes" in notice.inner_text()
    assert page.locator("#attached img").count() == 1
    screenshot(page, "not-added")
    ask(page, "What is in the picture?")
    page.locator(".facts").wait_for()
    assert notice.count() == 0


@pytest.mark.parametrize("width", [1100, 380])
def test_the_page_has_a_heading_at_every_width(page: Any, echo: RunningServer, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 760})
    page.goto(echo.url)
    assert page.get_by_role("heading", level=1).count() == 1


def test_themes_can_be_changed_and_are_kept(page: Any, echo: RunningServer) -> None:
    page.emulate_media(color_scheme="light")
    page.goto(echo.url)
    page.get_by_label("Switch between light and dark").click()
    page.reload()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_the_page_fits_a_telephone(page: Any) -> None:
    with running(FakeEngine(reply=REPLY)) as server:
        page.set_viewport_size({"width": 380, "height": 760})
        page.goto(server.url)
        screenshot(page, "phone-welcome")
        page.locator("#files").set_input_files(upload("circle.webm", "video/webm", webm(seconds=2)))
        ask(page, "What happens?")
        page.locator(".facts").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 380
        screenshot(page, "phone")


def test_every_control_has_a_name(page: Any, echo: RunningServer) -> None:
    page.goto(echo.url)
    page.get_by_label("Settings").click()
    unnamed = page.evaluate(
        """[...document.querySelectorAll("button, input:not([hidden]), textarea")].filter(
             (e) => !(e.ariaLabel || e.textContent.trim() || e.labels?.length)).map((e) => e.outerHTML)"""
    )
    assert unnamed == []
