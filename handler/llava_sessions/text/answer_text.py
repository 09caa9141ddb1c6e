"""Incremental detokenizer of one answer."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

# A token that is one byte of a character, as tokenizers with byte fallback (Llama's, for example) spell it.
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class AnswerText:
    """Decodes the tokens of one answer as they arrive and detects stop strings.

    Text is held back while it may become a stop string, or while the bytes of its last character are incomplete.
    Leading white space is removed. Not thread-safe.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        """`tokenizer`: of transformers. `stop`: strings that end the answer; none of them is part of its text."""
        self._decode_ids = _decoder(tokenizer)
        self._byte_ids = _byte_ids(tokenizer)
        self._stop = stop
        self._token_ids: list[int] = []
        self._decoded_tokens = 0  # the first of `_token_ids`, whose text is in `_returned` or `_held`
        # Decoded tokens from here on are decoded again with the next one: a token's text may depend on its neighbour.
        self._context_tokens = 0
        self._returned = ""
        self._held = ""
        self.stopped = False

    @property
    def may_stop(self) -> bool:
        """Whether text of the answer can end it."""
        return bool(self._stop)

    def push(self, token_id: int, may_stop: bool = True) -> str:
        """Append a token; return the text that is now certain. Sets `stopped` once a stop string is complete.

        Without `may_stop` a stop string that this token completes is text like any other.
        """
        self._token_ids.append(token_id)
        text = self._decode_more()
        if not self._returned and not self._held:
            text = text.lstrip()
        self._held += text
        cut = min((at for at in map(self._held.find, self._stop) if at >= 0), default=-1)
        if may_stop and cut >= 0:
            self.stopped = True
            return self._held[:cut]
        kept = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        certain = len(self._held) - kept
        text = self._held[:certain]
        self._held = self._held[certain:]
        self._returned += text
        return text

    def finish(self) -> str:
        """Return the text that is still held back, after the last token. Incomplete characters become U+FFFD."""
        before = self._decode(self._context_tokens, self._decoded_tokens)
        rest = self._decode(self._context_tokens, len(self._token_ids))[len(before) :]
        return self._held + (rest if self._returned or self._held else rest.lstrip())

    def _decode_more(self) -> str:
        """Return the text of the tokens not decoded yet; empty while the last one may be a part of a character."""
        if self._token_ids[-1] in self._byte_ids:
            return ""
        before = self._decode(self._context_tokens, self._decoded_tokens)
        text = self._decode(self._context_tokens, len(self._token_ids))
        if text.endswith("\ufffd"):
            return ""
        self._context_tokens = self._decoded_tokens
        self._decoded_tokens = len(self._token_ids)
        return text[len(before) :]

    def _decode(self, start: int, end: int) -> str:
        return self._decode_ids(self._token_ids[start:end], skip_special_tokens=True)


@functools.lru_cache(maxsize=8)
def _byte_ids(tokenizer: Any) -> frozenset[int]:
    """Return the IDs of the tokens that are one byte of a character."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    return frozenset(token_id for name, token_id in vocabulary.items() if _BYTE_TOKEN.fullmatch(name))


def _decoder(tokenizer: Any) -> Callable[..., str]:
    """Return what decodes token IDs: the library below transformers, in a quarter of the time, if that is the same."""
    has_backend = getattr(tokenizer, "is_fast", False) and not tokenizer.clean_up_tokenization_spaces
    decode: Callable[..., str] = tokenizer.backend_tokenizer.decode if has_backend else tokenizer.decode
    return decode


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
