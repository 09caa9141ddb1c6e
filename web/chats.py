"""The chats of the page. Each has one session of the client, and is known by a random ID that only its page has.

Methods that talk to the model server block: call them on a thread.
"""

from __future__ import annotations

import contextlib
import itertools
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from llava_sessions_client import AnswerStream, AskOptions, Chat, ClientError, Endpoint, SessionLost, Turn

from .pictures import MAX_PICTURES, StoredPicture, is_clip, render
from .problems import Problem, chat_not_found

MAX_CHATS = 32
MAX_BYTES = 512 * 1024 * 1024
UNUSED_S = 600.0
_ENDED = {"place": "ended"}


@dataclass(frozen=True)
class Comparison:
    """A turn without a session. `ttft_ms`: from the open with the whole conversation to the first piece."""

    ttft_ms: float
    prompt_tokens: int


@dataclass
class WebChat:
    """One chat. `lock` is held while the chat opens, answers or is measured; `changing` while its pictures change.

    `sending`: the pictures of the running question. `numbers`: of the pictures to come.
    A browser may keep a removed picture for an hour, so no number is used twice.
    """

    id: str
    session: Chat
    pictures: list[StoredPicture]
    lock: threading.Lock = field(default_factory=threading.Lock)
    changing: threading.Lock = field(default_factory=threading.Lock)
    running: AnswerStream | None = None
    sending: list[StoredPicture] = field(default_factory=list)
    comparisons: dict[Turn, Comparison] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    used_at: float = field(default_factory=time.monotonic)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The conversation."""
        return self.session.turns

    @property
    def pending(self) -> list[StoredPicture]:
        """The pictures that the next question shows."""
        return [picture for picture in self.pictures if picture.pending]

    @property
    def held_bytes(self) -> int:
        """The memory that the pictures take."""
        return sum(picture.held_bytes for picture in self.pictures)

    def picture(self, number: int) -> StoredPicture:
        """Return a picture by its number. Raise `Problem`."""
        found = next((one for one in self.pictures if one.number == number), None)
        if found is None:
            raise Problem("picture_not_found", "This picture is gone.", "Reload the page.", status=404)
        return found

    def attach(self, data: bytes, shown: bytes, media_type: str) -> None:
        """Add a picture or a clip to the next question. Raise `Problem`."""
        with self.changing:
            waiting = [one for one in self.pending if all(one is not sent for sent in self.sending)]
            if is_clip(data) and any(one.is_clip for one in waiting):
                raise Problem(
                    "too_many", "A question shows at most one clip.", "Remove the other clip first.", status=413
                )
            if len(self.pictures) >= MAX_PICTURES:
                title = f"A chat has at most {MAX_PICTURES} pictures and clips."
                raise Problem("too_many", title, "Start a new chat.", status=413)
            self.pictures.append(StoredPicture(next(self.numbers), data, shown, media_type, pending=True))

    def detach(self, number: int) -> None:
        """Remove a picture from the next question. Raise `Problem`."""
        with self.changing:
            found = self.picture(number)
            if any(one is found for one in self.sending):
                raise Problem("busy", "This picture is being sent.", "Wait for the answer, or stop it.", status=409)
            if not found.pending:
                advice = "Start a new chat without it."
                raise Problem("picture_in_use", "This picture is part of the conversation.", advice)
            self.pictures = [one for one in self.pictures if one is not found]

    def ask(self, text: str, options: AskOptions) -> AnswerStream:
        """Ask a question with the pictures and the clip that wait now. Later ones wait for another question."""
        with self.changing:
            self.sending = self.pending
        images = [one.data for one in self.sending if not one.is_clip]
        clip = next((one.data for one in self.sending if one.is_clip), None)
        return self.session.stream(text, images=images, video=clip, **options)

    def asked(self, index: int) -> None:
        """Note that turn `index` is the last one now, and shows `sending`. What belongs to later turns is gone."""
        with self.changing:
            self.pictures = [one for one in self.pictures if one.turn is None or one.turn <= index]
            for picture in self.sending:
                picture.pending = False
                picture.turn = index
        self.comparisons = {turn: found for turn, found in self.comparisons.items() if turn in self.turns}

    def stop(self) -> bool:
        """Stop the running answer. Return False if there is none. Raise `ClientError`."""
        stream = self.running
        if stream is None:
            return False
        stream.cancel()
        return True

    def where(self) -> dict[str, Any]:
        """Return where the session is, its memory, and the seconds to its expiry."""
        try:
            found = self.session.describe()
        except SessionLost:
            return _ENDED
        except ClientError:  # out of reach, or without this request
            return {"place": "unknown", "expires_in_s": _seconds_to(self.session.expires_at)}
        return {
            "place": found.residency,
            "expires_in_s": _seconds_to(found.expires_at),
            "cached_tokens": found.cached_tokens,
            "memory": {
                "kv_bytes": found.kv_bytes,
                "offloaded_bytes": found.offloaded_bytes,
                "features_bytes": found.features_bytes,
            },
        }

    def shown(self) -> dict[str, Any]:
        """Return the chat as the page reads it."""
        return {
            "id": self.id,
            "turns": [self._turn(index, turn) for index, turn in enumerate(self.turns)],
            "pictures": [{"number": one.number, "turn": one.turn, "pending": one.pending} for one in self.pictures],
            "notices": list(self.session.notices),
        }

    def _turn(self, index: int, turn: Turn) -> dict[str, Any]:
        answer = turn.answer
        compared = self.comparisons.get(turn)
        return {
            "question": turn.text,
            "answer": answer.text,
            "finish_reason": answer.finish_reason,
            "pictures": [one.number for one in self.pictures if one.turn == index],
            "ttft_ms": answer.ttft_s * 1000,
            "total_ms": answer.total_s * 1000,
            "prompt_tokens": answer.usage.prompt_tokens,
            "cached_tokens": answer.usage.cached_tokens,
            "completion_tokens": answer.usage.completion_tokens,
            "replayed": answer.replayed,
            "comparison": None if compared is None else vars(compared) | {"cached_tokens": 0},
        }


class Chats:
    """All chats of this page's server. Their number, and the memory of their pictures, are limited."""

    def __init__(
        self,
        endpoint: Endpoint,
        make_endpoint: Callable[[str], Endpoint],
        *,
        most: int = MAX_CHATS,
        max_bytes: int = MAX_BYTES,
        unused_s: float = UNUSED_S,
    ) -> None:
        """`make_endpoint` makes another client of the same model server, whose sessions have the given token.

        A chat that no request has named for `unused_s` may be closed for another one.
        """
        self._endpoint = endpoint
        self._make_endpoint = make_endpoint
        self._most = most
        self._max_bytes = max_bytes
        self._unused_s = unused_s
        self._lock = threading.Lock()  # of the fields below
        self._chats: dict[str, WebChat] = {}
        self._opening: dict[str, StoredPicture] = {}
        self._is_ended = False
        self._measuring = threading.Lock()

    def all(self) -> list[WebChat]:
        """Return the open chats, oldest first."""
        return list(self._chats.values())

    def find(self, chat_id: str) -> WebChat:
        """Return a chat. Raise `Problem`."""
        with self._lock:
            chat = self._chats.get(chat_id)
            if chat is None:
                raise chat_not_found()
            chat.used_at = time.monotonic()
        return chat

    def open(self, data: bytes) -> WebChat:
        """Open a chat on a picture or a clip. Raise `Problem` or `ClientError`."""
        picture = StoredPicture(0, data, *render(data))
        chat_id = secrets.token_urlsafe(16)
        with self._lock:
            dropped = self._make_room(picture.held_bytes, chats=1)
            self._opening[chat_id] = picture
        try:
            _close_all(dropped)
            session = self._endpoint.open(video=data) if picture.is_clip else self._endpoint.open(data)
            chat = WebChat(chat_id, session, [picture])
        except BaseException:
            with self._lock:
                del self._opening[chat_id]
            raise
        with self._lock:
            del self._opening[chat_id]
            is_late = self._is_ended
            if not is_late:
                self._chats[chat_id] = chat
        if is_late:
            _close(chat.session)
            raise chat_not_found()
        return chat

    def attach(self, chat: WebChat, data: bytes) -> None:
        """Add a picture or a clip to the next question of a chat. Raise `Problem`."""
        shown, media_type = render(data)
        dropped: list[WebChat] = []
        try:
            with self._lock:
                if chat.id not in self._chats:  # closed by another request during the upload
                    raise chat_not_found()
                dropped = self._make_room(StoredPicture(0, data, shown, media_type).held_bytes, user=chat)
                chat.attach(data, shown, media_type)
        finally:
            _close_all(dropped)

    def _make_room(self, size: int, *, chats: int = 0, user: WebChat | None = None) -> list[WebChat]:
        """Remove unused chats until there is memory for a picture, and room for so many new chats. Raise `Problem`.

        Return the removed chats, whose sessions the caller closes. Must be called with `_lock`. A chat whose answer is
        running is in use, and so is `user`, which receives the picture.
        """
        count = len(self._chats) + len(self._opening) + chats
        held = size + sum(one.held_bytes for one in self._opening.values())
        held += sum(chat.held_bytes for chat in self._chats.values())
        latest = time.monotonic() - self._unused_s
        unused = [chat for chat in self._chats.values() if chat.used_at <= latest and not chat.lock.locked()]
        unused = [chat for chat in unused if chat is not user]
        unused.sort(key=lambda chat: chat.used_at, reverse=True)
        dropped: list[WebChat] = []
        while count > self._most or held > self._max_bytes:
            if not unused:
                raise _no_memory() if held > self._max_bytes else _too_many()
            dropped.append(unused.pop())
            count -= 1
            held -= dropped[-1].held_bytes
        for chat in dropped:
            del self._chats[chat.id]
        return dropped

    def reopen(self, chat: WebChat) -> None:
        """Continue a chat in a new session with its history. Raise `Problem` or `ClientError`."""
        with alone(chat):
            old = chat.session
            fresh = self._endpoint.open(old.pictures, video=old.clip, history=old.turns)
            with self._lock:
                is_closed = chat.id not in self._chats
                if not is_closed:
                    chat.session = fresh
            if is_closed:  # by a request of another tab during the open
                _close(fresh)
                raise chat_not_found()
            _close(old)

    def compare(self, chat: WebChat, index: int) -> None:
        """Measure a turn without a session. Raise `Problem` or `ClientError`.

        The whole conversation is opened under a fresh session token, so that no picture and no prefix is shared with
        another session, and asked. The session is closed at once. One measurement runs at a time.
        """
        with alone(chat):
            turns = chat.turns
            if not 0 <= index < len(turns):
                raise Problem("turn_not_found", "This turn is gone.", "Reload the page.", status=404)
            turn = turns[index]
            with self._measuring, self._make_endpoint(secrets.token_urlsafe(32)) as other:
                other.open().close()  # makes the connection, which the session has too
                began = time.perf_counter()
                session = chat.session
                with other.open(session.pictures, video=session.clip, history=turns[:index]) as fresh:
                    stream = fresh.stream(turn.text, images=turn.pictures, video=turn.clip, max_new_tokens=8)
                    next(stream, None)
                    ttft_s = time.perf_counter() - began
                    for _ in stream:
                        pass
            chat.comparisons[turn] = Comparison(ttft_s * 1000, stream.answer.usage.prompt_tokens)

    def close(self, chat: WebChat) -> None:
        """Close a chat and its session. A model server that cannot be reached lets the session expire."""
        with self._lock:
            self._chats.pop(chat.id, None)
            session = chat.session
        _close(session)

    def stop_all(self) -> None:
        """Stop the running answers. Their turns are rolled back."""
        _at_once(_stop, self.all())

    def close_all(self) -> None:
        """Close every chat, and those that are being opened."""
        with self._lock:
            self._is_ended = True
            chats = self.all()
            self._chats.clear()
        _close_all(chats)


@contextlib.contextmanager
def alone(chat: WebChat) -> Iterator[None]:
    """Hold a chat's lock for a block. Raise `Problem` if the chat is answering."""
    if not chat.lock.acquire(blocking=False):
        raise Problem("busy", "This chat is still answering.", "Wait for the answer, or stop it.", status=409)
    try:
        yield
    finally:
        chat.lock.release()


def _too_many() -> Problem:
    return Problem("too_many_chats", "This page has too many open chats.", "Close a chat first.", status=429)


def _no_memory() -> Problem:
    title = "The pictures and clips of all chats take too much memory."
    return Problem("too_many_pictures", title, "Close a chat first, or send a smaller file.", status=429)


def _at_once(work: Callable[[WebChat], None], chats: list[WebChat]) -> None:
    """Call `work` for all chats at the same time: a model server that is gone takes seconds for each."""
    if chats:
        with ThreadPoolExecutor(len(chats)) as pool:
            list(pool.map(work, chats))


def _stop(chat: WebChat) -> None:
    with contextlib.suppress(ClientError):
        chat.stop()


def _close_all(chats: list[WebChat]) -> None:
    _at_once(lambda chat: _close(chat.session), chats)


def _close(session: Chat) -> None:
    with contextlib.suppress(ClientError):  # then the session expires
        session.close()


def _seconds_to(expiry: datetime | None) -> float | None:
    return None if expiry is None else (expiry - datetime.now(UTC)).total_seconds()
