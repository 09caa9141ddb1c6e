"""Conversations through the package openai: whole and streamed, sync and async, edited, regenerated and stopped."""

from __future__ import annotations

import asyncio

import openai
from program import Message, Program, assistant, openai_messages, system, user

program = Program()
q = program.questions
client = openai.OpenAI(base_url=program.job["url"], api_key="any", max_retries=0)
# The answer is random and long: it runs until the client leaves.
ENDLESS = {"temperature": 2.0, "seed": 3, "max_tokens": 600, "extra_body": {"ignore_eos": True}}


def ask(scenario: str, conversation: list[Message], **options) -> str:
    """Get an answer as a whole."""
    messages = openai_messages(program, conversation)
    reply = client.chat.completions.create(model=program.job["model"], messages=messages, **options)
    text = reply.choices[0].message.content
    facts = {"object": reply.object, "model": reply.model, "fingerprint": reply.system_fingerprint}
    usage = reply.usage.model_dump()
    program.note(scenario, conversation, text, finish_reason=reply.choices[0].finish_reason, usage=usage, **facts)
    return text


def ask_streamed(scenario: str, conversation: list[Message], **options) -> str:
    """Get a streamed answer. Its usage comes in a chunk of its own."""
    messages = openai_messages(program, conversation)
    options = {"stream": True, "stream_options": {"include_usage": True}, **options}
    chunks = list(client.chat.completions.create(model=program.job["model"], messages=messages, **options))
    *parts, last = chunks
    text = "".join(chunk.choices[0].delta.content or "" for chunk in parts)
    reasons = [chunk.choices[0].finish_reason for chunk in parts]
    facts = {"role": parts[0].choices[0].delta.role, "choices_of_usage": len(last.choices), "reasons": reasons[:-1]}
    usage = last.usage.model_dump()
    program.note(scenario, conversation, text, finish_reason=reasons[-1], usage=usage, **facts)
    return text


@program.scenario
def five_turns() -> None:
    """Ask five times, whole and streamed in turn."""
    conversation: list[Message] = []
    for number in range(5):
        conversation.append(user(q[number], *([] if number else ["first"])))
        text = (ask_streamed if number % 2 else ask)("five_turns", conversation)
        conversation.append(assistant(text))


@program.scenario
def edited_and_regenerated() -> None:
    """Ask three times, repeat the third, edit the second and go on; then go on with the conversation as it was."""
    first = [user(q[0], "second")]
    first.append(assistant(ask("edited_and_regenerated", first)))
    second = [*first, user(q[1])]
    second.append(assistant(ask("edited_and_regenerated", second)))
    third = [*second, user(q[2])]
    answer = ask("edited_and_regenerated", third)
    ask_streamed("edited_and_regenerated", third)
    edited = [*first, user(q[3])]
    edited.append(assistant(ask("edited_and_regenerated", edited)))
    ask("edited_and_regenerated", [*edited, user(q[2])])
    ask("edited_and_regenerated", [*third, assistant(answer), user(q[4])])


@program.scenario
def stopped() -> None:
    """Leave a stream in its middle, and go on with the half of the answer that came; then do without it."""
    conversation = [user(q[0], "first")]
    conversation.append(assistant(ask("stopped", conversation)))
    conversation.append(user(q[1]))
    messages = openai_messages(program, conversation)
    half = ""
    with client.chat.completions.create(
        model=program.job["model"], messages=messages, stream=True, **ENDLESS
    ) as chunks:
        for number, chunk in enumerate(chunks):
            half += chunk.choices[0].delta.content or ""
            if number >= 6 and half.strip():
                break
    ask("stopped", [*conversation, assistant(half), user(q[2])])
    ask("stopped", [*conversation[:-1], user(q[3])])


@program.scenario
def odd_conversations() -> None:
    """A picture in the third turn, a greeting first, system messages, pictures alone, messages of one role."""
    name = "odd_conversations"
    late = [user(q[0])]
    late.append(assistant(ask(name, late)))
    late += [user(q[1]), assistant("I see no picture."), user(q[2], "second")]
    late.append(assistant(ask_streamed(name, late)))
    ask(name, [*late, user(q[3])])
    ask(name, [assistant("Hello! How can I help?"), user(q[0], "first")])
    ask(name, [system("Be brief."), system("Be exact."), user(q[1], "first")])
    ask(name, [user("", "second"), user(q[1])])
    alone = [user("", "first")]
    alone.append(assistant(ask(name, alone)))
    ask(name, [*alone, user(q[2])])
    ask(name, [user(q[0], "first", "second"), assistant("Many."), assistant("Very many."), user("Well."), user(q[3])])


@program.scenario
def a_title_next_to_a_chat() -> None:
    """A chat page asks for a title, with text only, between two turns of a picture chat."""
    name = "a_title_next_to_a_chat"
    conversation = [user(q[0], "first")]
    conversation.append(assistant(ask(name, conversation)))
    ask(name, [user("Write a title of three words for this chat: " + q[0])], max_tokens=8)
    ask(name, [*conversation, user(q[1])])


@program.scenario
def options() -> None:
    """Every option that has an effect, and those that have none."""
    conversation = [user(q[0], "second")]
    ask("options", conversation, max_completion_tokens=3)
    ask("options", conversation, max_tokens=-1)
    ask("options", conversation, max_tokens=10**6, temperature=0, top_p=1, n=1, user="someone")
    neutral = {"presence_penalty": 0, "frequency_penalty": 0, "logprobs": False, "store": False, "metadata": {"a": "b"}}
    more = {"tools": [], "response_format": {"type": "text"}, "parallel_tool_calls": True, "prompt_cache_key": "key"}
    ask_streamed("options", conversation, **neutral, **more)


@program.scenario
def sampled() -> None:
    """The same seed gives the same answer, and a stop sequence ends it."""
    for _ in range(2):
        ask("sampled", [user(q[0], "first")], temperature=1.5, top_p=0.9, seed=7, stop=["."], max_tokens=30)


async def _two_conversations() -> None:
    async with openai.AsyncOpenAI(base_url=program.job["url"], api_key="any", max_retries=0) as gpt:
        await asyncio.gather(_converse(gpt, "first", stream=False), _converse(gpt, "second", stream=True))


async def _converse(gpt: openai.AsyncOpenAI, picture: str, stream: bool) -> None:
    conversation: list[Message] = []
    for number in range(3):
        conversation.append(user(q[number], *([] if number else [picture])))
        messages = openai_messages(program, conversation)
        reply = await gpt.chat.completions.create(model=program.job["model"], messages=messages, stream=stream)
        if stream:
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in reply])
        else:
            text = reply.choices[0].message.content
        program.note("asynchronous", conversation, text)
        conversation.append(assistant(text))


@program.scenario
def asynchronous() -> None:
    """Two conversations at the same time, by the async client; one of them streams."""
    asyncio.run(_two_conversations())


@program.scenario
def models() -> None:
    """The list of models has the one that a request names."""
    program.exchanges["models"] = [model.model_dump() for model in client.models.list()]


@program.scenario
def errors() -> None:
    """What is refused raises the package's own exceptions, with the code and the option."""
    facts = ("status_code", "code", "param", "type")
    requests = [
        ([user("word " * 20_000)], {}),
        ([user("word " * 3_000)], {}),
        ([user(q[0])], {"n": 2}),
        ([user(q[0])], {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}),
        ([user(q[0])], {"logprobs": True}),
        ([user(q[0])], {"response_format": {"type": "json_object"}}),
        ([user(q[0]), assistant("An answer.")], {}),
        ([], {}),
    ]
    for conversation, options in requests:
        messages = openai_messages(program, conversation)
        sent = {"model": program.job["model"], "messages": messages, **options}
        program.note_error("errors", lambda sent=sent: client.chat.completions.create(**sent), *facts)
    for url in ("data:image/png;base64,AAAA", "data:image/png;base64,?", "file:///etc/passwd", "picture.png"):
        part = {"type": "image_url", "image_url": {"url": url}}
        sent = {"model": program.job["model"], "messages": [{"role": "user", "content": [part]}], "stream": True}
        program.note_error("errors", lambda sent=sent: list(client.chat.completions.create(**sent)), *facts)


program.finish()
