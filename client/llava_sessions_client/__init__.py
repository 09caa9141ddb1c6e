"""Python client of LLaVA Sessions.

from llava_sessions_client import Endpoint

with Endpoint("http://127.0.0.1:8080").open("kitchen.jpg") as chat:  # or the name of a SageMaker endpoint
    print(chat.ask("What is on the table?"))
    for piece in chat.stream("And behind it?"):
        print(piece, end="", flush=True)
    chat.add_image("closer.jpg")

docs/client.md has more.
"""

from .answers import Answer, Timings, Turn, Usage
from .async_chat import AsyncAnswerStream, AsyncChat
from .async_endpoint import AsyncEndpoint
from .chat import AnswerStream, Chat
from .clips import Clip, VideoSource, load_clip
from .descriptions import Description
from .endpoint import Endpoint
from .errors import (
    AnswerChanged,
    ApiError,
    Busy,
    ChatClosed,
    ClientError,
    ConnectionFailed,
    ContextLengthExceeded,
    InvalidClip,
    InvalidPicture,
    InvalidRequest,
    NotConfigured,
    OverCapacity,
    SessionExpired,
    SessionLost,
    SessionMoved,
    TimedOut,
    TooLarge,
    Unavailable,
)
from .options import AskOptions, Retries, Timeouts
from .pictures import Picture, PictureSource, load_picture
from .state import Stats

__all__ = [
    "Answer",
    "AnswerChanged",
    "AnswerStream",
    "ApiError",
    "AskOptions",
    "AsyncAnswerStream",
    "AsyncChat",
    "AsyncEndpoint",
    "Busy",
    "Chat",
    "ChatClosed",
    "ClientError",
    "Clip",
    "ConnectionFailed",
    "ContextLengthExceeded",
    "Description",
    "Endpoint",
    "InvalidClip",
    "InvalidPicture",
    "InvalidRequest",
    "NotConfigured",
    "OverCapacity",
    "Picture",
    "PictureSource",
    "Retries",
    "SessionExpired",
    "SessionLost",
    "SessionMoved",
    "Stats",
    "TimedOut",
    "Timeouts",
    "Timings",
    "TooLarge",
    "Turn",
    "Unavailable",
    "Usage",
    "VideoSource",
    "load_clip",
    "load_picture",
]
