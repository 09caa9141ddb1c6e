"""The golden tables hold: each payload and each configuration is accepted or refused as by commit a10d9d0."""

from __future__ import annotations

import json
from typing import Any

import yaml

from tests.unit.golden import tables


def differs(row: dict[str, Any], outcome: dict[str, Any]) -> bool:
    """Compare as JSON text: 1, 1.0 and true are three values."""
    return json.dumps(outcome, sort_keys=True) != json.dumps(row["outcome"], sort_keys=True)


def changed_payloads(*, parsed: bool) -> dict[str, dict[str, Any]]:
    """Return the outcomes that differ, by name of the row. `parsed`: hand over the parsed JSON where it parses."""
    changed = {}
    for row in tables.rows(tables.PAYLOADS):
        body = tables.parsed_body_of(row) if parsed else tables.body_of(row)
        outcome = tables.outcome_of_payload(body, row.get("headers", {}), row.get("limits", {}))
        if differs(row, outcome):
            changed[row["name"]] = outcome
    return changed


def test_every_payload_has_its_frozen_outcome():
    assert changed_payloads(parsed=False) == {}


def test_every_payload_that_torchserve_parsed_has_the_same_outcome():
    assert changed_payloads(parsed=True) == {}


def test_every_configuration_has_its_frozen_outcome():
    outcomes = {
        row["name"]: (row, tables.outcome_of_configuration(yaml.safe_load(row["yaml"])))
        for row in tables.rows(tables.CONFIGURATIONS)
    }
    assert {name: outcome for name, (row, outcome) in outcomes.items() if differs(row, outcome)} == {}


def test_the_tables_have_both_outcomes():
    for path, accepted in ((tables.PAYLOADS, "request"), (tables.CONFIGURATIONS, "config")):
        outcomes = [accepted in row["outcome"] for row in tables.rows(path)]
        assert outcomes.count(True) > 100
        assert outcomes.count(False) > 100
