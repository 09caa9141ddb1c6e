"""How many sessions fit on which instance: a formula, the published sizes of models and instances, and a table.

A test holds the formula equal to the engine's real allocations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .instances import CUDA_SHARE, CUDA_SHARE_T4, INSTANCES, MIB, InstanceType
from .shapes import (
    BYTES_PER_NUMBER,
    CONTEXT_BYTES,
    FRAGMENTS_BYTES,
    KV_STEP_TOKENS,
    SCALE_BYTES,
    SHAPES,
    WORKING_FACTOR,
    Precision,
    Shape,
)

GIB = 2**30
HOST_SHARE = 0.2  # share of the RAM for offloaded KV caches, as with `host_bytes: auto`
GRAPHS_BYTES = 192 * MIB  # of captured CUDA graphs, as the engine reserves (engine/budget.py of the handler)
NOTE = "Computed from published sizes, not measured."

FORMULA = f"""\
  free      = GPU memory that CUDA reports - weights - reserve, where
    GPU memory that CUDA reports = {CUDA_SHARE:.1%} of the type's memory, {CUDA_SHARE_T4:.0%} on a T4
    reserve = {CONTEXT_BYTES // MIB} MiB of CUDA itself + {WORKING_FACTOR} x temporary tensors
              + {FRAGMENTS_BYTES // MIB} MiB
              + {GRAPHS_BYTES // MIB} MiB for CUDA graphs, unless the weights fill more than half of the GPU
    With `--reserve-gib X`, free = memory of the type - weights - X GiB
  session   = features + KV, where
    features  = picture tokens x hidden size x {BYTES_PER_NUMBER} bytes
    KV        = (picture tokens + text tokens, rounded up to {KV_STEP_TOKENS}) x KV bytes per token
    KV bytes per token = layers x 2 x KV heads x head size x {BYTES_PER_NUMBER} bytes; in int8, layers x 2 x KV heads
                x (head size + {SCALE_BYTES} bytes of the scale)
  weights     = parameters x {BYTES_PER_NUMBER} bytes; in int8, those of the language model's linears x 1 byte, and
                {SCALE_BYTES} bytes for each of their outputs
  on the GPU  = free / session: sessions that answer at once
  in RAM      = {HOST_SHARE:.0%} of the RAM / pinned KV: idle sessions, restored for their next turn. Pinned
                memory is taken in steps of {KV_STEP_TOKENS} tokens, each rounded up to a power of two of bytes
                Several GPUs share the RAM equally, and each has sessions of its own
  open        = on the GPU + in RAM, if the features of all of them leave room for one running session: the most that
                `build_mar.sh --sessions` may be
More sessions may be open: their features stay on the GPU, and a prefill rebuilds their KV. Their time to first token
is then that of a new conversation."""


@dataclass(frozen=True)
class Fit:
    """The sessions of one kind that fit on one instance, all its GPUs together; 0 if the weights leave no room."""

    on_gpu: int
    in_ram: int
    open: int


def graphs_bytes(weights_bytes: int, gpu_bytes: int) -> int:
    """Return the memory of CUDA graphs. The engine uses none if the weights fill more than half of the GPU."""
    return GRAPHS_BYTES if 2 * weights_bytes <= gpu_bytes else 0


def free_bytes(shape: Shape, instance: InstanceType, reserve_bytes: int | None = None) -> int:
    """Return the bytes for sessions on one GPU, 0 or less if there are none: the engine's `device_bytes: auto`."""
    if reserve_bytes is None:
        graphs = graphs_bytes(shape.weights_bytes, instance.cuda_bytes)
        return instance.cuda_bytes - shape.weights_bytes - shape.reserve_bytes - graphs
    return instance.gpu_mib * MIB - shape.weights_bytes - reserve_bytes


def fit(shape: Shape, instance: InstanceType, text_tokens: int, reserve_bytes: int | None = None) -> Fit:
    """Apply the formula. `text_tokens` is the length of a conversation without its picture."""
    tokens = shape.picture_tokens + text_tokens
    free = free_bytes(shape, instance, reserve_bytes)
    session = shape.features_bytes + shape.kv_bytes(tokens)
    on_gpu = max(free, 0) // session
    if not on_gpu:
        return Fit(0, 0, 0)
    # Each engine has its part of the RAM.
    in_ram = int(HOST_SHARE * instance.ram_gib * GIB) // instance.gpus // shape.host_bytes(tokens)
    by_features = (free - shape.kv_bytes(tokens)) // shape.features_bytes
    opened = min(_shared(free, shape, tokens, in_ram), by_features)
    return Fit(instance.gpus * on_gpu, instance.gpus * in_ram, instance.gpus * opened)


def _shared(free: int, shape: Shape, tokens: int, in_ram: int) -> int:
    """Return the sessions on one GPU and in its part of the RAM. The features of sessions in RAM stay on the GPU."""
    left = free - in_ram * shape.features_bytes
    return max(left, 0) // (shape.features_bytes + shape.kv_bytes(tokens)) + in_ram


def with_precision(weights: Precision, kv: Precision, name: str = "") -> tuple[Shape, ...]:
    """Return the shapes whose names contain a text, with weights and KV caches in these precisions."""
    chosen = (shape for shape in SHAPES if name.lower() in shape.name.lower())
    return tuple(replace(shape, weights=weights, kv=kv) for shape in chosen)


def smallest(shape: Shape, text_tokens: int, reserve_bytes: int | None = None) -> InstanceType | None:
    """Return the type with the least memory on which a session fits, of all GPUs together and then of the machine."""
    fitting = (one for one in INSTANCES if fit(shape, one, text_tokens, reserve_bytes).on_gpu)
    return min(fitting, key=lambda one: (one.gpus * one.gpu_mib, one.ram_gib), default=None)


def table(text_tokens: int, reserve_bytes: int | None = None, shapes: Sequence[Shape] = SHAPES) -> str:
    """Return Markdown: the sizes of the models, then for each family a table with a row for each instance type."""
    lines = ["| model | weights | KV a token | features | one session |", "|---|---|---|---|---|"]
    for shape in shapes:
        session = shape.session_bytes(text_tokens)
        sizes = (_gib(shape.weights_bytes), _kib(shape.kv_token_bytes), _mib(shape.features_bytes), _mib(session))
        lines.append(f"| {shape.name} | {' | '.join(sizes)} |")
    for family in dict.fromkeys(shape.family.title for shape in shapes):
        lines += ["", *_instances([one for one in shapes if one.family.title == family], text_tokens, reserve_bytes)]
    return "\n".join(lines)


def _instances(shapes: Sequence[Shape], text_tokens: int, reserve_bytes: int | None) -> list[str]:
    """Return a table of the sessions on each instance type."""
    lines = [f"| instance | GPU, RAM | {' | '.join(shape.name for shape in shapes)} |"]
    lines.append("|---" * (2 + len(shapes)) + "|")
    for instance in INSTANCES:
        cells = [cell(fit(shape, instance, text_tokens, reserve_bytes)) for shape in shapes]
        count = "" if instance.gpus == 1 else f"{instance.gpus} x "
        size = f"{count}{instance.gpu} {instance.gpu_mib / 1024:.1f} GiB, {instance.ram_gib} GiB"
        lines.append(f"| {instance.name} | {size} | {' | '.join(cells)} |")
    return lines


def smallest_table(text_tokens: int, reserve_bytes: int | None = None, shapes: Sequence[Shape] = SHAPES) -> str:
    """Return Markdown: for each model the smallest instance type, and its sessions, by precision."""
    kinds: tuple[tuple[Precision, Precision], ...] = (("auto", "auto"), ("int8", "auto"), ("int8", "int8"))
    lines = ["| model | smallest type | with `weights: int8` | and `kv_dtype: int8` |", "|---|---|---|---|"]
    for one in shapes:
        cells = []
        for weights, kv in kinds:
            shape = replace(one, weights=weights, kv=kv)
            found = smallest(shape, text_tokens, reserve_bytes)
            cells.append(f"{found.name}: {cell(fit(shape, found, text_tokens, reserve_bytes))}" if found else "-")
        lines.append(f"| {one.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def report(
    text_tokens: int,
    reserve_gib: float | None = None,
    weights: Precision = "auto",
    kv: Precision = "auto",
    name: str = "",
) -> str:
    """Return the output of `llava-deploy capacity`. Without `reserve_gib` the reserve is the engine's.

    `name`: a part of the names of the models to print.
    """
    shapes = with_precision(weights, kv, name)
    reserve = "the engine's" if reserve_gib is None else f"{reserve_gib:g} GiB"
    kinds = {"auto": "16 bits", "int8": "int8"}
    stored = f"Weights: {kinds[weights]}. KV caches: {kinds[kv]}."
    head = f"A session: one picture, {text_tokens} tokens of text. {stored} Reserve: {reserve}. {NOTE}"
    cells = "Each cell: sessions open (of these with their KV on the GPU); - if the weights leave no room for one."
    reserve_bytes = None if reserve_gib is None else int(reserve_gib * GIB)
    rows = table(text_tokens, reserve_bytes, shapes)
    least = smallest_table(text_tokens, reserve_bytes, shapes)
    return f"{head}\n{cells}\n\n{rows}\n\n{least}\n\n{FORMULA}"


def cell(fits: Fit) -> str:
    """Return the text of a table: sessions open, and of these with their KV on the GPU."""
    return f"{fits.open} ({fits.on_gpu})" if fits.on_gpu else "-"


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"


def _mib(count: int) -> str:
    return f"{count / MIB:.1f} MiB"


def _kib(count: int) -> str:
    return f"{count / 1024:.0f} KiB"
