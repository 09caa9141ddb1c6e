"""A picture chat, asynchronous."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine
from functools import partial
from types import TracebackType
from typing import Any, Unpack

from .answers import CANCELLED, Answer
from .chat import Images, load_media, one_turn
from .clips import VideoSource
from .conversation import Conversation
from .descriptions import Description
from .drive_async import AsyncShell, AsyncTransport, Result
from .effects import Core
from .errors import ClientError
from .options import AskOptions
from .pictures import Picture, PictureSource, load_picture
from .state import ChatState

log = logging.getLogger(__name__)


class AsyncAnswerStream(AsyncIterator[str]):
    """The pieces of an answer. As `AnswerStream`, except that leaving the loop alone cancels nothing at once.

    `await stream.cancel()`, the end of an `async with` block, the next question, or the end of the chat cancels it.
    """

    def __init__(
        self, pieces: AsyncGenerator[str, None], result: Result, stop: Callable[[], Coroutine[Any, Any, None]]
    ) -> None:
        """`stop` cancels the turn on the server while another task waits for a piece."""
        self._pieces = pieces
        self._result = result
        self._stop = stop
        self._lock = asyncio.Lock()  # of `_pieces`
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
        """Whether a task waits for a piece now."""
        return self._lock.locked()

    @property
    def is_done(self) -> bool:
        """Whether the answer has ended."""
        return self._answer is not None

    def __aiter__(self) -> AsyncAnswerStream:
        return self

    async def __anext__(self) -> str:
        async with self._lock:
            try:
                piece = await anext(self._pieces)
            except StopAsyncIteration:
                self._answer = self._answer or self._result.value
                raise
            self.text += piece
        return piece

    async def cancel(self) -> None:
        """End the answer and roll the session back. May be called by another task, and more than once."""
        if self._lock.locked():
            await self._stop()
            return
        async with self._lock:
            await self._pieces.aclose()
            self._answer = self._answer or Answer(self.text, CANCELLED)

    async def __aenter__(self) -> AsyncAnswerStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.cancel()


class AsyncChat(ChatState):
    """An open session with its conversation. As `Chat`; make one by `AsyncEndpoint.open`."""

    def __init__(
        self,
        conversation: Conversation,
        transport: AsyncTransport,
        region: str | None,
        on_close: Callable[[AsyncChat], Coroutine[Any, Any, None]],
    ) -> None:
        """Use `AsyncEndpoint.open` instead."""
        super().__init__(conversation)
        self._transport = transport
        self._region = region
        self._on_close = on_close
        self._lock = threading.Lock()  # never waited for
        self._stream: AsyncAnswerStream | None = None

    async def ask(
        self,
        text: str,
        *,
        images: Images = (),
        video: VideoSource | None = None,
        video_frames: int | None = None,
        **options: Unpack[AskOptions],
    ) -> Answer:
        """Ask a question and return its answer. As `Chat.ask`."""
        pictures, clip = await asyncio.to_thread(load_media, images, video, video_frames, self._region)
        return await self._run(self._conversation.ask(text, pictures, options, stream=False, clip=clip))

    def stream(
        self,
        text: str,
        *,
        images: Images = (),
        video: VideoSource | None = None,
        video_frames: int | None = None,
        **options: Unpack[AskOptions],
    ) -> AsyncAnswerStream:
        """Do as `ask`, and return the pieces of the answer as they arrive. The iteration raises `ClientError`."""

        async def core() -> Core[Answer]:
            pictures, clip = await asyncio.to_thread(load_media, images, video, video_frames, self._region)
            return self._conversation.ask(text, pictures, options, stream=True, clip=clip)

        return self._streamed(core)

    async def add_image(self, picture: PictureSource | Picture) -> Picture:
        """Show a picture with the next question. Raise `InvalidPicture`."""
        loaded = await asyncio.to_thread(load_picture, picture, region=self._region)
        self._conversation.waiting += (loaded,)
        return loaded

    async def edit(self, index: int, text: str, **options: Unpack[AskOptions]) -> Answer:
        """Replace question `index` (0 is the first, -1 the last) and answer it. Later turns are dropped."""
        return await self._run(self._conversation.rewrite(index, text, options, stream=False))

    def stream_edit(self, index: int, text: str, **options: Unpack[AskOptions]) -> AsyncAnswerStream:
        """Do as `edit`, and return the pieces of the answer."""
        return self._streamed(partial(_ready, self._conversation.rewrite(index, text, options, stream=True)))

    async def retry(self, **options: Unpack[AskOptions]) -> Answer:
        """Ask the last question again. A greedy answer stays the same; use `temperature` for another one."""
        return await self._run(self._conversation.rewrite(-1, None, options, stream=False))

    def stream_retry(self, **options: Unpack[AskOptions]) -> AsyncAnswerStream:
        """Do as `retry`, and return the pieces of the answer."""
        return self._streamed(partial(_ready, self._conversation.rewrite(-1, None, options, stream=True)))

    async def describe(self) -> Description:
        """Return where the session is, its memory and its expiry. Allowed during an answer. Raise `ClientError`."""
        return await AsyncShell(self._transport).run(self._conversation.describe())

    async def close(self) -> None:
        """Close the session. A running answer is cancelled. Raise `ClientError` if the server cannot be reached."""
        try:
            if self._stream is not None:
                with contextlib.suppress(ClientError):  # the close ends the turn too
                    await self._stream.cancel()
            await AsyncShell(self._transport).run(self._conversation.close())
        finally:
            await self._on_close(self)

    async def __aenter__(self) -> AsyncChat:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the session. An error of the close is logged: the session then expires by itself."""
        try:
            await self.close()
        except ClientError as failed:
            log.warning("close_failed error=%s", type(failed).__name__)

    # --- one question at a time ---------------------------------------------------------------------------------------

    async def _run(self, core: Core[Answer]) -> Answer:
        await _leave(self._stream)
        with one_turn(self._lock):
            return self._noted(await AsyncShell(self._transport).run(core))

    def _streamed(self, core: Callable[[], Awaitable[Core[Answer]]]) -> AsyncAnswerStream:
        result = Result()
        left = self._stream

        async def pieces() -> AsyncGenerator[str, None]:
            await _leave(left)
            with one_turn(self._lock):
                shell_pieces = AsyncShell(self._transport).pieces(await core(), result)
                try:
                    async for piece in shell_pieces:
                        yield piece
                finally:
                    await shell_pieces.aclose()
                self._noted(result.value)

        self._stream = AsyncAnswerStream(pieces(), result, self._stop)
        return self._stream

    async def _stop(self) -> None:
        """Cancel the running turn on the server. The task that reads the answer sees its end."""
        limits = self._conversation.cleanup_budget().limits()
        await self._transport.call(self._conversation.stop(), limits)


async def _leave(stream: AsyncAnswerStream | None) -> None:
    """Cancel a stream that the caller has left unfinished."""
    if stream is not None and not stream.is_done and not stream.is_reading:
        await stream.cancel()


async def _ready(core: Core[Answer]) -> Core[Answer]:
    return core
