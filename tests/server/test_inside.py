"""Shows on the real server that no spelling of an address inside is connected to: real listeners on the port that it
would use, on all addresses of this machine, see nobody.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import pytest

from models.shapes.scenes import HELD_OUT_SEEDS, make_scene
from tests.support.private_hosts import PRIVATE_HOSTS
from tests.support.wire import ChatSession

pytestmark = pytest.mark.usefixtures("same_worker")
PORT = 443  # the only one that is served


class Listener:
    """Takes connections on all addresses of this machine, and counts them."""

    def __init__(self) -> None:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        self._socket = socket.create_server(("", PORT), family=family, dualstack_ipv6=dual)
        self.seen = threading.Semaphore(0)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                self._socket.accept()[0].close()
                self.seen.release()

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(scope="module")
def listener() -> Iterator[Listener]:
    try:
        found = Listener()
    except OSError as error:
        pytest.skip(
            f"port {PORT} can't be listened on here: {error.strerror}; unit/test_media_fetch.py covers the same hosts"
        )
    yield found
    found.close()


def test_no_spelling_of_an_address_inside_is_connected_to(http: httpx.Client, listener: Listener) -> None:
    def refused(host: str) -> tuple[int, str]:
        body = {"type": "start_session", "path": f"https://{host}/latest/meta-data"}
        reply = http.post("/invocations", json=body)
        return reply.status_code, reply.json()["error"]["code"]

    with ThreadPoolExecutor(8) as pool:
        told = dict(zip(PRIVATE_HOSTS, pool.map(refused, PRIVATE_HOSTS), strict=True))
    assert set(told.values()) == {(400, "invalid_request")}, told
    assert not listener.seen.acquire(blocking=False)
    with socket.create_connection(("127.0.0.1", PORT)):
        assert listener.seen.acquire(timeout=10), "who does connect is seen"


def test_a_picture_shown_with_a_question_may_not_come_from_inside_either(
    http: httpx.Client, listener: Listener
) -> None:
    chat = ChatSession.open(http, make_scene(HELD_OUT_SEEDS[0]).draw(72))
    for host in ("127.0.0.1", "[::1]", "2130706433", "localhost", "169.254.169.254"):
        body = {"type": "send_text_prompt", "prompt_text": "And here?", "path": f"https://{host}/"}
        reply = http.post("/invocations", json=body, headers=chat.headers)
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_request")
    assert not listener.seen.acquire(blocking=False)
    assert chat.ask("How many shapes are there?")["finish_reason"] == "stop"
    chat.close()
