"""The table of metrics, its values, the worker's page, and the other places that name the same metrics."""

from __future__ import annotations

import socket
import urllib.request
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from deploy.serve.configuration import METRICS_PORT_VARIABLE, has_public_metrics
from deploy.serve.ports import free_ports
from deploy.serve.processes import ServeError
from llava_sessions.errors import STATUS_OF_CODE
from llava_sessions.ipc.messages import Memory, Timings, Usage
from llava_sessions.metrics import COUNTERS, GAUGES, METRICS, PORT_VARIABLE, VLLM_NAMES, MetricValues
from llava_sessions.worker.counters import Counters, EngineMemory, kv_usage
from llava_sessions.worker.exporter import Exporter, Histograms
from scripts import metrics_table

REPO = Path(__file__).resolve().parents[2]
SUFFIXES = {"bytes": "_bytes", "seconds": "_seconds", "ratio": "_ratio"}
HISTOGRAMS = [metric for metric in METRICS if metric.kind == "histogram"]


def test_names_are_unique_and_say_their_kind_and_unit() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    for metric in METRICS:
        assert metric.name.startswith("llava_")
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        for unit, suffix in SUFFIXES.items():
            assert metric.name.removesuffix("_total").endswith(suffix) == (metric.unit == unit), metric.name
        assert metric.help.endswith(".")
        assert not metric.label or (metric.kind, metric.label) == ("gauge", "device") or metric.kind == "counter"


def test_histograms_have_buckets_in_order_and_requests_up_to_two_minutes() -> None:
    for metric in METRICS:
        assert bool(metric.buckets) == (metric.kind == "histogram")
        assert list(metric.buckets) == sorted(set(metric.buckets))
    assert {metric.name: metric.buckets[-1] for metric in HISTOGRAMS}["llava_e2e_request_latency_seconds"] == 120


def test_each_gauge_and_counter_has_a_value() -> None:
    names = [f"llava_{field.name}" for field in fields(MetricValues)]
    assert names == [metric.name for metric in METRICS if metric.kind != "histogram"]
    values = MetricValues(**{field.name: index for index, field in enumerate(fields(MetricValues))})
    assert [values.value(name) for name in names] == list(range(len(names)))
    assert MetricValues(refusals_total={"capacity": 2, "internal": 3}).value("llava_refusals_total") == 5


@pytest.mark.parametrize(("kind", "units"), [("gauge", GAUGES), ("counter", COUNTERS)])
def test_the_frontend_declares_the_same_metrics(kind: str, units: dict[str, str]) -> None:
    """TorchServe drops a metric that its frontend does not know."""
    (path,) = (REPO / "deploy").rglob("metrics.yaml")
    declared = yaml.safe_load(path.read_text())["model_metrics"][kind]
    ours = [metric for metric in declared if metric["name"].startswith("llava_")]
    assert {metric["name"]: metric["unit"] for metric in ours} == units
    assert all(metric["dimensions"] == ["ModelName", "Level"] for metric in ours)


def test_operations_has_the_current_tables() -> None:
    page = metrics_table.PAGE.read_text(encoding="utf-8")
    assert page == metrics_table.with_tables(page)


def test_launcher_and_worker_name_the_port_alike() -> None:
    assert METRICS_PORT_VARIABLE == PORT_VARIABLE


def test_the_page_is_public_only_if_the_operator_says_so() -> None:
    assert not has_public_metrics({})
    assert not has_public_metrics({"PUBLIC_METRICS": ""})
    assert not has_public_metrics({"PUBLIC_METRICS": "off"})
    assert has_public_metrics({"PUBLIC_METRICS": "on"})
    with pytest.raises(ServeError, match=r"PUBLIC_METRICS must be on or off, got 'yes'"):
        has_public_metrics({"PUBLIC_METRICS": "yes"})


# --- the page ---------------------------------------------------------------------------------------------------------


def make(histograms: Histograms | None = None, model: str = "llava", compat: str = "none") -> tuple[Exporter, int]:
    """Return an exporter and its port."""
    [port] = free_ports(1)
    return Exporter(histograms or Histograms(), port, model, compat), port


def read(exporter: Exporter, port: int) -> tuple[str, dict[str, float]]:
    """Return the content type of the page, and its samples by name and labels."""
    exporter.serve()
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(f"http://127.0.0.1:{port}/metrics", timeout=30) as reply:
        text = reply.read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    found = {f"{one.name}{sorted(one.labels.items()) if one.labels else ''}": one.value for one in samples}
    assert len(found) == len(samples), "no sample is there twice"
    return reply.headers["Content-Type"], found


def test_the_page_has_every_metric_of_the_table_and_no_other() -> None:
    exporter, port = make()
    counters = Counters()
    exporter.publish(MetricValues(refusals_total=counters.refusals, evictions_total={"offload": 1, "drop": 2}))
    content_type, samples = read(exporter, port)
    assert content_type.startswith("text/plain; version=")
    for metric in METRICS:
        if metric.kind == "histogram":
            bounds = [f"{metric.name}_bucket[('le', '{bound}')]" for bound in (*metric.buckets, "+Inf")]
            assert [samples.pop(bound) for bound in bounds] == [0] * len(bounds)
            assert samples.pop(f"{metric.name}_sum") == samples.pop(f"{metric.name}_count") == 0
        elif not metric.label:
            assert samples.pop(metric.name) == 0
    assert samples.pop("llava_evictions_total[('kind', 'offload')]") == 1
    assert samples.pop("llava_evictions_total[('kind', 'drop')]") == 2
    assert samples == {f"llava_refusals_total[('code', '{code}')]": 0 for code in STATUS_OF_CODE}


def test_a_turn_is_observed_in_seconds() -> None:
    counters = Counters()
    exporter, port = make(counters.histograms)
    counters.add_tokens(Usage(40, 30, 5))
    counters.add_times(Usage(40, 30, 5), Timings(queue_ms=20, ttft_ms=300, total_ms=1100), prepared_s=0.5)
    counters.add_times(Usage(40, 30, 1), Timings(queue_ms=0, ttft_ms=100, total_ms=100), prepared_s=0)
    counters.add_duration(119.0)
    assert (counters.prompt_tokens, counters.cached_tokens, counters.generation_tokens) == (40, 30, 5)
    _, samples = read(exporter, port)
    sums = {metric.name: samples[f"{metric.name}_sum"] for metric in HISTOGRAMS}
    counts = {metric.name: samples[f"{metric.name}_count"] for metric in HISTOGRAMS}
    assert sums["llava_time_to_first_token_seconds"] == pytest.approx(0.9)
    assert sums["llava_request_queue_time_seconds"] == pytest.approx(0.02)
    assert counts["llava_time_to_first_token_seconds"] == counts["llava_request_queue_time_seconds"] == 2
    assert sums["llava_inter_token_latency_seconds"] == pytest.approx(0.2), "one token has no latency between tokens"
    assert counts["llava_inter_token_latency_seconds"] == 1
    assert samples["llava_e2e_request_latency_seconds_bucket[('le', '90.0')]"] == 0
    assert samples["llava_e2e_request_latency_seconds_bucket[('le', '120.0')]"] == 1


def test_vllms_names_have_the_values_of_ours() -> None:
    histograms = Histograms()
    for index, metric in enumerate(HISTOGRAMS):
        histograms.observe(metric.name, 0.5 * index)
        histograms.observe(metric.name, 3.0)
    exporter, port = make(histograms, "shapes", "vllm")
    plain = [ours.removeprefix("llava_") for ours in VLLM_NAMES.values() if not ours.endswith("_seconds")]
    exporter.publish(MetricValues(**{name: 7 * index + 1 for index, name in enumerate(plain)}))
    _, samples = read(exporter, port)
    theirs = {name: value for name, value in samples.items() if name.startswith("vllm:")}
    label = ("model_name", "shapes")
    expected: dict[str, float] = {}
    for name, ours in VLLM_NAMES.items():
        metric = next(metric for metric in METRICS if metric.name == ours)
        if metric.kind == "histogram":
            expected |= {f"{name}_{part}{[label]}": samples[f"{ours}_{part}"] for part in ("sum", "count")}
            for bound in (*metric.buckets, "+Inf"):
                expected[f"{name}_bucket{[('le', str(bound)), label]}"] = samples[f"{ours}_bucket[('le', '{bound}')]"]
        else:
            expected[f"{name}{[label]}"] = samples[ours]
    assert theirs == expected
    assert len(VLLM_NAMES) == 8
    _, samples = read(*make(histograms, "shapes"))
    assert not [name for name in samples if name.startswith("vllm:")]


def test_a_port_in_use_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    exporter, port = make(model="second", compat="vllm")
    with socket.create_server(("127.0.0.1", port)):
        exporter.serve()
        exporter.serve()
    assert caplog.text.count("metrics_page_failed") == 1
    _, samples = read(exporter, port)
    assert "vllm:num_requests_running[('model_name', 'second')]" in samples


# --- the engine's counts ----------------------------------------------------------------------------------------------


def test_counts_continue_when_the_engine_is_replaced() -> None:
    engine = EngineMemory()
    engine.report(Memory(resident=2, offloads=3, restores=1, picture_hits=4))
    engine.report(Memory(resident=2, offloads=5, restores=1, picture_hits=4, drops=1, pictures_encoded=2))
    engine.lost()
    names = ("offloads", "restores", "drops", "picture_hits", "pictures_encoded")
    assert [engine.count(name) for name in names] == [5, 1, 1, 4, 2]
    assert engine.now == Memory(), "gauges are those of the new engine"
    engine.report(Memory(offloads=1))
    engine.lost()
    engine.report(Memory(offloads=2, drops=1))
    assert [engine.count(name) for name in names] == [8, 1, 2, 4, 2]


@pytest.mark.parametrize(
    ("memory", "usage"),
    [
        (Memory(), 0),
        (Memory(kv_bytes=30, features_bytes=40, device_budget_bytes=100), 0.5),
        (Memory(kv_bytes=70, features_bytes=40, device_budget_bytes=100), 1),
        (Memory(kv_bytes=1, features_bytes=100, device_budget_bytes=100), 0),
    ],
)
def test_the_usage_of_kv_is_a_ratio(memory: Memory, usage: float) -> None:
    assert kv_usage(memory) == usage
