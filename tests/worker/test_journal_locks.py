"""The mark of a running turn ends with the process of its instance, if the instances share a directory."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from llava_sessions.journal.encoding import key_of
from llava_sessions.journal.journal import Journal, OwnerIsAnswering, SaveOutcome
from llava_sessions.journal.locks import INSTANCE_FILE, InstanceFiles
from llava_sessions.journal.owners import read_owner
from llava_sessions.journal.stores import DirectoryStore, S3Store
from tests.support.journals import NOW, PREFIX, _closing, again, bucket, folder, opening, stores, warnings

__all__ = ["_closing", "bucket", "folder"]  # fixtures
pytestmark = pytest.mark.usefixtures("_closing")

LONG_AGO_S = 1_000_000_000.0


@contextmanager
def answering_process(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that answers the session "chat"."""
    command = [sys.executable, "-m", "tests.support.journal_child", "mark", str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "marked\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def test_the_mark_of_a_killed_process_ends_with_the_process(folder: Path) -> None:
    with answering_process(folder) as process:
        journal = again(folder)
        with pytest.raises(OwnerIsAnswering):
            journal.claim("chat", NOW, None, waits=True)
        process.kill()
        process.wait()
        transcript = journal.claim("chat", NOW, None, waits=True)
    assert journal.save(transcript).result(10) is SaveOutcome.STORED


def test_a_mark_without_the_file_of_its_instance_counts_until_it_expires(folder: Path) -> None:
    with answering_process(folder) as process:
        process.kill()
        process.wait()
    (held,) = (path for path in folder.iterdir() if INSTANCE_FILE.fullmatch(path.name))
    held.unlink()
    with pytest.raises(OwnerIsAnswering):
        again(folder).claim("chat", NOW, None, waits=True)


def test_a_directory_ends_the_marks_in_both_stores(folder: Path, bucket: object) -> None:
    first = Journal([DirectoryStore(str(folder)), S3Store(PREFIX)])
    assert stores(first, opening(first, "chat", token_digest=None))
    assert first.mark("chat", NOW + 1000).result(10) is SaveOutcome.STORED
    instance = read_owner(S3Store(PREFIX), key_of("chat")).owner.instance
    second = Journal([DirectoryStore(str(folder)), S3Store(PREFIX)])
    with pytest.raises(OwnerIsAnswering):
        second.claim("chat", NOW, None, waits=True)
    held = folder / f".instance-{instance}"
    held.rename(folder / "locked")
    held.touch()  # as a process that has ended leaves it
    assert second.claim("chat", NOW, None, waits=True).turns == ()


def test_two_processes_may_look_at_once(folder: Path) -> None:
    files = InstanceFiles(folder)
    files.announce("ab" * 16)
    assert not InstanceFiles(folder).has_ended("ab" * 16)
    del files
    with (folder / f".instance-{'ab' * 16}").open() as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        assert InstanceFiles(folder).has_ended("ab" * 16)


@pytest.mark.parametrize("instance", ["", "unknown", "../" + "ab" * 16, "cd" * 16])
def test_an_instance_without_a_file_is_not_known_to_have_ended(folder: Path, instance: str) -> None:
    folder.mkdir()
    (folder.parent / f".instance-{'ab' * 16}").touch()
    assert not InstanceFiles(folder).has_ended(instance)


def test_old_files_of_ended_instances_are_removed(folder: Path) -> None:
    files = InstanceFiles(folder)
    files.announce("ab" * 16)
    for name in ("cd" * 16, "ef" * 16):
        (folder / f".instance-{name}").touch()
    for name in ("ab" * 16, "cd" * 16):
        os.utime(folder / f".instance-{name}", (LONG_AGO_S, LONG_AGO_S))
    DirectoryStore(str(folder)).tidy(NOW)
    assert {path.name for path in folder.iterdir()} == {f".instance-{'ab' * 16}", f".instance-{'ef' * 16}"}


def test_a_mark_that_writes_nothing_does_not_end_an_outage(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder.write_bytes(b"not a directory")
    journal = again(folder)
    transcript = opening(journal)
    for _ in range(3):
        assert journal.save(transcript).result(10) is SaveOutcome.FAILED
        journal.mark("chat-1", 0.0).result(10)
    assert len(warnings(caplog)) == 1
