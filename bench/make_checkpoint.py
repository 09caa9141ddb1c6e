"""Build the random-weight checkpoints of the benchmarks, in LLaVA-1.5's format and with its chat template.

    python -m bench.make_checkpoint --preset bench

Their answers are meaningless, but a step takes as long as with a trained model of the same shape. Embeddings and head
have a standard deviation of 0.3, because with the usual 0.02 greedy decoding repeats one token. The head's rows are
zero except those of whole words, so an answer never ends early, contains no image token, and every token has text. The
same seed gives the same weights.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from deploy.options import Parser

CACHE = Path(__file__).parents[1] / ".cache" / "bench"
SPECIALS = ("<s>", "</s>", "<pad>", "<image>")
EMBEDDING_STD = 0.3
WEIGHT_STD = 0.02
_MADE_FROM = "made_from.txt"

# The words of prompts and answers. Each is one token.
_WORDS = """
above across air all animal apple arm around ask baby back bag ball bank bird black blue board boat body book
bottle bottom bowl box boy bread bridge bright brown bus cake camera car cat chair child circle city clean
clear clock close cloud coat cold colour corner count cup curtain dark day deep desk detail dog door down draw
dress drink dry each edge egg empty end evening every eye face fall family far farm field fire first fish
floor flower food foot forest frame fruit full garden girl glass gold grass great green ground group hair half
hand happy hat head heavy high hill hold home horse house ice inside island kind kitchen lady lake lamp land
large last leaf left leg letter light line lion little long look low lower man many map market meal metal
middle milk mirror moon morning mountain mouth music narrow near new next night nose number object old one
open orange outside over page paint paper park part path pen people picture piece pink place plane plant plate
play point pool poor pretty purple quiet rain red rice right ring river road rock roof room round sand school
sea seat shade shape sheep ship shirt shoe shop short side sign silver sit sky small smile snow soft song
square stand star stone street strong summer sun table tall tea thin third three tiny top tower town toy train
tree triangle two under upper valley view wall warm water wave wheel white whole wide wild wind window winter
wood yard yellow young
"""
WORDS = _WORDS.split()

# LLaVA-1.5's: it writes no end-of-sequence token after an answer.
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


@dataclass(frozen=True)
class Preset:
    """The shape of a checkpoint. `vision` and `text`: arguments of the two config classes."""

    about: str
    vision: dict
    text: dict
    dtype: torch.dtype = torch.bfloat16

    @property
    def image_tokens(self) -> int:
        """Image tokens of one picture in the prompt."""
        return (self.vision["image_size"] // self.vision["patch_size"]) ** 2


_CLIP_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_CLIP_TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}


def _llama(width: int, layers: int, heads: int, feed_forward: int, vocabulary: int) -> dict:
    """Return the arguments of a Llama config with multi-head attention and an untied head, as in LLaVA-1.5."""
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": feed_forward,
        "vocab_size": vocabulary,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }


PRESETS = {
    "bench": Preset("CLIP ViT-L/14-336 and a small Llama, 0.63 B", _CLIP_L, _llama(1024, 20, 16, 2816, 32064)),
    "7b": Preset("the shape of LLaVA-1.5-7B, 14 GB", _CLIP_L, _llama(4096, 32, 32, 11008, 32064)),
    # Its KV is large for its size (2 MiB per session), so hundreds of sessions are visible in the process's memory.
    "tiny": Preset("for tests: 1.5 M, 16 image tokens", _CLIP_TINY, _llama(128, 8, 8, 256, 2048), torch.float32),
}


def make_tokenizer(**tokens: str) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE that encodes any text and has one token for a space and each of `WORDS`.

    `tokens`: further special tokens by name.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["USER: ASSISTANT: " + " ".join(WORDS)] * 8, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"} | tokens,
    )


def make_config(preset: Preset, tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    """Return the model's config. Its vocabulary is larger than the tokenizer's."""
    text = LlamaConfig(
        **preset.text,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**preset.vision),
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=preset.image_tokens,
        tie_word_embeddings=False,
    )


def make_model(preset: Preset, config: LlavaConfig, words: list[int], seed: int) -> LlavaForConditionalGeneration:
    """Return a model with random weights, drawn in the saved dtype. `words`: token IDs that an answer may contain."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model = model.to(preset.dtype).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    with (
        torch.no_grad(),
        tqdm(total=sum(p.numel() for p in parameters.values()), unit_scale=True, desc="weights") as bar,
    ):
        for name, parameter in parameters.items():
            if parameter.dim() == 1:
                parameter.fill_(0.0 if name.endswith("bias") or "class_embedding" in name else 1.0)
            else:
                wide = "lm_head" in name or "embed_tokens" in name
                parameter.normal_(std=EMBEDDING_STD if wide else WEIGHT_STD, generator=generator)
            bar.update(parameter.numel())
        head = model.lm_head.weight
        silent = torch.ones(len(head), dtype=torch.bool)
        silent[words] = False
        head[silent] = 0
    return model


def make_checkpoint(folder: Path, preset: Preset, seed: int = 0) -> Path:
    """Build and save a checkpoint. The folder is renamed into place once it is complete."""
    tokenizer = make_tokenizer()
    words = [ids[0] for word in WORDS if len(ids := tokenizer(" " + word, add_special_tokens=False)["input_ids"]) == 1]
    model = make_model(preset, make_config(preset, tokenizer), words, seed)
    making = folder.with_name(folder.name + ".making")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    print(f"saving to {folder} ...", flush=True)
    model.save_pretrained(making)
    size = preset.vision["image_size"]
    LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size}),
        tokenizer,
        patch_size=preset.vision["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(making)
    (making / _MADE_FROM).write_text(_recipe(preset, seed))
    shutil.rmtree(folder, ignore_errors=True)
    making.rename(folder)
    return folder


def ensure_checkpoint(name: str, seed: int = 0) -> Path:
    """Return the preset's folder in the cache. Builds it if it is missing or was built from another recipe."""
    folder = CACHE / name
    preset = PRESETS[name]
    made_from = folder / _MADE_FROM
    if not made_from.exists() or made_from.read_text() != _recipe(preset, seed):
        print(f"building the {name!r} checkpoint ({preset.about})", flush=True)
        make_checkpoint(folder, preset, seed)
    return folder


def _recipe(preset: Preset, seed: int) -> str:
    return f"{preset}\nseed={seed}\nwords={' '.join(WORDS)}\n{TEMPLATE}\n"


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python -m bench.make_checkpoint", description=__doc__, formatter_class=raw)
    presets = "; ".join(f"{name}: {preset.about}" for name, preset in PRESETS.items())
    parser.add_argument("--preset", choices=PRESETS, default="bench", help=presets)
    parser.add_argument("--output", type=Path, help="folder (default: .cache/bench/PRESET)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    make_checkpoint(options.output or CACHE / options.preset, PRESETS[options.preset], options.seed)


if __name__ == "__main__":
    main()
