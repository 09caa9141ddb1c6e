"""Make the pictures of a request fit: each one for the model, all of them together into one request.

Clips are never changed: a request that cannot carry its clips is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from .answers import Turn
from .clips import Clip
from .effects import Compute, Core
from .errors import InvalidClip
from .pictures import Picture
from .settings import Settings
from .shrink import Fitted, fit, fit_together
from .wire import ENVELOPE_BYTES

log = logging.getLogger(__name__)


def fit_each(pictures: Sequence[Picture], settings: Settings, notices: list[str]) -> Core[tuple[Picture, ...]]:
    """Return the pictures within the limits for one picture. Append a notice for each that was shrunk."""
    if not pictures:
        return ()
    fitted: Fitted = yield Compute(lambda: fit(pictures, settings.limits))
    _note(fitted, notices)
    return fitted.pictures


def fit_request(
    pictures: tuple[Picture, ...],
    turns: tuple[Turn, ...],
    settings: Settings,
    notices: list[str],
    clip: Clip | None = None,
) -> Core[tuple[tuple[Picture, ...], tuple[Turn, ...]]]:
    """Return pictures and turns such that one request can carry them. Append a notice for each picture that was shrunk.

    `clip`: that of the open. Raise `InvalidClip` if the clips alone do not fit. JSON may write a character in six
    bytes, so that twice the length of the texts is room enough for most of them.
    """
    texts = sum(len(turn.text.encode()) + len(turn.answer.text.encode()) for turn in turns)
    room = settings.max_body_bytes - ENVELOPE_BYTES - 2 * texts
    room = _without_clips(room, [clip, *(turn.clip for turn in turns)])
    shown = (*pictures, *(picture for turn in turns for picture in turn.pictures))
    if sum(picture.encoded_bytes for picture in shown) <= room:
        return pictures, turns
    fitted: Fitted = yield Compute(lambda: fit_together(shown, room))
    _note(fitted, notices)
    rest = iter(fitted.pictures)
    fitting = tuple(next(rest) for _ in pictures)
    return fitting, tuple(replace(turn, pictures=tuple(next(rest) for _ in turn.pictures)) for turn in turns)


def _without_clips(room: int, clips: Sequence[Clip | None]) -> int:
    """Return how many of the bytes of a request are left for pictures. Raise `InvalidClip`."""
    shown = [clip for clip in clips if clip is not None]
    needed = sum(clip.encoded_bytes for clip in shown)
    if shown and needed > room:
        most_mib = max(room, 0) * 3 / 4 / 2**20
        got_mib = sum(clip.size_bytes for clip in shown) / 2**20
        message = f"the clips of one request must have at most {most_mib:.1f} MiB together, got {got_mib:.1f} MiB"
        raise InvalidClip(message)
    return room - needed


def _note(fitted: Fitted, notices: list[str]) -> None:
    for notice in fitted.notices:
        log.info("picture_shrunk")
        notices.append(notice)
