"""A picture chat with the endpoint through boto3: open, ask, close. docs/sagemaker.md has the same as an example."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError, EventStreamError

from .account import SESSION_CALLS, Account
from .problems import DeployError, code_of, message_of

MAX_BODY_BYTES = 6 << 20  # of a request, by the API reference


@dataclass
class EndpointChat:
    """An open session on an endpoint."""

    session_id: str
    expires: str
    _runtime: Any
    _endpoint: str

    def ask(self, question: str) -> Iterator[str]:
        """Ask a question and yield the pieces of the streamed answer. Raise `DeployError`."""
        body = _json({"type": "send_text_prompt", "prompt_text": question, "stream": True})
        with _explained(self._endpoint):
            reply = self._runtime.invoke_endpoint_with_response_stream(
                EndpointName=self._endpoint, SessionId=self.session_id, ContentType="application/json", Body=body
            )
            for line in _lines(part.get("PayloadPart", {}).get("Bytes", b"") for part in reply["Body"]):
                event = json.loads(line)
                if "error" in event:
                    raise DeployError(f"the answer broke off: {event['error']['code']}: {event['error']['message']}")
                yield event.get("delta", "")

    def close(self) -> None:
        """Close the session."""
        with _explained(self._endpoint):
            self._runtime.invoke_endpoint(
                EndpointName=self._endpoint,
                SessionId=self.session_id,
                ContentType="application/json",
                Body=_json({"type": "close_session"}),
            )


def open_chat(account: Account, picture: Path) -> EndpointChat:
    """Open a session on a picture. Raise `DeployError`. Never retried: a retry could open a second session."""
    try:
        image = base64.b64encode(picture.read_bytes()).decode()
    except OSError as error:
        raise DeployError(f"{picture} can't be read: {error.strerror}") from None
    body = _json({"type": "start_session", "image": image})
    if len(body) > MAX_BODY_BYTES:
        raise DeployError(
            f"{picture} is too large for a request of {MAX_BODY_BYTES >> 20} MiB; put it behind a URL (`path`)"
        )
    runtime = account.client("sagemaker-runtime", SESSION_CALLS)
    with _explained(account.name):
        reply = runtime.invoke_endpoint(
            EndpointName=account.name, SessionId="NEW_SESSION", ContentType="application/json", Body=body
        )
    session_id, _, expires = reply.get("NewSessionId", "").partition("; Expires=")
    if not session_id:
        raise DeployError("the endpoint answered without a session ID: does it run an image of LLaVA Sessions?")
    return EndpointChat(session_id, expires, runtime, account.name)


def _lines(parts: Iterator[bytes]) -> Iterator[bytes]:
    """Yield complete lines. SageMaker splits and joins the container's chunks arbitrarily."""
    rest = b""
    for part in parts:
        *complete, rest = (rest + part).split(b"\n")
        yield from (line for line in complete if line)
    if rest:
        yield rest


@contextmanager
def _explained(endpoint: str) -> Iterator[None]:
    """Raise SageMaker's errors as `DeployError`, with the container's message if there is one."""
    try:
        yield
    except EventStreamError as error:
        raise DeployError(f"the answer broke off: {message_of(error)}") from None
    except ClientError as error:
        if code_of(error) == "ModelError":
            status = error.response.get("OriginalStatusCode")
            message = error.response.get("OriginalMessage", "") or message_of(error)
            raise DeployError(f"the container answered {status}: {message}") from None
        if code_of(error) == "ValidationError":
            raise DeployError(f"{message_of(error)} (is {endpoint!r} up? `llava-deploy status`)") from None
        raise


def _json(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()
