"""A picture chat, synchronous."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from types import TracebackType
from typing import Unpack

from .answers import CANCELLED, Answer
from .clips import Clip, VideoSource, load_optional_clip
from .conversation import Conversation
from .descriptions import Description
from .drive import Shell, Transport
from .effects import Core
from .errors import Busy, ClientError
from .options import AskOptions
from .pictures import Picture, PictureSource, load_picture, load_pictures
from .state import ChatState

log = logging.getLogger(__name__)
Images = PictureSource | Picture | Sequence[PictureSource | Picture] | None


def load_media(
    images: Images, video: VideoSource | None, video_frames: int | None, region: str | None
) -> tuple[tuple[Picture, ...], Clip | None]:
    """Return the pictures and the clip of an open or of a question. Raise `InvalidPicture`."""
    return load_pictures(images, region=region), load_optional_clip(video, frames=video_frames, region=region)


class AnswerStream(Iterator[str]):
    """The pieces of an answer. The question is sent when the first piece is asked for.

    Leaving the loop and dropping the stream, `cancel()`, or the end of a `with` block cancels the turn: the session is
    then as it was before the question. `answer` is the whole answer after the last piece.
    """

    def __init__(self, pieces: Generator[str, None, Answer], stop: Callable[[], None]) -> None:
        """`stop` cancels the turn on the server while another thread waits for a piece."""
        self._pieces = pieces
        self._stop = stop
        self._lock = threading.Lock()  # of `_pieces`
        self._answer: Answer | None = None
        self.text = ""

    @property
    def answer(self) -> Answer:
        """The answer. `RuntimeError` before its end. After a cancel: the text so far, and "cancelled"."""
        if self._answer is None:
            raise RuntimeError("the answer must be read to its end, got an unfinished stream")
        return self._answer

    @property
    def is_reading(self) -> bool:
        """Whether a thread waits for a piece now."""
        return self._lock.locked()

    @property
    def is_done(self) -> bool:
        """Whether the answer has ended."""
        return self._answer is not None

    def __iter__(self) -> AnswerStream:
        return self

    def __next__(self) -> str:
        with self._lock:
            try:
                piece = next(self._pieces)
            except StopIteration as stop:
                self._answer = self._answer or stop.value
                raise StopIteration from None
            self.text += piece
        return piece

    def cancel(self) -> None:
        """End the answer and roll the session back. May be called by another thread, and more than once.

        If another thread waits for a piece, its iteration ends soon after, with `finish_reason` "cancelled".
        """
        if not self._lock.acquire(blocking=False):
            self._stop()
            return
        try:
            self._pieces.close()
            self._answer = self._answer or Answer(self.text, CANCELLED)
        finally:
            self._lock.release()

    def __enter__(self) -> AnswerStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.cancel()


@contextmanager
def one_turn(lock: threading.Lock) -> Generator[None, None, None]:
    """Hold the lock of a chat. Raise `Busy` if another thread holds it."""
    if not lock.acquire(blocking=False):
        raise Busy(409, "session_busy", "The chat is still answering another question; wait for it or cancel it.")
    try:
        yield
    finally:
        lock.release()


def leave(stream: AnswerStream | None) -> None:
    """Cancel a stream that the caller has left unfinished."""
    if stream is not None and not stream.is_done and not stream.is_reading:
        stream.cancel()


class Chat(ChatState):
    """An open session with its conversation. Make one by `Endpoint.open`, and close it: `with` does.

    One question runs at a time: a second one from another thread raises `Busy`. A stream that was left unfinished is
    cancelled by the next question.
    """

    def __init__(
        self, conversation: Conversation, transport: Transport, region: str | None, on_close: Callable[[Chat], None]
    ) -> None:
        """Use `Endpoint.open` instead."""
        super().__init__(conversation)
        self._transport = transport
        self._region = region
        self._on_close = on_close
        self._lock = threading.Lock()
        self._stream: AnswerStream | None = None

    def ask(
        self,
        text: str,
        *,
        images: Images = (),
        video: VideoSource | None = None,
        video_frames: int | None = None,
        **options: Unpack[AskOptions],
    ) -> Answer:
        """Ask a question and return its answer. `images` and the clip `video` are shown with it. Raise `ClientError`.

        `video_frames`: the most frames that the server samples from a video file.
        """
        pictures, clip = load_media(images, video, video_frames, self._region)
        return self._run(self._conversation.ask(text, pictures, options, stream=False, clip=clip))

    def stream(
        self,
        text: str,
        *,
        images: Images = (),
        video: VideoSource | None = None,
        video_frames: int | None = None,
        **options: Unpack[AskOptions],
    ) -> AnswerStream:
        """Do as `ask`, and return the pieces of the answer as they arrive. The iteration raises `ClientError`."""
        pictures, clip = load_media(images, video, video_frames, self._region)
        return self._streamed(self._conversation.ask(text, pictures, options, stream=True, clip=clip))

    def add_image(self, picture: PictureSource | Picture) -> Picture:
        """Show a picture with the next question. Raise `InvalidPicture`."""
        loaded = load_picture(picture, region=self._region)
        self._conversation.waiting += (loaded,)
        return loaded

    def edit(self, index: int, text: str, **options: Unpack[AskOptions]) -> Answer:
        """Replace question `index` (0 is the first, -1 the last) and answer it. Later turns are dropped."""
        return self._run(self._conversation.rewrite(index, text, options, stream=False))

    def stream_edit(self, index: int, text: str, **options: Unpack[AskOptions]) -> AnswerStream:
        """Do as `edit`, and return the pieces of the answer."""
        return self._streamed(self._conversation.rewrite(index, text, options, stream=True))

    def retry(self, **options: Unpack[AskOptions]) -> Answer:
        """Ask the last question again. A greedy answer stays the same; use `temperature` for another one."""
        return self._run(self._conversation.rewrite(-1, None, options, stream=False))

    def stream_retry(self, **options: Unpack[AskOptions]) -> AnswerStream:
        """Do as `retry`, and return the pieces of the answer."""
        return self._streamed(self._conversation.rewrite(-1, None, options, stream=True))

    def describe(self) -> Description:
        """Return where the session is, its memory and its expiry. Allowed during an answer. Raise `ClientError`."""
        return Shell(self._transport).run(self._conversation.describe())

    def close(self) -> None:
        """Close the session. A running answer is cancelled. Raise `ClientError` if the server cannot be reached."""
        try:
            if self._stream is not None:
                with suppress(ClientError):  # the close ends the turn too
                    self._stream.cancel()
            Shell(self._transport).run(self._conversation.close())
        finally:
            self._on_close(self)

    def __enter__(self) -> Chat:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the session. An error of the close is logged: the session then expires by itself."""
        try:
            self.close()
        except ClientError as failed:
            log.warning("close_failed error=%s", type(failed).__name__)

    # --- one question at a time ---------------------------------------------------------------------------------------

    def _run(self, core: Core[Answer]) -> Answer:
        leave(self._stream)
        with one_turn(self._lock):
            return self._noted(Shell(self._transport).run(core))

    def _streamed(self, core: Core[Answer]) -> AnswerStream:
        leave(self._stream)

        def pieces() -> Generator[str, None, Answer]:
            with one_turn(self._lock):
                answer = yield from Shell(self._transport).pieces(core)
                return self._noted(answer)

        self._stream = AnswerStream(pieces(), partial(_stop, self._transport, self._conversation))
        return self._stream


def _stop(transport: Transport, conversation: Conversation) -> None:
    """Cancel the running turn on the server. The thread that reads the answer sees its end."""
    transport.call(conversation.stop(), conversation.cleanup_budget().limits())
