"""Random conversations with edits at random places: every answer equals `generate` on what was sent, in float32."""

from __future__ import annotations

import base64
import functools
import random
from concurrent.futures import ThreadPoolExecutor

import httpx

from models.shapes.scenes import HELD_OUT_SEEDS, dialogue, make_scene
from tests.support.encoding import to_png
from tests.support.reference import Reference

CONVERSATIONS, REQUESTS, MAX_NEW_TOKENS = 30, 6, 16
SEEDS = HELD_OUT_SEEDS[5_200 : 5_200 + 40]
PATH = "/predictions/llava/1.0/v1/chat/completions"
Message = dict


def user(text: str, *pictures: str) -> Message:
    return {"role": "user", "text": text, "pictures": list(pictures)}


def assistant(text: str) -> Message:
    return {"role": "assistant", "text": text, "pictures": []}


class RandomChat:
    """A conversation that a client edits at random places between its requests."""

    def __init__(self, http: httpx.Client, number: int) -> None:
        self._http = http
        self._random = random.Random(f"conversations {number}")
        self._seed = SEEDS[number % len(SEEDS)]
        self._questions = [turn.text for turn in dialogue(make_scene(self._seed), self._seed, 12)]
        self._messages: list[Message] = []
        # Conversations of a server test share their pictures, so that prefixes of one are found by another.
        self._pictures = [str(self._random.choice(SEEDS[:4])), str(self._seed)]
        if self._random.random() < 0.2:
            self._messages.append({"role": "system", "text": "Answer in few words.", "pictures": []})
        if self._random.random() < 0.2:
            self._messages.append(assistant("Hello! What may I look at?"))

    def run(self) -> list[dict]:
        """Send the requests. Return each conversation with its reply."""
        exchanges = []
        for _ in range(REQUESTS):
            self._edit()
            sent = [dict(message) for message in self._messages]
            reply = self._http.post(PATH, json=body(sent))
            assert reply.status_code == httpx.codes.OK, (reply.text, sent)
            reply = reply.json()
            exchanges.append({"sent": sent, "reply": reply})
            self._messages.append(assistant(reply["choices"][0]["message"]["content"]))
        return exchanges

    def _edit(self) -> None:
        """Append a question, or change the conversation as clients do, so that it ends with a question."""
        places = [place for place, message in enumerate(self._messages) if message["role"] == "user"]
        if not places or self._random.random() < 0.5:
            self._messages.append(self._question())
            return
        place = self._random.choice(places)
        match self._random.choice(("edit", "regenerate", "trim", "half", "other picture")):
            case "edit":
                self._messages[place:] = [self._question(first=place == places[0])]
            case "regenerate":
                del self._messages[place + 1 :]
            case "trim":
                self._messages[max(place - 2, 0) :] = [self._messages[place]]
            case "half":
                answers = [message for message in self._messages if message["role"] == "assistant"]
                if answers:
                    answer = self._random.choice(answers)
                    words = answer["text"].split()
                    answer["text"] = " ".join(words[: self._random.randrange(len(words) + 1)])
                self._messages.append(self._question())
            case "other picture":
                self._messages[place]["pictures"] = [self._random.choice(self._pictures)]
                del self._messages[place + 1 :]

    def _question(self, first: bool = False) -> Message:
        has_picture = any(message["pictures"] for message in self._messages)
        chance = 0.1 if has_picture and not first else 0.8
        pictures = [self._random.choice(self._pictures)] if self._random.random() < chance else []
        return user(self._random.choice(self._questions), *pictures)


def body(sent: list[Message], **options: object) -> dict:
    """Return a request in OpenAI's words."""
    messages = []
    for message in sent:
        urls = [f"data:image/png;base64,{encoded(name)}" for name in message["pictures"]]
        parts: list[dict] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        messages.append({"role": message["role"], "content": [*parts, {"type": "text", "text": message["text"]}]})
    return {"model": "llava", "messages": messages, "max_tokens": MAX_NEW_TOKENS, **options}


@functools.cache
def encoded(name: str) -> str:
    """Return a picture as base64."""
    return base64.b64encode(to_png(make_scene(int(name)).draw())).decode()


def test_thirty_random_conversations_equal_generate(http: httpx.Client) -> None:
    chats = [RandomChat(http, number) for number in range(CONVERSATIONS)]
    with ThreadPoolExecutor(6) as pool:
        exchanges = [exchange for found in pool.map(RandomChat.run, chats) for exchange in found]
    reference = Reference({str(seed): make_scene(seed).draw() for seed in SEEDS})
    edited = 0
    for exchange in exchanges:
        expected = reference.answer(exchange["sent"], MAX_NEW_TOKENS)
        reply = exchange["reply"]
        text = reply["choices"][0]["message"]["content"]
        assert expected.matches(text.strip()), (exchange["sent"], text, expected.text)
        usage = reply["usage"]
        assert usage["prompt_tokens"] == expected.prompt_tokens, exchange["sent"]
        edited += usage["prompt_tokens_details"]["cached_tokens"] > 0
    assert len(exchanges) == CONVERSATIONS * REQUESTS
    assert edited > len(exchanges) / 2, "most requests continued or forked a session"
