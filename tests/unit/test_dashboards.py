"""Grafana's board, the alerts and deploy/compose.yaml agree with the code and with each other.

tests/server/test_dashboards.py runs the queries and the alerts in a real Prometheus.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema_rs
import pytest
import yaml
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.container.entrypoint import MODEL, PORT
from deploy.serve.configuration import CORS_VARIABLE, PUBLIC_METRICS_VARIABLE
from llava_sessions.errors import STATUS_OF_CODE
from llava_sessions.metrics import METRICS
from scripts import dashboard, dashboard_panels

REPO = Path(__file__).resolve().parents[2]
DEPLOY = REPO / "deploy"
NAMES = {metric.name for metric in METRICS}
PANELS = [panel for row in dashboard_panels.ROWS for panel in row.panels]
RULES = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"][0]["rules"]
PROMETHEUS = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
PROVISIONING = DEPLOY / "grafana" / "provisioning"


def metrics_of(expression: str) -> set[str]:
    """Return the names of the table that a query reads. A histogram is read by its buckets."""
    return {name.removesuffix("_bucket") for name in re.findall(r"llava_\w+", expression)}


# --- the board --------------------------------------------------------------------------------------------------------


def test_the_board_is_current() -> None:
    assert dashboard.BOARD.read_text(encoding="utf-8") == dashboard.text()


def lost(value: Any, kept: Any, path: str = "") -> Iterator[str]:
    """Yield the paths of `value` that `kept` does not have with the same content. `kept` may have more."""
    if isinstance(value, dict) and isinstance(kept, dict):
        for key, inner in value.items():
            yield from lost(inner, kept.get(key), f"{path}/{key}")
    elif isinstance(value, list) and isinstance(kept, list) and len(value) == len(kept):
        for index, (inner, other) in enumerate(zip(value, kept, strict=True)):
            yield from lost(inner, other, f"{path}/{index}")
    elif value != kept:
        yield path


def test_grafanas_own_model_of_a_dashboard_has_every_field_of_the_board() -> None:
    """Its classes drop a field that they do not know."""
    plugins.register_default_plugins()
    board = dashboard.board()
    assert list(lost(board, json.loads(json.dumps(Dashboard.from_json(board), cls=JSONEncoder)))) == []
    board["panels"][1]["fieldConfig"]["defaults"]["custom"]["lineWitdh"] = 1
    kept = json.loads(json.dumps(Dashboard.from_json(board), cls=JSONEncoder))
    assert list(lost(board, kept)) == ["/panels/1/fieldConfig/defaults/custom/lineWitdh"]


def test_the_board_shows_every_metric_of_the_table_and_no_other() -> None:
    shown = {name for panel in PANELS for query in panel.queries for name in metrics_of(query.expr)}
    assert shown == NAMES


def test_each_query_follows_the_chosen_instances() -> None:
    selectors = [found for panel in PANELS for query in panel.queries for found in re.findall(r"\{(.*?)\}", query.expr)]
    assert len(selectors) >= len(PANELS)
    assert all('instance=~"$instance"' in selector for selector in selectors)


def test_the_panels_fill_the_grid_without_overlap() -> None:
    cells: set[tuple[int, int]] = set()
    for item in dashboard.board()["panels"]:
        place = item["gridPos"]
        columns = range(place["x"], place["x"] + place["w"])
        own = {(x, y) for x in columns for y in range(place["y"], place["y"] + place["h"])}
        assert not own & cells, item["title"]
        cells |= own
    assert len(cells) == dashboard.COLUMNS * (1 + max(y for _, y in cells))


def test_the_picture_of_the_board_is_small() -> None:
    assert "](img/board.png)" in (REPO / "docs" / "watching.md").read_text(encoding="utf-8")
    assert (REPO / "docs" / "img" / "board.png").stat().st_size <= 200_000


# --- the alerts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_reads_metrics_of_the_table_and_has_a_runbook(rule: dict[str, Any]) -> None:
    assert metrics_of(rule["expr"]) <= NAMES
    assert metrics_of(rule["expr"]) or f'up{{job="{dashboard_panels.JOB}"}}' in rule["expr"]
    for codes in re.findall(r'code=~?"([^"]+)"', rule["expr"]):
        assert set(codes.split("|")) <= set(STATUS_OF_CODE)
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert set(rule["annotations"]) == {"summary", "runbook"}
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    assert anchor == rule["alert"].lower()
    heading = re.search(rf"^### {rule['alert']}\n\n(.*?)(?=^#|\Z)", (REPO / page).read_text(), re.MULTILINE | re.DOTALL)
    assert heading is not None
    assert all(f"**{part}:**" in heading[1] for part in ("Meaning", "Look at", "Do"))


def test_each_alert_has_a_test_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    tests = yaml.safe_load((DEPLOY / "prometheus" / "alerts_test.yml").read_text())["tests"]
    checks = [(check["alertname"], bool(check["exp_alerts"])) for test in tests for check in test["alert_rule_test"]]
    assert set(checks) == {(rule["alert"], fires) for rule in RULES for fires in (True, False)}


@pytest.mark.parametrize(
    ("alert", "limit"),
    [
        ("LlavaSlowFirstToken", dashboard_panels.FIRST_TOKEN_LIMIT_S),
        ("LlavaTurnsWait", dashboard_panels.QUEUE_LIMIT_S),
        ("LlavaSlowAnswers", dashboard_panels.ANSWER_LIMIT_S),
    ],
)
def test_the_limits_on_the_board_are_those_of_the_alerts(alert: str, limit: float) -> None:
    (rule,) = [rule for rule in RULES if rule["alert"] == alert]
    assert float(rule["expr"].rpartition(" > ")[2]) == limit
    (metric,) = metrics_of(rule["expr"])
    assert [panel.limit for panel in PANELS if metrics_of(panel.queries[0].expr) == {metric}] == [limit]


# --- deploy/compose.yaml ----------------------------------------------------------------------------------------------


def mounts(service: str) -> dict[str, str]:
    """Return the sources of a service's volumes by their place in the container."""
    found = {}
    for volume in SERVICES[service].get("volumes", []):
        if isinstance(volume, str):
            source, target, *_ = volume.split(":")
        else:
            source, target = volume["source"], volume["target"]
        found[target] = re.sub(r"\$\{\w+:-(.*?)\}", r"\1", source)
    return found


def test_the_file_fits_the_schema_of_compose() -> None:
    packaged = "check_jsonschema/builtin_schemas/vendor/compose-spec.json"
    schema = json.loads(Path(distribution("check-jsonschema").locate_file(packaged)).read_text())
    validator = jsonschema_rs.validator_for(schema)
    assert [error.message for error in validator.iter_errors(COMPOSE)] == []
    assert not validator.is_valid({"services": {"server": {"imgae": "x"}}})


def test_the_mounted_files_exist_and_named_volumes_are_declared() -> None:
    for service in SERVICES:
        for source in mounts(service).values():
            if source.startswith("."):
                path = (DEPLOY / source).resolve()
                assert path.exists() or path == REPO / "model_store" / "llava", source
            else:
                assert source in COMPOSE["volumes"], source


def test_the_server_has_the_names_that_its_image_reads() -> None:
    server = SERVICES["server"]
    assert set(server["environment"]) == {PUBLIC_METRICS_VARIABLE, CORS_VARIABLE}
    assert server["environment"][PUBLIC_METRICS_VARIABLE] == "on"
    assert server["command"] == ["serve"]
    assert mounts("server") == {str(MODEL): "../model_store/llava"}
    assert server["ports"][0].endswith(f":{PORT}")
    assert f":{PORT}/ping" in server["healthcheck"]["test"][-1]


def test_images_are_pinned_and_ports_are_on_loopback() -> None:
    for name, service in SERVICES.items():
        if name != "server":  # its image is built here
            assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), name
    ports = [port for service in SERVICES.values() for port in service["ports"]]
    assert all(port.startswith("127.0.0.1:") for port in ports)
    assert len({port.rpartition(":")[0] for port in ports}) == len(SERVICES)


def test_the_services_find_each_other() -> None:
    (scrape,) = PROMETHEUS["scrape_configs"]
    assert scrape["job_name"] == dashboard_panels.JOB
    assert scrape["static_configs"] == [{"targets": [f"server:{PORT}"]}]
    assert PROMETHEUS["rule_files"] == ["alerts.yml"]
    (source,) = yaml.safe_load((PROVISIONING / "datasources" / "prometheus.yaml").read_text())["datasources"]
    url = urlsplit(source["url"])
    assert f"127.0.0.1:{url.port}:{url.port}" in SERVICES[url.hostname]["ports"]
    assert source["jsonData"]["timeInterval"] == PROMETHEUS["global"]["scrape_interval"]
    assert SERVICES["webui"]["environment"]["OPENAI_API_BASE_URL"] == f"http://server:{PORT}/v1"


def test_grafana_loads_the_board_and_opens_on_it() -> None:
    (provider,) = yaml.safe_load((PROVISIONING / "dashboards" / "llava.yaml").read_text())["providers"]
    board = f"{provider['options']['path']}/{dashboard.BOARD.name}"
    assert (DEPLOY / mounts("grafana")[board]).resolve() == dashboard.BOARD
    assert SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == board
    assert mounts("grafana")["/etc/grafana/provisioning"] == "./grafana/provisioning"
