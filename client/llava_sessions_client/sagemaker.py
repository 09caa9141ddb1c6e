"""A SageMaker endpoint with boto3."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    EventStreamError,
    HTTPClientError,
    ReadTimeoutError,
)

from . import errors
from .drive import ReplyStream
from .effects import Limits
from .options import Timeouts
from .wire import CONTENT_TYPE, Reply, Request
from .within import within

T = TypeVar("T")
NEW_SESSION = "NEW_SESSION"
_PENDING_PARTS = 64
_THROTTLED = ("ThrottlingException", "Throttling", "TooManyRequestsException", "ModelNotReadyException")
_THROTTLED_RETRY_S = 1.0


def make_client(timeouts: Timeouts, region: str | None, endpoint_url: str | None) -> Any:
    """Return a boto3 client without retries of its own: they would run an open twice.

    `AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME` replaces the address, as for every boto3 client. Raise `NotConfigured`.
    """
    config = Config(
        connect_timeout=min(timeouts.connect_s, timeouts.total_s),
        read_timeout=min(timeouts.first_byte_s, timeouts.total_s),
        retries={"total_max_attempts": 1},
        max_pool_connections=64,
    )
    try:
        return boto3.client("sagemaker-runtime", region_name=region, endpoint_url=endpoint_url, config=config)
    except (BotoCoreError, ValueError) as error:
        raise errors.NotConfigured(f"boto3 cannot call SageMaker: {error}") from error


class SageMakerTransport:
    """Calls of the endpoint `name`. `own`: whether to close the client."""

    def __init__(self, name: str, client: Any, *, own: bool) -> None:
        self._name = name
        self._client = client
        self._own = own

    def call(self, request: Request, limits: Limits) -> Reply:
        """Send a request and return its reply. Raise `ConnectionFailed` or `TimedOut`."""

        def invoke() -> Reply:
            reply = self._client.invoke_endpoint(**self._members(request, request.session_id or NEW_SESSION))
            with contextlib.closing(reply["Body"]) as body:
                return Reply(200, body.read(), reply.get("NewSessionId", ""))

        try:
            return _in_time(limits, invoke)
        except ClientError as error:
            return _reply_of(error, is_session=bool(request.session_id))
        except (BotoCoreError, HTTPClientError, OSError) as error:
            raise _error_of(error) from error

    def start(self, request: Request, limits: Limits) -> tuple[Reply, ReplyStream | None]:
        """Send a request for a stream. Return its head and its body, or an error reply. Raise as `call`."""
        try:
            members = self._members(request, request.session_id)
            reply = _in_time(limits, lambda: self._client.invoke_endpoint_with_response_stream(**members))
        except ClientError as error:
            return _reply_of(error, is_session=True), None
        except (BotoCoreError, HTTPClientError, OSError) as error:
            raise _error_of(error) from error
        return Reply(200), EventReader(reply["Body"], limits)

    def close(self) -> None:
        """Close the connections."""
        if self._own:
            self._client.close()

    def _members(self, request: Request, session_id: str) -> dict[str, Any]:
        return {
            "EndpointName": self._name,
            "ContentType": CONTENT_TYPE,
            "Body": request.content,
            "SessionId": session_id,
        }


def _in_time(limits: Limits, work: Callable[[], T]) -> T:
    """Return the result of `work`. The time-outs of a boto3 client are those of its connections, not of one call."""
    return within(min(limits.first_byte_s, limits.deadline_s - time.monotonic()), work, _discard)


def _discard(result: object) -> None:
    if isinstance(result, dict):
        result["Body"].close()


class EventReader:
    """The parts of an event stream. A thread reads them, since boto3 cannot limit the time of one part."""

    def __init__(self, events: Any, limits: Limits) -> None:
        self._events = events
        self._limits = limits
        self._parts: queue.Queue[bytes | Exception] = queue.Queue(_PENDING_PARTS)
        self._aborted = threading.Event()
        self._thread = threading.Thread(target=self._pump, daemon=True, name="llava-sessions-stream")
        self._thread.start()

    def read(self) -> bytes:
        """Return the next part, b"" at the end. Raise `ClientError`."""
        remaining_s = self._limits.deadline_s - time.monotonic()
        try:
            part = self._parts.get(timeout=max(0.0, min(self._limits.between_s, remaining_s)))
        except queue.Empty:
            self.abort()
            raise errors.TimedOut("the next part of the answer must arrive within the time-outs") from None
        if isinstance(part, Exception):
            raise part
        return part

    def finish(self) -> None:
        """Let the thread read what follows the last line."""
        self._aborted.set()

    def abort(self) -> None:
        """Close the connection. May be called more than once."""
        self._aborted.set()
        self._events.close()

    def _pump(self) -> None:
        try:
            for part in _payloads(self._events):
                self._put(part)
            self._put(b"")
        except errors.ClientError as error:
            self._put(error)
        except EventStreamError as error:
            self._put(_stream_error(error))
        except Exception as error:  # urllib3's errors and those of a connection that `abort` has closed
            self._put(errors.ConnectionFailed(f"the connection broke: {type(error).__name__}"))
        finally:
            self._events.close()

    def _put(self, part: bytes | Exception) -> None:
        while not self._aborted.is_set():
            with contextlib.suppress(queue.Full):
                self._parts.put(part, timeout=1.0)
                return


def _payloads(events: Any) -> Iterator[bytes]:
    for event in events:
        part = event.get("PayloadPart", {}).get("Bytes")
        if part:
            yield part


def _stream_error(error: EventStreamError) -> errors.ClientError:
    """Return the error for an exception event: the stream was cut, or has run for more than 8 minutes."""
    details = error.response.get("Error", {})
    return errors.ConnectionFailed(f"SageMaker ended the stream: {details.get('Code')}: {details.get('Message')}")


def _reply_of(error: ClientError, *, is_session: bool) -> Reply:
    """Return the container's own reply of a `ModelError`. Raise the `ApiError` of SageMaker for any other error."""
    response = error.response
    code = str(response.get("Error", {}).get("Code"))
    message = str(response.get("Error", {}).get("Message"))
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    original = int(response.get("OriginalStatusCode") or 0)
    if original:
        return Reply(original, str(response.get("OriginalMessage", "")).encode())
    if code == "ModelError":  # the container did not answer, or not in time
        raise errors.Unavailable(503, code, message)
    if code == "ValidationError" and is_session and not _names_endpoint(message):
        raise errors.SessionLost(status, code, message)
    if code in _THROTTLED:
        raise errors.OverCapacity(status, code, message, _THROTTLED_RETRY_S)
    if status >= 500:
        raise errors.Unavailable(status, code, message)
    raise errors.api_error(status, code, message)


def _names_endpoint(message: str) -> bool:
    """Return whether a `ValidationError` is about the endpoint's name. Unknown sessions receive the same class."""
    return message.lower().startswith("endpoint ")


def _error_of(error: Exception) -> errors.ClientError:
    """Return the client's error for one of boto3."""
    if isinstance(error, EndpointConnectionError | ConnectTimeoutError):
        return errors.ConnectionFailed(f"SageMaker cannot be reached: {error}", connected=False)
    if isinstance(error, ReadTimeoutError):
        return errors.TimedOut(f"SageMaker must reply within the time-outs: {error}")
    if isinstance(error, HTTPClientError | OSError):
        return errors.ConnectionFailed(f"the connection broke: {error}")
    return errors.NotConfigured(f"boto3 cannot call SageMaker: {error}")
