"""Trains the shapes model from nothing: `python models/shapes/train.py` makes the committed weights.

Owns: the recipe (stages, steps, rates, mix) and saving. Must not know: pixels, truths, or any held-out seed.

Stage 1 teaches the eye (vision tower and projector): each image token must tell kind, colour and place of its own cell
through three linear heads, which are dropped. Stage 2 freezes the eye, keeps every picture's features and teaches the
language model on dialogues; the loss is on answers and </s> only. Two processes with one thread each average their
gradients, which was much steadier on shared cores than one process with two threads.
"""

from __future__ import annotations

import copy
import io
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

from deploy.options import Parser
from models.shapes import build
from models.shapes.scenes import COLOURS, HELD_OUT_SEEDS, KINDS, PLACES, Question, Scene, dialogue, make_scene

FOLDER = Path(__file__).resolve().parent
SEEDS_PER_RUN, SEEDS_PER_PROCESS = 1_000_000, 250_000
ADAMW_RATE, MUON_RATE = 2e-3, 3e-3  # Muon at 8e-3 learns fast for 200 steps and then no more
IGNORED = -100  # torch's mark for positions outside the loss

# The question types that were last to be learnt are asked more often.
MIX = {
    "check": 1.6,
    "where": 1.5,
    "then_where": 1.5,
    "then_else": 1.5,
    "colour": 1.4,
    "at": 1.4,
    "exists": 1.2,
    "then_check": 1.2,
    "then_count": 1.2,
    "count": 0.6,
}
TURNS = (1, 2, 3, 4, 5, 6, 10)
TURN_WEIGHTS = (2, 2, 3, 3, 3, 3, 0.6)
SYSTEM_PROMPTS = (
    "Answer in one short sentence.",
    "You are a helpful assistant.",
    "You answer questions about pictures of shapes.",
    "Be brief and truthful.",
    (
        "A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions."
    ),
)


@dataclass(frozen=True)
class Plan:
    """How much work a run does, for each process."""

    pictures: int = 16_000
    eye_steps: int = 1_000
    eye_batch: int = 64
    talk_steps: int = 4_000
    talk_turns: int = 64  # questions in a batch; the number of dialogues follows from their length
    peek_steps: int = 500  # between two saves of the unfinished model

    def scaled(self, scale: float) -> Plan:
        return Plan(
            pictures=max(64, int(self.pictures * min(1.0, scale * 2))),
            eye_steps=max(2, int(self.eye_steps * min(1.0, scale * 4))),  # cheap, and useless when half trained
            talk_steps=max(2, int(self.talk_steps * scale)),
        )


@dataclass(frozen=True)
class Team:
    """The processes that train one model together."""

    rank: int
    size: int

    def average(self, grads: list[Tensor]) -> None:
        """Replaces each gradient by its mean over the processes."""
        if self.size == 1:
            return
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        flat /= self.size
        for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(mean.view_as(grad))

    def progress(self, steps: int, title: str) -> tqdm:
        return tqdm(range(steps), desc=title, disable=self.rank != 0, mininterval=2.0)


class Descent:
    """Muon on matrices, AdamW on the rest; a warm-up, then straight down to zero; gradients averaged over the team."""

    def __init__(self, parameters: list[nn.Parameter], matrices: list[nn.Parameter], steps: int, team: Team) -> None:
        self.parameters, self.steps, self.team, self.done = [*matrices, *parameters], steps, team, 0
        self.optimizers = [torch.optim.AdamW(parameters, lr=ADAMW_RATE, betas=(0.9, 0.98), weight_decay=0.01)]
        if matrices:
            muon = torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
            self.optimizers.append(muon)
        self.peaks = [optimizer.param_groups[0]["lr"] for optimizer in self.optimizers]

    def step(self, loss: Tensor) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        loss.backward()
        self.team.average([parameter.grad for parameter in self.parameters if parameter.grad is not None])
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        warm_up = min(1.0, (self.done + 1) / (0.02 * self.steps + 1))
        share = warm_up * (1 - self.done / self.steps)
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * share
            optimizer.step()
        self.done += 1


# --- pictures --------------------------------------------------------------------------------------------------------


def training_scenes(first_seed: int, count: int, crowded: bool) -> list[Scene]:
    """Scenes of consecutive seeds; `crowded` ones hold up to nine shapes, so that the eye sees more of them at once."""
    seeds = range(first_seed, first_seed + count)
    assert seeds.stop <= HELD_OUT_SEEDS.start, "a training seed may not be a held-out seed"
    return [make_scene(seed, 3 + seed % 7 if crowded else None) for seed in seeds]


def draw_small(scene: Scene, rng: random.Random) -> Image.Image:
    """The picture as the processor will hand it over, after one of the sizes and formats people send."""
    picture = scene.draw(rng.choice((112, 144, 144, 224, 336)))
    if rng.random() < 0.3:
        coded = io.BytesIO()
        picture.save(coded, "JPEG", quality=rng.randint(60, 95))
        picture = Image.open(coded)
    return picture.resize((build.IMAGE_PX, build.IMAGE_PX), Image.Resampling.BICUBIC)


def draw_all(scenes: list[Scene], seed: int, team: Team, title: str) -> Tensor:
    """All pictures as bytes, [pictures, 3, 72, 72]."""
    rng = random.Random(seed)
    pixels = torch.empty(len(scenes), 3, build.IMAGE_PX, build.IMAGE_PX, dtype=torch.uint8)
    for row in team.progress(len(scenes), title):
        raw = torch.frombuffer(bytearray(draw_small(scenes[row], rng).tobytes()), dtype=torch.uint8)
        pixels[row] = raw.view(build.IMAGE_PX, build.IMAGE_PX, 3).permute(2, 0, 1)
    return pixels


def normalised(pixels: Tensor, processor: LlavaProcessor) -> Tensor:
    """Bytes to the model's input, as the image processor does it."""
    mean = torch.tensor(processor.image_processor.image_mean).view(3, 1, 1)
    spread = torch.tensor(processor.image_processor.image_std).view(3, 1, 1)
    return (pixels.float() / 255 - mean) / spread


# --- stage 1: the eye ------------------------------------------------------------------------------------------------


def cell_truths(scenes: list[Scene]) -> Tensor:
    """[pictures, 9, 3]: kind (last number: empty), colour (last number: empty) and place of every cell."""
    truths = torch.tensor([len(KINDS), len(COLOURS), 0]).repeat(len(scenes), build.IMAGE_TOKENS, 1)
    truths[:, :, 2] = torch.arange(build.IMAGE_TOKENS)
    for row, scene in enumerate(scenes):
        for shape in scene.objects:
            cell = PLACES.index(shape.place)
            truths[row, cell, 0], truths[row, cell, 1] = KINDS.index(shape.kind), COLOURS.index(shape.colour)
    return truths


def see(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Projected features, [pictures, 9, text width]."""
    return torch.stack(list(model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output))


def teach_eye(
    model: LlavaForConditionalGeneration,
    pixels: Tensor,
    truths: Tensor,
    processor: LlavaProcessor,
    plan: Plan,
    team: Team,
) -> None:
    """Trains vision tower and projector through linear heads on every image token."""
    sizes = (len(KINDS) + 1, len(COLOURS) + 1, len(PLACES))
    heads = nn.ModuleList(nn.Linear(model.config.text_config.hidden_size, size) for size in sizes)
    parameters = [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]
    descent = Descent([*parameters, *heads.parameters()], [], plan.eye_steps, team)
    picks = torch.Generator().manual_seed(team.rank)
    bar = team.progress(plan.eye_steps, "stage 1: the eye")
    for step in bar:
        rows = torch.randint(len(pixels), (plan.eye_batch,), generator=picks)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = see(model, normalised(pixels[rows], processor))
            guesses = [head(features).float() for head in heads]
        truth = truths[rows]
        loss = sum(F.cross_entropy(guess.flatten(0, 1), truth[..., i].flatten()) for i, guess in enumerate(guesses))
        descent.step(loss)
        if step % 20 == 0:
            right = [(guess.argmax(-1) == truth[..., i]).float().mean() for i, guess in enumerate(guesses)]
            bar.set_postfix_str(f"loss {loss:.4f}, kind {right[0]:.4f}, colour {right[1]:.4f}, place {right[2]:.4f}")


@torch.no_grad()
def cached_features(
    model: LlavaForConditionalGeneration, pixels: Tensor, processor: LlavaProcessor, team: Team
) -> Tensor:
    """Features of all pictures, brought to the spread of word embeddings first (by scaling the projector)."""
    embeddings = model.get_input_embeddings().weight
    sample = see(model, normalised(pixels[:1024], processor))
    ratio = embeddings.std() / sample.std()
    team.average([ratio])
    last = model.model.multi_modal_projector.linear_2
    last.weight.mul_(ratio)
    last.bias.mul_(ratio)
    return torch.cat([see(model, normalised(chunk, processor)).half() for chunk in pixels.split(256)])


# --- stage 2: the language model -------------------------------------------------------------------------------------


class Script:
    """Writes dialogues down as token ids, piece by piece, exactly as the processor tokenizes their rendered text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.image = [tokenizer.convert_tokens_to_ids(build.IMAGE)] * build.IMAGE_TOKENS
        self._known: dict[str, tuple[int, ...]] = {}

    def encode(self, text: str) -> tuple[int, ...]:
        """The token ids of a piece of text; the pieces come back often, so they are remembered."""
        if text not in self._known:
            self._known[text] = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return self._known[text]

    def turn(self, number: int, question: Question) -> tuple[list[int], list[int]]:
        """Token ids of one question and of its answer; the picture comes with the first question."""
        if number == 0:
            asked = [*self.encode("USER: "), *self.image, *self.encode(f"\n{question.text} ASSISTANT:")]
        else:
            asked = [*self.encode("USER:"), *self.encode(f" {question.text} ASSISTANT:")]
        return asked, [*self.encode(f" {question.answer}"), self.tokenizer.eos_token_id]

    def dialogue(self, scene: Scene, turns: int, rng: random.Random) -> tuple[list[int], list[int]]:
        """Token ids and targets of one random dialogue; targets are IGNORED outside of answers."""
        ids = [] if rng.random() < 0.05 else [self.tokenizer.bos_token_id]  # hand-written prompts often lack <s>
        if rng.random() < 0.15:
            ids += self.encode(rng.choice(SYSTEM_PROMPTS) + " ")
        targets = [IGNORED] * len(ids)
        for number, question in enumerate(dialogue(scene, rng.getrandbits(48), turns, hasty=0.25, weights=MIX)):
            asked, answered = self.turn(number, question)
            ids += asked + answered
            targets += [IGNORED] * len(asked) + answered
        return ids, targets

    def check(self, processor: LlavaProcessor) -> None:
        """Fails if chat template and processor would write a dialogue in another way than `dialogue` does."""
        scene = make_scene(0)
        ids, messages = [self.tokenizer.bos_token_id], []
        for number, question in enumerate(dialogue(scene, 0, 4, hasty=0.5)):
            asked, answered = self.turn(number, question)
            ids += asked + answered
            image = [{"type": "image"}] if number == 0 else []
            messages.append({"role": "user", "content": [*image, {"type": "text", "text": question.text}]})
            messages.append({"role": "assistant", "content": question.answer})
        rendered = processor.apply_chat_template(messages)
        wanted = processor(text=rendered, images=scene.draw(), return_tensors="pt")["input_ids"][0].tolist()
        if ids != wanted:
            raise RuntimeError(f"training writes {ids}, the chat template {wanted}")


def padded(rows: list[list[int]], fill: int) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])


def talk_loss(
    model: LlavaForConditionalGeneration, ids: Tensor, targets: Tensor, features: Tensor
) -> tuple[Tensor, Tensor]:
    """The mean loss over answer tokens, and the share of them guessed right."""
    embedded = model.get_input_embeddings()(ids)
    images = (ids == model.config.image_token_id).unsqueeze(-1)
    embedded = embedded.masked_scatter(images, features.to(embedded.dtype))
    hidden = model.model.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
    wanted = targets[:, 1:] != IGNORED  # padding is on the right, where causal attention cannot see it
    logits = model.lm_head(hidden[:, :-1][wanted]).float()
    truth = targets[:, 1:][wanted]
    return F.cross_entropy(logits, truth), (logits.argmax(-1) == truth).float().mean()


def teach_talk(
    model: LlavaForConditionalGeneration,
    scenes: list[Scene],
    features: Tensor,
    script: Script,
    plan: Plan,
    team: Team,
    peek: Callable[[], None] | None,
) -> None:
    """Trains the language model on dialogues; few shapes and short dialogues come first."""
    layers = list(model.model.language_model.layers.parameters())
    matrices = [parameter for parameter in layers if parameter.ndim == 2]
    others = [parameter for parameter in layers if parameter.ndim != 2]
    others += [*model.get_input_embeddings().parameters(), *model.model.language_model.norm.parameters()]
    descent = Descent([*others, *model.lm_head.parameters()], matrices, plan.talk_steps, team)
    by_count = [[row for row, scene in enumerate(scenes) if len(scene.objects) <= most] for most in range(5)]
    rng, shared = random.Random(1 + team.rank), random.Random(0)  # `shared` runs alike in all processes
    bar = team.progress(plan.talk_steps, "stage 2: the language model")
    for step in bar:
        done = step / plan.talk_steps
        most_shapes = 2 if done < 0.02 else 3 if done < 0.04 else 4
        turns = shared.choices(TURNS, TURN_WEIGHTS)[0] if done > 0.02 else shared.choice((1, 2, 3))
        rows = rng.choices(by_count[most_shapes], k=max(1, plan.talk_turns // turns))
        written = [script.dialogue(scenes[row], turns, rng) for row in rows]
        ids = padded([ids for ids, _ in written], script.tokenizer.pad_token_id)
        targets = padded([targets for _, targets in written], IGNORED)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, right = talk_loss(model, ids, targets, features[rows])
        descent.step(loss)
        if step % 10 == 0:
            bar.set_postfix_str(f"loss {loss:.4f}, answer tokens right {right:.4f}")
        if peek and step and step % plan.peek_steps == 0:
            peek()


# --- a run -----------------------------------------------------------------------------------------------------------


def corpus_for_tokenizer(first_seed: int) -> list[str]:
    dialogues = [dialogue(make_scene(seed), seed, 4, hasty=0.4) for seed in range(first_seed, first_seed + 4_000)]
    lines = [f"USER: {turn.text} ASSISTANT: {turn.answer}" for turns in dialogues for turn in turns]
    return lines + list(SYSTEM_PROMPTS) * 2


def work(rank: int, processes: int, meeting_point: str, seed: int, scale: float, out: Path, peek: Path | None) -> None:
    """One process's whole run; rank 0 reports and saves."""
    torch.set_num_threads(1)
    if processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=processes)
    team, plan, started = Team(rank, processes), Plan().scaled(scale), time.perf_counter()
    first_seed = seed % 10 * SEEDS_PER_RUN
    tokenizer = build.make_tokenizer(corpus_for_tokenizer(first_seed))
    processor = build.make_processor(tokenizer)
    script = Script(tokenizer)
    script.check(processor)
    torch.manual_seed(seed)  # the same first weights in every process
    model = build.make_model(tokenizer).train()

    own_seeds = first_seed + rank * SEEDS_PER_PROCESS
    scenes = training_scenes(own_seeds, plan.pictures, crowded=False)
    crowd = training_scenes(own_seeds + plan.pictures, plan.pictures // 2, crowded=True)
    pixels = draw_all(scenes + crowd, own_seeds, team, "drawing")
    teach_eye(model, pixels, cell_truths(scenes + crowd), processor, plan, team)
    features = cached_features(model, pixels[: len(scenes)], processor, team)
    del pixels
    peeking = (lambda: save(copy.deepcopy(model), processor, peek)) if peek and rank == 0 else None
    teach_talk(model, scenes, features, script, plan, team, peeking)
    if rank == 0:
        save(model, processor, out)
        print(f"trained in {(time.perf_counter() - started) / 60:.1f} min; saved to {out}")
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, out: Path) -> None:
    """Weights in float16, and everything `from_pretrained` wants beside them."""
    model.half().eval().save_pretrained(out)
    processor.save_pretrained(out)


def main() -> None:
    parser = Parser(
        prog="models/shapes/train.py", description="Train the demo model from nothing, with its committed recipe."
    )
    parser.add_argument("--seed", type=int, default=0, help="fixes pictures, dialogues and first weights (default 0)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the model (default: beside this file)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full work; 0.01 is a smoke test")
    parser.add_argument("--peek", type=Path, help="folder for the unfinished model, saved every 500 steps of stage 2")
    parser.add_argument("--processes", type=int, default=2, help="processes of one thread each (default 2)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        job = (options.processes, f"{folder}/meeting", options.seed, options.scale, options.out, options.peek)
        mp.start_processes(work, job, nprocs=options.processes, start_method="spawn")


if __name__ == "__main__":
    main()
