"""How many sessions fit on which instance: a formula, the published sizes of models and instances, and a table.

A test holds the formula equal to the engine's real allocations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from .instances import CUDA_SHARE, CUDA_SHARE_T4, INSTANCES, MIB, InstanceType

GIB = 2**30
KV_STEP_TOKENS = 256  # step in which the engine's KV caches grow
HOST_SHARE = 0.2  # share of the RAM for offloaded KV caches, as with `host_bytes: auto`
BYTES_PER_NUMBER = 2  # bfloat16, and float16 where the GPU has no other
SCALE_BYTES = 4  # float32, of each output of a linear and of each key and value in int8

Precision = Literal["auto", "int8"]  # of `llava.weights` and `llava.kv_dtype`

# The engine's reserve for forwards (engine/budget.py of the handler): temporary tensors times a factor, fragments, and
# captured CUDA graphs.
WORKING_FACTOR = 1.25
FRAGMENTS_BYTES = 256 * MIB
GRAPHS_BYTES = 192 * MIB
CONTEXT_BYTES = 448 * MIB  # CUDA's context and the kernels that it loads; 400 to 450 MiB with CUDA 12 and 13
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
class Tower:
    """The sizes of a vision tower: a transformer over the patches of a picture, with biases."""

    width: int
    layers: int
    inner: int
    patches: int
    is_clip: bool

    @property
    def parameters(self) -> int:
        """Its parameters. CLIP has a class token and a norm before the layers; SigLIP has a bias of its patches."""
        patch = 3 * 14 * 14 * self.width
        embeddings = patch + self.patches * self.width + (2 if self.is_clip else 1) * self.width
        attention = 4 * (self.width * self.width + self.width)
        layer = attention + 2 * self.width * self.inner + self.inner + self.width + 2 * 2 * self.width
        return embeddings + self.layers * layer + (4 if self.is_clip else 2) * self.width


# Sources: config.json of openai/clip-vit-large-patch14-336, and of google/siglip-so400m-patch14-384 with 26 of its 27
# layers, as in LLaVA-OneVision.
CLIP = Tower(width=1024, layers=24, inner=4096, patches=576, is_clip=True)
SIGLIP = Tower(width=1152, layers=26, inner=4304, patches=729, is_clip=False)


@dataclass(frozen=True)
class LlavaShape:
    """The sizes of a LLaVA checkpoint, from the `config.json` that its authors publish.

    `picture_tokens`: of the largest picture. `working_mib`: temporary tensors at their peak, of a forward of 2,048
    tokens or of the pictures; `int8_working_mib`: with weights and KV in int8. `weights`, `kv`: the precision in
    which they are stored.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    picture_tokens: int
    working_mib: int
    int8_working_mib: int
    newline: bool = False
    vocabulary: int = 32064
    tower: Tower = CLIP
    text: str = "llama"
    weights: Precision = "auto"
    kv: Precision = "auto"

    @property
    def head_dim(self) -> int:
        """The size of one attention head."""
        return self.hidden // self.heads

    @property
    def kv_token_bytes(self) -> int:
        """The size of the keys and values of one token in all layers, with their scales."""
        return sum(self._kv_parts)

    @property
    def _kv_parts(self) -> tuple[int, ...]:
        """The sizes of one token's numbers, and in int8 of its scales, in all layers."""
        keys_and_values = self.layers * 2 * self.kv_heads
        if self.kv == "int8":
            return keys_and_values * self.head_dim, keys_and_values * SCALE_BYTES
        return (keys_and_values * self.head_dim * BYTES_PER_NUMBER,)

    @property
    def features_bytes(self) -> int:
        """The size of the features of one picture."""
        return self.picture_tokens * self.hidden * BYTES_PER_NUMBER

    @property
    def parameters(self) -> int:
        """The parameters of language model, vision tower and projector. Qwen2's attention has biases."""
        kv_width = self.kv_heads * self.head_dim
        biases = self.hidden + 2 * kv_width if self.text == "qwen2" else 0
        attention = 2 * self.hidden**2 + 2 * self.hidden * kv_width + biases
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        language = 2 * self.vocabulary * self.hidden + self.layers * layer + self.hidden
        projector = self.tower.width * self.hidden + self.hidden + self.hidden**2 + self.hidden
        return language + self.tower.parameters + projector + (self.hidden if self.newline else 0)

    @property
    def linears(self) -> tuple[int, int]:
        """The weights and the outputs of the language model's linears, which `weights: int8` stores in int8."""
        outputs = 3 * self.hidden + 2 * self.kv_heads * self.head_dim + 2 * self.intermediate
        weights = 2 * self.hidden**2 + 2 * self.hidden * self.kv_heads * self.head_dim
        weights += 3 * self.hidden * self.intermediate
        return self.layers * weights + self.vocabulary * self.hidden, self.layers * outputs + self.vocabulary

    @property
    def weights_bytes(self) -> int:
        """The size of all weights."""
        if self.weights == "int8":
            linears, outputs = self.linears
            return (self.parameters - linears) * BYTES_PER_NUMBER + linears + outputs * SCALE_BYTES
        return self.parameters * BYTES_PER_NUMBER

    def kv_bytes(self, tokens: int) -> int:
        """Return the size of the KV cache of a conversation with so many tokens."""
        return -(-tokens // KV_STEP_TOKENS) * KV_STEP_TOKENS * self.kv_token_bytes

    def host_bytes(self, tokens: int) -> int:
        """Return the size of the KV cache in pinned RAM, whose blocks are powers of two."""
        steps = -(-tokens // KV_STEP_TOKENS)
        return steps * sum(1 << (KV_STEP_TOKENS * size - 1).bit_length() for size in self._kv_parts)

    @property
    def reserve_bytes(self) -> int:
        """The GPU memory that the engine leaves to CUDA and to forwards."""
        working_mib = self.int8_working_mib if "int8" in (self.weights, self.kv) else self.working_mib
        return CONTEXT_BYTES + int(WORKING_FACTOR * working_mib * MIB) + FRAGMENTS_BYTES


# Sources: config.json of llava-hf/llava-1.5-7b-hf and -13b-hf, llava-hf/llava-v1.6-vicuna-7b-hf, -mistral-7b-hf,
# -vicuna-13b-hf and -34b-hf, llava-hf/llama3-llava-next-8b-hf, llava-hf/llava-onevision-qwen2-7b-ov-hf.
# Language models: Vicuna 7B and 13B have Llama 2's shapes ("Llama 2", table of model sizes), Mistral 7B has
# grouped-query attention with 8 KV heads and an inner size of 14336 ("Mistral 7B", table 1). The others: "Yi" (34B),
# "The Llama 3 Herd of Models" (8B) and "Qwen2 Technical Report" (7B), each in its table of model sizes.
# Tokens of a picture: 336/14 squared = 576 in LLaVA-1.5. LLaVA-NeXT encodes a picture whole and in up to four tiles
# (image_grid_pinpoints): 576 + 48 x 48 + 48 ends of line = 2928 at 672 x 672, its most. LLaVA-OneVision encodes a
# picture in up to 36 tiles and keeps at most 9 x 729 of their tokens (anyres_max_9): 729 + 81 x 81 + 81 ends of
# line = 7371.
# Temporary tensors: counted in the engine's first chat with the largest picture (tests/engine/test_budget.py).
MODELS = (
    LlavaShape("LLaVA-1.5-7B", 4096, 32, 32, 32, 11008, 576, 195, 216),
    LlavaShape("LLaVA-1.5-13B", 5120, 40, 40, 40, 13824, 576, 244, 262),
    LlavaShape("LLaVA-NeXT-7B (Vicuna)", 4096, 32, 32, 32, 11008, 2928, 195, 216, newline=True),
    LlavaShape("LLaVA-NeXT-7B (Mistral)", 4096, 32, 32, 8, 14336, 2928, 234, 242, newline=True, text="mistral"),
    LlavaShape("LLaVA-NeXT-8B (Llama 3)", 4096, 32, 32, 8, 14336, 2928, 234, 242, newline=True, vocabulary=128320),
    LlavaShape("LLaVA-NeXT-13B (Vicuna)", 5120, 40, 40, 40, 13824, 2928, 244, 262, newline=True),
    LlavaShape("LLaVA-NeXT-34B (Yi)", 7168, 60, 56, 8, 20480, 2928, 354, 354, newline=True, vocabulary=64064),
    LlavaShape(
        "LLaVA-OneVision-7B",
        3584,
        28,
        28,
        4,
        18944,
        7371,
        743,
        743,
        newline=True,
        vocabulary=152000,
        tower=SIGLIP,
        text="qwen2",
    ),
)


@dataclass(frozen=True)
class Fit:
    """The sessions of one kind that fit on one instance, all its GPUs together; 0 if the weights leave no room."""

    on_gpu: int
    in_ram: int
    open: int


def graphs_bytes(weights_bytes: int, gpu_bytes: int) -> int:
    """Return the memory of CUDA graphs. The engine uses none if the weights fill more than half of the GPU."""
    return GRAPHS_BYTES if 2 * weights_bytes <= gpu_bytes else 0


def free_bytes(model: LlavaShape, instance: InstanceType, reserve_bytes: int | None = None) -> int:
    """Return the bytes for sessions on one GPU, 0 or less if there are none: the engine's `device_bytes: auto`."""
    if reserve_bytes is None:
        graphs = graphs_bytes(model.weights_bytes, instance.cuda_bytes)
        return instance.cuda_bytes - model.weights_bytes - model.reserve_bytes - graphs
    return instance.gpu_mib * MIB - model.weights_bytes - reserve_bytes


def fit(model: LlavaShape, instance: InstanceType, text_tokens: int, reserve_bytes: int | None = None) -> Fit:
    """Apply the formula. `text_tokens` is the length of a conversation without its picture."""
    tokens = model.picture_tokens + text_tokens
    free = free_bytes(model, instance, reserve_bytes)
    session = model.features_bytes + model.kv_bytes(tokens)
    on_gpu = max(free, 0) // session
    if not on_gpu:
        return Fit(0, 0, 0)
    # Each engine has its part of the RAM.
    in_ram = int(HOST_SHARE * instance.ram_gib * GIB) // instance.gpus // model.host_bytes(tokens)
    by_features = (free - model.kv_bytes(tokens)) // model.features_bytes
    opened = min(_shared(free, model, tokens, in_ram), by_features)
    return Fit(instance.gpus * on_gpu, instance.gpus * in_ram, instance.gpus * opened)


def _shared(free: int, model: LlavaShape, tokens: int, in_ram: int) -> int:
    """Return the sessions on one GPU and in its part of the RAM. The features of sessions in RAM stay on the GPU."""
    left = free - in_ram * model.features_bytes
    return max(left, 0) // (model.features_bytes + model.kv_bytes(tokens)) + in_ram


def with_precision(weights: Precision, kv: Precision) -> tuple[LlavaShape, ...]:
    """Return the models of the table with weights and KV caches in these precisions."""
    return tuple(replace(model, weights=weights, kv=kv) for model in MODELS)


def smallest(model: LlavaShape, text_tokens: int, reserve_bytes: int | None = None) -> InstanceType | None:
    """Return the type with the least memory on which a session fits, of all GPUs together and then of the machine."""
    fitting = (one for one in INSTANCES if fit(model, one, text_tokens, reserve_bytes).on_gpu)
    return min(fitting, key=lambda one: (one.gpus * one.gpu_mib, one.ram_gib), default=None)


def table(text_tokens: int, reserve_bytes: int | None = None, models: Sequence[LlavaShape] = MODELS) -> str:
    """Return Markdown: the sizes of the models, a row for each instance type, and the smallest type of each model."""
    lines = ["| model | weights | KV a token | features | one session |", "|---|---|---|---|---|"]
    for model in models:
        session = model.features_bytes + model.kv_bytes(model.picture_tokens + text_tokens)
        sizes = (_gib(model.weights_bytes), _kib(model.kv_token_bytes), _mib(model.features_bytes), _mib(session))
        lines.append(f"| {model.name} | {' | '.join(sizes)} |")
    lines += ["", f"| instance | GPU, RAM | {' | '.join(model.name for model in models)} |"]
    lines.append("|---" * (2 + len(models)) + "|")
    for instance in INSTANCES:
        cells = [_cell(fit(model, instance, text_tokens, reserve_bytes)) for model in models]
        count = "" if instance.gpus == 1 else f"{instance.gpus} x "
        size = f"{count}{instance.gpu} {instance.gpu_mib / 1024:.1f} GiB, {instance.ram_gib} GiB"
        lines.append(f"| {instance.name} | {size} | {' | '.join(cells)} |")
    return "\n".join(lines)


def smallest_table(text_tokens: int, reserve_bytes: int | None = None) -> str:
    """Return Markdown: for each model the smallest instance type, and its sessions, by precision."""
    kinds: tuple[tuple[Precision, Precision], ...] = (("auto", "auto"), ("int8", "auto"), ("int8", "int8"))
    lines = ["| model | smallest type | with `weights: int8` | and `kv_dtype: int8` |", "|---|---|---|---|"]
    for model in MODELS:
        cells = []
        for weights, kv in kinds:
            shape = replace(model, weights=weights, kv=kv)
            found = smallest(shape, text_tokens, reserve_bytes)
            cells.append(f"{found.name}: {_cell(fit(shape, found, text_tokens, reserve_bytes))}" if found else "-")
        lines.append(f"| {model.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def report(
    text_tokens: int, reserve_gib: float | None = None, weights: Precision = "auto", kv: Precision = "auto"
) -> str:
    """Return the output of `llava-deploy capacity`. Without `reserve_gib` the reserve is the engine's."""
    reserve = "the engine's" if reserve_gib is None else f"{reserve_gib:g} GiB"
    kinds = {"auto": "16 bits", "int8": "int8"}
    stored = f"Weights: {kinds[weights]}. KV caches: {kinds[kv]}."
    head = f"A session: one picture, {text_tokens} tokens of text. {stored} Reserve: {reserve}. {NOTE}"
    cells = "Each cell: sessions open (of these with their KV on the GPU); - if the weights leave no room for one."
    reserve_bytes = None if reserve_gib is None else int(reserve_gib * GIB)
    rows = table(text_tokens, reserve_bytes, with_precision(weights, kv))
    least = smallest_table(text_tokens, reserve_bytes)
    return f"{head}\n{cells}\n\n{rows}\n\n{least}\n\n{FORMULA}"


def _cell(fits: Fit) -> str:
    return f"{fits.open} ({fits.on_gpu})" if fits.on_gpu else "-"


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"


def _mib(count: int) -> str:
    return f"{count / MIB:.1f} MiB"


def _kib(count: int) -> str:
    return f"{count / 1024:.0f} KiB"
