"""The untrained parts: architecture, tokenizer, chat template, processor."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip import CLIPImageProcessorPil

BOS, EOS, PAD, IMAGE = "<s>", "</s>", "<pad>", "<image>"
IMAGE_PX, PATCH_PX = 144, 16
GRID = IMAGE_PX // PATCH_PX  # patches a side: three for each of the three places, so that no patch is in two places
IMAGE_TOKENS = GRID**2
_MOST_TOKENS_IN_VOCABULARY = 1024

# The words of LLaVA-1.5. The template writes <s>, not the tokenizer: text then has the same tokens in one piece and in
# parts, and apply_chat_template agrees with processor(text=...).
CHAT_TEMPLATE = """\
{%- macro words(content) -%}
  {%- if content is string -%}{{ content | trim }}
  {%- else -%}
    {%- for part in content if part.type == 'text' -%}{{ part.text | trim }}{{ '' if loop.last else ' ' }}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{{- bos_token -}}
{%- for message in messages -%}
  {%- if message.role == 'system' -%}
    {{- words(message.content) + ' ' -}}
  {%- elif message.role == 'user' -%}
    {{- 'USER: ' -}}
    {%- if message.content is not string -%}
      {%- for part in message.content if part.type == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}
    {%- endif -%}
    {{- words(message.content) -}}
  {%- elif message.role == 'assistant' -%}
    {{- ' ASSISTANT: ' + words(message.content) + eos_token -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ ' ASSISTANT:' }}{%- endif -%}
"""


def make_tokenizer(corpus: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE: every word of the corpus is one token, any other text is spelt in bytes."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_MOST_TOKENS_IN_VOCABULARY,
        special_tokens=[PAD, BOS, EOS, IMAGE],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Return the processor: it squashes a picture of any shape to a square and writes `<image>` as 81 tokens."""
    pictures = CLIPImageProcessorPil(
        size={"height": IMAGE_PX, "width": IMAGE_PX}, do_center_crop=False, do_convert_rgb=True
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=PATCH_PX,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """Return the model with 5.2 million random weights, two thirds of them in the vision tower."""
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=7,
        num_attention_heads=4,
        hidden_act="gelu",
        image_size=IMAGE_PX,
        patch_size=PATCH_PX,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    settings = model.generation_config
    settings.do_sample = False
    settings.bos_token_id = tokenizer.bos_token_id
    settings.eos_token_id = tokenizer.eos_token_id
    settings.pad_token_id = tokenizer.pad_token_id
    return model
