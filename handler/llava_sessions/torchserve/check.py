"""Check a configuration without starting a server: `python -m llava_sessions.torchserve.check`.

Reads a JSON object from stdin: `model_configs` (texts of model-config.yaml), `properties` (of the frontend) and
`environment` (of frontend and worker). Prints a JSON object: `model_configs` has the problems of each text, `headers`
those of the session headers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import yaml

from ..config_file import ConfigError, read_config
from .headers import header_problems


def config_problems(text: str) -> list[str]:
    """Return every problem of a model-config.yaml for which the handler would refuse to start."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        return [f"model-config.yaml must be YAML, got a text that is not: {' '.join(str(error).split())}"]
    if not isinstance(content, Mapping):
        return [f"model-config.yaml must be a mapping, got {type(content).__name__}"]
    try:
        read_config(content)
    except ConfigError as error:
        return error.problems
    return []


def main() -> None:
    """Print the problems of the configuration on stdin."""
    given = json.load(sys.stdin)
    problems: dict[str, Any] = {
        "model_configs": [config_problems(text) for text in given["model_configs"]],
        "headers": header_problems(given["properties"], given["environment"]),
    }
    json.dump(problems, sys.stdout)


if __name__ == "__main__":
    main()
