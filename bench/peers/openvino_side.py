"""OpenVINO GenAI in this process, in its own environment: `python -m bench.peers.openvino_side FOLDER PRECISION`.

Its continuous-batching pipeline keeps features and KV of the histories that it is given (prefix caching). Kinds:

- `together`: `generate` with all histories at once, turn by turn. All answers of a turn end together, and no chat
  starts its next turn before.
- `continuous`: `add_request` and `step`, so that each chat continues on its own. The picture is encoded in every turn.
"""

from __future__ import annotations

import io
import os
import sys
import time
from dataclasses import dataclass, field

import numpy
import openvino
import openvino_genai
from PIL import Image

from .worker import Job, Outcome, Turn, serve

CACHE_GB = 2
MOST_CHATS = 16
STEP_TOKENS = 2048  # tokens of prompts in one step: the longest prompt


class Clock(openvino_genai.StreamerBase):
    """Records the time of each token."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def write(self, token: int | list[int]) -> openvino_genai.StreamingStatus:
        """Note one token, or several that come together."""
        self.times += [time.perf_counter()] * (len(token) if isinstance(token, list) else 1)
        return openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None:
        """Do nothing: no token is buffered."""


@dataclass
class Running:
    """A chat of `continuous` while it runs."""

    picture: openvino.Tensor
    questions: list[str]
    messages: list[dict] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    handle: openvino_genai.GenerationHandle | None = None
    asked_at: float = 0.0
    token_times: list[float] = field(default_factory=list)
    answer_ids: list[int] = field(default_factory=list)


class Side:
    """The pipeline and its ways of serving."""

    def __init__(self, folder: str, precision: str) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = True
        scheduler.cache_size = CACHE_GB
        scheduler.max_num_seqs = MOST_CHATS
        scheduler.max_num_batched_tokens = STEP_TOKENS
        properties = {
            "INFERENCE_NUM_THREADS": os.cpu_count(),
            "INFERENCE_PRECISION_HINT": precision,
            "KV_CACHE_PRECISION": precision,
            "CACHE_DIR": "",
        }
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", properties)
        self._tokenizer = self._pipeline.get_tokenizer()
        self._requests = 0

    def run(self, job: Job) -> Outcome:
        """Run a job."""
        began = time.perf_counter()
        if len(job.chats) == 1:
            chats = [self._alone(job)]
        else:
            chats = self._together(job) if job.kind == "together" else self._continuous(job)
        return Outcome(time.perf_counter() - began, chats)

    def _alone(self, job: Job) -> list[Turn]:
        history = openvino_genai.ChatHistory()
        turns = []
        for number, question in enumerate(job.chats[0].questions):
            asked_at = time.perf_counter()
            pictures = [_tensor(job.chats[0].jpeg)] if number == 0 else []
            history.append({"role": "user", "content": question})
            clock = Clock()
            results = self._pipeline.generate(
                [history], images=[pictures], generation_config=[_greedy(job.tokens)], streamer=clock
            )
            answer = results[0].texts[0].strip()
            history.append({"role": "assistant", "content": answer})
            first, last = clock.times[0], clock.times[-1]
            turns.append(Turn((first - asked_at) * 1e3, (last - asked_at) * 1e3, len(clock.times), answer))
        return turns

    def _together(self, job: Job) -> list[list[Turn]]:
        histories = [openvino_genai.ChatHistory() for _ in job.chats]
        pictures = [[_tensor(chat.jpeg)] for chat in job.chats]
        turns: list[list[Turn]] = [[] for _ in job.chats]
        for number in range(len(job.chats[0].questions)):
            for history, chat in zip(histories, job.chats, strict=True):
                history.append({"role": "user", "content": chat.questions[number]})
            given = pictures if number == 0 else [[] for _ in job.chats]
            limits = [_greedy(job.tokens)] * len(histories)
            results = self._pipeline.generate(histories, images=given, generation_config=limits)
            for history, result, taken in zip(histories, results, turns, strict=True):
                answer = result.texts[0].strip()
                history.append({"role": "assistant", "content": answer})
                taken.append(Turn(None, None, job.tokens, answer))
        return turns

    def _continuous(self, job: Job) -> list[list[Turn]]:
        chats = [Running(_tensor(chat.jpeg), chat.questions) for chat in job.chats]
        for chat in chats:
            self._ask(chat, job.tokens)
        while any(chat.handle for chat in chats):
            self._pipeline.step()
            now = time.perf_counter()
            for chat in chats:
                if chat.handle is not None:
                    self._note(chat, now, job.tokens)
        return [chat.turns for chat in chats]

    def _ask(self, chat: Running, tokens: int) -> None:
        """Add the chat's next question, with its whole conversation and its picture."""
        tag = "" if chat.messages else "<image>\n"
        chat.messages.append({"role": "user", "content": tag + chat.questions[len(chat.turns)]})
        prompt = self._tokenizer.apply_chat_template(chat.messages, add_generation_prompt=True)
        limits = _greedy(tokens)
        limits.apply_chat_template = False
        chat.asked_at, chat.token_times, chat.answer_ids = time.perf_counter(), [], []
        self._requests += 1
        chat.handle = self._pipeline.add_request(self._requests, prompt, [chat.picture], limits)

    def _note(self, chat: Running, now: float, tokens: int) -> None:
        """Note the new tokens of a chat after a step; ask its next question if its answer is complete."""
        while chat.handle.can_read():
            for output in chat.handle.read().values():
                chat.answer_ids += output.generated_ids
                chat.token_times += [now] * len(output.generated_ids)
        if chat.handle.get_status() == openvino_genai.GenerationStatus.RUNNING:
            return
        chat.handle = None
        answer = self._tokenizer.decode(chat.answer_ids).strip()
        chat.messages.append({"role": "assistant", "content": answer})
        first, last = chat.token_times[0], chat.token_times[-1]
        asked_at = chat.asked_at
        chat.turns.append(Turn((first - asked_at) * 1e3, (last - asked_at) * 1e3, len(chat.answer_ids), answer))
        if len(chat.turns) < len(chat.questions):
            self._ask(chat, tokens)


def _greedy(tokens: int) -> openvino_genai.GenerationConfig:
    """Return a configuration for greedy answers of exactly `tokens` tokens."""
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = tokens
    config.ignore_eos = True
    config.do_sample = False
    return config


def _tensor(jpeg: bytes) -> openvino.Tensor:
    """Return a picture as OpenVINO expects it: (1, height, width, 3), uint8."""
    return openvino.Tensor(numpy.array(Image.open(io.BytesIO(jpeg)).convert("RGB"))[None])


if __name__ == "__main__":
    serve(Side(*sys.argv[1:3]).run)
