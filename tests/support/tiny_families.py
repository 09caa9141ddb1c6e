"""Make very small random checkpoints of every served family, as tests/support/tiny_llava.py does for LLaVA-1.5.

The real config, model, tokenizer and processor classes of transformers; each with the chat template of its family's
published checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaProcessor,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2Tokenizer,
    Qwen3Config,
    SiglipVisionConfig,
)

from deploy.sagemaker.shapes import Shape
from llava_sessions.text.processors.internvl import PillowInternVLProcessor
from llava_sessions.text.processors.next_video import PillowNextVideoProcessor
from llava_sessions.text.processors.onevision import PillowOnevisionProcessor

IMAGES = "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
TEXTS = "{% for part in message['content'] if part['type'] == 'text' %}"
# As llava-v1.6-vicuna: a system message without a role, no token after an answer.
VICUNA = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'][0]['text'] }}"
    "{% else %}{{ message['role'].upper() + ': ' }}{% endif %}"
    + IMAGES
    + TEXTS
    + "{{ part['text'] + ' ' }}{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# As LLaVA-NeXT-Video: Vicuna's, with all clips after all pictures.
VICUNA_VIDEO = VICUNA.replace(
    TEXTS, "{% for part in message['content'] if part['type'] == 'video' %}{{ '<video>\n' }}{% endfor %}" + TEXTS
)
# As llava-v1.6-mistral: no generation prompt, an end-of-sequence token after an answer.
MISTRAL = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ '<<SYS>>\n' + message['content'][0]['text'] + '\n<</SYS>>\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' }}"
    + IMAGES
    + TEXTS
    + "{{ part['text'] }}{% endfor %}{{ ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'][0]['text'] + '</s> ' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
# As llava-onevision-qwen2: "assistant \n" before an earlier answer, "assistant\n" before the next one.
QWEN = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'video' %}{{ '<video>' }}{% endfor %}"
    + TEXTS
    + "{{ '\n' + part['text'] }}{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As the InternVL3 checkpoints named *-hf: the parts in their order.
INTERNVL = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% elif part['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_WORDS = ["USER: ASSISTANT: [INST] [/INST] user assistant what is the red circle doing near a blue square and stars? "]
_TILE = 28
_GRID = [[28, 56], [56, 28], [56, 56], [28, 84], [84, 28]]


def _llama_tokenizer(**more: str) -> LlamaTokenizer:
    """Return a SentencePiece tokenizer with byte fallback that adds a start token and a space to every text.

    Mistral's is of the same class. `more`: further special tokens by name.
    """
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary, merges = _train(pre_tokenizers.Metaspace(), pieces)
    extra = {"image_token": "<image>"} | more
    tokenizer = LlamaTokenizer(vocabulary, merges, pad_token="</s>", extra_special_tokens=extra)
    start = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = start
    return tokenizer


def _qwen_tokenizer(**media: str) -> Qwen2Tokenizer:
    """Return a byte-level BPE tokenizer without a start token. `media`: special tokens by name."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary, merges = _train(level, ["<|endoftext|>"], alphabet=pre_tokenizers.ByteLevel.alphabet())
    extra = {"start_token": "<|im_start|>", **media}
    return Qwen2Tokenizer(vocabulary, merges, eos_token="<|im_end|>", extra_special_tokens=extra)


def _train(split: pre_tokenizers.PreTokenizer, first: list[str], alphabet: list[str] | None = None) -> tuple:
    """Return a vocabulary that begins with `first`, and its merges."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = split
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=first, initial_alphabet=alphabet or [], show_progress=False
    )
    backend.train_from_iterator(_WORDS * 4, trainer)
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def _text(kind: type[PreTrainedConfig], tokenizer: PreTrainedTokenizerBase, kv_heads: int, tied: bool, **more: object):
    sizes: dict = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 2048,
        "vocab_size": len(tokenizer),
    }
    return kind(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=tied,
        **sizes | more,
    )


def _clip() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=_TILE, patch_size=7
    )


def _save(model: PreTrainedModel, processor: object, folder: Path) -> Path:
    # With random weights at the usual scale attention is uniform, a picture has almost no effect and greedy decoding
    # repeats one token: comparing answers would be void.
    for part in (model.model.multi_modal_projector, model.model.language_model, model.lm_head):
        for weight in (weight for weight in part.parameters() if weight.ndim == 2):
            torch.nn.init.normal_(weight, std=0.3)
    # No answer contains an image token (`generate` would require a picture for it), and few answers end early.
    tokenizer = processor.tokenizer
    media = ("<image>", "<video>", "<img>", "</img>", "<IMG_CONTEXT>")
    never = [*map(tokenizer.convert_tokens_to_ids, media), tokenizer.eos_token_id]
    never = [token for token in never if token is not None and token < len(model.lm_head.weight)]
    model.lm_head.weight.data[never] = 0
    model.bfloat16().save_pretrained(folder)  # the published precision
    processor.save_pretrained(folder)
    return folder


def make_llava(folder: Path, **more: object) -> Path:
    """LLaVA-1.5: Llama text, multi-head attention, tied heads; 16 tokens a picture. `more`: of the text's config."""
    torch.manual_seed(1)
    tokenizer = _llama_tokenizer()
    image = tokenizer.convert_tokens_to_ids("<image>")
    text = _text(LlamaConfig, tokenizer, kv_heads=4, tied=True, **more)
    config = LlavaConfig(
        vision_config=_clip(), text_config=text, image_token_id=image, image_seq_length=16, tie_word_embeddings=True
    )
    images = CLIPImageProcessor(size={"shortest_edge": _TILE}, crop_size={"height": _TILE, "width": _TILE})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA,
    )
    return _save(LlavaForConditionalGeneration(config), processor, folder)


def _make_next(folder: Path, kind: type[PreTrainedConfig], template: str, kv_heads: int, **more: object) -> Path:
    torch.manual_seed(2)
    tokenizer = _llama_tokenizer()
    config = LlavaNextConfig(
        vision_config=_clip(),
        text_config=_text(kind, tokenizer, kv_heads, tied=False, **more),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=_GRID,
        image_seq_length=16,
    )
    images = LlavaNextImageProcessor(
        size={"shortest_edge": _TILE}, crop_size={"height": _TILE, "width": _TILE}, image_grid_pinpoints=_GRID
    )
    processor = LlavaNextProcessor(
        images,
        tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    return _save(LlavaNextForConditionalGeneration(config), processor, folder)


def make_next_mistral(folder: Path, sliding_window: int | None = None) -> Path:
    """LLaVA-NeXT 1.6: Mistral text, grouped-query attention, untied heads."""
    return _make_next(folder, MistralConfig, MISTRAL, kv_heads=2, sliding_window=sliding_window)


def make_next_llama(folder: Path) -> Path:
    """LLaVA-NeXT 1.6: Vicuna (Llama) text, multi-head attention, untied heads."""
    return _make_next(folder, LlamaConfig, VICUNA, kv_heads=4)


def make_onevision(folder: Path, tied: bool = True, **more: object) -> Path:
    """LLaVA-OneVision: Qwen2 text, grouped-query attention, SigLIP vision; pictures, several of them, and clips."""
    torch.manual_seed(3)
    tokenizer = _qwen_tokenizer(image_token="<image>", video_token="<video>")
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=_TILE,
        patch_size=7,
        vision_use_head=False,
    )
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=_text(Qwen2Config, tokenizer, kv_heads=2, tied=tied, **more),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=_GRID,
        tie_word_embeddings=tied,
    )
    images = LlavaOnevisionImageProcessor(size={"height": _TILE, "width": _TILE}, image_grid_pinpoints=_GRID)
    processor = PillowOnevisionProcessor(
        images, tokenizer, num_image_tokens=16, vision_feature_select_strategy="full", chat_template=QWEN
    )
    _save(LlavaOnevisionForConditionalGeneration(config), processor, folder)
    # As published: with the class that needs torchvision, and a video processor next to the image processor.
    saved = _read(folder, "processor_config")
    saved["processor_class"] = "LlavaOnevisionProcessor"
    saved["video_processor"] = {"size": {"height": _TILE, "width": _TILE}}
    _write(folder, "processor_config", saved)
    return folder


def make_onevision_untied(folder: Path) -> Path:
    """As `make_onevision`, with an untied head."""
    return make_onevision(folder, tied=False)


def make_next_video(folder: Path, **more: object) -> Path:
    """LLaVA-NeXT-Video: Vicuna (Llama) text, untied heads; tiled pictures, and clips of 4 tokens a frame."""
    torch.manual_seed(4)
    tokenizer = _llama_tokenizer(video_token="<video>")
    config = LlavaNextVideoConfig(
        vision_config=_clip(),
        text_config=_text(LlamaConfig, tokenizer, kv_heads=4, tied=False, **more),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=_GRID,
        image_seq_length=16,
    )
    sizes = {"size": {"shortest_edge": _TILE}, "crop_size": {"height": _TILE, "width": _TILE}}
    processor = PillowNextVideoProcessor(
        LlavaNextImageProcessor(**sizes, image_grid_pinpoints=_GRID),
        tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VICUNA_VIDEO,
    )
    _save(LlavaNextVideoForConditionalGeneration(config), processor, folder)
    # As published: a file for each processor, with the classes that need torchvision.
    saved = _read(folder, "processor_config")
    images = saved.pop("image_processor") | {"image_processor_type": "LlavaNextImageProcessor"}
    _write(folder, "processor_config", saved | {"processor_class": "LlavaNextVideoProcessor"})
    _write(folder, "preprocessor_config", images)
    video = {name: value for name, value in images.items() if name != "image_grid_pinpoints"}
    _write(folder, "video_preprocessor_config", video | {"image_processor_type": "LlavaNextVideoImageProcessor"})
    return folder


def _internvl_tokenizer() -> Qwen2Tokenizer:
    """Return Qwen's tokenizer with the tokens of InternVL."""
    return _qwen_tokenizer(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )


def _make_internvl(folder: Path, kind: type[PreTrainedConfig], tower: dict | None = None, **more: object) -> Path:
    tokenizer = _internvl_tokenizer()
    vision = InternVLVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        attention_bias=True,
        image_size=[_TILE, _TILE],
        patch_size=[7, 7],
        **(tower or {}),
    )
    config = InternVLConfig(
        vision_config=vision,
        text_config=_text(kind, tokenizer, kv_heads=2, tied=False, **more),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    model = InternVLForConditionalGeneration(config)
    # The initial values are constants, or so small that a layer has no effect.
    made = model.model.vision_tower
    for weight in made.parameters():
        if weight.ndim >= 2:
            torch.nn.init.normal_(weight, std=0.3)
    for layer in made.encoder.layer:
        torch.nn.init.uniform_(layer.lambda_1, 0.5, 1.5)
        torch.nn.init.uniform_(layer.lambda_2, 0.5, 1.5)
    for name, weight in model.model.language_model.named_parameters():
        if "q_norm" in name or "k_norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    size = {"height": _TILE, "width": _TILE}
    deviation = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    images = GotOcr2ImageProcessorPil(size=size, **deviation)
    processor = PillowInternVLProcessor(images, tokenizer, image_seq_length=4, chat_template=INTERNVL)
    _save(model, processor, folder)
    # As published: a file for each processor, with the classes that need torchvision.
    saved = _read(folder, "processor_config")
    unset = ("crop_size", "device", "do_center_crop", "do_pad", "input_data_format", "return_tensors", "size_divisor")
    images = saved.pop("image_processor") | dict.fromkeys(unset)
    images |= {"image_processor_type": "GotOcr2ImageProcessorFast", "crop_to_patches": False, "default_to_square": True}
    _write(folder, "processor_config", saved | {"processor_class": "InternVLProcessor"})
    _write(folder, "preprocessor_config", images)
    video = {"video_processor_type": "InternVLVideoProcessor", "size": size, **deviation}
    _write(folder, "video_preprocessor_config", video)
    return folder


def make_internvl(folder: Path, **more: object) -> Path:
    """InternVL3: Qwen2 text with dynamic RoPE, untied heads; 4 tokens a tile or frame, at most 13 tiles a picture.

    `more`: of the text's config; `tower`: of the vision tower's.
    """
    torch.manual_seed(5)
    rope = {"rope_type": "dynamic", "type": "dynamic", "factor": 2.0}
    # As published: the last token of the tokenizer, "<video>", has no embedding.
    rows = _internvl_tokenizer().convert_tokens_to_ids("<video>")
    _make_internvl(folder, Qwen2Config, rope_parameters={**rope, "rope_theta": 1e6}, **{"vocab_size": rows, **more})
    # As published: keys of older versions of transformers.
    config = _read(folder, "config")
    del config["text_config"]["rope_parameters"]
    config["text_config"] |= {"rope_scaling": rope, "rope_theta": 1e6}
    _write(folder, "config", config)
    return folder


def make_internvl35(folder: Path, **more: object) -> Path:
    """InternVL3.5: Qwen3 text (query and key norm), whose heads are together wider than the hidden size."""
    torch.manual_seed(6)
    return _make_internvl(folder, Qwen3Config, head_dim=16, **more)


def _read(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def _write(folder: Path, name: str, content: dict) -> None:
    (folder / f"{name}.json").write_text(json.dumps(content))


# --- processors of the published checkpoints, with small tokenizers ---


def _options(shape: Shape) -> dict[str, Any]:
    return {
        "patch_size": shape.tower.patch_size,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }


def _sides(shape: Shape) -> dict[str, Any]:
    side = shape.tower.image_size
    return {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}


def _published_llava(shape: Shape) -> LlavaProcessor:
    images = CLIPImageProcessor(**_sides(shape))
    return LlavaProcessor(images, _llama_tokenizer(), **_options(shape), chat_template=VICUNA)


def _published_next(shape: Shape) -> LlavaNextProcessor:
    images = LlavaNextImageProcessor(**_sides(shape), image_grid_pinpoints=GRIDS["llava_next"])
    return LlavaNextProcessor(images, _llama_tokenizer(), **_options(shape), chat_template=VICUNA)


def _published_next_video(shape: Shape) -> PillowNextVideoProcessor:
    images = LlavaNextImageProcessor(**_sides(shape), image_grid_pinpoints=GRIDS["llava_next_video"])
    tokenizer = _llama_tokenizer(video_token="<video>")
    return PillowNextVideoProcessor(images, tokenizer, **_options(shape), chat_template=VICUNA_VIDEO)


def _published_onevision(shape: Shape) -> PillowOnevisionProcessor:
    square = {"height": shape.tower.image_size, "width": shape.tower.image_size}
    return PillowOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=GRIDS["llava_onevision"]),
        _qwen_tokenizer(image_token="<image>", video_token="<video>"),
        num_image_tokens=shape.tower.side**2,
        vision_feature_select_strategy="full",
        chat_template=QWEN,
    )


def _published_internvl(shape: Shape) -> PillowInternVLProcessor:
    images = GotOcr2ImageProcessorPil(size={"height": shape.tower.image_size, "width": shape.tower.image_size})
    tokens = shape.family.tokens_of_tile(shape.tower.side)
    return PillowInternVLProcessor(images, _internvl_tokenizer(), tokens, chat_template=INTERNVL)


PUBLISHED: dict[str, Callable[[Shape], Any]] = {
    "llava": _published_llava,
    "llava_next": _published_next,
    "llava_next_video": _published_next_video,
    "llava_onevision": _published_onevision,
    "internvl": _published_internvl,
}
GRIDS = {
    "llava_next": LlavaNextConfig().image_grid_pinpoints,
    "llava_next_video": LlavaNextVideoConfig().image_grid_pinpoints,
    "llava_onevision": [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)],
}
# What the configurations of the towers have besides their sizes.
TOWERS: dict[str, dict[str, Any]] = {
    "clip_vision_model": {"projection_dim": 768},
    "siglip_vision_model": {"vision_use_head": False},
    "internvl_vision": {"attention_bias": True},
}


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "llava": make_llava,
    "next-mistral": make_next_mistral,
    "next-llama": make_next_llama,
    "onevision": make_onevision,
    "onevision-untied": make_onevision_untied,
    "next-video": make_next_video,
    "internvl": make_internvl,
    "internvl3.5": make_internvl35,
}
