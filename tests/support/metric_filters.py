"""The template's metric filters, and CloudWatch's way of matching a log line with them."""

from __future__ import annotations

import json
import re

import yaml

from deploy.sagemaker import stacks


def template() -> dict:
    return yaml.load(stacks.TEMPLATE.read_text(encoding="utf-8"), stacks._Loader)


def matches(pattern: str, line: str) -> bool:
    """CloudWatch's JSON filter patterns, as far as ours go: `{ $.key = "text" && $.key >= number }`."""
    try:
        event = json.loads(line)
    except ValueError:
        return False
    terms = pattern.strip("{} ").split(" && ")
    for term in terms:
        key, comparison, value = re.fullmatch(r"\$\.(\w+) (=|>=) (\S+)", term).groups()
        found, wanted = event.get(key), json.loads(value)
        if comparison == "=" and found != wanted:
            return False
        if comparison == ">=" and not (isinstance(found, int | float) and found >= wanted):
            return False
    return True


def filters() -> dict[str, tuple[str, str]]:
    resources = template()["Resources"].values()
    found = [item["Properties"] for item in resources if item["Type"] == "AWS::Logs::MetricFilter"]
    return {
        item["MetricTransformations"][0]["MetricName"]: (
            item["FilterPattern"],
            item["MetricTransformations"][0]["MetricValue"],
        )
        for item in found
    }
