"""The web chat in a real Chromium, in front of a real model server. Every test checks that no other host is asked."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Locator, Page, expect

from tests.support.browser import DRAWING, PHONE, PICTURE, PageServer, Visit, WebCommand
from tests.support.serving import START_S

QUESTIONS = ("Which shapes are there?", "How many are there?", "Is there a star?")


def metric(web: WebCommand, name: str) -> float:
    """Return a value of the model server's page of metrics."""
    page = httpx.get(f"{web.model_url}/metrics", trust_env=False).text
    return sum(float(line.split()[-1]) for line in page.splitlines() if re.match(rf"{name}[ {{]", line))


def tokens_of(text: str) -> tuple[int, int]:
    """Return the cached and the computed tokens that a line of the page names."""
    found = re.search(r"([\d,]+) tokens? cached, (\d+) computed", text)
    assert found, text
    return int(found[1].replace(",", "")), int(found[2])


def scrolls_sideways(page: Page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth > window.innerWidth")


def paste(target: Locator, picture: Path, event: str) -> None:
    """Send a paste or a drop of a picture to an element."""
    data = base64.b64encode(picture.read_bytes()).decode()
    target.evaluate(
        """(element, [data, event]) => {
            const bytes = Uint8Array.from(atob(data), (char) => char.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "pasted.png", { type: "image/png" }));
            const options = { bubbles: true, cancelable: true };
            element.dispatchEvent(event === "paste"
                ? new ClipboardEvent("paste", { ...options, clipboardData: transfer })
                : new DragEvent("drop", { ...options, dataTransfer: transfer }));
        }""",
        [data, event],
    )


# --- a chat ---


def test_three_turns_show_their_times_their_tokens_and_the_session(visit: Visit, web: WebCommand) -> None:
    visit.open()
    answers = [visit.ask(question) for question in QUESTIONS]
    assert all(answers)
    lines = visit.chat.locator(".facts-line").all_inner_texts()
    cached = [tokens_of(line)[0] for line in lines]
    assert 0 < cached[0] < cached[1] < cached[2]
    assert all(re.match(r"first token after [\d.]+ m?s · ", line) for line in lines)
    panel = visit.chat.locator("[data-panel]")
    expect(panel.locator("[data-place=resident]")).to_have_text("Resident")
    expect(panel.locator(".facts")).to_contain_text(re.compile(r"[\d.]+ [kM]B KV cache on the device"))
    expect(panel.locator("[role=timer]")).to_have_text(re.compile(r"^1\d:\d\d$"))

    visit.page.reload()
    expect(visit.page.locator("[data-turn]")).to_have_count(3)
    assert visit.answers() == answers


def test_a_reload_shows_the_chats_of_all_tabs_again(visit: Visit) -> None:
    visit.may_fail = True
    other = visit.page.context.new_page()
    other.goto(visit.origin)
    visit.open()
    other.locator("[data-example='square.png']").click()
    other.locator(".chat").wait_for()
    other.close()
    failed = {"problem": {"code": "unavailable", "title": "Not now.", "advice": "Wait."}}
    visit.page.route("**/api/chats/*", lambda route: route.fulfill(status=503, json=failed))
    visit.page.reload()
    expect(visit.page.locator(".start")).to_be_visible()
    visit.page.unroute("**/api/chats/*")
    visit.page.reload()
    expect(visit.page.locator("#chat-list li")).to_have_count(2)


def test_a_turn_is_measured_without_a_session_that_shares_anything(visit: Visit, web: WebCommand) -> None:
    visit.open()
    visit.ask(QUESTIONS[0])
    visit.ask(QUESTIONS[1])
    before = {name: metric(web, f"llava_{name}") for name in ("pictures_encoded_total", "open_sessions")}
    visit.page.locator("[data-compare='1']").click()
    row = visit.page.locator(".bars li").first  # the latest turn
    expect(row.locator("[data-verdict]")).to_be_visible()
    expect(row.locator(".bar")).to_have_count(2)
    cached, computed = tokens_of(row.locator(".tokens").inner_text())
    expect(row.locator(".tokens")).to_contain_text(f"without a session {cached + computed} computed")
    assert metric(web, "llava_pictures_encoded_total") == before["pictures_encoded_total"] + 1
    assert metric(web, "llava_open_sessions") == before["open_sessions"]


def test_an_edited_question_drops_the_turns_after_it_and_an_answer_is_made_again(visit: Visit) -> None:
    visit.open()
    first = visit.ask(QUESTIONS[0])
    visit.ask(QUESTIONS[1])
    visit.page.locator("[data-edit='0']").click()
    editor = visit.page.locator("[data-edit-text]")
    expect(editor).to_have_value(QUESTIONS[0])
    editor.fill(QUESTIONS[2])
    editor.press("Enter")
    visit.settled()
    expect(visit.page.locator("[data-turn]")).to_have_count(1)
    expect(visit.page.locator(".question .text")).to_have_text(QUESTIONS[2])
    [edited] = visit.answers()
    assert edited != first
    visit.page.locator("[data-retry]").click()
    visit.settled()
    assert visit.answers() == [edited]


def test_a_stopped_answer_is_no_part_of_the_conversation(
    page_server: Callable[..., PageServer], visit_to: Callable[..., Visit]
) -> None:
    server = page_server(options={"ignore_eos": True, "max_new_tokens": 1024})
    visit = visit_to(server.url)
    visit.open()
    visit.page.locator("[data-text]").fill(QUESTIONS[0])
    visit.page.locator("[data-send]").click()
    expect(visit.page.locator("[data-live]")).to_contain_text(re.compile(r"\w"))
    paste(visit.chat, DRAWING, "drop")
    expect(visit.page.locator(".attached img")).to_have_count(1)
    expect(visit.page.locator("[data-live]")).to_contain_text(re.compile(r"\w"))
    visit.page.keyboard.press("Escape")
    expect(visit.page.locator("[data-note]")).to_contain_text("You stopped this answer.")
    [chat] = server.app.state.chats.all()
    assert chat.turns == ()
    expect(visit.page.locator(".attached img")).to_have_count(1)
    visit.page.locator("[data-again]").click()
    expect(visit.page.locator("[data-turn] .thumbs img")).to_have_count(2)
    expect(visit.page.locator(".attached img")).to_have_count(0)
    expect(visit.page.locator("[data-live]")).to_contain_text(re.compile(r"\w"))
    visit.page.locator("[data-stop]").click()
    expect(visit.page.locator("[data-note]")).to_be_visible()


def test_two_chats_are_shown_side_by_side(visit: Visit) -> None:
    visit.open()
    visit.ask(QUESTIONS[0])
    visit.page.locator("#new-chat").click()
    expect(visit.page.locator(".start")).to_be_visible()
    visit.page.locator("[data-example='drawing.png']").click()
    expect(visit.page.locator(".chat")).to_have_count(2)
    expect(visit.chat.locator("[data-text]")).not_to_have_value("")
    visit.chat.locator("[data-text]").press("Enter")
    visit.settled()
    boxes = [chat.bounding_box() for chat in visit.page.locator(".chat").all()]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    expect(visit.page.locator("#chat-list li")).to_have_count(2)
    visit.page.locator(".chat [data-beside]").first.click()
    expect(visit.page.locator(".chat")).to_have_count(1)
    expect(visit.page.locator(".chat [data-title]")).to_have_text(QUESTIONS[0])
    visit.page.locator("[data-show-beside]:visible").click()
    expect(visit.page.locator(".chat")).to_have_count(2)
    visit.chat.locator("[data-close]").click()
    expect(visit.page.locator("#chat-list li")).to_have_count(1)


def test_pictures_are_pasted_dropped_and_drawn(visit: Visit) -> None:
    paste(visit.page.locator("body"), PICTURE, "paste")
    visit.page.locator(".chat").wait_for()
    paste(visit.chat.locator("[data-text]"), DRAWING, "paste")
    expect(visit.page.locator(".attached img")).to_have_count(1)
    paste(visit.chat, DRAWING, "drop")
    expect(visit.page.locator(".attached img")).to_have_count(2)
    visit.page.get_by_role("button", name="Remove picture 2").click()
    expect(visit.page.locator(".attached img")).to_have_count(1)
    visit.chat.locator("[data-draw]").click()
    box = visit.page.locator("#draw-canvas").bounding_box()
    visit.page.mouse.move(box["x"] + 100, box["y"] + 100)
    visit.page.mouse.down()
    for x, y in ((300, 100), (300, 300), (100, 300), (100, 100)):
        visit.page.mouse.move(box["x"] + x, box["y"] + y, steps=4)
    visit.page.mouse.up()
    visit.page.locator("#draw-send").click()
    expect(visit.page.locator(".attached img")).to_have_count(2)
    assert visit.ask(QUESTIONS[2])
    expect(visit.page.locator("[data-turn='0'] .thumbs img")).to_have_count(3)
    expect(visit.page.locator(".attached img")).to_have_count(0)


def test_a_file_that_is_no_picture_is_refused_in_words(visit: Visit, tmp_path: Path) -> None:
    visit.may_fail = True
    text = tmp_path / "notes.png"
    text.write_text("not a picture")
    with visit.page.expect_file_chooser() as chooser:
        visit.page.locator("[data-choose]").click()
    chooser.value.set_files(text)
    expect(visit.page.locator("[data-problem]")).to_contain_text("not a picture that can be read")
    expect(visit.page.locator(".chat")).to_have_count(0)


def test_a_clip_is_sent_and_the_answer_of_a_model_for_pictures_is_shown(visit: Visit, tmp_path: Path) -> None:
    visit.may_fail = True
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(b"\x00\x00\x00\x20ftypisom" + bytes(100))
    with visit.page.expect_file_chooser() as chooser:
        visit.page.locator("[data-choose]").click()
    chooser.value.set_files(clip)
    expect(visit.page.locator("[data-problem]")).to_contain_text("got a clip")
    visit.open()
    with visit.page.expect_file_chooser() as chooser:
        visit.page.locator(".chat [data-choose]").click()
    chooser.value.set_files(clip)
    expect(visit.page.locator(".attached img")).to_have_count(1)


# --- how it is used and how it looks ---


def test_the_keyboard_alone_is_enough(visit: Visit) -> None:
    page = visit.page

    def tab_to(selector: str) -> None:
        for _ in range(30):
            page.keyboard.press("Tab")
            if page.evaluate("(selector) => document.activeElement.matches(selector)", selector):
                style = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert style != "none", selector
                return
        raise AssertionError(f"Tab does not reach {selector}")

    tab_to(".start [data-choose]")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files(PICTURE)
    expect(page.locator(".chat [data-text]")).to_be_focused()
    page.keyboard.type("One line")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("and another")
    expect(page.locator(".chat [data-text]")).to_have_value("One line\nand another")
    page.keyboard.press("Control+A")
    page.keyboard.type(QUESTIONS[0])
    page.keyboard.press("Enter")
    visit.settled()
    expect(page.locator("#announcer")).to_contain_text("Answer: ")
    expect(page.locator(".chat [data-text]")).to_be_focused()
    page.locator("#new-chat").focus()
    tab_to("[data-edit='0']")
    page.keyboard.press("Enter")
    expect(page.locator("[data-edit-text]")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator("[data-edit='0']")).to_be_focused()
    tab_to("[data-retry]")
    page.keyboard.press("Enter")
    visit.settled()
    expect(page.locator("[data-turn]")).to_have_count(1)


def test_a_phone_scrolls_down_only(visit_to: Callable[..., Visit], web: WebCommand) -> None:
    visit = visit_to(web.url, viewport=PHONE, has_touch=True, is_mobile=True)
    page = visit.page
    assert not scrolls_sideways(page)
    visit.open()
    visit.ask(QUESTIONS[0])
    assert not scrolls_sideways(page)
    page.locator(".panel summary").tap()
    expect(page.locator(".panel-body")).to_be_visible()
    assert not scrolls_sideways(page)
    page.locator(".chat [data-draw]").tap()
    expect(page.locator("#draw-canvas")).to_be_visible()
    assert page.locator("dialog").bounding_box()["width"] <= PHONE["width"]
    page.keyboard.press("Escape")
    page.locator("#menu").tap()
    expect(page.locator("#new-chat")).to_be_visible()
    page.locator("#new-chat").tap()
    expect(page.locator(".start")).to_be_visible()
    expect(page.locator(".chat")).to_have_count(0)
    assert not scrolls_sideways(page)


CONTRAST = """(selectors) => {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const rgba = (colour) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = colour;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const luminance = (colour) => {
        const [r, g, b] = colour.slice(0, 3).map((v) => v / 255)
            .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = (element) => {
        const colour = rgba(getComputedStyle(element).backgroundColor);
        return colour[3] > 250 || !element.parentElement ? colour : ground(element.parentElement);
    };
    return Object.fromEntries(selectors.map((selector) => {
        const element = document.querySelector(selector);
        const [low, high] = [luminance(rgba(getComputedStyle(element).color)), luminance(ground(element))].sort();
        return [selector, (Math.max(low, high) + 0.05) / (Math.min(low, high) + 0.05)];
    }));
}"""
TEXTS = (".top h1", "#server-text", "#new-chat", ".question .text", ".answer .text", ".facts-line", "[data-send]")
TEXTS += (".place", ".facts dt", "[data-edit]", ".keys", "#chats-hint", ".bar .value", "[data-compare]")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_can_be_read_in_both_themes(visit_to: Callable[..., Visit], web: WebCommand, scheme: str) -> None:
    visit = visit_to(web.url, color_scheme=scheme)
    visit.open()
    visit.ask(QUESTIONS[0])
    expect(visit.page.locator("[data-place=resident]")).to_be_visible()
    contrasts = visit.page.evaluate(CONTRAST, list(TEXTS))
    assert {name: round(value, 2) for name, value in contrasts.items() if value < 4.5} == {}
    ground = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0] < 60"
    assert visit.page.evaluate(ground) == (scheme == "dark")
    other = {"light": "Dark", "dark": "Light"}[scheme]
    theme = visit.page.locator("#theme")
    while theme.inner_text().strip() != other:
        theme.click()
    assert visit.page.evaluate(ground) == (scheme == "light")
    visit.page.reload()
    expect(theme).to_have_text(re.compile(other))


# --- faults ---


def test_a_lost_session_continues_in_a_new_one_with_its_history(
    page_server: Callable[..., PageServer], visit_to: Callable[..., Visit]
) -> None:
    server = page_server()
    visit = visit_to(server.url)
    visit.may_fail = True
    visit.open()
    first = visit.ask(QUESTIONS[0])
    [chat] = server.app.state.chats.all()
    lost = chat.session.session_id
    httpx.post(
        f"{server.app.state.endpoint}/invocations",
        json={"type": "close_session", "session_id": lost},
        trust_env=False,
    ).raise_for_status()
    visit.page.locator("[data-text]").fill(QUESTIONS[1])
    visit.page.locator("[data-text]").press("Enter")
    expect(visit.page.locator("[data-note]")).to_contain_text("no longer has the session")
    visit.page.locator(".turn [data-reopen]").click()
    expect(visit.page.locator("[data-turn]")).to_have_count(2)
    visit.settled()
    assert visit.answers()[0] == first
    assert chat.session.session_id != lost
    expect(visit.page.locator("[data-place=resident]")).to_be_visible()


def test_a_page_that_loses_its_own_server_says_so_and_goes_on(visit: Visit) -> None:
    visit.may_fail = True
    visit.open()
    visit.page.context.set_offline(True)
    visit.page.locator("[data-text]").fill(QUESTIONS[0])
    visit.page.locator("[data-text]").press("Enter")
    expect(visit.page.locator("[data-note]")).to_contain_text("cannot reach its own server")
    expect(visit.page.locator("#alert")).to_be_visible()
    visit.page.context.set_offline(False)
    expect(visit.page.locator("#alert")).to_be_hidden()
    visit.page.locator("[data-again]").click()
    expect(visit.page.locator("[data-turn]")).to_have_count(1)


def test_a_dead_model_server_is_announced_and_its_chats_go_on_when_it_is_back(visit: Visit, web: WebCommand) -> None:
    """The last test of this file: the model server is started again for it."""
    visit.may_fail = True
    visit.open()
    first = visit.ask(QUESTIONS[0])
    web.kill_model_server()
    expect(visit.page.locator("#alert")).to_contain_text("model server")
    expect(visit.page.locator("#server")).to_have_attribute("data-state", re.compile("starting|unreachable"))
    expect(visit.page.locator("#alert")).to_be_hidden(timeout=START_S * 1000)
    visit.page.locator("[data-banner] [data-reopen]").click()
    expect(visit.page.locator("[data-place=resident]")).to_be_visible()
    assert visit.answers() == [first]
    assert visit.ask(QUESTIONS[1])
