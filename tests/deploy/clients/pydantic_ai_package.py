"""Conversations of a pydantic-ai agent with instructions: whole and streamed."""

from __future__ import annotations

import asyncio
import base64

from program import Message, Program, assistant, system, user
from pydantic_ai import Agent, BinaryContent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

program = Program()
q = program.questions
INSTRUCTIONS = "Answer in few words."
model = OpenAIChatModel(program.job["model"], provider=OpenAIProvider(base_url=program.job["url"], api_key="any"))
agent = Agent(model, instructions=INSTRUCTIONS, model_settings={"max_tokens": 40})


async def _converse() -> None:
    picture = BinaryContent(base64.b64decode(program.job["pictures"]["first"]), media_type="image/png")
    conversation: list[Message] = [system(INSTRUCTIONS)]
    history = None
    for number in range(4):
        conversation.append(user(q[number], *([] if number else ["first"])))
        prompt = q[number] if number else [q[number], picture]
        if number % 2:
            async with agent.run_stream(prompt, message_history=history) as run:
                text = await run.get_output()
                history = run.all_messages()
        else:
            run = await agent.run(prompt, message_history=history)
            text, history = run.output, run.all_messages()
        program.note("four_turns", conversation, text)
        conversation.append(assistant(text))


@program.scenario
def four_turns() -> None:
    """The agent keeps the history; each request has the instructions in front of it."""
    asyncio.run(_converse())


@program.scenario
def errors() -> None:
    """What is refused raises pydantic-ai's own exception."""
    settings = {"extra_body": {"n": 2}}
    program.note_error("errors", lambda: agent.run_sync(q[0], model_settings=settings), "status_code", "body")


program.finish()
