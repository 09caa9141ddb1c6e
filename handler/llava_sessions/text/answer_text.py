"""Incremental detokenizer of one answer."""

from __future__ import annotations

import re
from typing import Any

# How a tokenizer with byte fallback, such as Llama's, spells a token that is one byte of a character.
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class AnswerText:
    """Turns one answer's tokens into text as they come, and watches for stop strings.

    Text that may still turn into a stop string, or into a character whose bytes are not all there, is held back. White
    space before the first word is dropped.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._token_ids: list[int] = []
        self._told_tokens = 0  # their text is told, or held for a stop string
        self._context_tokens = 0  # the told tokens from here on are decoded again, for what depends on a neighbour
        self._told = ""
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Text that became certain with this token. `stopped` turns true when a stop string is complete."""
        self._token_ids.append(token_id)
        text = self._decode_more()
        if not self._told and not self._held:
            text = text.lstrip()
        self._held += text
        cut = min((at for at in map(self._held.find, self._stop) if at >= 0), default=-1)
        if cut >= 0:
            self.stopped = True
            return self._held[:cut]
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self._told += text
        return text

    def _decode_more(self) -> str:
        """Text of the tokens not told yet; empty while the last one may be a part of a character."""
        name = self._tokenizer.convert_ids_to_tokens(self._token_ids[-1]) or ""
        if _BYTE_TOKEN.fullmatch(name):
            return ""
        before = self._decode(self._context_tokens, self._told_tokens)
        text = self._decode(self._context_tokens, len(self._token_ids))
        if text.endswith("\ufffd"):
            return ""
        self._context_tokens, self._told_tokens = self._told_tokens, len(self._token_ids)
        return text[len(before) :]

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._token_ids[start:end], skip_special_tokens=True)

    def finish(self) -> str:
        """What is still held back once no more tokens come; bytes that never made a character are shown as U+FFFD."""
        before = self._decode(self._context_tokens, self._told_tokens)
        rest = self._decode(self._context_tokens, len(self._token_ids))[len(before) :]
        return self._held + (rest if self._told or self._held else rest.lstrip())


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
