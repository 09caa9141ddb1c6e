"""A process that keeps a journal until it is killed or runs out of room; what it acknowledged is on its output."""

from __future__ import annotations

import os
import resource
import signal
import sys
from dataclasses import replace

from llava_sessions.chat.transcript import OpenRecord, Transcript, TurnRecord
from llava_sessions.journal import encoding, stores
from llava_sessions.journal.journal import Journal, JournalError, SaveOutcome

EXPIRES_S = 2_000_000_000.0


def opening(journal: Journal, session_id: str, picture_bytes: int) -> Transcript:
    picture = journal.blobs.get(session_id.encode() * (picture_bytes // len(session_id)))
    return Transcript(OpenRecord(session_id, EXPIRES_S - 60, EXPIRES_S, None, "image", (picture,), [1, 2, 3], 1))


def turn(session_id: str, number: int) -> TurnRecord:
    """What the turn of that number says; the parent knows it too."""
    words = f"{session_id} {number}"
    return TurnRecord([number, 7], list(range(number)), (), words, words * 200, {"usage": {"turn": number}})


def stored(journal: Journal, story: Transcript) -> bool:
    return journal.save(story).result() is SaveOutcome.STORED


def chat_until_killed(folder: str) -> None:
    """Several sessions side by side, each of turns without an end; a line for each acknowledged save."""
    journal = Journal([stores.DirectoryStore(folder)])
    chats = [opening(journal, f"{os.getpid()}-{n}", 100_000) for n in range(4)]
    while True:
        saves = [(story, len(story.turns), journal.save(story)) for story in chats]
        for story, turns, save in saves:
            if save.result() is SaveOutcome.STORED:
                print(story.opening.session_id, turns, flush=True)
        for story in chats:
            story.append(turn(story.opening.session_id, len(story.turns)))


def die_at(folder: str, moment: str) -> None:
    """Two saves that are acknowledged, and one that is cut short at the moment that is named."""
    journal = Journal([stores.DirectoryStore(folder)])
    story = opening(journal, "chat", 1000)
    for number in range(2):
        assert stored(journal, story)
        story.append(turn("chat", number))
    make_deadly(moment)
    journal.save(story).result()


def make_deadly(moment: str) -> None:
    """The next call of a function of `os` kills this process: before its effect, or "after-" it."""
    real = getattr(os, moment.removeprefix("after-"))

    def deadly(*arguments):
        if moment.startswith("after-"):
            real(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(os, moment.removeprefix("after-"), deadly)


def claim_and_die_at(folder: str, moment: str) -> None:
    """A claim of the session "chat" that is cut short."""
    journal = Journal([stores.DirectoryStore(folder)])
    make_deadly(moment)
    journal.claim("chat", EXPIRES_S - 60, None)


def carry_on(folder: str, name: str) -> None:
    """Resume the session "chat" as `name` at a line of input, as an instance does; print what came of it."""
    journal = Journal([stores.DirectoryStore(folder)])
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        old = journal.claim("chat", EXPIRES_S - 60, None)
    except JournalError as error:
        print(type(error).__name__, flush=True)
        return
    assert stored(journal, Transcript(replace(old.opening, session_id=name), old.turns))
    won = journal.retire("chat").result()
    if not won:
        journal.forget(name).result()
    print("won" if won else "lost", len(old.turns), flush=True)


def mark_and_wait(folder: str) -> None:
    """Save the session "chat", mark that a turn of it runs for a long time, and wait to be killed."""
    journal = Journal([stores.DirectoryStore(folder)])
    assert stored(journal, opening(journal, "chat", 1000))
    assert journal.mark("chat", EXPIRES_S).result() is SaveOutcome.STORED
    print("marked", flush=True)
    sys.stdin.readline()


def meet_the_limit(folder: str) -> None:
    """The kernel lets a file grow to 4 KiB only, so that turns with large pictures don't fit; then it lets them."""
    journal = Journal([stores.DirectoryStore(folder)])
    story = opening(journal, "chat", 1000)
    told = [stored(journal, story)]
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    for number in range(3):
        large = (journal.blobs.get(bytes([number]) * 10_000),)
        story.append(TurnRecord([number], [number], large, None, "", {}))
        told.append(stored(journal, story))
    in_the_way = sorted(name for name in os.listdir(folder) if not name.startswith(encoding.key_of("chat")))
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    told.append(stored(journal, story))
    print(told, journal.failures_total, in_the_way, flush=True)


if __name__ == "__main__":
    import logging

    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
    {
        "chat": chat_until_killed,
        "die": die_at,
        "limit": meet_the_limit,
        "claim": claim_and_die_at,
        "resume": carry_on,
        "mark": mark_and_wait,
    }[sys.argv[1]](*sys.argv[2:])
