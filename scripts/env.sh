#!/usr/bin/env bash
# Makes .venv, or brings it up to date when requirements*.txt have changed since.
set -euo pipefail

if [[ "${1:-}" == --help ]]; then
  echo "usage: scripts/env.sh   makes .venv in the checkout with what requirements-dev.txt pins; PYTHON= chooses the Python"
  exit 0
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
stamp=.venv/.stamp
wanted="$(cat requirements.txt requirements-cpu.txt requirements-dev.txt pyproject.toml)"
if [[ -x .venv/bin/python && -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]]; then
  exit 0
fi

right_version='import sys; sys.exit(sys.version_info < (3, 11))'
if [[ ! -x .venv/bin/python ]]; then
  python=""
  for candidate in ${PYTHON:-python3.11 python3 python}; do
    if "$candidate" -c "$right_version" 2>/dev/null; then
      python="$candidate"
      break
    fi
  done
  if [[ -z "$python" ]]; then
    echo "Python 3.11 or later is needed; looked for ${PYTHON:-python3.11, python3, python}. PYTHON=/path/to/it chooses one." >&2
    exit 1
  fi
  echo "making .venv with $("$python" --version) ..."
  if ! "$python" -m venv .venv; then
    rm -rf .venv
    echo "$python cannot make environments (Debian, Ubuntu: sudo apt-get install python3-venv)" >&2
    exit 1
  fi
elif ! .venv/bin/python -c "$right_version"; then
  echo ".venv holds $(.venv/bin/python --version), 3.11 or later is needed: remove .venv and run this again." >&2
  exit 1
fi

# The stamp goes first and comes back last: an install that fails or is interrupted is tried again next time.
rm -f "$stamp"
echo "installing requirements-dev.txt into .venv (torch is large: some minutes on a new machine) ..."
quiet=--quiet
if [[ -t 1 ]]; then
  quiet=--progress-bar=on # someone is watching
fi
.venv/bin/python -m pip install "$quiet" --disable-pip-version-check -r requirements-dev.txt
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
printf '%s\n' "$wanted" >"$stamp"
echo ".venv is ready"
