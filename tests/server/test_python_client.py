"""The Python client and llava-chat against a real TorchServe."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pexpect
import pytest

from deploy.serve.torchserve import TorchServe
from llava_sessions_client import (
    AsyncEndpoint,
    ConnectionFailed,
    Endpoint,
    InvalidRequest,
    SessionLost,
    TimedOut,
    TooLarge,
)
from models.shapes.scenes import HELD_OUT_SEEDS, make_scene
from tests.support.encoding import to_png
from tests.support.python_chats import OPTIONS, QUESTIONS, chat_async, chat_sync
from tests.support.reference import Reference
from tests.support.server_metrics import wait_for_metrics
from tests.support.wire import ChatSession

ROOT = Path(__file__).parents[2]
FIRST, SECOND = (make_scene(HELD_OUT_SEEDS[index]).draw() for index in (5_300, 5_301))
COMMAND = [sys.executable, "-m", "llava_sessions_client.terminal.command"]


@pytest.fixture(autouse=True)
def nothing_is_left(server: TorchServe) -> Iterator[None]:
    """Check that the test leaves no session open."""
    yield
    assert wait_for_metrics(server.metrics_url, llava_open_sessions=0)["llava_open_sessions"] == 0


@pytest.fixture
def endpoint(server: TorchServe) -> Endpoint:
    """Describe the server."""
    return Endpoint(server.url)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """Write the first picture to a file."""
    path = tmp_path / "first.png"
    path.write_bytes(to_png(FIRST))
    return path


def test_a_conversation_is_the_models_in_both_clients(server: TorchServe, http: httpx.Client) -> None:
    def lose(session_id: str) -> None:
        ChatSession(http, session_id, "").close()

    seen = chat_sync(Endpoint(server.url), FIRST, SECOND, lose)
    again = chat_async(AsyncEndpoint(server.url), FIRST, SECOND, lose)
    assert seen.facts == again.facts
    reference = Reference({"first": FIRST, "second": SECOND})
    asked = [(0, "first"), (1, ""), (0, "second"), (2, ""), (3, ""), (3, ""), (1, "")]
    kept = [0, 2, 4, 6, 2, 2, 4]  # messages before each question: an edit and a retry drop the later ones
    expected, conversation = [], []
    for (question, picture), messages, answer in zip(asked, kept, seen.answers, strict=True):
        del conversation[messages:]
        conversation.append({"role": "user", "text": QUESTIONS[question], "pictures": [picture] if picture else []})
        expected.append(reference.answer(conversation, OPTIONS["max_new_tokens"]))
        conversation.append({"role": "assistant", "text": answer.text, "pictures": []})
    assert all(one.matches(answer.text) for one, answer in zip(expected, seen.answers, strict=True))
    assert [one.prompt_tokens for one in expected] == [answer.usage.prompt_tokens for answer in seen.answers]
    assert ["".join(pieces) for pieces in seen.pieces] == [seen.answers[1].text, seen.answers[4].text]
    assert [answer.replayed for answer in seen.answers] == [False] * 6 + [True]
    assert all(answer.timings.total_ms > 0 for answer in seen.answers)
    assert [turn.text for turn in seen.turns] == [QUESTIONS[0], QUESTIONS[3], QUESTIONS[1]]


def test_a_session_is_closed_whatever_ends_the_block(endpoint: Endpoint) -> None:
    def fail() -> None:
        with endpoint.open(FIRST) as chat:
            assert chat.expires_at is not None
            assert chat.expires_at > datetime.now(UTC)
            next(chat.stream(QUESTIONS[0], **OPTIONS))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with endpoint:
        chats = [endpoint.open(FIRST) for _ in range(2)]
    assert all(chat.is_closed for chat in chats)


def test_a_history_continues_a_conversation(endpoint: Endpoint) -> None:
    with endpoint.open(FIRST) as chat:
        chat.ask(QUESTIONS[0], **OPTIONS)
        expected = chat.ask(QUESTIONS[1], **OPTIONS)
        turns = chat.turns[:1]
    for history in (turns, [(turns[0].text, turns[0].answer.text)]):
        with endpoint.open(FIRST, history=history) as chat:
            assert chat.ask(QUESTIONS[1], **OPTIONS).usage.prompt_tokens == expected.usage.prompt_tokens


def test_errors_have_their_class(endpoint: Endpoint, server: TorchServe, http: httpx.Client) -> None:
    with endpoint.open(FIRST) as chat:
        wrong = (("", {}, InvalidRequest), ("a" * 100_000, {}, TooLarge), ("a", {"seed": -5}, InvalidRequest))
        for text, options, kind in wrong:
            with pytest.raises(kind):
                chat.ask(text, **options)
        ChatSession(http, chat.session_id, "").close()
        with pytest.raises(SessionLost):
            chat.ask(QUESTIONS[0])
    with Endpoint(server.url, session_token="a-secret-of-the-tenant").open(FIRST) as chat:
        assert chat.ask(QUESTIONS[0], **OPTIONS).text
        with pytest.raises(Exception, match="session_not_found"):
            ChatSession(http, chat.session_id, "").ask(QUESTIONS[0])
    with pytest.raises(ConnectionFailed):
        Endpoint("http://127.0.0.1:9", retries=0).open(FIRST)


def test_another_thread_stops_an_answer(endpoint: Endpoint) -> None:
    with endpoint.open(FIRST) as chat:
        stream = chat.stream(QUESTIONS[0], ignore_eos=True, max_new_tokens=256)
        first = next(stream)
        reader = threading.Thread(target=lambda: rest.extend(stream))
        rest: list[str] = []
        reader.start()
        while not rest:
            time.sleep(0.01)
        stream.cancel()
        reader.join(60)
        assert not reader.is_alive()
        assert stream.answer.finish_reason == "cancelled"
        assert stream.text.startswith(first)
        assert chat.turns == ()


def test_a_question_ends_with_its_time_out(endpoint: Endpoint) -> None:
    with endpoint.open(FIRST) as chat:
        stopped = chat.ask(QUESTIONS[0], deadline_ms=1)
        assert (stopped.text, stopped.finish_reason) == ("", "deadline")
        with pytest.raises(TimedOut):
            chat.ask(QUESTIONS[0], timeout_s=0.0)
        assert chat.turns == ()
        answer = chat.ask(QUESTIONS[0], **OPTIONS)
    with endpoint.open(FIRST) as chat:
        assert chat.ask(QUESTIONS[0], **OPTIONS).usage.prompt_tokens == answer.usage.prompt_tokens


# --- llava-chat -------------------------------------------------------------------------------------------------------


def environment(tmp_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "PYTHONPATH")}
    paths = os.pathsep.join(str(ROOT / name) for name in (".", "client"))
    return {**kept, "PYTHONPATH": paths, "XDG_STATE_HOME": str(tmp_path), "TERM": "xterm-256color"}


def test_lines_of_a_pipe_are_questions(server: TorchServe, endpoint: Endpoint, picture: Path, tmp_path: Path) -> None:
    lines = "\n".join([QUESTIONS[0], "", "/bad", QUESTIONS[1], f"/save {tmp_path}/chat.json", "/quit", "unread"])
    command = [*COMMAND, server.url, str(picture), "--max-new-tokens", "12"]
    run = subprocess.run(command, input=lines, capture_output=True, text=True, env=environment(tmp_path), timeout=300)
    with endpoint.open(picture) as chat:
        expected = [chat.ask(text, **OPTIONS).text for text in QUESTIONS[:2]]
    assert run.stdout.splitlines() == expected
    assert "error: /bad is not a command" in run.stderr
    assert run.returncode == 1
    saved = json.loads((tmp_path / "chat.json").read_text())
    assert [(turn["question"], turn["text"]) for turn in saved] == list(zip(QUESTIONS[:2], expected, strict=True))


def test_a_terminal_chat(server: TorchServe, picture: Path, tmp_path: Path) -> None:
    """Colours, streaming, Ctrl-C, every command, and the input history."""
    (tmp_path / "second.png").write_bytes(to_png(SECOND))
    command = [*COMMAND, server.url, str(picture), "--max-new-tokens", "256"]
    child = pexpect.spawn(command[0], command[1:], env=environment(tmp_path), timeout=300, dimensions=(60, 100))
    child.delaybeforesend = None
    child.expect("\x1b\\[[0-9;]*38;[0-9;]*m▀".encode())
    child.expect(b"/help lists the commands")
    for line, shown in (
        (QUESTIONS[0], rb"\.\s*\r\n"),
        (f"/image {tmp_path}/second.png", rb"shown with the next question"),
        (QUESTIONS[3], rb"\.\s*\r\n"),
        ("/edit 1 Is there a circle?", rb"(Yes|No)"),
        ("/edit 9 x", rb"needs a turn from 1 to 1"),
        ("/retry", rb"(Yes|No)"),
        ("/history", rb"1\. Is there a circle\?"),
        ("/stats", rb"TTFT"),
        (f"/save {tmp_path}/chat.md", rb"saved to"),
        ("/nothing", rb"is not a command"),
    ):
        child.sendline(line)
        child.expect(shown)
    child.sendline("/quit")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    assert (tmp_path / "chat.md").read_text().startswith(f"Pictures: {picture}\n\n**Is there a circle?**")
    history = (tmp_path / "llava-chat" / "history").read_text()
    assert re.search(rf"^\+{re.escape(QUESTIONS[0])}$", history, re.MULTILINE)
