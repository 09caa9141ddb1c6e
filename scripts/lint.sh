#!/usr/bin/env bash
# Check the code without running it.
set -euo pipefail

if [[ "${1:-}" == --help ]]; then
  echo "usage: scripts/lint.sh   run ruff, import-linter, mypy, hadolint, cfn-lint, shellcheck and the two checks below"
  echo "  scripts/structure.py   import chains, length of files and functions, methods of classes"
  echo "  scripts/words.py       words that make a sentence hard to read"
  exit 0
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin=.venv/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
# The archive contains the content of handler/, so its packages are top-level ones; so is that of client/.
PYTHONPATH=.:handler:client "$bin/lint-imports" --no-cache | tail -n 3
"$bin/mypy"
"$bin/python" scripts/structure.py
"$bin/python" scripts/words.py
"$bin/hadolint" Dockerfile
"$bin/cfn-lint" deploy/sagemaker/endpoint.yaml
"$bin/shellcheck" build_mar.sh .ci/run scripts/*.sh
