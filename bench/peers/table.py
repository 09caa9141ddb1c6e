"""The table, the ratios and the plot of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..harness import Result, median, spread
from .rounds import ALONE, PARALLEL, Sample, Samples
from .sides import KINDS
from .worker import Turn

COLUMNS = [
    "side",
    "TTFT turn 1 ms",
    "TTFT turns 2-5 ms",
    "per token ms",
    "follow-up ms",
    "8 chats: tokens/s",
    "8 chats: TTFT 1 ms",
    "8 chats: TTFT 2-5 ms",
    "8 chats: CPU s",
    "same first answer",
    "others",
]
# Sides with which `served` competes for tokens per second.
PEERS = ("vllm", "openvino", "openvino-continuous")


def report(samples: Samples) -> Result:
    """Return the table and the ratios that `bar.py` reads."""
    result = Result(COLUMNS)
    for name, kind in KINDS.items():
        alone, parallel = samples.of(name, ALONE), samples.of(name, PARALLEL)
        if alone or parallel:
            row = {"side": kind.label, **_alone(alone), **_parallel(parallel)}
            row["same first answer"] = _same_answers(alone, samples.of("stateless", ALONE))
            row["others"] = f"{median(one.noise for one in (*alone, *parallel)):.0%}"
            result.rows.append(row)
            result.samples[name] = {
                ALONE: [_record(one) for one in alone],
                PARALLEL: [_record(one) for one in parallel],
            }
    result.ratios = ratios(samples)
    plan = samples.plan
    result.settings = {name: getattr(plan, name) for name in ("chats", "turns", "prompt_tokens", "answer_tokens")}
    result.settings |= {"parallel_rounds": plan.parallel_rounds}
    result.notes = [
        "Times are medians [best]. TTFT of turn 1 is from the open, and the first question follows the open at once.",
        "`follow-up`: from a question to its last token, turns 2-5. `others`: CPU share of other processes.",
        "`same first answer`: rounds in which the answer of turn 1 equals that of stateless transformers.",
    ]
    return result


def ratios(samples: Samples) -> dict[str, float]:
    """Return ratios of medians. A ratio whose sides were not measured is absent."""

    def alone(name: str, of: Callable[[list[Turn]], Iterable[float]]) -> float:
        return median(value for one in samples.of(name, ALONE) for value in of(one.chats[0]))

    def rate(name: str) -> float:
        return median(one.tokens_s for one in samples.of(name, PARALLEL))

    best_peer = max((rate(name) for name in PEERS if samples.of(name, PARALLEL)), default=float("nan"))
    found = {
        "first answer, served / vLLM": alone("served", _first) / alone("vllm", _first),
        "TTFT of turns 2-5, served / vLLM": alone("served", _later) / alone("vllm", _later),
        "worst turn's TTFT / median turn's, served": worst_turn(samples.of("served", ALONE)),
        "time per token, served / vLLM": alone("served", _per_token) / alone("vllm", _per_token),
        "time per token, in process / OpenVINO": alone("engine", _per_token) / alone("openvino", _per_token),
        "8 chats, tokens/s, served / best peer": rate("served") / best_peer,
        "time per token, served / in process": alone("served", _per_token) / alone("engine", _per_token),
        "8 chats, tokens/s, served / in process": rate("served") / rate("engine"),
        "first answer, in process / OpenVINO": alone("engine", _first) / alone("openvino", _first),
        "TTFT of turns 2-5, in process / OpenVINO": alone("engine", _later) / alone("openvino", _later),
        "follow-up, served / vLLM": alone("served", _total) / alone("vllm", _total),
        "follow-up, in process / OpenVINO": alone("engine", _total) / alone("openvino", _total),
    }
    return {name: value for name, value in found.items() if value == value}  # NaN: a side was not measured


def worst_turn(alone: list[Sample]) -> float:
    """Return the largest of the turns' median TTFT over the median of them, without turn 1."""
    if not alone:
        return float("nan")
    turns = [median(one.chats[0][turn].ttft_ms for one in alone) for turn in range(1, len(alone[0].chats[0]))]
    return max(turns) / median(turns)


def _first(chat: list[Turn]) -> list[float]:
    return [chat[0].ttft_ms]


def _later(chat: list[Turn]) -> list[float]:
    return [turn.ttft_ms for turn in chat[1:]]


def _per_token(chat: list[Turn]) -> list[float]:
    return [turn.tpot_ms for turn in chat]


def _total(chat: list[Turn]) -> list[float]:
    return [turn.total_ms for turn in chat[1:]]


def _alone(samples: list[Sample]) -> dict[str, str]:
    """Return the figures of one chat at a time."""
    ways = {
        "TTFT turn 1 ms": _first,
        "TTFT turns 2-5 ms": _later,
        "per token ms": _per_token,
        "follow-up ms": _total,
    }
    chats = [sample.chats[0] for sample in samples]
    return {name: spread(value for chat in chats for value in of(chat)) for name, of in ways.items()}


def _parallel(samples: list[Sample]) -> dict[str, float | str]:
    """Return the figures of eight chats at once."""
    if not samples:
        return {}
    chats = [chat for sample in samples for chat in sample.chats]
    figures: dict[str, float | str] = {
        "8 chats: tokens/s": median(sample.tokens_s for sample in samples),
        "8 chats: CPU s": median(sample.cpu_s for sample in samples),
    }
    if chats[0][0].ttft_ms is not None:
        figures["8 chats: TTFT 1 ms"] = median(value for chat in chats for value in _first(chat))
        figures["8 chats: TTFT 2-5 ms"] = median(value for chat in chats for value in _later(chat))
    return figures


def _same_answers(samples: list[Sample], expected: list[Sample]) -> str:
    """Return how many of the first answers equal those that stateless `transformers` gave to equal chats."""
    answers = {(one.round, one.attempt): one.chats[0][0].answer for one in expected}
    pairs = [(one.chats[0][0].answer, answers.get((one.round, one.attempt))) for one in samples]
    known = [answer == other for answer, other in pairs if other is not None]
    return f"{sum(known)}/{len(known)}" if known else ""


def _record(sample: Sample) -> dict:
    """Return what a record keeps of a sample: the times in ms, by chat and turn."""
    times = {
        name: [[value if value is None else round(value, 2) for value in map(of, chat)] for chat in sample.chats]
        for name, of in _TIMES.items()
    }
    figures = {"seconds": sample.seconds, "tokens_s": sample.tokens_s, "cpu_s": sample.cpu_s}
    figures = {name: round(value, 3) for name, value in figures.items()}
    noise = {"others": round(sample.others, 3), "idle_sides": round(sample.idle_sides, 3), "attempts": sample.attempts}
    return {"round": sample.round, **figures, **noise, **times}


_TIMES: dict[str, Callable[[Turn], float | None]] = {
    "ttft_ms": lambda turn: turn.ttft_ms,
    "tpot_ms": lambda turn: turn.tpot_ms,
    "total_ms": lambda turn: turn.total_ms,
}
# Group of bars -> the mode, and the values of one recorded sample.
_GROUPS: dict[str, tuple[str, Callable[[dict], list[float]]]] = {
    "first answer, ms": (ALONE, lambda one: one["ttft_ms"][0][:1]),
    "TTFT, turns 2-5, ms": (ALONE, lambda one: one["ttft_ms"][0][1:]),
    "time per token, ms": (ALONE, lambda one: one["tpot_ms"][0]),
    "follow-up, ms": (ALONE, lambda one: one["total_ms"][0][1:]),
    "8 chats, tokens/s": (PARALLEL, lambda one: [one["tokens_s"]]),
}


def paint(axes, result: Result) -> None:
    """Draw the times of one chat, and the tokens per second of eight chats, by side."""
    width = 0.84 / len(result.samples)
    for place, (name, modes) in enumerate(result.samples.items()):
        values = [median(value for one in modes[mode] for value in of(one)) for mode, of in _GROUPS.values()]
        spots = [index + place * width for index in range(len(values))]
        bars = axes.bar(spots, values, width, label=KINDS[name].label, color=f"C{place}")
        axes.bar_label(bars, [f"{value:,.0f}" if value == value else "" for value in values], fontsize=5)
    axes.set_xticks([index + 0.42 - width / 2 for index in range(len(_GROUPS))], list(_GROUPS), fontsize=7)
    axes.set(yscale="log", title="Chats of five turns, each about a new picture")
    axes.legend(fontsize=6, ncols=2)
    axes.set_ylim(top=axes.get_ylim()[1] * 4)  # room for the legend
