"""Train the shapes model: `python models/shapes/train.py --start FOLDER` makes the committed files.

FOLDER has version 1 of the model, whose language model and tokenizer this version starts with. The vision tower and the
projector start with random weights.

1. Pictures are drawn by two processes.
2. One process teaches the eye (`eye.py`); at the same time the other one teaches the language model on dialogues about
   pictures that it does not see: codes with noise (`codes.py`) replace the features of a trained eye.
3. Both processes train the whole model on pictures and dialogues, and average their gradients.
4. Both train the language model alone on what the finished eye sees, most of all on pictures with many or equal shapes.

The pictures take 7.5 GB on disk, and as much memory while the eye is taught.
`--folder` keeps them and a checkpoint of every ten minutes: the same command then continues a run that
was interrupted. Its random choices differ from those of a run in one piece.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoTokenizer, LlavaForConditionalGeneration, LlavaProcessor

from deploy.options import Parser
from models.shapes import attention, build
from models.shapes.codes import Codes
from models.shapes.descent import Descent, Team
from models.shapes.eye import Eye, Truth, first_weights
from models.shapes.pictures import Album, Pictures, scene_of, scene_of_row
from models.shapes.scenes import Pictured
from models.shapes.talk import Script, Voice, imagined

FOLDER = Path(__file__).resolve().parent
EYE, VOICE = "eye.pt", "voice.pt"  # what the second stage passes on to the third, in the run's folder
EYE_OF_BOTH, VOICE_OF_BOTH = "eye-of-both.pt", "voice-of-both.pt"  # what the third stage passes on to the fourth
TOKENIZER = "tokenizer_config.json"
SEEDS_PER_RUN = 1_000_000
SEEDS_PER_FILE = 2_000
IMAGINED_FROM = 500_000  # the language model's own seeds, in each run
SECONDS_BETWEEN_CHECKPOINTS = 600
TURNS, TURN_WEIGHTS = (1, 2, 3, 4, 6, 9), (1, 1, 1, 2, 4, 5)
# How often a picture is asked about, by its number of shapes: answers about few shapes are learned first.
SHARES_IMAGINED = (0.15, 0.3, 0.6, 1.0, 1.0, 1.0, 1.0)
WEIGHTS_SEEN = (0.7, 0.5, 0.8, 1.5, 1.5, 1.5, 1.5)
WEIGHTS_LISTED, WEIGHT_OF_EQUALS = (0.5, 0.4, 0.9, 1.4, 1.6, 1.8, 1.8), 3.0


@dataclass(frozen=True)
class Rate:
    """A rate of training as a share of the peak rates: constant at first, then straight down."""

    first: float
    last: float
    hold: float  # the share of the steps with the first rate
    warm_up: int = 60  # steps

    def at(self, step: int, steps: int) -> float:
        fallen = max(0.0, step / steps - self.hold) / (1 - self.hold)
        return min(1.0, (step + 1) / self.warm_up) * (self.first + (self.last - self.first) * fallen)


@dataclass(frozen=True)
class Plan:
    """How much work a run does: about two hours on two quiet cores."""

    files: int = 60
    eye_steps: int = 6_000
    eye_batch: int = 96
    eye_rate: Rate = Rate(first=1.0, last=0.05, hold=0.4)
    talk_steps: int = 6_000
    talk_turns: int = 112  # questions in a batch; the number of dialogues follows from their length
    talk_rate: Rate = Rate(first=0.5, last=0.05, hold=0.3)
    joint_steps: int = 2_000
    joint_pictures: int = 64  # in each process
    joint_turns: int = 60
    joint_rate: Rate = Rate(first=0.2, last=0.0, hold=0.0)
    list_steps: int = 800
    list_turns: int = 100
    list_rate: Rate = Rate(first=0.15, last=0.0, hold=0.0)

    def scaled(self, scale: float) -> Plan:
        """Return the plan of a shorter run."""
        return replace(
            self,
            files=max(2, int(self.files * scale)),
            eye_steps=max(2, int(self.eye_steps * scale)),
            talk_steps=max(2, int(self.talk_steps * scale)),
            joint_steps=max(2, int(self.joint_steps * scale)),
            list_steps=max(2, int(self.list_steps * scale)),
        )


@dataclass(frozen=True)
class Job:
    """What each process of a run knows: `folder` holds the pictures and what the stages pass on."""

    seed: int
    plan: Plan
    folder: Path
    start: Path
    out: Path
    meeting: Path  # a new file, by which the two processes of the third stage find each other

    @property
    def first_seed(self) -> int:
        return self.seed % 9 * SEEDS_PER_RUN  # far from the held-out seeds

    def codes(self) -> Codes:
        """Return the codes of the run."""
        return Codes(**torch.load(self.folder / "codes.pt"))


class Progress:
    """Counts the steps of one part of a run, and keeps a checkpoint of it in the run's folder."""

    def __init__(self, job: Job, name: str, steps: int, descent: Descent, keeps: bool = True) -> None:
        self.name, self.steps, self.descent, self.keeps = name, steps, descent, keeps
        self.path = job.folder / f"{name}.checkpoint"
        self.first = 0
        if self.path.exists():
            kept = torch.load(self.path)
            self.first = kept["step"]
            descent.load(kept)
        self._kept_at = time.monotonic()

    def bar(self, position: int = 0) -> tqdm:
        """Return the steps still to take, with a progress bar."""
        return tqdm(
            range(self.first, self.steps),
            initial=self.first,
            total=self.steps,
            desc=self.name,
            mininterval=5,
            position=position,
            disable=not self.keeps,
        )

    def taken(self, step: int) -> None:
        """Keep a checkpoint after `step` if it is time for one."""
        if self.keeps and time.monotonic() - self._kept_at > SECONDS_BETWEEN_CHECKPOINTS:
            whole_file(self.path, {"step": step + 1, **self.descent.state()})
            self._kept_at = time.monotonic()


def whole_file(path: Path, content: object) -> None:
    """Write a file that is either whole or absent."""
    torch.save(content, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


# --- stage 1: pictures -----------------------------------------------------------------------------------------------


def draw_pictures(rank: int, job: Job) -> None:
    """Draw every second file of pictures."""
    for number in tqdm(range(rank, job.plan.files, 2), desc="drawing", disable=rank != 0):
        path = job.folder / f"{number}.npz"
        if path.exists():
            continue
        start = job.first_seed + number * SEEDS_PER_FILE
        Pictures.of(range(start, start + SEEDS_PER_FILE)).save(path)


# --- stage 2: the eye and the language model, each on its own ---------------------------------------------------------


def teach_apart(rank: int, job: Job) -> None:
    """Teach the eye in process 0 and the language model in process 1."""
    torch.set_num_threads(1)
    (teach_eye if rank == 0 else teach_talk)(job)


def teach_eye(job: Job) -> None:
    if (job.folder / EYE).exists():
        return
    torch.manual_seed(job.seed)
    model, _ = new_model(job)
    eye = Eye(model)
    first_weights(eye)
    descent = Descent([eye], skip=eye.unused)
    album, codes = Album(job.folder), job.codes()
    progress = Progress(job, "the eye", job.plan.eye_steps, descent)
    rng = np.random.default_rng((job.seed, progress.first))
    bar = progress.bar()
    for step in bar:
        batch = album.batch(job.plan.eye_batch, rng)
        seen = eye(batch.normalized())
        loss, found = eye.loss(seen, Truth.of(batch), codes)
        descent.step(loss, job.plan.eye_rate.at(step, job.plan.eye_steps))
        progress.taken(step)
        if step % 20 == 0:
            bar.set_postfix_str(f"loss {loss.item():.3f}, centres {found:.3f}")
    descent.finish()
    whole_file(job.folder / EYE, eye.state_dict())


def teach_talk(job: Job) -> None:
    if (job.folder / VOICE).exists():
        return
    torch.manual_seed(job.seed + 1)
    model, processor = new_model(job)
    voice, script = Voice(model), Script(processor.tokenizer)
    voice.load_state_dict(
        Voice(AutoModelForImageTextToText.from_pretrained(job.start, dtype=torch.float32)).state_dict()
    )
    descent = Descent([voice])
    codes = job.codes()
    steps = job.plan.talk_steps
    progress = Progress(job, "the language model", steps, descent)
    rng = random.Random(1_000_000 * job.seed + progress.first)
    noise = np.random.default_rng((job.seed, progress.first))
    next_seed = job.first_seed + IMAGINED_FROM + progress.first * job.plan.talk_turns // 3
    bar = progress.bar(position=1)
    for step in bar:
        turns = rng.choices(TURNS, TURN_WEIGHTS)[0]
        scenes: list[Pictured] = []
        while len(scenes) < max(2, job.plan.talk_turns // max(3, turns)):
            scene = scene_of(next_seed)
            next_seed += 1
            if rng.random() < SHARES_IMAGINED[len(scene.objects)]:
                scenes.append(scene)
        features = imagined(scenes, codes, noise) * codes.scale
        loss, right = voice.loss(script.batch(scenes, turns, rng), features)
        descent.step(loss, job.plan.talk_rate.at(step, steps))
        progress.taken(step)
        if step % 20 == 0:
            bar.set_postfix_str(f"loss {loss.item():.4f}, answer tokens right {right:.4f}")
    descent.finish()
    whole_file(job.folder / VOICE, voice.state_dict())


# --- stage 3: both ---------------------------------------------------------------------------------------------------


def teach_both(rank: int, job: Job) -> None:
    """Train the whole model in both processes; process 0 keeps it."""
    if (job.folder / VOICE_OF_BOTH).exists():
        return
    team = _team(rank, job)
    model, processor = new_model(job)
    eye, voice, script = Eye(model), Voice(model), Script(processor.tokenizer)
    eye.load_state_dict(torch.load(job.folder / EYE))
    voice.load_state_dict(torch.load(job.folder / VOICE))
    descent = Descent([eye, voice], skip=eye.unused, team=team)
    album, codes = Album(job.folder, part=rank, parts=2), job.codes()
    steps = job.plan.joint_steps
    progress = Progress(job, "both", steps, descent, keeps=rank == 0)
    rng = random.Random(1_000_000 * job.seed + 2 * progress.first + rank)
    picks = np.random.default_rng((job.seed, progress.first, rank))
    bar = progress.bar()
    for step in bar:
        batch = album.batch(job.plan.joint_pictures, picks)
        seen = eye(batch.normalized())
        loss, found = eye.loss(seen, Truth.of(batch), codes)
        turns = (6, 8, 4, 2, 6, 8)[step % 6]
        rows = _rows_to_ask_about(batch, max(2, job.plan.joint_turns // turns), rng)
        scenes = [scene_of_row(batch.shapes[row]) for row in rows]
        spoken, right = voice.loss(script.batch(scenes, turns, rng), seen[0][rows] * codes.scale)
        descent.step(loss + spoken, job.plan.joint_rate.at(step, steps))
        progress.taken(step)
        if step % 20 == 0:
            bar.set_postfix_str(f"centres {found:.4f}, answer tokens right {right:.4f}")
    descent.finish()
    if rank == 0:
        whole_file(job.folder / EYE_OF_BOTH, eye.state_dict())
        whole_file(job.folder / VOICE_OF_BOTH, voice.state_dict())
    dist.barrier()
    dist.destroy_process_group()


def _team(rank: int, job: Job) -> Team:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{job.meeting}", rank=rank, world_size=2)
    return Team(rank, 2)


def _rows_to_ask_about(batch: Pictures, count: int, rng: random.Random) -> list[int]:
    """Return different rows of the batch, drawn with WEIGHTS_SEEN."""
    numbers = (batch.shapes[..., 0] >= 0).sum(-1)
    return weighted([WEIGHTS_SEEN[number] for number in numbers], count, rng)


def weighted(weights: list[float], count: int, rng: random.Random) -> list[int]:
    """Return `count` different indices, drawn with `weights`."""
    keys = [rng.random() ** (1 / weight) for weight in weights]
    return sorted(range(len(keys)), key=lambda row: keys[row])[-count:]


# --- stage 4: lists --------------------------------------------------------------------------------------------------


def teach_lists(rank: int, job: Job) -> None:
    """Train the language model in both processes on the features of the finished eye; process 0 saves the model."""
    team = _team(rank, job)
    model, processor = new_model(job)
    eye, voice, script = Eye(model), Voice(model), Script(processor.tokenizer)
    eye.load_state_dict(torch.load(job.folder / EYE_OF_BOTH))
    voice.load_state_dict(torch.load(job.folder / VOICE_OF_BOTH))
    eye.bfloat16()
    descent = Descent([voice], team=team)
    album, codes = Album(job.folder, part=rank, parts=2), job.codes()
    steps = job.plan.list_steps
    progress = Progress(job, "lists", steps, descent, keeps=rank == 0)
    rng = random.Random(1_000_000 * job.seed + 2 * progress.first + rank)
    picks = np.random.default_rng((job.seed, progress.first, rank))
    for step in progress.bar():
        turns = (6, 4, 2, 8, 3, 6)[step % 6]
        batch = album.batch(256, picks)
        weights = [weight_in_lists(shapes) for shapes in batch.shapes]
        batch = batch.picked(np.array(weighted(weights, max(2, job.plan.list_turns // turns), rng)), turn=0)
        with torch.no_grad():
            features, _ = eye(batch.normalized())
        scenes = [scene_of_row(shapes) for shapes in batch.shapes]
        loss, _ = voice.loss(script.batch(scenes, turns, rng), features * codes.scale)
        descent.step(loss, job.plan.list_rate.at(step, steps))
        progress.taken(step)
    descent.finish()
    if rank == 0:
        model.float()
        eye.load_state_dict(torch.load(job.folder / EYE_OF_BOTH))  # in float32
        eye.scale_features(codes.scale)
        save(model, processor, job)
    dist.barrier()
    dist.destroy_process_group()


def weight_in_lists(shapes: np.ndarray) -> float:
    names = [(kind, colour) for kind, colour, _, _ in shapes.tolist() if kind >= 0]
    return WEIGHTS_LISTED[len(names)] * (WEIGHT_OF_EQUALS if len(set(names)) < len(names) else 1.0)


# --- a run -----------------------------------------------------------------------------------------------------------


def new_model(job: Job) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Return a model with random weights, and the processor of the run."""
    processor = LlavaProcessor.from_pretrained(job.folder)
    model = build.make_model(processor.tokenizer)
    model.model.vision_tower.config._attn_implementation = attention.NAME
    model.model.language_model.config._attn_implementation = attention.NAME
    return model.train(), processor


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, job: Job) -> None:
    """Save weights in float16, and everything else that `from_pretrained` needs."""
    model.half().eval().save_pretrained(job.out)
    processor.save_pretrained(job.out)
    shutil.copy(job.start / TOKENIZER, job.out / TOKENIZER)  # transformers adds how it was loaded


def run(job: Job) -> None:
    """Run all stages, each in two processes with one thread."""
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive", TOKENIZERS_PARALLELISM="false")
    processor = build.make_processor(AutoTokenizer.from_pretrained(job.start))
    Script(processor.tokenizer).check(processor)
    processor.save_pretrained(job.folder)
    torch.save(vars(Codes.of_version_1(job.start)), job.folder / "codes.pt")
    started = time.perf_counter()
    for number, stage in enumerate((draw_pictures, teach_apart, teach_both, teach_lists)):
        job = replace(job, meeting=job.meeting.with_name(f"meeting-{number}"))
        mp.start_processes(stage, (job,), nprocs=2, start_method="spawn")
        print(f"{stage.__name__}: done after {(time.perf_counter() - started) / 60:.1f} min")


def main() -> None:
    parser = Parser(prog="models/shapes/train.py", description="Train the demo model with its committed recipe.")
    parser.add_argument("--seed", type=int, default=0, help="fixes pictures, dialogues and first weights (default 0)")
    parser.add_argument("--start", type=Path, required=True, help="folder of version 1 of this model")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder for the model (default: models/shapes)")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full work; 0.01 is a smoke test")
    parser.add_argument("--folder", type=Path, help="keep pictures and checkpoints here, and continue from them")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        plan = Plan().scaled(options.scale)
        run(Job(options.seed, plan, folder, options.start, options.out, Path(temporary) / "meeting"))


if __name__ == "__main__":
    main()
