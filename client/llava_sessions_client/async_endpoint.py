"""A server or a SageMaker endpoint, asynchronous."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from .answers import HistoryTurn, to_turns
from .async_chat import AsyncChat
from .chat import Images, load_media
from .clips import Clip, VideoSource
from .conversation import Conversation
from .drive_async import AsyncShell, AsyncTransport
from .http_async import AsyncHttpTransport
from .options import OnLost, Retries, Timeouts
from .pictures import Picture
from .shrink import DEFAULT_SIDE_PX
from .targets import is_http, settings_of

if TYPE_CHECKING:
    import httpx


LoadMedia = Callable[[], tuple[tuple[Picture, ...], Clip | None]]


class AsyncEndpoint:
    """A server or a SageMaker endpoint. As `Endpoint`, from one event loop."""

    def __init__(
        self,
        name_or_url: str,
        *,
        region: str | None = None,
        endpoint_url: str | None = None,
        timeout_s: float | Timeouts | None = None,
        retries: int | Retries | None = None,
        session_token: str | None = None,
        max_side_px: int = DEFAULT_SIDE_PX,
        max_body_bytes: int | None = None,
        http_client: httpx.AsyncClient | None = None,
        boto_client: Any = None,
    ) -> None:
        """Describe the server. The arguments are those of `Endpoint`."""
        self.name_or_url = name_or_url
        self._region = region
        self._endpoint_url = endpoint_url
        self._http_client = http_client
        self._boto_client = boto_client
        self._settings = settings_of(
            name_or_url,
            timeouts=Timeouts.of(timeout_s),
            retries=Retries.of(retries),
            session_token=session_token,
            max_side_px=max_side_px,
            max_body_bytes=max_body_bytes,
        )
        self._transport: AsyncTransport | None = None
        self._chats: set[AsyncChat] = set()
        self._opening = 0
        self._entered = False

    def open(
        self,
        pictures: Images = None,
        *,
        video: VideoSource | None = None,
        video_frames: int | None = None,
        history: Sequence[HistoryTurn] = (),
        on_lost: OnLost = "raise",
    ) -> Opening:
        """Open a session. `await` the result for its chat, or use it in `async with`. As `Endpoint.open`."""
        return Opening(self, partial(load_media, pictures, video, video_frames, self._region), history, on_lost)

    async def close(self) -> None:
        """Close all chats and the connections."""
        for chat in list(self._chats):
            await chat.__aexit__(None, None, None)
        self._entered = False
        await self._close_unused()

    async def __aenter__(self) -> AsyncEndpoint:
        self._entered = True
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def make_chat(self, load: LoadMedia, history: Sequence[HistoryTurn], on_lost: OnLost) -> AsyncChat:
        """Open a session. Use `open` instead."""
        pictures, clip = await asyncio.to_thread(load)
        conversation = Conversation(self._settings, pictures, to_turns(history), on_lost, clip=clip)
        self._opening += 1
        try:
            if self._transport is None:
                self._transport = await self._make_transport()
            await AsyncShell(self._transport).run(conversation.open())
            chat = AsyncChat(conversation, self._transport, self._region, self._forget)
            self._chats.add(chat)
        finally:
            self._opening -= 1
            await self._close_unused()
        return chat

    async def _forget(self, chat: AsyncChat) -> None:
        self._chats.discard(chat)
        await self._close_unused()

    async def _close_unused(self) -> None:
        if self._entered or self._opening or self._chats or self._transport is None:
            return
        transport, self._transport = self._transport, None
        await transport.close()

    async def _make_transport(self) -> AsyncTransport:
        if is_http(self.name_or_url):
            return AsyncHttpTransport(self.name_or_url, self._http_client)
        return await asyncio.to_thread(self._make_boto_transport)

    def _make_boto_transport(self) -> AsyncTransport:
        from .sagemaker import SageMakerTransport, make_client  # here: boto3 takes a third of a second
        from .sagemaker_async import ThreadedTransport

        client = self._boto_client or make_client(self._settings.timeouts, self._region, self._endpoint_url)
        return ThreadedTransport(SageMakerTransport(self.name_or_url, client, own=self._boto_client is None))


class Opening:
    """A session that is being opened."""

    def __init__(
        self, endpoint: AsyncEndpoint, load: LoadMedia, history: Sequence[HistoryTurn], on_lost: OnLost
    ) -> None:
        """`load` returns the pictures and the clip; it blocks."""
        self._endpoint = endpoint
        self._load = load
        self._history = history
        self._on_lost = on_lost
        self._chat: AsyncChat | None = None

    def __await__(self) -> Generator[Any, None, AsyncChat]:
        return self._endpoint.make_chat(self._load, self._history, self._on_lost).__await__()

    async def __aenter__(self) -> AsyncChat:
        self._chat = await self
        return self._chat

    async def __aexit__(self, *error: Any) -> None:
        if self._chat is not None:
            await self._chat.__aexit__(*error)
