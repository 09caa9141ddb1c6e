"""The size of prefill chunks on a GPU, measured when the engine starts, and the memory that their forwards take."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from .attention import Segment
from .device import synchronize
from .faults import is_out_of_memory, release_unused
from .kv import SessionKV
from .model import Model
from .scheduler import DEFAULT_CHUNK_TOKENS, LONGEST_GPU_PIECE, PieceSize

log = logging.getLogger(__name__)

# A chunk delays running answers by the time of its forward. It is not to take longer than this.
_CHUNK_S = 0.05


def measure_pieces(
    model: Model, chunk_tokens: int | None, clock: Callable[[], float] = time.perf_counter
) -> tuple[PieceSize, int]:
    """Return the pieces of prompts on the model's GPU, and the most bytes of temporary tensors of their forwards.

    `chunk_tokens` None: the largest of 256, 512, 1,024 and 2,048 tokens whose forward takes at most 50 ms. A forward
    for which memory runs out ends the search, and limits the pieces. `clock`: seconds.
    """
    pieces = PieceSize(chunk_tokens or _choose_chunk(model, clock), on_gpu=True)
    working_bytes = _fit(model, pieces, clock)
    log.info("prefill_chunk tokens=%d longest_piece=%d", pieces.chunk_tokens, pieces.most_tokens)
    release_unused(model.device)
    return pieces, working_bytes


def _choose_chunk(model: Model, clock: Callable[[], float]) -> int:
    chosen = tokens = DEFAULT_CHUNK_TOKENS
    while tokens <= min(LONGEST_GPU_PIECE, model.context_tokens):
        try:
            seconds = min(_forward(model, tokens, clock)[0] for _ in range(2))  # the first one may load kernels
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return chosen
        if seconds > _CHUNK_S:
            return chosen
        chosen = tokens
        tokens *= 2
    return chosen


def _fit(model: Model, pieces: PieceSize, clock: Callable[[], float]) -> int:
    """Halve the longest piece until memory suffices for its forward; return the bytes of its temporary tensors.

    0 if memory runs out for a chunk as well.
    """
    while True:
        try:
            return _forward(model, min(pieces.most_tokens, model.context_tokens), clock)[1]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        if pieces.most_tokens == pieces.chunk_tokens:
            return 0
        pieces.limit(pieces.most_tokens // 2)


def _forward(model: Model, tokens: int, clock: Callable[[], float]) -> tuple[float, int]:
    """Run a prompt of `tokens` tokens; return its seconds and the bytes of its temporary tensors.

    Raises torch's out-of-memory error.
    """
    kv = SessionKV(model.kv_shape)
    kv.reserve(tokens)
    held_bytes = model.allocated_bytes()
    synchronize(model.device)
    model.peak_bytes()
    began = clock()
    model.forward([Segment(kv, [0] * tokens, None, [], sample=True)])
    synchronize(model.device)
    return clock() - began, model.peak_bytes() - held_bytes
