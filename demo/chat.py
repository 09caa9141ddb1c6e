"""`make demo`: pack, serve, chat about a new picture, compare each turn with a stateless server, stop.

The stateless server is transformers' own `generate` on the whole conversation, in this process.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# Two processes share the cores, so that a waiting thread must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import httpx
from PIL import Image

from deploy.options import Parser, whole_number
from deploy.serve.processes import ServeError
from deploy.serve.torchserve import TorchServe
from llava_sessions_client import Chat, ClientError, Endpoint
from models.shapes.scenes import HELD_OUT_SEEDS, Question, Scene, dialogue, make_scene

from .recorded import recorded_plot
from .served import wait_for_metrics
from .turn import TurnResult

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models" / "shapes"
RECORD = ROOT / "bench" / "results" / "turns-float32.json"
PICTURES = ROOT / "demo" / "pictures"
TURNS = 5
SMALL = """\
  The demo model is too small to show it: its picture is 81 tokens, so that HTTP and Python take most of a turn (compare
  the engine's part of each TTFT above). A picture of LLaVA-1.5 is 576 tokens. A stateless server encodes it again and
  prefills it again in each turn.
"""
MAX_NEW_TOKENS = 64


class DemoError(Exception):
    """A step of the demo has a wrong result."""


def main() -> int:
    """Run the demo. Return 0 if every step succeeded."""
    options = parse_args()
    began = time.monotonic()
    try:
        run(options.seed)
    except (DemoError, ServeError, ClientError, httpx.HTTPError, subprocess.CalledProcessError) as error:
        print(f"\nthe demo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    print(f"every step succeeded, in {time.monotonic() - began:.0f} s")
    return 0


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options. The default seed is chosen by the clock."""
    first = HELD_OUT_SEEDS[0]
    last = HELD_OUT_SEEDS[-1]
    parser = Parser(
        prog="python -m demo.chat",
        description="Pack the demo model, serve it, hold a five-turn chat about a new picture, and compare each answer "
        "with transformers' own generate(). `make demo` runs this command.",
    )
    seed = f"of the picture, from {first} to {last}: training never used these (default: chosen by the clock)"
    parser.add_argument("--seed", type=whole_number(first, last), metavar="N", help=seed)
    options = parser.parse_args(argv)
    if options.seed is None:
        options.seed = HELD_OUT_SEEDS[time.time_ns() // 1_000_000 % len(HELD_OUT_SEEDS)]
    return options


def run(seed: int) -> None:
    """Pack, serve, chat, stop. Raise `DemoError`."""
    step("packing models/shapes with build_mar.sh")
    store = ROOT / "model_store" / "demo"  # not that of a server that runs here
    words = ["--model", MODEL, "--dtype", "float32", "--output", store]
    subprocess.run([ROOT / "build_mar.sh", *map(str, words)], check=True, stdout=subprocess.DEVNULL)
    step("starting TorchServe")
    server = TorchServe(store)
    try:
        server.start()
        ready_s = server.wait_ready()
        print(f"  ready in {ready_s:.1f} s on {server.url} (java {server.pid}, worker {server.worker_pids()[0]})")
        with Endpoint(server.url) as endpoint:
            show_chat(server, endpoint, seed)
    finally:
        step("stopping TorchServe")
        server.stop()


def show_chat(server: TorchServe, endpoint: Endpoint, seed: int) -> None:
    """Open a session, chat, close it. Print its device memory before, during and after. Raise `DemoError`."""
    scene = make_scene(seed)
    picture = scene.draw()
    PICTURES.mkdir(exist_ok=True)
    path = PICTURES / f"{seed}.png"
    picture.save(path)
    step(f"a new picture, SEED={seed}: {path.relative_to(ROOT)}")
    held_before = session_bytes(server, llava_open_sessions=0, llava_kv_bytes=0)
    began = time.perf_counter()
    chat = endpoint.open(picture)
    print(
        f"  open   {(time.perf_counter() - began) * 1e3:6.1f} ms   session {chat.session_id}, until {chat.expires_at}"
    )
    talk(chat, scene, picture, dialogue(scene, seed, TURNS))
    held_open = session_bytes(server, llava_open_sessions=1, llava_turns_total=TURNS)
    chat.close()
    held_after = session_bytes(server, llava_open_sessions=0, llava_kv_bytes=0)
    step("device memory of sessions (features and KV cache), from the server's metrics")
    print(f"  before open {held_before:,} bytes, while open {held_open:,}, after close {held_after:,}")
    if not held_before == held_after < held_open:
        raise DemoError("closing the session did not free its memory")


def talk(chat: Chat, scene: Scene, picture: Image.Image, questions: list[Question]) -> None:
    """Ask each question of the server and of a stateless server. Raise `DemoError` if their answers differ."""
    from .stateless import Stateless  # here, so that --help and a wrong option need no torch

    Stateless(MODEL, MAX_NEW_TOKENS).ask(picture, "warm up")  # the first call is slower and belongs to no turn
    stateless = Stateless(MODEL, MAX_NEW_TOKENS)
    step("the chat: each turn from the server, then from a stateless generate()")
    right = 0
    for number, question in enumerate(questions, 1):
        print(f"\n  {number}. {question.text}\n     ", end="", flush=True)
        served = stream(chat, question.text)
        right += served.text == question.answer
        verdict = "right" if served.text == question.answer else "WRONG"
        print(f"\n     truth: {question.answer}  ({verdict})")
        again = stateless.ask(picture, question.text)
        engine = f"the engine's part of the TTFT is {served.engine_ms:.1f} ms"
        print(f"     sessions   TTFT {served.ttft_ms:6.1f} ms   total {served.total_ms:6.1f} ms   ({engine})")
        print(f"     stateless  TTFT {again.ttft_ms:6.1f} ms   total {again.total_ms:6.1f} ms")
        if again.text != served.text:
            raise DemoError(f"the answer must be that of generate(), {again.text!r}, got {served.text!r}")
    print(f"\n  {right} of {len(questions)} answers are right; all are the same as from generate().")
    step("what sessions save, recorded with a larger model")
    print(SMALL)
    print(recorded_plot(RECORD))


def stream(chat: Chat, text: str) -> TurnResult:
    """Ask a question and print the streamed answer."""
    pieces = chat.stream(text, max_new_tokens=MAX_NEW_TOKENS)
    for piece in pieces:
        print(piece, end="", flush=True)
    answer = pieces.answer
    return TurnResult(answer.text, answer.ttft_s * 1e3, answer.total_s * 1e3, answer.timings.ttft_ms)


def session_bytes(server: TorchServe, **expected: float) -> int:
    """Return the bytes of sessions on the device, after the metrics have the `expected` values."""
    metrics = wait_for_metrics(server.metrics_url, **expected)
    return int(metrics["llava_features_bytes"] + metrics["llava_kv_bytes"])


def step(text: str) -> None:
    """Print a heading."""
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
