#!/usr/bin/env bash
# Everything that reads the code without running it.
set -euo pipefail

if [[ "${1:-}" == --help ]]; then
  echo "usage: scripts/lint.sh   ruff check, ruff format --check, import-linter, hadolint, cfn-lint, and shellcheck where installed"
  exit 0
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin=.venv/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
# handler/ is the top of what travels in the archive, so its modules are top-level ones.
PYTHONPATH=.:handler:client "$bin/lint-imports" --no-cache | tail -n 3
"$bin/hadolint" Dockerfile
"$bin/cfn-lint" deploy/sagemaker/endpoint.yaml
scripts=(build_mar.sh .ci/run scripts/*.sh)
if command -v shellcheck >/dev/null; then
  shellcheck "${scripts[@]}"
else
  for script in "${scripts[@]}"; do bash -n "$script"; done
  echo "shellcheck is not installed: shell scripts were only parsed"
fi
