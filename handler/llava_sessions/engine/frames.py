"""Features of a clip in pieces of few frames.

The temporary memory of an encode does not grow with the clip, and the caller can do other work between two pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch


def encode_in_pieces(
    encode: Callable[[torch.Tensor], torch.Tensor], frames: torch.Tensor, most_frames: int
) -> Iterator[torch.Tensor | None]:
    """Encode the frames of a clip by calls of `encode` with at most `most_frames` frames.

    Yield None after each piece but the last one, and then the features `[tokens, hidden]` of the clip.

    `frames`: `[frames, 3, height, width]`, at least one. `most_frames`: at least 2. `encode` maps consecutive frames to
    features `[tokens, hidden]`. The tokens of a frame must not depend on other frames, and each frame must have as many
    of them. After the last frame the same tokens may follow in each call, such as LLaVA-OneVision's newline: they are
    kept once, at the end. Their number follows from two pieces with different numbers of frames.

    Raises ValueError if no such number fits, and the errors of `encode`.
    """
    sizes = _piece_sizes(len(frames), most_frames)
    pieces: list[torch.Tensor] = []
    for part in frames.split(sizes):
        if pieces:
            yield None
        pieces.append(encode(part))
    if len(pieces) == 1:
        yield pieces[0]
        return
    closing = _closing_tokens(sizes[0], len(pieces[0]), sizes[-1], len(pieces[-1]))
    yield torch.cat([*(piece[: len(piece) - closing] for piece in pieces[:-1]), pieces[-1]])


def _piece_sizes(frames: int, most_frames: int) -> list[int]:
    """Return the frames of each piece. If there are several, the last one has fewer than the first one."""
    full, rest = divmod(frames, most_frames)
    if rest:
        return [most_frames] * full + [rest]
    if full == 1:
        return [most_frames]
    return [most_frames] * (full - 1) + [most_frames - 1, 1]


def _closing_tokens(frames: int, tokens: int, fewer_frames: int, fewer_tokens: int) -> int:
    """Return the number of tokens that follow those of the last frame, from two pieces of a clip."""
    of_a_frame, rest = divmod(tokens - fewer_tokens, frames - fewer_frames)
    closing = tokens - frames * of_a_frame
    if rest or of_a_frame < 1 or closing < 0:
        raise ValueError(
            f"the features of each frame must have the same number of tokens, got {tokens} tokens for {frames} frames "
            f"and {fewer_tokens} for {fewer_frames}"
        )
    return closing
