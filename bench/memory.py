"""More sessions than the memory budget holds: their tiers, their memory, and the time to restore or rebuild them.

*Tiers*: sessions with different pictures are opened until the device's part of the budget is full, then the host's, and
then beyond it. After that one resident, one offloaded and one cold session in turn generates one token.

*Many* (on the tiny model, see `--many-preset`): 500 open sessions under a budget that holds 20 on the device and 20 on
the host. Each session is asked twice, in random orders in which almost every session has become offloaded or cold.
Every answer is compared with the answer of a new session with enough memory, and the process's memory is recorded.
"""

from __future__ import annotations

import argparse
import gc
import random
import time

from llava_sessions.engine.budget import DeviceBudget
from llava_sessions.text.chat_template import Opening

from . import harness
from .driver import EngineChats, Pictures, Prompts, load_engine, prepare
from .harness import Options, Result, Run, median, spread
from .machine import resident_set_bytes
from .make_checkpoint import PRESETS

TIERS = ("resident", "offloaded", "cold")
ROOM_TOKENS = 64  # tokens of a chat after its picture, in both parts


def budget_for(
    chats: EngineChats, opening: Opening, resident: int, offloaded: int, pictures: int, spoken: int = 0
) -> DeviceBudget:
    """Return a budget for these numbers of resident and offloaded sessions, and for the features of `pictures`.

    An offloaded session has the tokens of its opening and `spoken` more.
    """
    model = chats.engine.model
    tokens = len(opening.token_ids)
    features = pictures * opening.image_tokens * model.feature_bytes
    return DeviceBudget(
        device_bytes=resident * model.kv_shape.device_bytes(tokens + ROOM_TOKENS) + features,
        host_bytes=offloaded * (tokens + spoken) * model.kv_shape.token_bytes,
    )


class Ledger:
    """The sessions in least-recently-used order, from which the tier of each one follows."""

    def __init__(self, chats: EngineChats) -> None:
        self._chats = chats
        self._order: list[str] = []

    def touch(self, name: str) -> None:
        """Record a use of a session."""
        self._order = [other for other in self._order if other != name] + [name]

    def least_recent(self, tier: str) -> str:
        """Return the least recently used session of a tier."""
        held = self._chats.engine.memory()
        first = {"cold": 0, "offloaded": held.cold, "resident": held.cold + held.offloaded}[tier]
        return self._order[first]


def tiers(options: Options, run: Run) -> tuple[list[dict], dict[str, list[float]], dict[str, float]]:
    """Return counts after every open, times to open and by tier to a first token, and bytes per session by tier."""
    chats = load_engine(options)
    resident, offloaded, cold = (getattr(options.extra, tier) for tier in TIERS)
    total = resident + offloaded + cold
    pictures = Pictures(options.seed)
    prompts = Prompts(options.seed)
    opening = prepare(chats.tokens, pictures.jpeg())
    chats.engine.device_memory.budget = budget_for(chats, opening, resident, offloaded, total)
    ledger = Ledger(chats)
    counts = []
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
    run.say("asking resident, offloaded and cold sessions")
    for _ in range(options.rounds):
        for tier in TIERS:
            name = ledger.least_recent(tier)
            turn = chats.answer(name, prompts.words(4), 1)
            ledger.touch(name)
            if (turn.cached_tokens == 0) != (tier == "cold"):
                raise RuntimeError(f"{name} should be {tier}, but {turn.cached_tokens} tokens were cached")
            times[tier].append(turn.ttft_ms)
    return counts, times, sizes


def _holding(chats: EngineChats) -> dict:
    held = chats.engine.memory()
    counts = {tier: getattr(held, tier) for tier in TIERS}
    sizes = {"kv_bytes": held.kv_bytes, "offloaded_bytes": held.offloaded_bytes, "rss_bytes": resident_set_bytes()}
    return counts | sizes


def many(options: Options, run: Run) -> dict:
    """Run 500 sessions under a budget that holds 20; return the wrong answers and the process's memory over time."""
    small = harness.at_preset(options, options.extra.many_preset)
    chats = load_engine(small)
    total = options.pick(options.extra.many, 12)
    room = options.pick(options.extra.many_room, 2)
    pictures = Pictures(options.seed + 1, (160, 120))
    prompts = Prompts(options.seed + 1)
    openings = [prepare(chats.tokens, pictures.jpeg()) for _ in range(min(total, options.extra.many_pictures))]
    names = [f"chat{number}" for number in range(total)]
    questions = {name: [prompts.words(5), prompts.words(5)] for name in names}
    chats.engine.device_memory.budget = budget_for(chats, openings[0], room, room, len(openings), ROOM_TOKENS)
    run.say(f"{total} sessions, {len(openings)} pictures, room for {room}")
    rss = []
    most_resident = 0
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
    held = chats.engine.memory()
    seconds = time.perf_counter() - began
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
    """Return the process's memory for every fifth `number`, else 0."""
    if number % 5:
        return 0
    gc.collect()
    return resident_set_bytes()


def _growth(rss: list[int], room: int) -> int:
    """Return the growth of memory from when both tiers were full to the later maximum."""
    later = [value for value in rss[2 * room :] if value]
    return max(later) - later[0] if later else 0


def _wrong(chats: EngineChats, openings: list, questions: dict, answers: dict) -> int:
    """Return the number of answers that differ from those of a new session with enough memory."""
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
    """Return the table and the ratios that `bar.py` reads."""
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
    restore = median(times["offloaded"]) - alive
    rebuild = median(times["cold"]) - alive
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
        "To come back: first token minus that of a resident session. The budget is full, so each session that returns",
        f"displaces another one. {right}; at the end {crowd['at_the_end']}.",
    ]
    return result


def paint(axes, result: Result) -> None:
    """Draw the sessions per tier over the number of opened sessions."""
    counts = result.samples["counts"]
    opened = range(1, len(counts) + 1)
    series = [[count[tier] for count in counts] for tier in TIERS]
    axes.stackplot(opened, series, labels=TIERS, colors=["black", "tab:blue", "lightgray"], step="mid")
    axes.set(xlabel="sessions opened", ylabel="sessions", title="Tiers of open sessions under a fixed budget")
    axes.set_xticks(opened)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize=8, loc="upper left")


def main(argv: list[str] | None = None) -> Result:
    """Run the command line."""
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
    parser.add_argument("--many-room", type=int, default=20, help="number of them that the device holds, and the host")
    parser.add_argument("--many-pictures", type=int, default=500, help="number of different pictures")
    parser.add_argument("--many-preset", choices=PRESETS, default="tiny", help="the model of the second part")


if __name__ == "__main__":
    main()
