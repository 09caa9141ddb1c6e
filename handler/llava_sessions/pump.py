"""Owns the exchange with TorchServe's batches: which row waits for what, and what each row is answered in this step.

`exchange()` takes all active rows and gives each a reply or holds it. It never raises. Must not know TorchServe's API
(the edge translates), torch, or how an answer is computed (the engine does).

A row that is held gets no prediction in this step; the frontend keeps its request open and sends the row again. So the
status of a reply stays free until there is something to say, and a refusal or a failure keeps its own HTTP status.
"""

from __future__ import annotations

import hashlib
import json
import logging
import queue
import re
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from PIL import Image

from . import media, protocol
from .conversation import ChatTokens, Conversation, Opening
from .engine.messages import (
    Accepted,
    AskSession,
    Cancelled,
    CancelTurn,
    Closed,
    CloseSession,
    Delta,
    Event,
    Finished,
    Memory,
    NoRoom,
    Opened,
    OpenFailed,
    OpenSession,
    Picture,
    Report,
    Sampling,
    TurnFailed,
)
from .errors import Refused
from .rows import EngineDoor, Entry, Reply, Row, SequenceEnd, Turn
from .sessions import Session, SessionTable
from .telemetry import Figures

log = logging.getLogger(__name__)

# How long a step waits for something to say. A new request joins between steps, so this bounds what it waits for.
WAIT_S = 0.02
# How long a step waits for the engine to free a session, so that a close is answered in the step in which it came.
CLOSE_WAIT_S = 2.0
# While rows are active, TorchServe calls without a pause; a silence of this length means that all their clients are
# gone.
SILENCE_S = 5.0
_OPENS_KEPT = 10_000
# How the frontend names a sequence that came without an id (InferenceRequestHandler.java).
_FRONTEND_ID = re.compile(r"ts-seq-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Pump:
    """Answers rows from sessions. One lock guards all state: TorchServe's thread and the sweeper's take turns."""

    def __init__(
        self,
        engine: EngineDoor,
        inbox: queue.SimpleQueue,
        tokens: ChatTokens,
        table: SessionTable[Conversation],
        context_tokens: int,
        limits: protocol.Limits,
        media_limits: media.MediaLimits,
        sequences: SequenceEnd,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`inbox`: where the engine puts its reports; `clock`: seconds since the epoch."""
        self._engine = engine
        self._inbox = inbox
        self._tokens = tokens
        self._table = table
        self._context_tokens = context_tokens
        self._limits = limits
        self._media_limits = media_limits
        self._sequences = sequences
        self._clock = clock
        self._fetch = media.Fetcher()
        self._lock = threading.Lock()
        self._decoding = ThreadPoolExecutor(max_workers=4, thread_name_prefix="decode")
        self._fetching = ThreadPoolExecutor(max_workers=16, thread_name_prefix="fetch")
        self._entries: dict[str, Entry] = {}
        self._turns: dict[str, Turn] = {}
        self._opens: OrderedDict[str, str] = OrderedDict()  # sessions by what a repeated open is known by
        self._joined_opens: dict[str, list[Entry]] = {}
        self._opening: dict[str, tuple[Entry, Opening]] = {}
        self._closing: dict[str, list[Entry]] = {}
        self._memory = Memory()
        self._turns_total = 0
        self._refusals_total = 0
        self._last_exchange_s = time.monotonic()

    def exchange(self, rows: list[Row]) -> list[Reply | None]:
        """One step: `rows` are all active requests. A reply for each, or None where the row is held."""
        with self._lock:
            for row in rows:
                if row.request_id not in self._entries:
                    self._admit(row)
            self._drop_vanished({row.request_id for row in rows})
            self._wait()
            replies = [self._safe_reply(self._entries[row.request_id]) for row in rows]
            self._last_exchange_s = time.monotonic()
            return replies

    def sweep(self) -> None:
        """Expire sessions, and notice clients that left while nothing else went on. Call it about once a second."""
        with self._lock:
            self._drain()
            if self._entries and time.monotonic() - self._last_exchange_s > SILENCE_S:
                self._drop_vanished(set())
            for session in self._table.expired(self._clock()):
                if session.turn_id is None:
                    log.info("session_expired session=%s", _short(session.id))
                    self._table.remove(session.id, "expired")
                    self._engine.submit(CloseSession(session.id))
                    self._sequences.end(session.id)

    @property
    def busy(self) -> bool:
        """Whether any row is still waiting for its last reply."""
        return bool(self._entries)

    def figures(self) -> Figures:
        """Gauges and counters as of now."""
        memory = self._memory
        held = memory.features_bytes + memory.kv_bytes
        return Figures(
            open_sessions=len(self._table),
            running_turns=self._table.running_turns,
            resident_sessions=memory.resident,
            parked_sessions=memory.parked,
            cold_sessions=memory.cold,
            features_bytes=memory.features_bytes,
            kv_bytes=memory.kv_bytes,
            parked_bytes=memory.parked_bytes,
            device_bytes=memory.allocated_bytes or held,
            turns_total=self._turns_total,
            refusals_total=self._refusals_total,
        )

    # --- requests ---

    def _admit(self, row: Row) -> None:
        """Take a new row: parse it, and start what it asks for or refuse it."""
        entry = self._entries[row.request_id] = Entry(row)
        try:
            request = protocol.parse(row.body, row.headers, self._limits)
            match request:
                case protocol.Open():
                    self._open(entry, request)
                case protocol.Ask():
                    self._ask(entry, request)
                case protocol.Close():
                    self._close(entry, request.session_id)
                case protocol.Cancel():
                    self._cancel(entry, request.session_id)
        except Exception as error:
            self._refuse(entry, error)

    def _open(self, entry: Entry, request: protocol.Open) -> None:
        row = entry.row
        if protocol.session_in_header(row.headers):
            wanted = f"open without the {protocol.SESSION_HEADER} header, or with {protocol.NEW_SESSION} in it"
            raise Refused("invalid_request", f"A new session gets its id from the server; {wanted}.")
        # The frontend routes by the id that it made; behind a literal NEW_SESSION it made none.
        made = row.fresh and _FRONTEND_ID.fullmatch(row.sequence_id)
        session_id = row.sequence_id if made else f"ls-{uuid.uuid4()}"
        if request.retry_key is not None and self._opened_before(entry, request.retry_key):
            return
        self._table.reserve(session_id)
        if request.retry_key is not None:
            self._remember_open(request.retry_key, session_id)
        entry.preparing = self._beside(request.pictures, self._prepare, request)
        entry.preparing.add_done_callback(lambda _: self._inbox.put(partial(self._prepared, entry, session_id)))

    def _opened_before(self, entry: Entry, retry_key: str) -> bool:
        """Answer a repeated open with the session of the first: at once, or when that one is."""
        session_id = self._opens.get(retry_key)
        if session_id is None or session_id not in self._table:
            return False
        session = self._table.find(session_id)
        if session is None:
            self._joined_opens.setdefault(session_id, []).append(entry)
        elif session.closing or self._clock() >= session.expires_at_s:
            return False
        else:
            self._tell_open(entry, session)
        return True

    def _remember_open(self, retry_key: str, session_id: str) -> None:
        self._opens[retry_key] = session_id
        while len(self._opens) > _OPENS_KEPT:
            self._opens.popitem(last=False)

    def _beside(self, sources: tuple[protocol.PictureSource, ...], work: Callable, *arguments: Any) -> Future:
        """Run `work` beside the pump; pictures behind slow hosts never hold up those that are at hand."""
        remote = any(source.path is not None and media.is_remote(source.path) for source in sources)
        return (self._fetching if remote else self._decoding).submit(work, *arguments)

    def _prepare(self, request: protocol.Open) -> Opening:
        """Runs beside the pump, so that a slow host or a large picture delays nobody else."""
        if request.frames:
            frames = self._load(request.frames)
            key = hashlib.sha256(" ".join(key for key, _ in frames).encode()).hexdigest()
            return self._tokens.clip_opening(key, [frame for _, frame in frames])
        return self._tokens.opening(self._load(request.pictures))

    def _prepare_turn(self, conversation: Conversation, ask: protocol.Ask) -> tuple[list[int], tuple[Picture, ...]]:
        """As `_prepare`, of a question with pictures: its ids and its pictures. Its session is busy meanwhile."""
        prepared = self._tokens.prepare(self._load(ask.pictures))
        return self._tokens.prompt(conversation, ask.prompt_text, prepared), prepared.pictures

    def _load(self, sources: tuple[protocol.PictureSource, ...]) -> list[tuple[str, Image.Image]]:
        pictures = []
        for source in sources:
            if source.image is not None:
                picture = media.load_base64(source.image, self._media_limits)
            else:
                picture = media.load_path(source.path, self._media_limits, self._fetch)
            pictures.append((picture.sha256, picture.image))
        return pictures

    def _prepared(self, entry: Entry, session_id: str) -> None:
        """The picture is there, or is refused."""
        try:
            opening = entry.preparing.result()
            self._fits(len(opening.token_ids) + 1)
            if not self._waiting_for_open(entry, session_id):
                raise Refused("invalid_request", "All who asked for it have left.")  # told to nobody
        except Exception as error:
            self._open_refused(entry, session_id, error)
            return
        self._opening[session_id] = (entry, opening)
        self._engine.submit(OpenSession(session_id, opening.token_ids, opening.pictures))

    def _accepted(self, session_id: str) -> None:
        """The engine has room for the session."""
        entry, opening = self._opening.pop(session_id)
        session = self._table.open(session_id, Conversation(opening.without_arrays()), self._clock())
        waiting = self._waiting_for_open(entry, session_id)
        self._joined_opens.pop(session_id, None)
        if not waiting:  # its clients have left: nobody knows the id
            self._table.remove(session_id, "closed")
            self._engine.submit(CloseSession(session_id))
            self._end_sequence_of(entry)
            return
        for row in waiting:
            self._tell_open(row, session)
        counts = f"tokens={len(opening.token_ids)} open={len(self._table)}"
        log.info("session_open session=%s %s", _short(session_id), counts)

    def _open_refused(self, entry: Entry, session_id: str, error: Exception) -> None:
        """Give the place back, and tell whoever is still there."""
        self._table.release(session_id)
        waiting = self._waiting_for_open(entry, session_id)
        self._joined_opens.pop(session_id, None)
        for row in waiting:
            self._refuse(row, error)
        if entry not in waiting:
            self._end_sequence_of(entry)

    def _waiting_for_open(self, entry: Entry, session_id: str) -> list[Entry]:
        """The rows that the open's outcome is told to: its own, and those of its repetitions."""
        rows = [entry, *self._joined_opens.get(session_id, [])]
        return [row for row in rows if row.row.request_id in self._entries]

    def _tell_open(self, entry: Entry, session: Session[Conversation]) -> None:
        opening = session.conversation.opening
        body = protocol.opened(session.id, session.expires, opening.image_tokens, len(opening.token_ids))
        entry.final = Reply(json.dumps(body), headers=protocol.session_headers(session.id, session.expires))

    def _ask(self, entry: Entry, ask: protocol.Ask) -> None:
        session = self._table.get(ask.session_id, self._clock())
        turn_id = entry.row.request_id
        entry.streamed = ask.stream
        if ask.retry_key is not None and self._asked_before(entry, session, ask.retry_key):
            return
        self._table.begin_turn(session, turn_id)
        self._turns[turn_id] = Turn(session, ask, [entry], preparing=bool(ask.pictures))
        if ask.pictures:
            entry.preparing = self._beside(ask.pictures, self._prepare_turn, session.conversation, ask)
            entry.preparing.add_done_callback(lambda _: self._inbox.put(partial(self._turn_prepared, entry)))
            return
        try:
            self._start(turn_id, self._tokens.prompt(session.conversation, ask.prompt_text), ())
        except Exception:
            self._end_turn(turn_id, cancelled=False)
            raise

    def _asked_before(self, entry: Entry, session: Session[Conversation], retry_key: str) -> bool:
        """Answer a repeated ask by the answer that is known, or with the one that is being made."""
        running = self._turns.get(session.turn_id)
        if retry_key in session.answers:
            text, facts = session.answers[retry_key]
            self._tell_words(entry, text)
            self._tell_end(entry, text, facts)
        elif running is not None and running.ask.retry_key == retry_key:
            running.entries.append(entry)
            self._tell_words(entry, "".join(running.text))
        else:
            return False
        return True

    def _turn_prepared(self, entry: Entry) -> None:
        """The pictures of a question are there, or one is refused."""
        turn_id = entry.row.request_id
        if turn_id not in self._turns:
            return  # it was cancelled, or its client has left
        try:
            self._start(turn_id, *entry.preparing.result())
        except Exception as error:
            for waiting in self._end_turn(turn_id, cancelled=False).entries:
                self._refuse(waiting, error)

    def _start(self, turn_id: str, prompt_ids: list[int], pictures: tuple[Picture, ...]) -> None:
        """Hand a turn to the engine, if the context has room for it."""
        turn = self._turns[turn_id]
        self._fits(len(turn.session.conversation.token_ids) + len(prompt_ids) + 1)
        turn.prompt_ids, turn.preparing, ask = prompt_ids, False, turn.ask
        sampling = Sampling(ask.max_new_tokens, ask.temperature, ask.top_p, ask.seed, ask.stop, ask.deadline_ms)
        self._engine.submit(AskSession(turn.session.id, turn_id, prompt_ids, sampling, pictures))

    def _stop(self, turn_id: str) -> None:
        """End a turn before its time: by the engine, if that has it already."""
        if self._turns[turn_id].preparing:
            self._cancelled(turn_id, "cancelled")
        else:
            self._engine.submit(CancelTurn(turn_id))

    def _cancelled(self, turn_id: str, reason: str) -> None:
        turn = self._end_turn(turn_id, cancelled=True)
        self._tell(turn, {"session_id": turn.session.id, "finish_reason": reason})

    def _fits(self, tokens: int) -> None:
        if tokens > self._context_tokens:
            sizes = f"the model's context is {self._context_tokens} tokens, the conversation would need {tokens}"
            raise Refused("context_length_exceeded", f"The conversation is too long: {sizes}.")

    def _close(self, entry: Entry, session_id: str) -> None:
        if session_id in self._closing:
            self._closing[session_id].append(entry)
            return
        if self._table.was_closed(session_id) or self._is_ours(entry):
            self._closed(entry, session_id)
            return
        session = self._table.get(session_id, self._clock())
        session.closing = True
        self._closing[session_id] = [entry]
        if session.turn_id is not None and self._turns[session.turn_id].preparing:
            self._cancelled(session.turn_id, "cancelled")
        self._engine.submit(CloseSession(session_id))

    def _is_ours(self, entry: Entry) -> bool:
        """Whether the request only ends its sequence; that of an open session goes the way of every close."""
        name, value = self._sequences.mark
        return entry.row.headers.get(name) == value and entry.row.sequence_id not in self._table

    def _closed(self, entry: Entry, session_id: str) -> None:
        headers = {protocol.CLOSED_SESSION_HEADER: session_id}
        entry.final = Reply(json.dumps(protocol.closed(session_id)), headers=headers)

    def _cancel(self, entry: Entry, session_id: str) -> None:
        session = self._table.get(session_id, self._clock())
        if session.turn_id is None:
            entry.final = Reply(json.dumps(protocol.cancelled(session_id, had_turn=False)))
            return
        self._turns[session.turn_id].waiting_cancels.append(entry)
        self._stop(session.turn_id)

    def _refuse(self, entry: Entry, error: Exception) -> None:
        refused = _as_refusal(error)
        self._refusals_total += 1
        log.info("refused request=%s code=%s", _short(entry.row.request_id), refused.code)
        entry.final = Reply(json.dumps(refused.body()), status=refused.status)

    def _drop_vanished(self, active: set[str]) -> None:
        """Forget rows whose clients left, and end what only they were waiting for."""
        for request_id in self._entries.keys() - active:
            entry = self._entries.pop(request_id)
            self._end_sequence_of(entry)
            for turn_id, turn in list(self._turns.items()):
                if entry in turn.entries:
                    turn.entries.remove(entry)
                    if not turn.entries:
                        log.info("client_left session=%s", _short(turn.session.id))
                        self._stop(turn_id)

    # --- events ---

    def _wait(self) -> None:
        """Take in what has happened; when no row can be answered by it, wait a little for more."""
        self._drain()
        began = time.monotonic()
        while self._closing or not any(entry.lines or entry.final for entry in self._entries.values()):
            left = began + (CLOSE_WAIT_S if self._closing else WAIT_S) - time.monotonic()
            if left <= 0:
                return
            try:
                self._take(self._inbox.get(timeout=left))
            except queue.Empty:
                return
            self._drain()

    def _drain(self) -> None:
        while True:
            try:
                self._take(self._inbox.get_nowait())
            except queue.Empty:
                return

    def _take(self, item: Report | Callable[[], None]) -> None:
        """A report of the engine, or what to do with pictures that are there now."""
        if isinstance(item, Report):
            self._memory = item.memory
            steps = [partial(self._hear, event) for event in item.events]
        else:
            steps = [item]
        for step in steps:
            try:
                step()
            except Exception:
                log.exception("event_lost")  # one session's fault stays its own

    def _hear(self, event: Event) -> None:
        match event:
            case Delta():
                turn = self._turns[event.turn_id]
                turn.text.append(event.text)
                for entry in turn.entries:
                    self._tell_words(entry, event.text)
            case Finished():
                turn = self._end_turn(event.turn_id, cancelled=False)
                turn.session.conversation.commit(turn.prompt_ids, event.kept_ids)
                self._answer(turn, event)
            case Cancelled():
                self._cancelled(event.turn_id, event.reason)
            case TurnFailed():
                turn = self._end_turn(event.turn_id, cancelled=False)
                refused = _as_refusal(RuntimeError(event.error))
                self._tell(turn, refused.body(), status=refused.status)
            case NoRoom():
                self._no_room(event)
            case Accepted():
                self._accepted(event.session_id)
            case Opened():
                times = f"encode_ms={event.encode_ms:.0f} total_ms={event.total_ms:.0f}"
                log.info("session_ready session=%s %s", _short(event.session_id), times)
            case OpenFailed():
                self._open_failed(event)
            case Closed():
                self._hear_closed(event.session_id)

    def _open_failed(self, event: OpenFailed) -> None:
        if event.session_id in self._opening:
            entry, _ = self._opening.pop(event.session_id)
            self._open_refused(entry, event.session_id, RuntimeError(event.error))
        elif event.session_id in self._table:
            self._table.remove(event.session_id, "failed")
            self._sequences.end(event.session_id)

    def _no_room(self, event: NoRoom) -> None:
        sizes = f"{event.needed_bytes:,} bytes are needed, {event.free_bytes:,} are free"
        message = f"The device's memory can't hold it: {sizes} beside what is running, {event.open_sessions} are open."
        refused = Refused("capacity", message)
        if event.turn_id is not None:
            self._refusals_total += 1
            self._tell(self._end_turn(event.turn_id, cancelled=False), refused.body(), status=refused.status)
            return
        entry, _ = self._opening.pop(event.session_id)
        self._open_refused(entry, event.session_id, refused)

    def _hear_closed(self, session_id: str) -> None:
        waiting = self._closing.pop(session_id, None)
        if waiting is None:
            return  # expired: the sweeper has told the table already
        if session_id in self._table:
            self._table.remove(session_id, "closed")
        log.info("session_close session=%s open=%d", _short(session_id), len(self._table))
        for entry in waiting:
            self._closed(entry, session_id)

    def _end_turn(self, turn_id: str, cancelled: bool) -> Turn:
        turn = self._turns.pop(turn_id)
        turn.session.turn_id = None
        for entry in turn.waiting_cancels:
            entry.final = Reply(json.dumps(protocol.cancelled(turn.session.id, had_turn=cancelled)))
        return turn

    def _answer(self, turn: Turn, event: Finished) -> None:
        self._turns_total += 1
        usage, timings = vars(event.usage), {name: round(ms, 1) for name, ms in vars(event.timings).items()}
        ids = event.answer_ids if turn.ask.return_token_ids else None
        facts = protocol.answer_facts(turn.session.id, event.reason, usage, timings, ids)
        if turn.ask.retry_key is not None:
            turn.session.keep_answer(turn.ask.retry_key, (event.text, facts))
        self._tell(turn, facts)
        counts = f"prompt={usage['prompt_tokens']} cached={usage['cached_tokens']} answer={usage['completion_tokens']}"
        times = f"ttft_ms={timings['ttft_ms']} total_ms={timings['total_ms']}"
        log.info("turn_done session=%s reason=%s %s %s", _short(turn.session.id), event.reason, counts, times)

    def _tell(self, turn: Turn, facts: dict, status: int = 200) -> None:
        """Give the turn's rows their last words."""
        for entry in turn.entries:
            if status != 200 and not entry.head_sent:
                entry.lines.clear()
                entry.final = Reply(json.dumps(facts), status=status)
            else:
                self._tell_end(entry, "".join(turn.text), facts)

    def _tell_words(self, entry: Entry, text: str) -> None:
        """The next words of an answer, where it streams."""
        if entry.streamed and text:
            entry.lines.append(protocol.line({"delta": text}))

    def _tell_end(self, entry: Entry, text: str, facts: dict) -> None:
        """A last line when it streams, else one body with the whole answer."""
        if entry.streamed:
            last = facts if "error" in facts else {"delta": "", **facts}
            entry.final = Reply(protocol.line(last), more=False, content_type=protocol.STREAM_TYPE)
        else:
            entry.final = Reply(json.dumps({"response_text": text, **facts}, ensure_ascii=False))

    # --- replies ---

    def _safe_reply(self, entry: Entry) -> Reply | None:
        try:
            return self._reply(entry)
        except Exception as error:
            self._entries.pop(entry.row.request_id, None)
            body = json.dumps(_as_refusal(error).body())
            return Reply(body + "\n", more=False) if entry.head_sent else Reply(body, status=500)

    def _reply(self, entry: Entry) -> Reply | None:
        """What the row is told in this step."""
        text = "".join(entry.lines)
        entry.lines.clear()
        if entry.final is None:
            entry.steps += 1
            if not text and not entry.head_sent:
                return None
            # An empty chunk is how TorchServe notices that a streaming client has left.
            entry.head_sent = True
            return Reply(text, more=True, content_type=protocol.STREAM_TYPE)
        del self._entries[entry.row.request_id]
        final = entry.final
        final.body = text + final.body
        if final.more is False and not entry.head_sent:
            final.more = None  # a last chunk that is also the first sends no head at all: make it a whole answer
        if self._is_foreign(entry):
            self._release_sequence(entry, final)
        return final

    def _is_foreign(self, entry: Entry) -> bool:
        """Whether the row came on a sequence that is no open session's, and no other row is waiting on."""
        sequence = entry.row.sequence_id
        # A ';' would name two sequences to the frontend, the second perhaps somebody else's.
        if not sequence or sequence in self._table or sequence == protocol.NEW_SESSION or ";" in sequence:
            return False
        return not any(other.row.sequence_id == sequence for other in self._entries.values() if other is not entry)

    def _end_sequence_of(self, entry: Entry) -> None:
        """Have the sequence of a row that will get no reply ended, unless others use it."""
        if self._is_foreign(entry):
            self._sequences.end(entry.row.sequence_id)

    def _release_sequence(self, entry: Entry, final: Reply) -> None:
        """Have the frontend forget the row's sequence.

        TorchServe keeps a place for each id that it ever saw, and when all are taken nobody can open a session. Its end
        header frees the place, but only on the first response to a request: after that, one of its few threads already
        waits for the sequence's next request, and would wait on until `sequenceTimeoutMSec` (SequenceBatching.java,
        pollJobFromJobGroup). A request of our own frees that thread, and is answered with the header at once.
        """
        sequence, named = entry.row.sequence_id, None
        if entry.steps == 0:
            named = final.headers.setdefault(protocol.CLOSED_SESSION_HEADER, sequence)
        if named != sequence:
            self._sequences.end(sequence)


def _as_refusal(error: Exception) -> Refused:
    """The refusal that an error is told as. What nobody foresaw is logged whole and told by an id only."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, media.MediaError):
        return Refused(error.code, f"{error.message[:1].upper()}{error.message[1:]}.")
    error_id = uuid.uuid4().hex[:8]
    log.error("internal_error id=%s", error_id, exc_info=error)
    return Refused("internal", f"Something went wrong inside the server; its log has the cause under id {error_id}.")


def _short(identity: str) -> str:
    """Ids are secrets: a log shows enough to tell two apart."""
    return identity.removeprefix("ts-seq-")[:8]
