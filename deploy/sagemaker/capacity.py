"""How many sessions fit on which instance: a formula, the published sizes of models and instances, and a table.

A test holds the formula equal to the engine's real allocations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MIB = 2**20
GIB = 2**30
KV_STEP_TOKENS = 256  # step in which the engine's KV caches grow
HOST_SHARE = 0.2  # share of the RAM for offloaded KV caches, as with `host_bytes: auto`
BYTES_PER_NUMBER = 2  # bfloat16, and float16 where the GPU has no other

NOTE = "Computed from published sizes, not measured."

FORMULA = f"""\
  free      = GPU memory - weights - reserve
  session   = features + KV, where
    features  = picture tokens x hidden size x {BYTES_PER_NUMBER} bytes
    KV        = (picture tokens + text tokens, rounded up to {KV_STEP_TOKENS}) x KV bytes per token
    KV bytes per token = layers x 2 x KV heads x head size x {BYTES_PER_NUMBER} bytes
  on the GPU  = free / session: sessions that answer at once
  in RAM      = {HOST_SHARE:.0%} of the RAM / (tokens x KV bytes per token): idle sessions, restored for their next turn
  open        = on the GPU + in RAM, if the features of all of them leave room for one running session: the most that
                `build_mar.sh --sessions` may be
More sessions may be open: their features stay on the GPU, and a prefill rebuilds their KV. Their time to first token
is then that of a new conversation."""


@dataclass(frozen=True)
class LlavaShape:
    """The sizes of a LLaVA checkpoint, from the `config.json` that its authors publish.

    The vision tower is CLIP ViT-L/14 at 336 pixels in all of them: 24 layers of 1024, 576 patches.
    """

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    picture_tokens: int
    newline: bool = False
    vocabulary: int = 32064

    @property
    def head_dim(self) -> int:
        """The size of one attention head."""
        return self.hidden // self.heads

    @property
    def kv_token_bytes(self) -> int:
        """The size of the keys and values of one token in all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim * BYTES_PER_NUMBER

    @property
    def features_bytes(self) -> int:
        """The size of the features of one picture."""
        return self.picture_tokens * self.hidden * BYTES_PER_NUMBER

    @property
    def parameters(self) -> int:
        """The parameters of language model (as Llama or Mistral), vision tower and projector."""
        attention = 2 * self.hidden**2 + 2 * self.hidden * self.kv_heads * self.head_dim
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        language = 2 * self.vocabulary * self.hidden + self.layers * layer + self.hidden
        projector = 1024 * self.hidden + self.hidden + self.hidden**2 + self.hidden
        return language + _clip_parameters() + projector + (self.hidden if self.newline else 0)

    @property
    def weights_bytes(self) -> int:
        """The size of all weights."""
        return self.parameters * BYTES_PER_NUMBER

    def kv_bytes(self, tokens: int) -> int:
        """Return the size of the KV cache of a conversation with so many tokens."""
        return -(-tokens // KV_STEP_TOKENS) * KV_STEP_TOKENS * self.kv_token_bytes


def _clip_parameters(
    width: int = 1024, layers: int = 24, inner: int = 4096, patches: int = 576, patch: int = 14
) -> int:
    embeddings = 3 * patch * patch * width + width + (patches + 1) * width
    attention = 4 * (width * width + width)
    layer = attention + 2 * width * inner + inner + width + 2 * 2 * width
    return embeddings + layers * layer + 2 * 2 * width


# Sources: config.json of llava-hf/llava-1.5-7b-hf and -13b-hf, llava-hf/llava-v1.6-vicuna-7b-hf, -mistral-7b-hf and
# -vicuna-13b-hf. Language models: Vicuna 7B and 13B have Llama 2's shapes ("Llama 2", table of model sizes), Mistral 7B
# has grouped-query attention with 8 KV heads and an inner size of 14336 ("Mistral 7B", table 1).
# Tokens of a picture: 336/14 squared = 576 in LLaVA-1.5. LLaVA-NeXT encodes a picture whole and in up to four tiles
# (image_grid_pinpoints): 576 + 48 x 48 + 48 ends of line = 2928 at 672 x 672, its most.
MODELS = (
    LlavaShape("LLaVA-1.5-7B", 4096, 32, 32, 32, 11008, 576),
    LlavaShape("LLaVA-1.5-13B", 5120, 40, 40, 40, 13824, 576),
    LlavaShape("LLaVA-NeXT-7B (Vicuna)", 4096, 32, 32, 32, 11008, 2928, newline=True),
    LlavaShape("LLaVA-NeXT-7B (Mistral)", 4096, 32, 32, 8, 14336, 2928, newline=True),
    LlavaShape("LLaVA-NeXT-13B (Vicuna)", 5120, 40, 40, 40, 13824, 2928, newline=True),
)


@dataclass(frozen=True)
class InstanceType:
    """An instance type with one GPU. The engine uses one."""

    name: str
    gpu: str
    gpu_mib: int
    ram_gib: int


# Source: EC2's DescribeInstanceTypes of the type without "ml.": GpuInfo.TotalGpuMemoryInMiB and MemoryInfo.SizeInMiB.
INSTANCES = (
    InstanceType("ml.g4dn.xlarge", "T4", 16384, 16),
    InstanceType("ml.g4dn.2xlarge", "T4", 16384, 32),
    InstanceType("ml.g5.xlarge", "A10G", 22888, 16),
    InstanceType("ml.g5.2xlarge", "A10G", 22888, 32),
    InstanceType("ml.g5.4xlarge", "A10G", 22888, 64),
    InstanceType("ml.g5.8xlarge", "A10G", 22888, 128),
    InstanceType("ml.g6.2xlarge", "L4", 22888, 32),
    InstanceType("ml.g6.4xlarge", "L4", 22888, 64),
    InstanceType("ml.g6e.xlarge", "L40S", 45776, 32),
    InstanceType("ml.g6e.2xlarge", "L40S", 45776, 64),
    InstanceType("ml.g6e.4xlarge", "L40S", 45776, 128),
    InstanceType("ml.p5.4xlarge", "H100", 81920, 256),
)


@dataclass(frozen=True)
class Fit:
    """The sessions of one kind that fit on one instance; all zero if the weights leave no room for one."""

    on_gpu: int
    in_ram: int
    open: int


def fit(model: LlavaShape, instance: InstanceType, text_tokens: int, reserve_bytes: int) -> Fit:
    """Apply the formula. `text_tokens` is the length of a conversation without its picture."""
    tokens = model.picture_tokens + text_tokens
    free = instance.gpu_mib * MIB - model.weights_bytes - reserve_bytes
    session = model.features_bytes + model.kv_bytes(tokens)
    on_gpu = max(free, 0) // session
    if not on_gpu:
        return Fit(0, 0, 0)
    in_ram = int(HOST_SHARE * instance.ram_gib * GIB) // (tokens * model.kv_token_bytes)
    by_features = (free - model.kv_bytes(tokens)) // model.features_bytes
    return Fit(on_gpu, in_ram, min(_shared(free, model, tokens, in_ram), by_features))


def _shared(free: int, model: LlavaShape, tokens: int, in_ram: int) -> int:
    """Return the sessions on GPU and in RAM together. The features of sessions in RAM stay on the GPU."""
    left = free - in_ram * model.features_bytes
    return max(left, 0) // (model.features_bytes + model.kv_bytes(tokens)) + in_ram


def table(text_tokens: int, reserve_bytes: int, models: Sequence[LlavaShape] = MODELS) -> str:
    """Return Markdown: the sizes of the models, then a row for each instance type."""
    lines = ["| model | weights | KV a token | features | one session |", "|---|---|---|---|---|"]
    for model in models:
        session = model.features_bytes + model.kv_bytes(model.picture_tokens + text_tokens)
        sizes = (_gib(model.weights_bytes), _kib(model.kv_token_bytes), _mib(model.features_bytes), _mib(session))
        lines.append(f"| {model.name} | {' | '.join(sizes)} |")
    lines += ["", f"| instance | GPU, RAM | {' | '.join(model.name for model in models)} |"]
    lines.append("|---" * (2 + len(models)) + "|")
    for instance in INSTANCES:
        cells = [_cell(fit(model, instance, text_tokens, reserve_bytes)) for model in models]
        size = f"{instance.gpu} {instance.gpu_mib / 1024:.1f} GiB, {instance.ram_gib} GiB"
        lines.append(f"| {instance.name} | {size} | {' | '.join(cells)} |")
    return "\n".join(lines)


def report(text_tokens: int, reserve_gib: float) -> str:
    """Return the output of `llava-deploy capacity`."""
    head = f"A session: one picture, {text_tokens} tokens of text. Reserve: {reserve_gib:g} GiB. {NOTE}"
    cells = "Each cell: sessions open (of these with their KV on the GPU); - if the weights leave no room for one."
    return f"{head}\n{cells}\n\n{table(text_tokens, int(reserve_gib * GIB))}\n\n{FORMULA}"


def _cell(fits: Fit) -> str:
    return f"{fits.open} ({fits.on_gpu})" if fits.on_gpu else "-"


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"


def _mib(count: int) -> str:
    return f"{count / MIB:.1f} MiB"


def _kib(count: int) -> str:
    return f"{count / 1024:.0f} KiB"
