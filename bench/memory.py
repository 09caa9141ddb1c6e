"""Sessions beyond what the memory budget holds: where they lie, what they take there, and what it costs to come back.

Two parts. *Tiers*: sessions with different pictures are opened until the device's budget is full, then the host's, then
further; then one resident, one parked and one cold session at a time is asked for one token. *Many* (on the tiny model
unless `--many-preset` says otherwise): 500 open sessions under a budget whose device part holds 20 and whose host part
holds 20; everyone asks twice, in an order that always finds its session gone cold or parked. Every answer is compared
with that of a fresh session with room for itself, and the memory of the process is watched.
"""

from __future__ import annotations

import argparse
import gc
import random
import time

from llava_sessions.engine.memory import DeviceBudget

from . import harness
from .driver import EngineChats, Pictures, Prompts, load_engine, prepare
from .harness import Options, Result, Run, median, spread
from .machine import resident_set_bytes
from .make_checkpoint import PRESETS

TIERS = ("resident", "offloaded", "cold")
ROOM_TOKENS = 64  # that a chat has behind its picture, in both parts


def budget_for(
    chats: EngineChats, opening, resident: int, offloaded: int, pictures: int, spoken: int = 0
) -> DeviceBudget:
    """Room for so many sessions in either tier, and for the features of so many pictures.

    What is parked is as long as its opening and the `spoken` tokens behind that.
    """
    model = chats.engine.model
    tokens = len(opening.token_ids)
    features = pictures * opening.image_tokens * model.feature_bytes
    return DeviceBudget(
        device_bytes=resident * model.kv_shape.device_bytes(tokens + ROOM_TOKENS) + features,
        host_bytes=offloaded * (tokens + spoken) * model.kv_shape.token_bytes,
    )


class Ledger:
    """Which session lies where, as a least-recently-used order says it must; checked against the engine's counts."""

    def __init__(self, chats: EngineChats) -> None:
        self._chats = chats
        self._order: list[str] = []

    def touch(self, name: str) -> None:
        """A session was used."""
        self._order = [other for other in self._order if other != name] + [name]

    def least_recent(self, tier: str) -> str:
        """The session of a tier that was used longest ago."""
        held = self._chats.engine.memory()
        first = {"cold": 0, "offloaded": held.cold, "resident": held.cold + held.offloaded}[tier]
        return self._order[first]


def tiers(options: Options, run: Run) -> tuple[list[dict], dict[str, list[float]], dict[str, float]]:
    """Counts after every open; times to open and, by tier, to a first token; bytes a session by tier."""
    chats = load_engine(options)
    resident, offloaded, cold = (getattr(options.extra, tier) for tier in TIERS)
    total = resident + offloaded + cold
    pictures, prompts = Pictures(options.seed), Prompts(options.seed)
    opening = prepare(chats.tokens, pictures.jpeg())
    chats.engine.device_memory.budget = budget_for(chats, opening, resident, offloaded, total)
    ledger, counts = Ledger(chats), []
    times: dict[str, list[float]] = {"open": []} | {tier: [] for tier in TIERS}
    run.say(f"opening {total} sessions")
    for number in range(total):
        name = f"chat{number}"
        chats.open(name, prepare(chats.tokens, pictures.jpeg()))
        chats.run()
        times["open"].append(chats.opened_ms[name])
        ledger.touch(name)
        counts.append(_holding(chats))
    held = chats.engine.memory()
    sizes = {
        "features": held.features_bytes / total,
        "resident": held.kv_bytes / max(held.resident, 1),
        "offloaded": held.offloaded_bytes / max(held.offloaded, 1),
        "cold": 0.0,
    }
    run.say("asking resident, parked and cold ones")
    for _ in range(options.rounds):
        for tier in TIERS:
            name = ledger.least_recent(tier)
            turn = chats.answer(name, prompts.words(4), 1)
            ledger.touch(name)
            if (turn.cached_tokens == 0) != (tier == "cold"):
                raise RuntimeError(f"{name} was taken for {tier}, but {turn.cached_tokens} tokens were cached")
            times[tier].append(turn.ttft_ms)
    return counts, times, sizes


def _holding(chats: EngineChats) -> dict:
    held = chats.engine.memory()
    counts = {tier: getattr(held, tier) for tier in TIERS}
    sizes = {"kv_bytes": held.kv_bytes, "offloaded_bytes": held.offloaded_bytes, "rss_bytes": resident_set_bytes()}
    return counts | sizes


def many(options: Options, run: Run) -> dict:
    """500 sessions under a budget that holds 20: wrong answers, and the memory of the process on the way."""
    small = harness.at_preset(options, options.extra.many_preset)
    chats = load_engine(small)
    total, room = options.pick(options.extra.many, 12), options.pick(options.extra.many_room, 2)
    pictures, prompts = Pictures(options.seed + 1, (160, 120)), Prompts(options.seed + 1)
    openings = [prepare(chats.tokens, pictures.jpeg()) for _ in range(min(total, options.extra.many_pictures))]
    names = [f"chat{number}" for number in range(total)]
    questions = {name: [prompts.words(5), prompts.words(5)] for name in names}
    chats.engine.device_memory.budget = budget_for(chats, openings[0], room, room, len(openings), ROOM_TOKENS)
    run.say(f"{total} sessions, {len(openings)} pictures, room for {room}")
    rss, most_resident = [], 0
    began = time.perf_counter()
    for number, name in enumerate(names):
        chats.open(name, openings[number % len(openings)])
        chats.run()
        rss.append(_settled_rss(number))
        most_resident = max(most_resident, chats.engine.memory().resident)
    order = random.Random(options.seed)
    answers: dict[str, list[list[int]]] = {name: [] for name in names}
    for turn in range(2):
        for name in order.sample(names, total):
            answers[name].append(chats.answer(name, questions[name][turn], 6).answer_ids)
            rss.append(_settled_rss(len(rss)))
    held, seconds = chats.engine.memory(), time.perf_counter() - began
    chats.close_all()
    wrong = _wrong(chats, openings, questions, answers)
    return {
        "sessions": total,
        "room": room,
        "most_resident": most_resident,
        "at_the_end": {tier: getattr(held, tier) for tier in TIERS},
        "answers": 2 * total,
        "wrong": wrong,
        "rss_bytes": [value for value in rss if value],
        "rss_growth_bytes": _growth(rss, room),
        "kv_if_all_were_resident_bytes": total
        * chats.engine.model.kv_shape.device_bytes(len(openings[0].token_ids) + 1),
        "seconds": seconds,
    }


def _settled_rss(number: int) -> int:
    """The process's memory; 0 where it was not looked at, which is most of the time."""
    if number % 5:
        return 0
    gc.collect()
    return resident_set_bytes()


def _growth(rss: list[int], room: int) -> int:
    """From when both tiers were full to the highest point behind that."""
    behind = [value for value in rss[2 * room :] if value]
    return max(behind) - behind[0] if behind else 0


def _wrong(chats: EngineChats, openings: list, questions: dict, answers: dict) -> int:
    """How many answers a fresh session, alone and with room for itself, would not have given."""
    chats.engine.device_memory.budget = DeviceBudget(2**40, 2**40)
    wrong = 0
    for number, (name, asked) in enumerate(questions.items()):
        chats.open(name, openings[number % len(openings)])
        fresh = [chats.answer(name, text, 6).answer_ids for text in asked]
        wrong += sum(a != b for a, b in zip(fresh, answers[name], strict=True))
        chats.close(name)
        chats.run()
    return wrong


def report(options: Options, counts: list[dict], times: dict, sizes: dict, crowd: dict) -> Result:
    """The table, and the ratios of the project's bar."""
    result = Result(["session", "count", "KV MiB each", "first token ms", "to come back ms"])
    alive = median(times["resident"])
    for tier in TIERS:
        back = [value - alive for value in times[tier]] if tier != "resident" else []
        result.rows.append(
            {
                "session": tier,
                "count": counts[-1][tier],
                "KV MiB each": sizes[tier] / 2**20,
                "first token ms": spread(times[tier]),
                "to come back ms": spread(back),
            }
        )
    result.rows.append({"session": "(first open)", "first token ms": None, "to come back ms": spread(times["open"])})
    restore, rebuild = median(times["offloaded"]) - alive, median(times["cold"]) - alive
    result.ratios = {
        "restore / rebuild": restore / rebuild,
        "restore / first open": restore / median(times["open"]),
        f"{crowd['sessions']} sessions, room for {crowd['room']}: wrong answers": crowd["wrong"],
        "RSS growth once the budget is full, MiB": crowd["rss_growth_bytes"] / 2**20,
        "KV of all of them, if it were kept, MiB": crowd["kv_if_all_were_resident_bytes"] / 2**20,
    }
    result.settings = {name: getattr(options.extra, name) for name in (*TIERS, "many", "many_room", "many_preset")}
    result.settings["feature_mib_per_session"] = round(sizes["features"] / 2**20, 2)
    result.samples = {"counts": counts, "times_ms": times, "many": crowd}
    right = f"Of the {crowd['answers']} answers of the {crowd['sessions']} sessions, {crowd['wrong']} were wrong"
    result.notes = [
        "Coming back is the first token less that of a resident session; the budget is full, so another session leaves",
        f"for each that comes. {right}; at the end {crowd['at_the_end']}.",
    ]
    return result


def paint(axes, result: Result) -> None:
    """Where the sessions lie as ever more of them are opened."""
    counts = result.samples["counts"]
    opened = range(1, len(counts) + 1)
    series = [[count[tier] for count in counts] for tier in TIERS]
    axes.stackplot(opened, series, labels=TIERS, colors=["black", "tab:blue", "lightgray"], step="mid")
    axes.set(xlabel="sessions opened", ylabel="sessions", title="Where open sessions lie under a fixed budget")
    axes.set_xticks(opened)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8, loc="upper left")


def main(argv: list[str] | None = None) -> Result:
    """Entry point."""
    options = harness.parse("memory", __doc__, argv, rounds=5, more=_arguments)
    run = Run(options)
    found = tiers(options, run)
    gc.collect()
    return run.finish(report(options, *found, many(options, run)), paint)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--resident", type=int, default=6, help="sessions that the device's budget holds")
    parser.add_argument("--offloaded", type=int, default=6, help="sessions that the host's budget holds")
    parser.add_argument("--cold", type=int, default=6, help="sessions beyond that")
    parser.add_argument("--many", type=int, default=500, help="sessions of the second part")
    parser.add_argument("--many-room", type=int, default=20, help="how many of them the device holds, and the host")
    parser.add_argument("--many-pictures", type=int, default=500, help="how many different pictures they show")
    parser.add_argument("--many-preset", choices=PRESETS, default="tiny", help="the model of the second part")


if __name__ == "__main__":
    main()
