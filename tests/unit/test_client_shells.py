"""The shells of llava_sessions_client: threads, Ctrl-C, cancelled tasks, and the time-outs of its transports."""

from __future__ import annotations

import asyncio
import base64
import io
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError, NoCredentialsError

from llava_sessions_client import (
    ApiError,
    AsyncChat,
    Busy,
    Chat,
    ConnectionFailed,
    InvalidPicture,
    InvalidRequest,
    NotConfigured,
    OverCapacity,
    SessionLost,
    TimedOut,
    TooLarge,
    Unavailable,
    load_picture,
    sources,
)
from llava_sessions_client.conversation import Conversation
from llava_sessions_client.effects import Limits
from llava_sessions_client.http import HttpTransport
from llava_sessions_client.http_async import AsyncHttpTransport
from llava_sessions_client.sagemaker import SageMakerTransport
from llava_sessions_client.sagemaker_async import ThreadedTransport
from llava_sessions_client.terminal.command import parse_args
from llava_sessions_client.terminal.talk import Talk
from llava_sessions_client.wire import Reply, Request
from llava_sessions_client.within import within
from tests.support.client_script import CANCELLED, CLOSED, answer, completion, lines, refusal, settings
from tests.support.pictures import PNG

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
ASK = Request({"type": "send_text_prompt"}, "abc-1")


def conversation() -> Conversation:
    return Conversation(settings(), (), session_id="abc-1")


def limits(total_s: float, first_byte_s: float = 60.0, between_s: float = 60.0) -> Limits:
    return Limits(5.0, first_byte_s, between_s, time.monotonic() + total_s)


class Scripted:
    """A transport with scripted replies. An `Event` blocks a stream until it is set."""

    def __init__(self, *replies: Any) -> None:
        self.replies = list(replies)
        self.bodies: list[dict[str, Any]] = []
        self.aborted = False

    def call(self, request: Request, limits: Limits) -> Reply:
        self.bodies.append(request.body)
        reply = self.replies.pop(0)
        if isinstance(reply, threading.Event):
            reply.wait(60)
            reply = self.replies.pop(0)
        if isinstance(reply, BaseException):
            raise reply
        return reply

    def start(self, request: Request, limits: Limits) -> tuple[Reply, Any]:
        self.bodies.append(request.body)
        if isinstance(self.replies[0], Reply):
            return self.replies.pop(0), None
        return Reply(200), self

    def read(self) -> bytes:
        reply = self.replies.pop(0)
        if isinstance(reply, threading.Event):
            reply.wait(60)
            return self.read()
        return reply

    def finish(self) -> None:
        pass

    def abort(self) -> None:
        self.aborted = True

    def close(self) -> None:
        pass


class AsyncScripted:
    """As `Scripted`, for a stream of one part."""

    def __init__(self, part: bytes) -> None:
        self.part = part

    async def start(self, request: Request, limits: Limits) -> tuple[Reply, Any]:
        return Reply(200), self

    async def read(self) -> bytes:
        return self.part

    async def abort(self) -> None:
        pass


def chat_of(transport: Scripted) -> Chat:
    return Chat(conversation(), transport, None, lambda _: None)


def test_a_second_question_of_another_thread_is_busy_and_disturbs_nothing() -> None:
    waiting = threading.Event()
    chat = chat_of(Scripted(lines("A", end=False), waiting, lines("B"), answer("C.")))
    stream = chat.stream("Which?")
    assert next(stream) == "A"
    rest: list[str] = []
    reader = threading.Thread(target=lambda: rest.extend(stream))
    reader.start()
    while not stream.is_reading:
        time.sleep(0.001)
    with pytest.raises(Busy):
        chat.ask("Second?")
    waiting.set()
    reader.join(60)
    assert (rest, stream.answer.text) == (["B"], "AB")
    assert chat.ask("Third?").text == "C."


def test_ctrl_c_cancels_the_turn() -> None:
    transport = Scripted(KeyboardInterrupt(), CANCELLED, completion("Two."))
    chat = chat_of(transport)
    with pytest.raises(KeyboardInterrupt):
        chat.ask("Which?")
    assert transport.bodies[-1] == {"type": "cancel"}
    assert chat.ask("Next?").text == "Two."
    assert [message["content"] for message in transport.bodies[-1]["messages"]] == ["Next?"]


def test_dropping_a_stream_cancels_the_turn() -> None:
    transport = Scripted(lines("A", "B"), CANCELLED)
    chat = chat_of(transport)
    for _ in chat.stream("Which?"):
        break
    chat._stream.cancel()
    assert transport.aborted
    assert transport.bodies[-1] == {"type": "cancel"}


def test_a_reader_sees_the_end_of_a_stream_that_another_thread_is_cancelling() -> None:
    cancelling = threading.Event()
    transport = Scripted(lines("A", "B"), cancelling, CANCELLED)
    stream = chat_of(transport).stream("Which?")
    assert next(stream) == "A"
    other = threading.Thread(target=stream.cancel)
    other.start()
    while {"type": "cancel"} not in transport.bodies:
        time.sleep(0.001)
    threading.Timer(0.05, cancelling.set).start()
    assert list(stream) == []
    assert stream.answer.finish_reason == "cancelled"
    other.join(60)


def test_a_task_sees_the_end_of_a_stream_that_another_one_is_cancelling() -> None:
    async def main() -> None:
        cancelling = asyncio.Event()
        asked = asyncio.Event()

        class Async(AsyncScripted):
            async def call(self, request: Request, limits: Limits) -> Reply:
                asked.set()
                await cancelling.wait()
                return CANCELLED

        stream = AsyncChat(conversation(), Async(lines("A", "B")), None, None).stream("Which?")
        assert await anext(stream) == "A"
        cancel = asyncio.create_task(stream.cancel())
        await asked.wait()
        rest = asyncio.create_task(anext(stream, None))
        await asyncio.sleep(0)
        cancelling.set()
        assert await rest is None
        assert stream.answer.finish_reason == "cancelled"
        await cancel

    asyncio.run(main())


def test_a_close_goes_on_if_the_running_answer_cannot_be_cancelled() -> None:
    waiting = threading.Event()
    transport = Scripted(lines("A", end=False), waiting, lines("B"))
    closed: list[Chat] = []
    chat = Chat(conversation(), transport, None, closed.append)
    stream = chat.stream("Which?")
    next(stream)
    reader = threading.Thread(target=lambda: list(stream))
    reader.start()
    while len(transport.replies) > 1:  # the reader waits for its next part
        time.sleep(0.001)
    transport.replies[:0] = [ConnectionFailed("gone"), CLOSED]
    chat.close()
    assert transport.bodies[-1] == {"type": "close_session"}
    assert closed == [chat]
    waiting.set()
    reader.join(60)


def test_cancelling_a_task_cancels_the_turn() -> None:
    class Async:
        def __init__(self) -> None:
            self.bodies: list[dict[str, Any]] = []
            self.asked = asyncio.Event()

        async def call(self, request: Request, limits: Limits) -> Reply:
            self.bodies.append(request.body)
            if request.body["type"] == "cancel":
                return CANCELLED
            self.asked.set()
            await asyncio.Event().wait()
            raise AssertionError

    async def main() -> list[dict[str, Any]]:
        transport = Async()
        chat = AsyncChat(conversation(), transport, None, None)
        task = asyncio.create_task(chat.ask("Which?"))
        await transport.asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return transport.bodies

    assert [body["type"] for body in asyncio.run(main())] == ["send_text_prompt", "cancel"]


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_a_picture_that_the_server_rejects_is_dropped_on_request() -> None:
    chat = chat_of(Scripted(refusal(415, "unsupported_media"), answer("Two.")))
    added = chat.add_image(PNG)
    with pytest.raises(InvalidRequest):
        chat.ask("Which?")
    assert chat.drop_images() == (added,)
    assert chat.drop_images() == chat.waiting_pictures == ()
    assert chat.ask("Which?").text == "Two."
    assert "image" not in chat._transport.bodies[-1]


def test_a_drop_during_an_answer_keeps_the_pictures_of_its_question() -> None:
    chat = chat_of(Scripted(lines("A", end=False), lines("B"), answer("Two.")))
    first = chat.add_image(PNG)
    stream = chat.stream("Which?")
    next(stream)
    second = chat.add_image(PNG)
    assert chat.drop_images() == (second,)
    assert chat.waiting_pictures == (first,)
    third = chat.add_image(PNG)
    assert list(stream) == ["B"]
    assert chat.waiting_pictures == (third,)


def test_llava_chat_drops_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/image {path}\nWhich?\n/drop\n/drop\nWhich?\n"))
    chat = chat_of(Scripted(refusal(415, "unsupported_media"), lines("Two.")))
    assert Talk().run(chat) == 1
    printed = capsys.readouterr()
    assert printed.out.endswith("Two.\n")
    assert printed.err.splitlines()[-3:] == [
        "the next question shows the waiting pictures and clip again; /drop drops them",
        f"dropped {path}",
        "nothing waits for the next question",
    ]


def test_llava_chat_shows_a_clip_with_one_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(bytes(2**19))
    script = f"/video {path}\nWhich?\nWhich?\nWhich?\n/video {path}\n/drop\n/history\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(script))
    chat = chat_of(Scripted(refusal(415, "unsupported_media"), lines("Two."), lines("Three.")))
    assert Talk().run(chat) == 1
    assert ["video" in body for body in chat._transport.bodies] == [True, True, False]
    printed = capsys.readouterr()
    assert printed.err.splitlines()[0] == f"[{path}, clip of 0.5 MiB] is shown with the next question"
    assert printed.err.splitlines()[-1] == f"dropped {path}"
    assert printed.out.splitlines()[-4:] == [f"1. Which? [{path}]", "   Two.", "2. Which?", "   Three."]


def test_llava_chat_is_opened_on_pictures_or_a_clip(capsys: Any) -> None:
    options = parse_args(["http://h", "--video", "a.mp4", "--video-frames", "4"])
    assert (options.pictures, options.video, options.video_frames) == ([], "a.mp4", 4)
    with pytest.raises(SystemExit):
        parse_args(["http://h", "a.png", "--video", "a.mp4"])
    assert "on pictures or on a clip, got both" in capsys.readouterr().err


def test_an_async_chat_shows_clips() -> None:
    async def main() -> list[dict[str, Any]]:
        scripted = Scripted(answer("Two."), lines("Three."))
        transport = ThreadedTransport(scripted)
        chat = AsyncChat(conversation(), transport, None, None)
        await chat.ask("Which?", video=b"clip", video_frames=3)
        async for _ in chat.stream("Which?", video=[PNG, PNG]):
            pass
        await transport.close()
        return scripted.bodies

    first, second = asyncio.run(main())
    assert (first["video"], first["video_frames"]) == ("data:video/mp4;base64,Y2xpcA==", 3)
    assert second["video"] == [base64.b64encode(PNG).decode()] * 2


# --- time-outs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def dripping() -> Iterator[str]:
    """Answer with a head, and then a byte each 20 ms without end."""
    listener = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()

    def drip(connection: socket.socket) -> None:
        with connection:
            try:
                connection.sendall(HEAD)
                while not ended.wait(0.02):
                    connection.sendall(b"1\r\n \r\n")
            except OSError:
                pass

    def serve() -> None:
        while not ended.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threads.append(threading.Thread(target=drip, args=(connection,)))
            threads[-1].start()

    threads = [threading.Thread(target=serve)]
    threads[0].start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    ended.set()
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    for thread in threads:
        thread.join()


@pytest.fixture
def silent() -> Iterator[str]:
    """Accept connections and answer nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_reply_that_never_ends_is_cut_at_the_deadline(dripping: str) -> None:
    transport = HttpTransport(dripping)
    with pytest.raises(TimedOut):
        transport.call(ASK, limits(0.3))
    reply, stream = transport.start(ASK, limits(0.3))
    assert reply.is_success
    with pytest.raises(TimedOut):
        list(iter(stream.read, b""))
    stream.abort()
    transport.close()

    async def main() -> None:
        transport = AsyncHttpTransport(dripping)
        with pytest.raises(TimedOut):
            await transport.call(ASK, limits(0.3))
        await transport.close()

    asyncio.run(main())


def test_a_server_that_answers_nothing_is_given_up(silent: str) -> None:
    transport = HttpTransport(silent)
    with pytest.raises(TimedOut):
        transport.call(ASK, limits(60, first_byte_s=0.2))
    transport.close()

    async def main() -> None:
        transport = AsyncHttpTransport(silent)
        with pytest.raises(TimedOut):
            await transport.call(ASK, limits(60, first_byte_s=0.2))
        await transport.close()

    asyncio.run(main())
    ended = threading.Event()
    with pytest.raises(TimedOut):
        within(0.1, lambda: ended.wait(60), lambda _: None)
    ended.set()


@pytest.mark.parametrize("server", ["silent", "dripping"])
def test_an_object_of_s3_that_does_not_arrive_is_given_up(
    server: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", request.getfixturevalue(server))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setattr(sources, "FETCH_TIMEOUT_S", 0.4)
    with pytest.raises(InvalidPicture, match="must arrive within"):
        load_picture("s3://pictures/a.png", region="us-east-1")


def test_an_object_of_s3_that_is_cut_off_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        monkeypatch.setattr(sources, "FETCH_TIMEOUT_S", 300)  # boto3 loads its tables first

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65_536)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(PNG) + PNG[:-1])

        server = threading.Thread(target=serve, daemon=True)
        server.start()
        with pytest.raises(InvalidPicture, match="must be a readable object"):
            load_picture("s3://pictures/a.png", region="us-east-1")
        server.join()


# --- errors of SageMaker ----------------------------------------------------------------------------------------------


def error_of_boto(code: str, status: int, message: str = "Why.", **members: Any) -> ClientError:
    response = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}, **members}
    return ClientError(response, "InvokeEndpoint")


class Failing:
    """A boto3 client whose calls fail."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def invoke_endpoint(self, **_: Any) -> Any:
        raise self._error

    invoke_endpoint_with_response_stream = invoke_endpoint


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (error_of_boto("ValidationError", 400, "Session abc... is not known to this endpoint."), SessionLost),
        (error_of_boto("ValidationError", 400, "Endpoint llava of account 1 not found."), ApiError),
        (error_of_boto("ModelError", 424, OriginalStatusCode=0), Unavailable),
        (error_of_boto("ThrottlingException", 400), OverCapacity),
        (error_of_boto("ServiceUnavailable", 503), Unavailable),
        (error_of_boto("InternalDependencyException", 530), Unavailable),
        (error_of_boto("413", 413), TooLarge),
        (error_of_boto("AccessDeniedException", 403), ApiError),
        (NoCredentialsError(), NotConfigured),
        (ConnectionResetError(), ConnectionFailed),
    ],
)
def test_an_error_of_sagemaker_has_its_class(error: Exception, kind: type[Exception]) -> None:
    transport = SageMakerTransport("llava", Failing(error), own=False)
    for send in (transport.call, transport.start):
        with pytest.raises(kind) as raised:
            send(ASK, limits(60))
        assert kind is not ApiError or not isinstance(raised.value, SessionLost)


def test_a_model_error_is_the_containers_reply() -> None:
    body = '{"error": {"code": "session_busy", "message": "Why."}}'
    error = error_of_boto("ModelError", 424, OriginalStatusCode=409, OriginalMessage=body)
    transport = SageMakerTransport("llava", Failing(error), own=False)
    assert transport.call(ASK, limits(60)) == Reply(409, body.encode())
