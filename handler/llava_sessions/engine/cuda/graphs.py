"""CUDA graphs of decode steps: one launch per step instead of some hundred.

A graph repeats its kernels with the arguments of its capture. Everything that changes from step to step is therefore
in memory at fixed addresses: token IDs, positions and the table of the sessions' KV caches. The addresses of the caches
are numbers of the table, so a cache may grow, move to the host and back, or be freed without a new capture.
`decode_graphs` has the policy. Decision: docs/decisions/0021-ragged-decode-and-graphs.md.
"""

from __future__ import annotations

import contextlib
import gc
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from .ragged import Place, RaggedAttention, RaggedTask, count_pieces, table_size

# Rows for which graphs are captured. A step with fewer rows gets spare ones; a step with more runs without a graph.
ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64)

# Most likely tokens, int64 `[rows]`, and logits `[rows, vocabulary]`.
Outputs = tuple[torch.Tensor, torch.Tensor]
# A decode step: token IDs and positions, int64 `[rows]` on the device, and the task of attention. It launches the same
# kernels whatever the numbers in these are, and the host reads nothing from the device.
Run = Callable[[torch.Tensor, torch.Tensor, RaggedTask], Outputs]


class Bucket(NamedTuple):
    """The size of a captured step: rows, and pieces of attention (`ragged.PIECE`), both with spare ones."""

    rows: int
    pieces: int


class Graph(Protocol):
    """A graph of launches. `CUDAGraph` is the only kind outside tests."""

    def capture(self, work: Callable[[], None]) -> None:
        """Record the launches of `work` without running them."""

    def replay(self) -> None:
        """Run the recorded launches on the current stream."""


class CUDAGraph:
    """A graph of torch whose temporary tensors are in a memory pool that it shares with other graphs."""

    def __init__(self, pool: Any) -> None:
        """`pool`: from `torch.cuda.graph_pool_handle`. Graphs of one pool must not run at the same time."""
        self._graph = torch.cuda.CUDAGraph()
        self._pool = pool

    def capture(self, work: Callable[[], None]) -> None:
        """As `Graph.capture`. Raises the error of `work`. The current stream is the same afterwards in any case."""
        stream = torch.cuda.current_stream()
        failure: Exception | None = None
        try:
            # In torch's default mode a call of another thread could invalidate the capture.
            with torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local"):
                try:
                    work()
                except Exception as error:
                    failure = error
                    raise
        except Exception:
            # The end of a broken capture raises an error of its own, which hides an out-of-memory error.
            if failure is not None:
                raise failure from None
            raise
        finally:
            torch.cuda.set_stream(stream)

    def replay(self) -> None:
        """As `Graph.replay`."""
        self._graph.replay()


class CUDAGraphs:
    """Makes graphs that share one memory pool of the current device."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self) -> CUDAGraph:
        """Return a new graph. Raises RuntimeError if torch or the device has no graphs."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return CUDAGraph(self._pool)


def bucket_of(places: Sequence[Place]) -> Bucket | None:
    """Return the smallest bucket for a step, or None if no bucket has as many rows."""
    if not 1 <= len(places) <= ROWS[-1]:
        return None
    return bucket(len(places), count_pieces(places))


def bucket(rows: int, pieces: int) -> Bucket:
    """Return the smallest bucket for at most `ROWS[-1]` rows and any number of pieces, which is a power of two."""
    return Bucket(ROWS[bisect_left(ROWS, rows)], 1 << (pieces - 1).bit_length())


class CapturedStep:
    """The graph of a bucket and its inputs, which keep their addresses."""

    def __init__(self, bucket: Bucket, graph: Graph, attention: RaggedAttention, device: torch.device) -> None:
        self.bucket = bucket
        self._graph = graph
        self._attention = attention
        # Token IDs, positions and the table of the task.
        size = 2 * bucket.rows + table_size(*bucket)
        self.numbers = torch.empty(size, dtype=torch.int64, device=device)
        self.fill((), (), ())

    def capture(self, run: Run, outputs: Outputs) -> None:
        """Capture `run`, whose results are copied to the first rows of `outputs`."""

        def work() -> None:
            for output, values in zip(outputs, self.run_plain(run), strict=True):
                output[: self.bucket.rows].copy_(values)

        with _no_garbage_collection():
            self._graph.capture(work)

    def run_plain(self, run: Run) -> Outputs:
        """Run the step on the inputs without a graph."""
        ids, positions, table = self._parts(self.numbers)
        return run(ids, positions, self._attention.task_in(table, *self.bucket))

    def replay(self) -> None:
        """Run the graph on the inputs."""
        self._graph.replay()

    def fill(self, ids: Sequence[int], positions: Sequence[int], places: Sequence[Place]) -> None:
        """Set the inputs in one asynchronous copy. Rows up to the bucket become spare: they read and write no cache.

        `ids`, `positions`, `places`: one of each per row, in the order of the rows. Raises ValueError, see
        `RaggedAttention.fill`.
        """
        # New memory each time: the copy of the previous step may still read the old one.
        pins = self.numbers.device.type == "cuda"
        numbers = torch.zeros(len(self.numbers), dtype=torch.int64, pin_memory=pins)
        host_ids, host_positions, host_table = self._parts(numbers)
        host_ids[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
        host_positions[: len(ids)] = torch.tensor(positions, dtype=torch.int64)
        self._attention.fill(host_table, places, *self.bucket)
        self.numbers.copy_(numbers, non_blocking=True)

    def _parts(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return views of token IDs, positions and table."""
        rows = self.bucket.rows
        ids, positions, table = numbers.split((rows, rows, len(numbers) - 2 * rows))
        return ids, positions, table


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keep garbage of reference cycles in this block. To destroy a CUDA object would invalidate a capture."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
