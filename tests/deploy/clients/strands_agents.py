"""Conversations of Strands agents: OpenAIModel, and SageMakerAIModel with and without a session."""

from __future__ import annotations

import base64
import json

import boto3
from program import Message, Program, assistant, system, user
from strands import Agent
from strands.models.model import Model
from strands.models.openai import OpenAIModel
from strands.models.sagemaker import SageMakerAIModel

program = Program()
q = program.questions
SYSTEM = "Answer in few words."


def picture(name: str) -> dict:
    """Return a picture in the words of Strands."""
    return {"image": {"format": "png", "source": {"bytes": base64.b64decode(program.job["pictures"][name])}}}


def sagemaker(stream: bool, **additional_args: str) -> Model:
    """Return a model at the endpoint."""
    return SageMakerAIModel(
        endpoint_config={
            "endpoint_name": program.job["endpoint"],
            "region_name": "us-west-2",
            "additional_args": additional_args,
        },
        payload_config={"max_tokens": 40, "stream": stream},
    )


def converse(scenario: str, model: Model, *first: dict) -> None:
    """Ask a question for each prompt of `first`, then two more. The agent keeps the history."""
    agent = Agent(model=model, system_prompt=SYSTEM, callback_handler=None)
    conversation: list[Message] = [system(SYSTEM)]
    prompts = [(first, user(" ".join(block["text"] for block in first if "text" in block), "first"))]
    prompts += [([{"text": text}], user(text)) for text in q[1:3]]
    for blocks, message in prompts:
        conversation.append(message)
        result = agent(list(blocks))
        text = "".join(block["text"] for block in result.message["content"])
        program.note(scenario, conversation, text, finish_reason=result.stop_reason)
        conversation.append(assistant(text))


@program.scenario
def openai_model() -> None:
    """Every request is streamed."""
    options = {"client_args": {"base_url": program.job["url"], "api_key": "any"}, "model_id": program.job["model"]}
    model = OpenAIModel(**options, params={"max_tokens": 40})
    converse("openai_model", model, {"text": q[0]}, picture("first"))
    refused = OpenAIModel(**options, params={"n": 2})
    program.note_error("openai_model_errors", lambda: Agent(model=refused, callback_handler=None)(q[0]), "status_code")


@program.scenario
def sagemaker_model() -> None:
    """Strands 1.62 sends only the text of a message that has text, so the picture is a message of its own."""
    converse("sagemaker_model", sagemaker(stream=True), picture("first"))
    converse("sagemaker_model_whole", sagemaker(stream=False), picture("first"))


@program.scenario
def sagemaker_model_in_a_session() -> None:
    """The session is named in each request."""
    runtime = boto3.client("sagemaker-runtime")
    request = {"EndpointName": program.job["endpoint"], "ContentType": "application/json"}
    body = json.dumps({"requestType": "NEW_SESSION"})
    opened = runtime.invoke_endpoint(**request, SessionId="NEW_SESSION", Body=body)
    session = opened["NewSessionId"].split(";")[0]
    converse("sagemaker_model_in_a_session", sagemaker(stream=True, SessionId=session), picture("first"))
    runtime.invoke_endpoint(**request, SessionId=session, Body=json.dumps({"requestType": "CLOSE"}))


program.finish()
