"""Conversations through LiteLLM, as `openai/...` or as `sagemaker_chat/...`."""

from __future__ import annotations

import litellm
from program import Message, Program, assistant, openai_messages, system, user

program = Program()
q = program.questions
# `sagemaker_chat` has an option for the whole URL, and needs another one for streams.
if runtime := program.job.get("runtime_url"):
    path = f"{runtime}/endpoints/{program.job['endpoint']}/invocations"
    MODEL = f"sagemaker_chat/{program.job['endpoint']}"
    WHOLE = {"sagemaker_base_url": path}
    STREAMED = {"sagemaker_base_url": f"{path}-response-stream", "stream": True}
else:
    MODEL = f"openai/{program.job['model']}"
    WHOLE = {"api_base": program.job["url"], "api_key": "any"}
    STREAMED = {**WHOLE, "stream": True, "stream_options": {"include_usage": True}}


@program.scenario
def four_turns() -> None:
    """Ask four times, whole and streamed in turn."""
    conversation: list[Message] = [system("Be brief.")]
    for number in range(4):
        conversation.append(user(q[number], *([] if number else ["first"])))
        messages = openai_messages(program, conversation)
        if number % 2:
            chunks = list(litellm.completion(MODEL, messages=messages, max_tokens=40, **STREAMED))
            choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
            text = "".join(choice.delta.content or "" for choice in choices)
            reason = choices[-1].finish_reason
        else:
            reply = litellm.completion(MODEL, messages=messages, max_tokens=40, **WHOLE)
            text, reason = reply.choices[0].message.content, reply.choices[0].finish_reason
        program.note("four_turns", conversation, text, finish_reason=reason)
        conversation.append(assistant(text))


@program.scenario
def errors() -> None:
    """What is refused raises LiteLLM's own exceptions."""
    for options in ({"n": 2}, {"logprobs": True}):
        messages = openai_messages(program, [user(q[0])])
        sent = {"model": MODEL, "messages": messages, **options, **WHOLE, "num_retries": 0}
        program.note_error("errors", lambda sent=sent: litellm.completion(**sent), "status_code")


program.finish()
