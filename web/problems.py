"""Errors in words: what happened, what to do, and the button that helps."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from llava_sessions_client import (
    AnswerChanged,
    ApiError,
    Busy,
    ChatClosed,
    ClientError,
    ConnectionFailed,
    ContextLengthExceeded,
    InvalidClip,
    InvalidPicture,
    NotConfigured,
    OverCapacity,
    SessionExpired,
    SessionLost,
    SessionMoved,
    TimedOut,
    TooLarge,
    Unavailable,
)

REOPEN = "reopen"
RETRY = "retry"
_RECOVERS = "The page notices by itself when the server is back."


@dataclass(eq=False)
class Problem(Exception):
    """An error that the page shows. `title`: what happened. `advice`: what to do. `action`: "retry", "reopen" or ""."""

    code: str
    title: str
    advice: str
    action: str = ""
    status: int = 400

    def body(self) -> dict[str, str]:
        """Return the fields that the page reads."""
        fields = asdict(self)
        del fields["status"]
        return fields


def chat_not_found() -> Problem:
    """Return the problem of a chat that this page's server does not have."""
    return Problem("chat_not_found", "This page's server no longer has this chat.", "Start a new chat.", status=404)


def in_words(error: Exception) -> Problem:
    """Return the problem of an error of the client. Details of an unexpected error stay in the log."""
    if isinstance(error, Problem):
        return error
    for kind, problem in _WORDS:
        if isinstance(error, kind):
            return problem
    if isinstance(error, ApiError):
        message = error.message.rstrip(".")
        return Problem(error.code, "The server rejected the request.", f"It says: {message}.", RETRY, 502)
    title = "Something went wrong in this page's server."
    return Problem("internal", title, "Its terminal shows the error.", RETRY, 500)


# The first entry that fits an error counts.
_WORDS: list[tuple[type[ClientError], Problem]] = [
    (
        SessionExpired,
        Problem(
            "session_expired",
            "The session of this chat has expired.",
            "Its conversation is still here: continue it in a new session.",
            REOPEN,
            410,
        ),
    ),
    (
        SessionLost,
        Problem(
            "session_lost",
            "The server no longer has the session of this chat.",
            "Its conversation is still here: continue it in a new session.",
            REOPEN,
            410,
        ),
    ),
    (Busy, Problem("busy", "This chat is still answering.", "Wait for the answer, or stop it.", "", 409)),
    (
        SessionMoved,
        Problem("session_moved", "The session is moving to another instance.", "Ask again in a moment.", RETRY, 503),
    ),
    (
        OverCapacity,
        Problem(
            "capacity", "The server has no room for another chat.", "Close a chat, or try again later.", RETRY, 429
        ),
    ),
    (
        ContextLengthExceeded,
        Problem(
            "context_length",
            "The conversation has become too long for the model.",
            "Edit an earlier question, or start a new chat.",
            "",
            422,
        ),
    ),
    (
        TooLarge,
        Problem("too_large", "The picture, the clip or the text is too large.", "Send a smaller one.", "", 413),
    ),
    (
        InvalidClip,
        Problem("invalid_clip", "The clip is too large for one request.", "Send a shorter or smaller clip.", "", 413),
    ),
    (
        InvalidPicture,
        Problem(
            "invalid_picture",
            "This file is not a picture that can be read.",
            "Send a PNG, JPEG, WEBP, GIF, BMP or TIFF file.",
            "",
            415,
        ),
    ),
    (
        NotConfigured,
        Problem(
            "not_configured",
            "The address of the model server, its region or the credentials are missing or wrong.",
            "Check the options of `make web` and the AWS credentials.",
            "",
            503,
        ),
    ),
    (ChatClosed, Problem("chat_closed", "This chat was closed during the question.", "Start a new chat.", "", 409)),
    (
        AnswerChanged,
        Problem("answer_changed", "The answer has changed after a retry.", "Reload the page to read it.", "", 409),
    ),
    (Unavailable, Problem("unavailable", "The model server is not ready at the moment.", _RECOVERS, RETRY, 503)),
    (
        ConnectionFailed,
        Problem("unreachable", "The model server cannot be reached.", f"Check that it runs. {_RECOVERS}", RETRY, 503),
    ),
    (
        TimedOut,
        Problem("timed_out", "The model server took too long.", "Ask again, or ask something shorter.", RETRY, 504),
    ),
]
