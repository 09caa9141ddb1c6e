"""Token IDs of rendered chat templates. Special tokens that a user typed are encoded as text."""

from __future__ import annotations

import copy
import re
import secrets
from collections.abc import Collection
from typing import Any

_PLACEHOLDER_BYTES = 8
_PLACEHOLDER = re.compile(rf"\ue000[0-9a-f]{{{2 * _PLACEHOLDER_BYTES}}}\ue001")

# Anchor for text that follows an answer: no tokenizer joins a newline with the text after it.
ANSWER_END = "\n"


class PromptTokenizer:
    """Encodes parts of a conversation as they would be encoded within the whole of it.

    Not thread-safe: transformers' fast tokenizers keep settings of a call in shared state.
    """

    def __init__(self, tokenizer: Any, image_token: str, places: Collection[str] = ()) -> None:
        """`tokenizer`: of transformers, with `image_token` among its special tokens.

        `places`: what the chat template writes for a picture or clip, which may be no token of the tokenizer.
        """
        self._tokenizer = tokenizer
        # Encodes special tokens as text. A copy, because the switch is part of the tokenizer's state.
        self._literal = copy.deepcopy(tokenizer)
        self._literal.split_special_tokens = True
        specials = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
        self._specials = _pattern(specials)
        self._hidden = _pattern({*specials, *places})
        # Older forms of SentencePiece encode text after a special token like the start of a text.
        at_start = self._ids(tokenizer, "a")
        after_special = self._ids(tokenizer, image_token + "a")[1:]
        self._anchor_after_special = "" if after_special == at_start else ANSWER_END
        # Tokens that the tokenizer appends to every text.
        with_specials: list[int] = tokenizer("a")["input_ids"]
        lengths = range(len(with_specials), 0, -1)
        end = next((n for n in lengths if with_specials[:n][-len(at_start) :] == at_start), len(with_specials))
        self._end_tokens = len(with_specials) - end

    def copy(self) -> PromptTokenizer:
        """Return a copy for another thread."""
        return copy.deepcopy(self)

    def token_id(self, token: str) -> int:
        """Return the ID of a token."""
        token_id: int = self._tokenizer.convert_tokens_to_ids(token)
        return token_id

    def encode_start(self, rendered: str) -> list[int]:
        """Return the token IDs of the start of a conversation.

        As `ProcessorMixin.apply_chat_template`: the tokenizer adds its start token unless the template wrote it.
        """
        bos = self._tokenizer.bos_token
        add_special_tokens = not (bos and rendered.startswith(bos))
        return list(self._tokenizer(rendered, add_special_tokens=add_special_tokens)["input_ids"])

    def encode_whole(self, rendered: str, literals: dict[str, str]) -> list[int]:
        """Return the token IDs of a conversation from its start, which something follows. `literals`: as below."""
        bos = self._tokenizer.bos_token
        adds = not (bos and rendered.startswith(bos))
        if not literals:
            ids: list[int] = self._tokenizer(rendered, add_special_tokens=adds)["input_ids"]
            return ids[: len(ids) - self._end_tokens] if adds else ids
        start: list[int] = self._tokenizer("", add_special_tokens=True)["input_ids"] if adds else []
        return start[: len(start) - self._end_tokens] + self._encode_parts(rendered, literals, first_anchor="")

    def hide_specials(self, text: str) -> tuple[str, dict[str, str]]:
        """Replace the special tokens in a user's text by placeholders; return the text and `{placeholder: token}`.

        After rendering, every special token and every place of a picture or clip was written by the template.
        """
        literals: dict[str, str] = {}

        def hide(match: re.Match[str]) -> str:
            hidden = placeholder()
            literals[hidden] = match.group()
            return hidden

        return self._hidden.sub(hide, text), literals

    def encode_after(self, anchor: str, rendered: str, literals: dict[str, str]) -> list[int]:
        """Return the token IDs of `rendered` in mid-conversation, directly after `anchor`.

        `literals`: of `hide_specials`; their tokens are encoded as text. A tokenizer splits its input at special tokens
        in any case, so the text between two of them is encoded separately.
        """
        if not literals:
            return self._ids_after(self._tokenizer, anchor, rendered)
        first_anchor = ANSWER_END if anchor == ANSWER_END else self._anchor_after_special
        return self._encode_parts(rendered, literals, first_anchor)

    def _encode_parts(self, rendered: str, literals: dict[str, str], first_anchor: str) -> list[int]:
        """Return the token IDs of text and special tokens. `first_anchor`: for text before the first special token."""
        ids: list[int] = []
        for part in filter(None, self._specials.split(rendered)):
            if self._specials.fullmatch(part):
                ids.append(self.token_id(part))
                continue
            part = _PLACEHOLDER.sub(lambda match: literals.get(match.group(), match.group()), part)
            ids += self._ids_after(self._literal, self._anchor_after_special if ids else first_anchor, part)
        return ids

    def _ids_after(self, tokenizer: Any, anchor: str, text: str) -> list[int]:
        """Return the token IDs of `text` after `anchor`, or of `text` alone if a token spans both."""
        before = self._ids(tokenizer, anchor)
        ids = self._ids(tokenizer, anchor + text)
        if ids[: len(before)] == before:
            return ids[len(before) :]
        return self._ids(tokenizer, text)

    @staticmethod
    def _ids(tokenizer: Any, text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids


def _pattern(tokens: Collection[str]) -> re.Pattern[str]:
    """Return a pattern, with one group, of tokens that are cut out of text before merges are applied."""
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile("(" + ("|".join(map(re.escape, longest_first)) or r"(?!)") + ")")


def placeholder() -> str:
    """Return a random string that no user's text contains and no template changes."""
    return f"\ue000{secrets.token_hex(_PLACEHOLDER_BYTES)}\ue001"
