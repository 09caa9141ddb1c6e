"""Models of published shapes with random weights, made on the device: no checkpoint, no network.

Their answers mean nothing, but a step takes as long as with a trained model of the shape. `bench.make_checkpoint` has
the reasons for the scale of the weights and for the zeros of the head.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessorPil,
    LlavaProcessor,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)

from llava_sessions.text.chat_template import ChatTemplate
from llava_sessions.text.processors.internvl import PillowInternVLProcessor
from llava_sessions.text.processors.onevision import PillowOnevisionProcessor

from ..make_checkpoint import EMBEDDING_STD, TEMPLATE, WEIGHT_STD, WORDS, make_tokenizer

_TEXTS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
# Tokens of InternVL's tokenizer, and their names.
_INTERNVL_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}


@dataclass(frozen=True)
class Shape:
    """The sizes of a model. `kind`: "llava", "next", "onevision" or "internvl". `head`: see `head_dim`."""

    name: str
    kind: str
    text: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    vision: dict[str, int]
    picture_side: int
    grid: tuple[tuple[int, int], ...] = ()
    head: int = 0

    @property
    def head_dim(self) -> int:
        """Numbers of a key. Only Qwen3's configuration has them; others have `hidden / heads`."""
        return self.head or self.hidden // self.heads

    @property
    def linear_bytes(self) -> int:
        """Bytes of the weights that a decode step reads, in 16 bits: all linears of the layers, and the head."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        layer = attention + 3 * self.hidden * self.intermediate
        return 2 * (self.layers * layer + self.hidden * self.vocabulary)


_CLIP = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
_SIGLIP = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26, "num_attention_heads": 16}
_INTERNVIT = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_NEXT = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
_ANY = tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7))
# Sources: config.json of llava-hf/llava-1.5-7b-hf, llava-v1.6-mistral-7b-hf and llava-onevision-qwen2-7b-ov-hf, and of
# OpenGVLab/InternVL3_5-8B-HF.
LLAVA = Shape("LLaVA-1.5-7B", "llava", "llama", 4096, 32, 32, 32, 11008, 32064, _CLIP, 336)
MISTRAL = Shape("LLaVA-NeXT-Mistral-7B", "next", "mistral", 4096, 32, 32, 8, 14336, 32064, _CLIP, 336, _NEXT)
QWEN2 = Shape("LLaVA-OneVision-7B", "onevision", "qwen2", 3584, 28, 28, 4, 18944, 152000, _SIGLIP, 384, _ANY)
QWEN3 = Shape("InternVL3.5-8B", "internvl", "qwen3", 4096, 36, 32, 8, 12288, 151936, _INTERNVIT, 448, head=128)

_SMALL_TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_SMALL_GRID = ((56, 56), (28, 56), (56, 28))
TINY = Shape("tiny LLaVA", "llava", "llama", 64, 2, 4, 4, 128, 2048, _SMALL_TOWER, 56)
TINY_MISTRAL = Shape("tiny NeXT", "next", "mistral", 64, 2, 4, 2, 128, 2048, _SMALL_TOWER, 28, _SMALL_GRID)
TINY_QWEN2 = Shape("tiny OneVision", "onevision", "qwen2", 64, 2, 4, 2, 128, 2048, _SMALL_TOWER, 28, _SMALL_GRID)
TINY_QWEN3 = Shape("tiny InternVL", "internvl", "qwen3", 64, 2, 4, 2, 128, 2048, _SMALL_TOWER, 56, head=32)


def tokenizer_of(shape: Shape) -> Any:
    """Return a tokenizer with one token for each word of `WORDS`, and the tokens of pictures and clips."""
    tokenizer = make_tokenizer(**_INTERNVL_TOKENS if shape.kind == "internvl" else {})
    if shape.kind == "onevision":
        tokenizer.add_tokens(["<video>"], special_tokens=True)
    return tokenizer


def config_of(shape: Shape, tokenizer: Any, layers: int | None = None) -> Any:
    """Return the configuration of transformers. `layers`: other language layers than the shape's."""
    head = {"head_dim": shape.head} if shape.head else {}
    text = _TEXTS[shape.text](
        **head,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers if layers is None else layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocabulary,
        max_position_embeddings=32768,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    tower = {**shape.vision, "image_size": shape.picture_side, "patch_size": 14}
    options: dict[str, Any] = {"tie_word_embeddings": False}
    if shape.kind == "internvl":
        image = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
        vision: Any = InternVLVisionConfig(**tower, attention_bias=True)
        options["image_seq_length"] = _internvl_tokens(shape)
        return InternVLConfig(vision_config=vision, text_config=text, image_token_id=image, **options)
    options["image_token_id"] = tokenizer.convert_tokens_to_ids("<image>")
    if shape.grid:
        options["image_grid_pinpoints"] = [list(size) for size in shape.grid]
    if shape.kind == "onevision":
        options["video_token_id"] = tokenizer.convert_tokens_to_ids("<video>")
        vision = SiglipVisionConfig(**tower, vision_use_head=False)
        return LlavaOnevisionConfig(vision_config=vision, text_config=text, **options)
    vision = CLIPVisionConfig(**tower, projection_dim=shape.vision["hidden_size"])
    kind = LlavaNextConfig if shape.kind == "next" else LlavaConfig
    # The tower has no layer after the one whose output is used, as in a loaded model.
    return kind(vision_config=vision, text_config=text, vision_feature_layer=tower["num_hidden_layers"], **options)


def _internvl_tokens(shape: Shape) -> int:
    """Return the image tokens of a tile: one for each 2 x 2 patches."""
    return (shape.picture_side // 28) ** 2


def template_of(shape: Shape, tokenizer: Any) -> ChatTemplate:
    """Return the text side of a model: its processor and chat template."""
    side = shape.picture_side
    grid = [list(size) for size in shape.grid]
    if shape.kind == "internvl":
        images: Any = GotOcr2ImageProcessorPil(size={"height": side, "width": side})
        template = TEMPLATE.replace("<image>", "<IMG_CONTEXT>")
        tokens = _internvl_tokens(shape)
        return ChatTemplate(PillowInternVLProcessor(images, tokenizer, image_seq_length=tokens, chat_template=template))
    if shape.kind == "onevision":
        images = LlavaOnevisionImageProcessorPil(size={"height": side, "width": side}, image_grid_pinpoints=grid)
        return ChatTemplate(
            PillowOnevisionProcessor(
                images,
                tokenizer,
                num_image_tokens=(side // 14) ** 2,
                vision_feature_select_strategy="full",
                chat_template=TEMPLATE,
            )
        )
    size: dict[str, Any] = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    options: dict[str, Any] = {"patch_size": 14, "vision_feature_select_strategy": "default", "chat_template": TEMPLATE}
    options["num_additional_image_tokens"] = 1
    if shape.kind == "next":
        images = LlavaNextImageProcessorPil(**size, image_grid_pinpoints=grid)
        return ChatTemplate(LlavaNextProcessor(images, tokenizer, **options))
    return ChatTemplate(LlavaProcessor(CLIPImageProcessorPil(**size), tokenizer, **options))


@torch.no_grad()
def make(shape: Shape, dtype: torch.dtype, device: torch.device, layers: int | None = None) -> tuple[Any, ChatTemplate]:
    """Return a transformers model on the device, and its text side. The same device makes the same weights."""
    tokenizer = tokenizer_of(shape)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config_of(shape, tokenizer, layers), dtype=dtype)
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith("bias") or "class_embedding" in name else 1.0)
        else:
            wide = "lm_head" in name or "embed_tokens" in name
            parameter.normal_(std=EMBEDDING_STD if wide else WEIGHT_STD, generator=generator)
    ids = [tokenizer(" " + word, add_special_tokens=False)["input_ids"] for word in WORDS]
    silent = torch.ones(shape.vocabulary, dtype=torch.bool, device=device)
    silent[[each[0] for each in ids if len(each) == 1]] = False
    model.lm_head.weight[silent] = 0
    return model.eval(), template_of(shape, tokenizer)


def twin(model: Any) -> Any:
    """Return a copy of a transformers model, for `generate`: the engine changes the model that it takes."""
    return copy.deepcopy(model)
