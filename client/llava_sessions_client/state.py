"""What a chat knows about itself: the same for `Chat` and `AsyncChat`."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from .answers import Answer, Turn, Usage
from .clips import Clip
from .conversation import Conversation
from .pictures import Picture


@dataclass(frozen=True)
class Stats:
    """Sums over all answers of a chat, also over those that an edit or a retry has dropped.

    `ttft_s` is the sum of the answers' times to the first piece, and `replays` counts the lost sessions.
    """

    answers: int = 0
    usage: Usage = field(default_factory=Usage)
    ttft_s: float = 0.0
    total_s: float = 0.0
    replays: int = 0

    def plus(self, answer: Answer) -> Stats:
        """Return the sums with one more answer."""
        return Stats(
            self.answers + 1,
            self.usage + answer.usage,
            self.ttft_s + answer.ttft_s,
            self.total_s + answer.total_s,
            self.replays + answer.replayed,
        )


class ChatState:
    """The readable state of a chat."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._stats = Stats()
        self._last: Answer | None = None

    @property
    def session_id(self) -> str:
        """The session's ID. It changes when a lost session is opened again."""
        return self._conversation.session_id

    @property
    def expires_at(self) -> datetime | None:
        """When the session expires at the latest, in UTC. The server may also expire a session that is not used."""
        return self._conversation.expires_at

    @property
    def turns(self) -> tuple[Turn, ...]:
        """The conversation so far. `Endpoint.open(pictures, history=chat.turns)` continues it."""
        return self._conversation.turns

    @property
    def pictures(self) -> tuple[Picture, ...]:
        """The pictures that the session was opened on, as they were sent."""
        return self._conversation.pictures

    @property
    def clip(self) -> Clip | None:
        """The clip that the session was opened on, or None."""
        return self._conversation.clip

    @property
    def waiting_pictures(self) -> tuple[Picture, ...]:
        """The pictures that the next question will show."""
        return self._conversation.waiting

    def drop_images(self) -> tuple[Picture, ...]:
        """Drop the pictures that the next question would show, and return them. Pictures of a running question stay.

        A picture that the server rejects is otherwise sent with each later question.
        """
        conversation = self._conversation
        dropped = conversation.waiting[conversation.sending :]
        conversation.waiting = conversation.waiting[: conversation.sending]
        return dropped

    @property
    def last(self) -> Answer | None:
        """The latest answer, or None."""
        return self._last

    @property
    def notices(self) -> tuple[str, ...]:
        """Sentences for the user, for example that a picture was shrunk."""
        return tuple(self._conversation.notices)

    @property
    def stats(self) -> Stats:
        """Sums over all answers."""
        return self._stats

    @property
    def is_closed(self) -> bool:
        """Whether the chat was closed here."""
        return self._conversation.closed

    def _noted(self, answer: Answer) -> Answer:
        self._stats = self._stats.plus(answer)
        self._last = answer
        return answer
