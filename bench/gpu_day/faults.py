"""Section "faults": the device runs out of memory, and a kernel fails so that the device is lost to its process."""

from __future__ import annotations

import logging
import random
from dataclasses import replace
from typing import Any

import torch

from llava_sessions.engine.budget import DeviceBudget
from llava_sessions.ipc.messages import TurnFailed

from .day import Day, Findings
from .engines import Driver, engine_of, load
from .models import LLAVA, TINY

_ROOM_BYTES = 2**30  # for the caches of the shortage
_ANSWER_TOKENS = 8


def run(day: Day, found: Findings) -> None:
    """Run both faults, in processes of their own."""
    from . import children  # it imports this module

    day.release()
    result, status = children.run(day, "shortage")
    found.results["shortage"] = result
    found.check("shortage: the process ended without an error", status == 0)
    settled = result["answered"] + result["refused"]
    found.check("shortage: every turn was answered or rejected", settled == result["turns"])
    found.check("shortage: the answers are those with enough memory", result["wrong"] == 0)
    if day.on_cuda and not day.smoke:
        found.check("shortage: memory ran out", result["failed_allocations"] > 0)
    day.say(f"shortage: {result}")
    result, status = children.run(day, "lost")
    found.results["lost"] = result | {"status": status}
    found.check(
        "lost: the turn failed, or on a GPU the engine", bool(result["error"]) and result["raised"] == day.on_cuda
    )
    first, second = _conversation(day, result["prompts"])
    found.check("lost: another process rebuilds the conversation", [first, second] == result["answers"])
    day.say(f"lost: {result['error']}")


def shortage(day: Day) -> dict[str, Any]:
    """Ask many sessions with a budget of more memory than the process may take; compare with enough memory."""
    shape = replace(day.pick(LLAVA, TINY), layers=2)
    model, template = load(day, shape, torch.float32)
    count = day.pick(60, 4)
    order = random.Random(0)
    prompts = [[order.randrange(300, shape.vocabulary) for _ in range(day.pick(600, 20))] for _ in range(count)]

    def answers(names: list[str], driver: Driver) -> dict[str, list[list[int]]]:
        for name, prompt in zip(names, prompts, strict=True):
            driver.open(name)
            driver.ask(name, prompt, _ANSWER_TOKENS)
        driver.run()
        return dict(driver.answers)

    names = [f"chat{number}" for number in range(count)]
    enough = Driver(engine_of(model, template, 512), shape.vocabulary)
    expected = answers(names, enough)
    enough.close(names)
    day.release()
    if day.on_cuda:
        total = torch.cuda.get_device_properties(day.device).total_memory
        allowed = torch.cuda.memory_allocated(day.device) + _ROOM_BYTES
        torch.cuda.set_per_process_memory_fraction(allowed / total, day.device)
    short = Driver(engine_of(model, template, 512, DeviceBudget(2**40, 2**31)), shape.vocabulary)
    found = answers(names, short)
    answered = [name for name in names if found[name]]
    stats = torch.cuda.memory_stats(day.device) if day.on_cuda else {}
    return {
        "turns": count,
        "answered": len(answered),
        "refused": short.refused,
        "wrong": sum(found[name] != expected[name] for name in answered),
        "failed_allocations": int(stats.get("num_ooms", 0)),
        "offloads": short.engine.memory().offloads,
    }


def lost(day: Day) -> dict[str, Any]:
    """Answer two questions, then run a token that the model does not have. On a GPU the device is lost by that."""
    order = random.Random(0)
    shape = TINY
    prompts = [[order.randrange(300, shape.vocabulary) for _ in range(count)] for count in (20, 5)]
    model, template = load(day, shape, torch.float32)
    driver = Driver(engine_of(model, template), shape.vocabulary)
    driver.open("chat")
    for prompt in prompts:
        driver.ask("chat", prompt, _ANSWER_TOKENS)
        driver.run()
    result: dict[str, Any] = {"prompts": prompts, "answers": driver.answers["chat"], "raised": False, "error": ""}
    driver.ask("chat", [10 * shape.vocabulary], 1)
    logging.getLogger("llava_sessions").setLevel(logging.CRITICAL)  # the engine logs the error that is meant
    try:
        while driver.engine.has_work:
            failed = [event for event in driver.engine.step() if isinstance(event, TurnFailed)]
            if failed:  # on a CPU the turn fails, not the engine
                result["error"] = failed[-1].error[:200]
    except Exception as error:
        result |= {"raised": True, "error": f"{type(error).__name__}: {error}"[:200]}
    finally:
        logging.getLogger("llava_sessions").setLevel(logging.NOTSET)
    return result


def _conversation(day: Day, prompts: list[list[int]]) -> list[list[int]]:
    """Return the answers of an engine in this process to a conversation."""
    model, template = load(day, TINY, torch.float32)
    driver = Driver(engine_of(model, template), TINY.vocabulary)
    driver.open("chat")
    for prompt in prompts:
        driver.ask("chat", prompt, _ANSWER_TOKENS)
        driver.run()
    return driver.answers["chat"]
