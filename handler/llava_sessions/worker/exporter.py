"""The worker's page of metrics, for Prometheus: a registry by the table of metrics, on a loopback port.

A scrape takes no lock of the pump and asks the engine nothing: gauges and counters are those of the latest `publish`,
after each step and once a second, and histograms are observed directly.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram, disable_created_metrics, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from .. import metrics
from ..metrics import HISTOGRAMS, METRICS, VLLM_NAMES, MetricValues

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
_TABLE = {metric.name: metric for metric in METRICS}


class Histograms:
    """The histograms of the table, in a registry of their own. Thread-safe."""

    def __init__(self) -> None:
        disable_created_metrics()  # no further metric with the time of creation
        self.registry = CollectorRegistry()
        self._by_name = {
            metric.name: Histogram(metric.name, metric.help, buckets=metric.buckets, registry=self.registry)
            for metric in HISTOGRAMS
        }

    def observe(self, name: str, value: float) -> None:
        """Add a value to the histogram of this name."""
        self._by_name[name].observe(value)


class Exporter(Collector):
    """Serves the page. `collect` and `publish` may run on any thread."""

    def __init__(self, histograms: Histograms, port: int | None, model: str, compat: str = "none") -> None:
        """`port` None: there is no page. `compat` "vllm": also use vLLM's names, with the label `model_name`."""
        self._port = port
        self._model = model
        self._compat = VLLM_NAMES if compat == "vllm" else {}
        self._values = MetricValues()
        self._histograms = histograms
        self._port_failed = False
        self._is_served = False
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def publish(self, values: MetricValues) -> None:
        """Replace the values of gauges and counters. They must not change any more."""
        self._values = values

    def serve(self) -> None:
        """Serve the page on its port of loopback, if it is not served yet.

        The port of a worker that has died may be in use for a moment: call `serve` again until it succeeds.
        """
        if self._port is None or self._is_served:
            return
        try:
            start_http_server(self._port, LOOPBACK, self._registry)
        except OSError as error:
            if not self._port_failed:
                log.warning("metrics_page_failed port=%d reason=%s", self._port, error)
            self._port_failed = True
            return
        self._is_served = True

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics."""
        values = self._values
        observed = {family.name: family for family in self._histograms.registry.collect()}
        for metric in METRICS:
            yield observed[metric.name] if metric.kind == "histogram" else _family(metric, values)
        for name, ours in self._compat.items():
            if ours in observed:
                yield self._renamed(name, observed[ours])
            else:
                yield self._copied(name, _TABLE[ours], values)

    def _copied(self, name: str, metric: metrics.Metric, values: MetricValues) -> Metric:
        """Return a gauge or counter under another name, with the model's name as its label."""
        kind = GaugeMetricFamily if metric.kind == "gauge" else CounterMetricFamily
        family = kind(name, metric.help, labels=["model_name"])
        family.add_metric([self._model], values.value(metric.name))
        return family

    def _renamed(self, name: str, observed: Metric) -> Metric:
        """Return a histogram under another name, with the model's name as its label."""
        family = HistogramMetricFamily(name, observed.documentation, labels=["model_name"])
        buckets = [
            (sample.labels["le"], sample.value) for sample in observed.samples if sample.name.endswith("_bucket")
        ]
        total = math.fsum(sample.value for sample in observed.samples if sample.name.endswith("_sum"))
        family.add_metric([self._model], buckets, total)
        return family


def _family(metric: metrics.Metric, values: MetricValues) -> Metric:
    """Return a gauge or counter of the table with its values."""
    kind = GaugeMetricFamily if metric.kind == "gauge" else CounterMetricFamily
    if not metric.label:
        return kind(metric.name, metric.help, value=values.value(metric.name))
    family = kind(metric.name, metric.help, labels=[metric.label])
    for label, value in values.by_label(metric.name).items():
        family.add_metric([label], value)
    return family
