"""Which decode steps run as CUDA graphs: captures on demand, their memory, a trial before use, and the way without."""

from __future__ import annotations

import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from .attention import Segment, TokenBatch
from .cuda.graphs import ROWS, Bucket, CapturedStep, Graph, Outputs, bucket, bucket_of
from .cuda.ragged import PIECE, Place, RaggedAttention, RaggedTask
from .faults import first_line, is_out_of_memory, raise_if_device_lost, release_unused
from .fused.layer import Batch
from .kv import KVShape, SessionKV

log = logging.getLogger(__name__)

# A graph is captured at this step of its bucket: a capture takes as long as a few steps.
CAPTURE_AT = 4
# Most graphs at a time, if `prepare` has measured none. The least recently used one is dropped for a new one.
MOST_GRAPHS = 16
# Least memory of a graph, in bytes: the driver allocates in steps of this size, and a graph may seem to take nothing.
LEAST_GRAPH_BYTES = 2 * 2**20
# Rows for which `prepare` captures graphs, and the time after which it starts no further one, in seconds.
PREPARED_ROWS = (1, 2, 4, 8)
PREPARE_SECONDS = 3.0
# Part of the memory of all graphs that the scratch memory of attention may take: one of so many.
_SCRATCH_PART = 4
_TRIAL_TOKENS = 3
# Largest difference of logits in the trial, relative to the largest one, in roundings of their precision and at least.
# Both runs launch the same kernels, except that a library may choose another one for a capture.
_ALLOWED_ROUNDINGS = 8
_LEAST_ALLOWED = 1e-3


class Predictions(NamedTuple):
    """Logits `[rows, vocabulary]`, and the most likely token of each row, int64 `[rows]`, or None if not computed."""

    logits: torch.Tensor
    likeliest: torch.Tensor | None


class DecodeGraphs:
    """The captured decode steps of one model, one per bucket. Runs in the engine's thread."""

    def __init__(
        self,
        decode: Callable[[torch.Tensor, torch.Tensor, Batch], torch.Tensor],
        attention: RaggedAttention,
        heads: int,
        shape: KVShape,
        make_graph: Callable[[], Graph],
    ) -> None:
        """`decode`: as `Model.decode`, with `heads` query heads that attend by `attention`. `shape`: of the caches."""
        self._decode = decode
        self._attention = attention
        self._heads = heads
        self._shape = shape
        self._make_graph = make_graph
        self._captured: OrderedDict[Bucket, CapturedStep] = OrderedDict()  # the least recently used one first
        self._plain_steps: Counter[Bucket] = Counter()
        self._refused: set[Bucket] = set()  # memory ran out in the capture
        self._outputs: Outputs | None = None  # of all graphs, for the most rows
        self._most = MOST_GRAPHS
        self._most_pieces: int | None = None
        self.is_on = True
        self.captures = 0
        self.replays = 0

    @property
    def captured(self) -> list[Bucket]:
        """Buckets that have a graph, the least recently used one first."""
        return list(self._captured)

    @torch.inference_mode()
    def step(self, segments: Sequence[Segment]) -> Predictions | None:
        """Run a step of one new token per session as a graph, or return None: the step has to run without.

        Reserves room in each cache. The caller raises the lengths of the caches. The result is valid until the next
        step. Raises an out-of-memory error; the same step then runs without a graph. After another error no step runs
        as a graph, with a warning in the log.
        """
        if not self.is_on or not all(map(_is_decode, segments)):
            return None
        for segment in segments:
            segment.kv.reserve(segment.kv.length + 1)
        places = [_place(row, segment.kv) for row, segment in enumerate(segments)]
        size = bucket_of(places)
        if size is None or not self._may_capture(size):
            return None
        ids = [segment.token_ids[0] for segment in segments]
        positions = [segment.kv.length for segment in segments]
        try:
            if size not in self._captured:
                self._plain_steps[size] += 1
                if self._plain_steps[size] < CAPTURE_AT:
                    return None
                self._capture(size)
            likeliest, logits = self._replay(size, ids, positions, places)
        except Exception as error:
            if is_out_of_memory(error):
                self._refused.add(size)
                self._captured.pop(size, None)
                raise
            self._turn_off(error)
            return None
        return Predictions(logits, likeliest)

    @torch.inference_mode()
    def prepare(self, limit_bytes: int, chat_tokens: int) -> int:
        """Try graphs on an example, then capture the largest one, and those of few sessions of `chat_tokens` tokens.

        `limit_bytes`: device memory of all graphs; with 0 no step runs as a graph. The largest graph makes the memory
        pool as large as it gets; the memory of the others gives the number of graphs within the limit. Returns the
        bytes that graphs may still take. After an error or a wrong result no step runs as a graph. Raises an error
        after which the device no longer computes.
        """
        if not limit_bytes:
            log.info("graphs_unused")
            self._drop_all()
            return 0
        try:
            free_bytes = self._free_bytes()
            if not self._matches_plain():
                log.warning("graphs_wrong")
                self._drop_all()
                return 0
            largest = self._largest(free_bytes, limit_bytes)
            self._capture(largest)
            self._most_pieces = largest.pieces
            graph_bytes = self._capture_small(chat_tokens)
        except Exception as error:
            raise_if_device_lost(error, self._shape.device)
            self._turn_off(error)
            return 0
        held_bytes = free_bytes - self._free_bytes()
        self._most = len(self._captured) + (limit_bytes - held_bytes) // graph_bytes
        if self._most < 1:
            log.warning("graphs_too_large held_bytes=%d limit_bytes=%d", held_bytes, limit_bytes)
            self._drop_all()
            return 0
        self._make_room(0)
        log.info("graphs_ready captured=%d most=%d held_bytes=%d", len(self._captured), self._most, held_bytes)
        return max(limit_bytes - held_bytes, 0)

    def _capture_small(self, chat_tokens: int) -> int:
        """Capture graphs for few sessions of `chat_tokens` tokens. Return the memory of a graph, in bytes."""
        began = time.perf_counter()
        graph_bytes = LEAST_GRAPH_BYTES
        for size in (bucket(rows, rows * (chat_tokens // PIECE + 1)) for rows in PREPARED_ROWS):
            if size in self._captured or not self._may_capture(size):
                continue
            before = self._free_bytes()
            self._capture(size)
            graph_bytes = max(graph_bytes, before - self._free_bytes())
            if time.perf_counter() - began > PREPARE_SECONDS:
                break
        return graph_bytes

    def _largest(self, free_bytes: int, limit_bytes: int) -> Bucket:
        """Return the bucket of as many sessions, and of as many tokens, as can be in free memory.

        Scratch memory of attention may take a part of the limit only. A step with more pieces runs without a graph: it
        computes for so long that launches do not matter.
        """
        pieces = free_bytes // (PIECE * self._shape.token_bytes) + ROWS[-1]
        affordable = limit_bytes // _SCRATCH_PART // (torch.float32.itemsize * self._attention.scratch_size(1))
        return bucket(ROWS[-1], min(pieces, 1 << max(affordable.bit_length() - 1, 0)))

    def _free_bytes(self) -> int:
        """Return the free memory of the device without the memory that torch caches. 0 on a CPU."""
        device = self._shape.device
        if device.type != "cuda":
            return 0
        release_unused(device)
        free, _ = torch.cuda.mem_get_info(device)
        return free

    def _matches_plain(self) -> bool:
        """Return whether graph steps of one session give their tokens, and the logits of the same steps without."""
        size = bucket(1, 1)
        self._capture(size)
        captured = self._captured[size]
        plain = SessionKV(self._shape)
        replayed = SessionKV(self._shape)
        for kv in (plain, replayed):
            kv.reserve(_TRIAL_TOKENS)
        for at in range(_TRIAL_TOKENS):
            captured.fill([at], [at], [_place(0, plain)])
            _, expected = captured.run_plain(self._run)
            likeliest, logits = self._replay(size, [at], [at], [_place(0, replayed)])
            allowed = max(_ALLOWED_ROUNDINGS * torch.finfo(logits.dtype).eps, _LEAST_ALLOWED) * expected.abs().max()
            is_close = (logits - expected).abs().max() <= allowed  # False for NaN
            if not is_close or not torch.equal(likeliest, logits.argmax(-1)):
                return False
            plain.length += 1
            replayed.length += 1
        return True

    def _run(self, ids: torch.Tensor, positions: torch.Tensor, task: RaggedTask) -> Outputs:
        """Run the work of a graph."""
        logits = self._decode(ids, positions, TokenBatch(self._attention, task, self._heads))
        return logits.argmax(-1), logits

    def _may_capture(self, size: Bucket) -> bool:
        return size not in self._refused and (self._most_pieces is None or size.pieces <= self._most_pieces)

    def _capture(self, size: Bucket) -> None:
        """Capture the graph of a bucket that has none."""
        self._make_room(1)
        step = CapturedStep(size, self._make_graph(), self._attention, self._shape.device)
        # A capture must not compile or initialize anything.
        first = step.run_plain(self._run)
        if self._outputs is None:
            likeliest, logits = (output.new_empty((ROWS[-1], *output.shape[1:])) for output in first)
            self._outputs = (likeliest, logits)
        del first
        step.capture(self._run, self._outputs)
        self._captured[size] = step
        self.captures += 1

    def _replay(self, size: Bucket, ids: Sequence[int], positions: Sequence[int], places: Sequence[Place]) -> Outputs:
        """Run the graph of a bucket for a step."""
        assert self._outputs is not None
        step = self._captured[size]
        self._captured.move_to_end(size)
        step.fill(ids, positions, places)
        step.replay()
        self.replays += 1
        likeliest, logits = self._outputs
        return likeliest[: len(ids)], logits[: len(ids)]

    def _make_room(self, new: int) -> None:
        """Drop the least recently used graphs until `new` more may be captured."""
        while self._captured and len(self._captured) + new > self._most:
            dropped, _ = self._captured.popitem(last=False)
            self._plain_steps[dropped] = 0

    def _turn_off(self, error: Exception) -> None:
        log.warning("graphs_failed error=%s", first_line(error))
        self._drop_all()

    def _drop_all(self) -> None:
        """Run all further steps without graphs."""
        self.is_on = False
        self._captured.clear()
        self._outputs = None


def _is_decode(segment: Segment) -> bool:
    """Return whether a segment is one token, for which the next token is sampled."""
    return len(segment.token_ids) == 1 and segment.features is None and segment.sample


def _place(row: int, kv: SessionKV) -> Place:
    return (row, kv.address, kv.capacity, kv.length)
