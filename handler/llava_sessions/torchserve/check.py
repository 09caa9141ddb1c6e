"""Check a configuration without starting a server: `python -m llava_sessions.torchserve.check`.

Reads a JSON object from stdin: `model_config` (the text of model-config.yaml), `properties` (of the frontend) and
`environment` (of frontend and worker). Prints a JSON object with the problems of each: `model_config` and `headers`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping

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
    problems = {
        "model_config": config_problems(given["model_config"]),
        "headers": header_problems(given["properties"], given["environment"]),
    }
    json.dump(problems, sys.stdout)


if __name__ == "__main__":
    main()
