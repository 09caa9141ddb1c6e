"""Sessions that the server loses: expired, closed by another client, or gone with their worker or instance.

With `on_lost="replay"` every chat continues, with the answers of transformers' `generate` on the whole conversation.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx
import pytest

from deploy.serve.torchserve import TorchServe
from llava_sessions_client import Answer, Chat, Endpoint, SessionExpired, SessionLost
from models.shapes.scenes import HELD_OUT_SEEDS, make_scene
from tests.support.local_endpoint import NAME
from tests.support.local_endpoint import Endpoint as LocalEndpoint
from tests.support.reference import Reference
from tests.support.serving import Served, pack
from tests.support.wire import SESSION_HEADER

OnLost = Literal["raise", "replay"]
TTL_S = 10
CHATS = 5  # of each loss
SHORT: dict[str, Any] = {"max_new_tokens": 8}
QUESTIONS = ("Which shapes are there?", "How many shapes are there?", "Is there a circle?")
PICTURES = {f"scene {number}": make_scene(seed).draw() for number, seed in enumerate(HELD_OUT_SEEDS[5_210:5_212])}


@pytest.fixture(scope="module", autouse=True)
def credentials() -> Iterator[None]:
    """Give boto3 credentials for the local endpoint."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ACCESS_KEY_ID", "any")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "any")
        yield


@pytest.fixture(scope="module")
def fragile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Run a server without a journal, whose sessions expire soon, behind the launcher and HAProxy."""
    with Served(pack(tmp_path_factory.mktemp("fragile"), sessions=32, session_ttl_s=TTL_S)) as served:
        yield served


@pytest.fixture(scope="module")
def reference() -> Reference:
    """Return `generate` with the pictures."""
    return Reference(PICTURES)


@dataclass(eq=False)
class Talk:
    """A chat on one of the pictures, with its answers."""

    name: str
    chat: Chat
    answers: list[Answer] = field(default_factory=list)

    @classmethod
    def open(
        cls, endpoint: Endpoint, number: int, on_lost: OnLost = "replay", opened: Callable[[str], None] | None = None
    ) -> Talk:
        """Open a chat and ask the first question. `opened` receives the session ID before the question."""
        name = list(PICTURES)[number % len(PICTURES)]
        talk = cls(name, endpoint.open(PICTURES[name], on_lost=on_lost))
        if opened is not None:
            opened(talk.chat.session_id)
        talk.ask()
        return talk

    def ask(self) -> None:
        """Ask the next question, every other one as a stream."""
        text = QUESTIONS[len(self.answers)]
        if len(self.answers) % 2 == 0:
            self.answers.append(self.chat.ask(text, **SHORT))
            return
        stream = self.chat.stream(text, **SHORT)
        assert "".join(stream) == stream.answer.text
        self.answers.append(stream.answer)

    def check(self, reference: Reference) -> None:
        """Fail if an answer or its number of prompt tokens is not that of `generate`."""
        sent: list[Mapping[str, Any]] = []
        for number, answer in enumerate(self.answers):
            pictures = [] if number else [self.name]
            sent.append({"role": "user", "text": QUESTIONS[number], "pictures": pictures})
            expected = reference.answer(sent, SHORT["max_new_tokens"])
            assert expected.matches(answer.text), (sent, expected.text)
            assert answer.usage.prompt_tokens == expected.prompt_tokens
            sent.append({"role": "assistant", "text": answer.text, "pictures": []})


def at_once(count: int, work: Callable[[int], Any]) -> list[Any]:
    """Return the results of `work` on 0 to `count - 1`, side by side."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


def recover(talks: list[Talk], reference: Reference) -> None:
    """Continue chats whose sessions are lost. Each one must open its session again and go on."""
    lost = [talk.chat.session_id for talk in talks]
    at_once(len(talks), lambda number: [talks[number].ask(), talks[number].ask()])
    assert [talk.answers[1].replayed for talk in talks] == [True] * len(talks), "all of them are recovered"
    assert not set(lost) & {talk.chat.session_id for talk in talks}
    for talk in talks:
        talk.check(reference)
        talk.chat.close()


def test_sessions_that_another_client_closed_are_recovered(fragile: Served, reference: Reference) -> None:
    with Endpoint(fragile.url) as endpoint:
        talks = at_once(CHATS + 1, lambda number: Talk.open(endpoint, number, "replay" if number else "raise"))
        for talk in talks:
            header = {SESSION_HEADER: talk.chat.session_id}
            httpx.post(f"{fragile.url}/invocations", json={"type": "close_session"}, headers=header, trust_env=False)
        with pytest.raises(SessionLost):
            talks[0].ask()
        recover(talks[1:], reference)


def test_expired_sessions_are_recovered(fragile: Served, reference: Reference) -> None:
    with Endpoint(fragile.url) as endpoint:
        talks = at_once(CHATS + 1, lambda number: Talk.open(endpoint, number, "replay" if number else "raise"))
        assert fragile.gauges(timeout_s=60, llava_open_sessions=0)["llava_open_sessions"] == 0
        with pytest.raises(SessionExpired):
            talks[0].ask()
        recover(talks[1:], reference)


def test_sessions_of_a_killed_worker_and_of_a_replaced_instance_are_recovered(
    fragile: Served, instances: list[TorchServe], reference: Reference
) -> None:
    """One death, seen by the clients of HAProxy, and by those of a local endpoint that has another instance too."""
    with LocalEndpoint([fragile.server, instances[0]], cut_parts=True) as local, Endpoint(fragile.url) as direct:
        platform = Endpoint(NAME, region="us-west-2", endpoint_url=local.url)
        pins = local.service.pins
        homes: dict[str, int] = {}

        def note_home(session: str) -> None:
            """Note the instance of a session before its pin can expire."""
            instance = pins.find(session)
            assert instance is not None
            homes[session] = instance.number

        def open_placed(number: int, on_lost: OnLost = "replay") -> Talk:
            return Talk.open(platform, number, on_lost, note_home)

        talks = at_once(CHATS, lambda number: Talk.open(direct, number))
        placed = [*at_once(2 * CHATS, open_placed), *at_once(2, lambda number: open_placed(number, "raise"))]
        raising = [Talk.open(direct, 0, "raise"), *placed[-2:]]
        moved = [talk for talk in placed[:-2] if homes[talk.chat.session_id] == 1]
        kept = [talk for talk in placed if homes[talk.chat.session_id] == 2]
        assert moved
        assert kept
        fragile.lose_server(lambda: os.kill(fragile.worker_pid, signal.SIGKILL))
        recover([*talks, *moved], reference)
        for talk in raising:
            if talk not in kept:
                with pytest.raises(SessionLost):
                    talk.ask()
                talk.chat.close()
        at_once(len(kept), lambda number: kept[number].ask())
        assert not any(talk.answers[-1].replayed for talk in kept), "the other instance has kept its sessions"
        for talk in kept:
            talk.check(reference)
            talk.chat.close()
        assert fragile.gauges(timeout_s=60, llava_open_sessions=0)["llava_open_sessions"] == 0
