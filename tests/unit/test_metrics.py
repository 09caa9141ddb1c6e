"""The table of metrics, its values, and the frontend's declaration of the same metrics."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from llava_sessions.metrics import COUNTERS, GAUGES, METRICS, MetricValues

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def test_names_are_unique_and_say_their_kind_and_unit() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert metric.name.startswith("llava_")
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert metric.name.endswith("_bytes") == (metric.unit == "bytes")
        assert metric.help.endswith(".")


def test_each_metric_is_a_gauge_or_a_counter() -> None:
    assert {metric.name: metric.unit for metric in METRICS} == GAUGES | COUNTERS
    assert not GAUGES.keys() & COUNTERS.keys()


def test_each_metric_has_a_value() -> None:
    names = [f"llava_{field.name}" for field in fields(MetricValues)]
    assert names == [metric.name for metric in METRICS]
    values = MetricValues(**{field.name: index for index, field in enumerate(fields(MetricValues))})
    assert [values.value(name) for name in names] == list(range(len(names)))


@pytest.mark.parametrize(("kind", "units"), [("gauge", GAUGES), ("counter", COUNTERS)])
def test_the_frontend_declares_the_same_metrics(kind: str, units: dict[str, str]) -> None:
    """TorchServe drops a metric that its frontend does not know."""
    (path,) = DEPLOY.rglob("metrics.yaml")
    declared = yaml.safe_load(path.read_text())["model_metrics"][kind]
    ours = [metric for metric in declared if metric["name"].startswith("llava_")]
    assert {metric["name"]: metric["unit"] for metric in ours} == units
    assert all(metric["dimensions"] == ["ModelName", "Level"] for metric in ours)
