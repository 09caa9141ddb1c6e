"""Conversations through LangChain: langchain-openai's ChatOpenAI or langchain-aws's ChatSagemakerEndpoint."""

from __future__ import annotations

import json
from typing import Any

import boto3
from langchain_aws.chat_models.sagemaker_endpoint import ChatModelContentHandler, ChatSagemakerEndpoint
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from program import Message, Program, assistant, openai_messages, system, user

program = Program()
q = program.questions
KINDS = {"system": SystemMessage, "user": HumanMessage, "assistant": AIMessage}


class ContentHandler(ChatModelContentHandler):
    """Reads replies in OpenAI's form. langchain-aws leaves this class to its users."""

    content_type = "application/json"
    accepts = "application/json"

    def transform_input(self, prompt: list[dict], model_kwargs: dict) -> bytes:
        """Return the body of a request."""
        return json.dumps({"messages": prompt, **model_kwargs}).encode()

    def transform_output(self, output: Any) -> BaseMessage:
        """Return the message of a whole reply (a file), or of one line of a stream (bytes)."""
        if isinstance(output, bytes):
            choice = json.loads(output)["choices"][0]
            metadata = {"finish_reason": choice["finish_reason"]}
            return AIMessageChunk(content=choice["delta"].get("content") or "", response_metadata=metadata)
        choice = json.loads(output.read())["choices"][0]
        return AIMessage(
            content=choice["message"]["content"], response_metadata={"finish_reason": choice["finish_reason"]}
        )


def sagemaker(**endpoint_kwargs: str) -> BaseChatModel:
    """Return a model at the endpoint."""
    return ChatSagemakerEndpoint(
        endpoint_name=program.job["endpoint"],
        client=boto3.client("sagemaker-runtime", endpoint_url=program.job["runtime_url"]),
        content_handler=ContentHandler(),
        model_kwargs={"max_tokens": 40, "temperature": 0},
        endpoint_kwargs=endpoint_kwargs,
    )


def openai() -> BaseChatModel:
    """Return a model at the OpenAI route."""
    return ChatOpenAI(
        model=program.job["model"],
        base_url=program.job["url"],
        api_key="any",
        max_retries=0,
        max_tokens=40,
        temperature=0,
    )


def converse(scenario: str, model: BaseChatModel) -> None:
    """Ask four times, whole and streamed in turn."""
    conversation: list[Message] = [system("Be brief.")]
    for number in range(4):
        conversation.append(user(q[number], *([] if number else ["second"])))
        sent = [
            KINDS[message["role"]](content=message["content"]) for message in openai_messages(program, conversation)
        ]
        text = "".join(chunk.text for chunk in model.stream(sent)) if number % 2 else model.invoke(sent).text
        program.note(scenario, conversation, text)
        conversation.append(assistant(text))


@program.scenario
def chat_openai() -> None:
    """ChatOpenAI has the whole conversation, and the exceptions of the package openai."""
    converse("chat_openai", openai())
    program.note_error("chat_openai_errors", lambda: openai().bind(n=2).invoke(q[0]), "status_code", "code")


@program.scenario
def chat_sagemaker() -> None:
    """ChatSagemakerEndpoint without a session, then in one that it names in each request."""
    converse("chat_sagemaker", sagemaker())
    runtime = boto3.client("sagemaker-runtime", endpoint_url=program.job["runtime_url"])
    opened = runtime.invoke_endpoint(
        EndpointName=program.job["endpoint"],
        ContentType="application/json",
        SessionId="NEW_SESSION",
        Body=json.dumps({"requestType": "NEW_SESSION"}),
    )
    session = opened["NewSessionId"].split(";")[0]
    converse("chat_sagemaker_in_a_session", sagemaker(SessionId=session))
    closed = runtime.invoke_endpoint(
        EndpointName=program.job["endpoint"],
        ContentType="application/json",
        SessionId=session,
        Body=json.dumps({"requestType": "CLOSE"}),
    )
    program.exchanges["closed"] = [{"opened": session, "closed": closed.get("ClosedSessionId")}]
    program.note_error("chat_sagemaker_errors", lambda: sagemaker().invoke(q[0], n=2))


program.finish()
