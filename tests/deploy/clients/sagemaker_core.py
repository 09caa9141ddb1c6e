"""Native and OpenAI conversations through sagemaker-core's Endpoint."""

from __future__ import annotations

import json

from program import Message, Program, assistant, openai_messages, user
from sagemaker.core.resources import Endpoint

program = Program()
q = program.questions
endpoint = Endpoint(endpoint_name=program.job["endpoint"])


def invoke(body: dict, session: str | None = None):
    """Invoke the endpoint; return its output and the parsed body."""
    options = {} if session is None else {"session_id": session}
    output = endpoint.invoke(body=json.dumps(body), content_type="application/json", **options)
    return output, json.loads(output.body.read())


@program.scenario
def native() -> None:
    """Open a session on a picture, ask three times, and close it."""
    output, _ = invoke({"type": "start_session", "image": program.job["pictures"]["first"]}, "NEW_SESSION")
    session = output.new_session_id.split(";")[0]
    conversation: list[Message] = []
    for number in range(3):
        conversation.append(user(q[number], *([] if number else ["first"])))
        _, reply = invoke({"type": "send_text_prompt", "prompt_text": q[number]}, session)
        program.note("native", conversation, reply["response_text"])
        conversation.append(assistant(reply["response_text"]))
    output, _ = invoke({"type": "close_session"}, session)
    program.exchanges["closed"] = [{"opened": session, "closed": output.closed_session_id}]


@program.scenario
def messages() -> None:
    """Send the whole conversation without a session."""
    conversation: list[Message] = []
    for number in range(3):
        conversation.append(user(q[number], *([] if number else ["second"])))
        _, reply = invoke({"messages": openai_messages(program, conversation), "max_tokens": 40})
        text = reply["choices"][0]["message"]["content"]
        program.note("messages", conversation, text)
        conversation.append(assistant(text))


@program.scenario
def errors() -> None:
    """What the container refuses is botocore's ModelError."""
    body = {"messages": openai_messages(program, [user(q[0])]), "n": 2}
    program.note_error("errors", lambda: invoke(body))


program.finish()
