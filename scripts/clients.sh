#!/usr/bin/env bash
# Make environments of the clients that the tests run: one for each tests/deploy/clients/*.txt that is named.
set -euo pipefail

if [[ "${1:-}" == --help ]]; then
  echo "usage: scripts/clients.sh [NAME ...]   make .venv-clients/NAME with the packages of tests/deploy/clients/NAME.txt"
  echo "  without a name: openai-3 and openai-2, which \`make test\` uses; \`make test-clients\` uses aiperf too"
  exit 0
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ $# == 0 ]]; then
  set -- openai-3 openai-2
fi

make_environment() {
  local folder=".venv-clients/$1" pins="tests/deploy/clients/$1.txt"
  local stamp="$folder/.stamp"
  if [[ -x "$folder/bin/python" && -f "$stamp" ]] && cmp --silent "$stamp" "$pins"; then
    return
  fi
  echo "installing $pins into $folder ..."
  # A changed list of pins gets a new environment. The stamp is written last, so that an interrupted install is repeated.
  rm -rf "$folder"
  .venv/bin/python -m venv "$folder"
  # The list is complete: no package is searched for, and none is compiled before it is imported.
  "$folder/bin/python" -m pip install --disable-pip-version-check --quiet --no-deps --no-compile -r "$pins"
  "$folder/bin/python" -m pip check --disable-pip-version-check >/dev/null
  cp "$pins" "$stamp"
  echo "$folder is ready"
}

# One process for each: pip computes more than it waits.
processes=()
for name in "$@"; do
  if [[ ! -f "tests/deploy/clients/$name.txt" ]]; then
    echo "there is no tests/deploy/clients/$name.txt" >&2
    exit 1
  fi
  make_environment "$name" &
  processes+=($!)
done
status=0
for process in "${processes[@]}"; do
  wait "$process" || status=$?
done
exit "$status"
