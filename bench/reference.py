"""The baselines: four ways to chat about a picture with `transformers`' own `generate`.

Between turns they keep: nothing, the prepared pixels (as the public AWS sample does), the vision features, or the
features and the KV cache. Each holds one conversation, gets the same questions as the same token IDs, and decodes
greedily. They share the weights.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from llava_sessions.chat.transcript import Conversation
from llava_sessions.text.chat_template import ChatTemplate, Opening

from .driver import TurnTimes, prepare


class Reference:
    """A checkpoint loaded by `transformers`."""

    def __init__(self, checkpoint: Path, dtype: torch.dtype, device: torch.device) -> None:
        self.tokens = ChatTemplate(AutoProcessor.from_pretrained(checkpoint))
        self.model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=dtype, device_map={"": device})
        self.model.eval()
        self.device = device

    def pixels(self, opening: Opening) -> torch.Tensor:
        """Return the prepared picture on the device."""
        return torch.from_numpy(opening.pictures[0].inputs["pixel_values"]).to(self.device, self.model.dtype)

    @torch.inference_mode()
    def encode(self, opening: Opening) -> list[torch.Tensor]:
        """Run vision tower and projector."""
        return list(self.model.get_image_features(pixel_values=self.pixels(opening), return_dict=True).pooler_output)

    @torch.inference_mode()
    def generate(self, token_ids: list[int], answer_tokens: int, clock: _Clock, **inputs) -> list[int]:
        """Return the greedy answer. `clock` records the time of each token."""
        ids = torch.tensor([token_ids], device=self.device)
        out = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=answer_tokens,
            streamer=clock,
            **inputs,
        )
        return out[0, len(token_ids) :].tolist()


class _Clock(BaseStreamer):
    """Records the time at which `generate` returns each token. The first call passes the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt:
            self.times.append(time.perf_counter())
        self._prompt = False

    def end(self) -> None:
        """Do nothing: no token is buffered."""


class Chat:
    """A conversation that keeps only its token IDs: every turn decodes, encodes and prefills again."""

    label = "stateless"

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self._jpeg = b""
        self.conversation: Conversation

    def open(self, jpeg: bytes) -> None:
        """Start a chat about a picture."""
        self._jpeg = jpeg
        self.conversation = Conversation(self._keep(prepare(self._reference.tokens, jpeg)))

    def answer(self, text: str, answer_tokens: int, asked_at: float | None = None) -> TurnTimes:
        """Run one turn. `asked_at`: the question's arrival, if it had to wait."""
        turn = TurnTimes(asked_at or time.perf_counter())
        prompt = self._reference.tokens.prompt(self.conversation.opened_on, text)
        clock = _Clock()
        ids = self.conversation.token_ids + prompt
        turn.answer_ids = self._reference.generate(ids, answer_tokens, clock, **self._inputs())
        turn.token_times = clock.times
        self.conversation.commit(prompt, turn.answer_ids)
        return turn

    def _keep(self, opening: Opening) -> Opening:
        """Return the opening; subclasses keep parts of it."""
        return opening

    def _inputs(self) -> dict:
        """Return the arguments of `generate` other than token IDs."""
        return {"pixel_values": self._reference.pixels(prepare(self._reference.tokens, self._jpeg))}


class PixelsCached(Chat):
    """Keeps the prepared pixels, as the public AWS sample does: every turn encodes and prefills again."""

    label = "pixels cached"

    def _keep(self, opening: Opening) -> Opening:
        self._pixels = self._reference.pixels(opening)
        return opening

    def _inputs(self) -> dict:
        return {"pixel_values": self._pixels}


class FeaturesCached(Chat):
    """Encodes the picture when the chat opens; every turn prefills again."""

    label = "features cached"

    def _keep(self, opening: Opening) -> Opening:
        self._features = self._reference.encode(opening)
        return opening

    def _inputs(self) -> dict:
        return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=self._features)}}


class KeptKV(FeaturesCached):
    """Encodes the picture when the chat opens and keeps a `DynamicCache`: a later turn runs its new tokens only."""

    label = "KV kept"

    def _keep(self, opening: Opening) -> Opening:
        self._cache = DynamicCache(config=self._reference.model.config.get_text_config())
        return super()._keep(opening)

    def _inputs(self) -> dict:
        features = {} if self._cache.get_seq_length() else super()._inputs()
        return features | {"past_key_values": self._cache}


def random_caches(reference: Reference, lengths: list[int]) -> list[DynamicCache]:
    """Return KV caches of these lengths, filled with noise. A step takes as long as with real ones."""
    text = reference.model.config.get_text_config()
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    caches = []
    for length in lengths:
        cache = DynamicCache(config=text)
        shape = (1, text.num_key_value_heads, length, head_dim)
        for layer in range(text.num_hidden_layers):
            noise = torch.randn(2, *shape, device=reference.device).to(reference.model.dtype)
            cache.update(noise[0], noise[1], layer)
        caches.append(cache)
    return caches


@torch.inference_mode()
def decode_separately(reference: Reference, caches: list[DynamicCache], token: int) -> None:
    """Run one decode step of each cache, one forward after the other."""
    ids = torch.tensor([[token]], device=reference.device)
    for cache in caches:
        logits = reference.model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        logits[0, -1].argmax().item()
