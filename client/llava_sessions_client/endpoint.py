"""A server or a SageMaker endpoint, synchronous."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .answers import HistoryTurn, to_turns
from .chat import Chat, Images, load_media
from .clips import VideoSource
from .conversation import Conversation
from .drive import Shell, Transport
from .http import HttpTransport
from .options import OnLost, Retries, Timeouts
from .shrink import DEFAULT_SIDE_PX
from .targets import is_http, settings_of

if TYPE_CHECKING:
    import httpx


class Endpoint:
    """A server of LLaVA Sessions, by URL, or a SageMaker endpoint, by name.

    Opening a chat makes the connections. They are closed at the end of a `with` block over the endpoint; without one,
    when the last chat is closed. An endpoint may be used by several threads.
    """

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
        http_client: httpx.Client | None = None,
        boto_client: Any = None,
    ) -> None:
        """Describe the server. Raise `NotConfigured`.

        `name_or_url`: `http://...` or `https://...` is a server; any other string is the name of a SageMaker endpoint.
        `region` and `endpoint_url`: as in boto3, for SageMaker and `s3://` pictures. `timeout_s`: of each call with all
        its retries; `Timeouts` has the rest. `session_token`: binds the sessions to a secret of 16 to 256 characters.
        `max_side_px`: larger pictures are shrunk; set it to what the model can use. `max_body_bytes`: of one request;
        6 MiB on SageMaker, else 32 MiB. `http_client` and `boto_client`: clients of the caller, which closes them.
        """
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
        self._lock = threading.Lock()
        self._transport: Transport | None = None
        self._chats: set[Chat] = set()
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
    ) -> Chat:
        """Open a session on one picture, several, a clip, or nothing, and return its chat. Raise `ClientError`.

        `video`: a video file or a list of frames, as in `load_clip`, instead of pictures. `video_frames`: the most
        frames that the server samples from the file.
        `history`: earlier turns, as `Chat.turns` or as pairs of question and answer; they are computed in one prefill.
        `on_lost`: what a question does if the server has lost the session: "raise" `SessionLost`, or "replay": open a
        new session with the history and ask again.
        """
        loaded, clip = load_media(pictures, video, video_frames, self._region)
        conversation = Conversation(self._settings, loaded, to_turns(history), on_lost, clip=clip)
        with self._lock:
            self._opening += 1
        try:
            transport = self._connected()
            Shell(transport).run(conversation.open())
            chat = Chat(conversation, transport, self._region, self._forget)
            with self._lock:
                self._chats.add(chat)
        finally:
            with self._lock:
                self._opening -= 1
            self._close_unused()
        return chat

    def close(self) -> None:
        """Close all chats and the connections."""
        for chat in list(self._chats):
            chat.__exit__(None, None, None)
        with self._lock:
            self._entered = False
        self._close_unused()

    def __enter__(self) -> Endpoint:
        self._entered = True
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- connections --------------------------------------------------------------------------------------------------

    def _connected(self) -> Transport:
        with self._lock:
            if self._transport is None:
                self._transport = self._make_transport()
            return self._transport

    def _forget(self, chat: Chat) -> None:
        with self._lock:
            self._chats.discard(chat)
        self._close_unused()

    def _close_unused(self) -> None:
        with self._lock:
            if self._entered or self._opening or self._chats or self._transport is None:
                return
            transport, self._transport = self._transport, None
        transport.close()

    def _make_transport(self) -> Transport:
        if is_http(self.name_or_url):
            return HttpTransport(self.name_or_url, self._http_client)
        from .sagemaker import SageMakerTransport, make_client  # here: boto3 takes a third of a second

        client = self._boto_client or make_client(self._settings.timeouts, self._region, self._endpoint_url)
        return SageMakerTransport(self.name_or_url, client, own=self._boto_client is None)
