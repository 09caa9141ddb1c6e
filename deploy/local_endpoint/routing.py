"""The instance of a request without a session: the routing strategies of a production variant.

Undocumented, and chosen here: how the text of messages is joined, and how a prefix selects its instance.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from . import contract
from .pins import Instance

Strategy = Literal["LEAST_OUTSTANDING_REQUESTS", "RANDOM", "PREFIX_AWARE"]
STRATEGIES = get_args(Strategy)


@dataclass(frozen=True)
class Prefix:
    """What PREFIX_AWARE compares: the beginning of a request, and the identifier that the client gave."""

    beginning: bytes = b""
    identifier: str = ""


@dataclass(frozen=True)
class Router:
    """Selects instances by `strategy`.

    PREFIX_AWARE compares `prefix_length` bytes of a body, or characters of the text of messages. If an instance has
    `concurrency` running requests, another one gets the request.
    """

    strategy: Strategy = "LEAST_OUTSTANDING_REQUESTS"
    prefix_length: int = 1024
    concurrency: int = 16
    _uses: itertools.count[int] = field(default_factory=lambda: itertools.count(1), repr=False)

    def choose(self, instances: Sequence[Instance], prefix: Prefix) -> Instance:
        """Return one of the instances, of which there is at least one."""
        if self.strategy == "RANDOM":
            return random.choice(instances)
        if self.strategy == "PREFIX_AWARE":
            chosen = max(instances, key=lambda instance: _weight(instance, prefix))
            if chosen.running < self.concurrency:
                return chosen
        chosen = min(instances, key=lambda instance: (instance.running, instance.last_routed))
        chosen.last_routed = next(self._uses)
        return chosen

    def body_prefix(self, headers: Mapping[str, str], body: bytes) -> Prefix:
        """Return the prefix of a call of /invocations."""
        return Prefix(body[: self.prefix_length], headers.get(contract.PREFIX_AWARE_HEADER, ""))

    def messages_prefix(self, body: bytes) -> Prefix:
        """Return the prefix of an OpenAI request: the text of its messages, and its `prompt_cache_key`."""
        if self.strategy != "PREFIX_AWARE":
            return Prefix()
        try:
            payload = json.loads(body)
        except (ValueError, RecursionError):
            return Prefix()
        if not isinstance(payload, dict):
            return Prefix()
        text = "".join(_texts(payload.get("messages")))[: self.prefix_length]
        return Prefix(text.encode(errors="replace"), str(payload.get("prompt_cache_key") or ""))


def _weight(instance: Instance, prefix: Prefix) -> bytes:
    """Return the weight of an instance for a prefix. Without the instance of most weight, only its prefixes move."""
    digest = hashlib.sha256(f"{instance.number}\n{prefix.identifier}\n".encode())
    digest.update(prefix.beginning)
    return digest.digest()


def _texts(messages: Any) -> list[str]:
    found: list[str] = []
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else [content]:
            text = part.get("text") if isinstance(part, dict) else part
            if isinstance(text, str):
                found.append(text)
    return found
