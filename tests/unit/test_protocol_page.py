"""The tables of docs/protocol.md have the fields, the defaults and the limits of the models."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llava_sessions.config import SECTIONS
from llava_sessions.protocol.chat_payload import OPTION_NAMES
from llava_sessions.protocol.requests import PastTurn
from scripts.openapi_schemas import schemas

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "protocol.md").read_text(encoding="utf-8")
SCHEMAS = schemas()
QUESTION = SCHEMAS["SendTextPrompt"]["properties"]
# Fields that a section describes in its text, and not in its table.
IN_TEXT = {"type", "session_id"}


def section(heading: str) -> str:
    """Return the text below a heading, up to the next heading."""
    return PAGE.split(f"{heading}\n", 1)[1].split("\n#", 1)[0]


def table(heading: str, number: int = 0) -> dict[str, list[str]]:
    """Return the rows of a table of a section: the cells of each name in the first cell."""
    tables = re.findall(r"(?:^\|.*\n)+", section(heading), re.MULTILINE)
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in tables[number].splitlines()[2:]]
    return {name: cells for cells in rows for name in re.findall(r"`([\w.]+)`", cells[0])}


@pytest.mark.parametrize(
    ("heading", "schema"),
    [("### Open: `start_session`", "StartSession"), ("### Ask: `send_text_prompt`", "SendTextPrompt")],
)
def test_a_request_has_the_fields_of_its_model(heading: str, schema: str) -> None:
    assert set(table(heading)) == set(SCHEMAS[schema]["properties"]) - IN_TEXT


def test_the_defaults_of_a_question_are_those_of_its_model() -> None:
    shown = {}
    for name, (_, _, default, _) in table("### Ask: `send_text_prompt`").items():
        if found := re.fullmatch(r"`?(false|[\d.]+)`?(?: \(greedy\))?", default):
            shown[name] = False if found[1] == "false" else float(found[1])
    models = {name: found["default"] for name, found in QUESTION.items() if "default" in found}
    # The cell of `max_new_tokens` names the key of the configuration.
    assert shown == {name: value for name, value in models.items() if name != "max_new_tokens"}


def test_the_ranges_of_a_question_are_those_of_its_model() -> None:
    checked = set()
    for name, (_, _, _, limits) in table("### Ask: `send_text_prompt`").items():
        numbers = [value.replace(",", "") for value in re.findall(r"(?<![\w.])\d[\d,]*", limits)]
        for bound in {"minimum", "maximum"} & QUESTION[name].keys():
            is_named = re.search(r"to `(limits\.)?max_\w+`", limits)  # a key of the configuration, or another field
            if not (bound == "maximum" and is_named):
                assert f"{QUESTION[name][bound]}" in numbers, (name, bound)
                checked.add(name)
    assert {"max_new_tokens", "min_tokens", "temperature", "top_p", "seed", "deadline_ms"} <= checked


def test_a_past_turn_has_the_fields_of_its_model() -> None:
    text = section("### Open: `start_session`")
    sentence = next(line for line in text.splitlines() if line.startswith("Each turn has"))
    assert set(re.findall(r"`(\w+)`", sentence)) == set(PastTurn.model_fields)


def test_an_answer_has_the_fields_of_its_schema() -> None:
    answer = SCHEMAS["Answer"]["properties"]
    named = set(table("### Ask: `send_text_prompt`", 1))
    usage = {f"usage.{name}" for name in answer["usage"]["properties"]}
    assert named == {"finish_reason", "timings", "token_ids", "durable", *usage}
    for name in (*answer, *answer["timings"]["properties"]):
        assert name in section("### Ask: `send_text_prompt`")
    reasons = table("### Ask: `send_text_prompt`", 1)["finish_reason"][1]
    assert set(re.findall(r"`(\w+)`", reasons)) == set(answer["finish_reason"]["enum"])


def test_the_options_of_openai_clients_are_those_that_are_read() -> None:
    named = set(table("### Options")) - {"stream_options.include_usage"}
    read = {name for names in OPTION_NAMES.values() for name in names}
    assert named == read | {"model", "messages", "user", "prompt_cache_key"}


def test_a_limit_with_a_configuration_key_has_its_default() -> None:
    found = 0
    for line in section("## Limits").splitlines():
        for section_name, key in re.findall(r"`(limits|media)\.(\w+)` \|$", line):
            default = SECTIONS[section_name].model_fields[key].default
            cell = line.split("|")[2]
            shown = [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", cell)]
            factors = {"MiB": 2**20, "million": 10**6, "GiB": 2**30}
            factor = next((factor for unit, factor in factors.items() if unit in cell), 1)
            assert default in [number * factor for number in shown], line
            found += 1
    assert found == 14
