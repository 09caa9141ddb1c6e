#!/usr/bin/env bash
# Make .venv, or update it if requirements*.txt or pyproject.toml have changed since.
set -euo pipefail

if [[ "${1:-}" == --help ]]; then
  echo "usage: scripts/env.sh   make .venv in the checkout with the packages that requirements-dev.txt pins"
  echo "  PYTHON=/path/to/python   use this Python (default: python3.11, python3 or python)"
  exit 0
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
stamp=.venv/.stamp
pins="$(cat requirements.txt requirements-cpu.txt requirements-dev.txt pyproject.toml)"
if [[ -x .venv/bin/python && -f "$stamp" && "$(cat "$stamp")" == "$pins" ]]; then
  exit 0
fi

version_check='import sys; sys.exit(sys.version_info < (3, 11))'
if [[ ! -x .venv/bin/python ]]; then
  python=""
  for candidate in ${PYTHON:-python3.11 python3 python}; do
    if "$candidate" -c "$version_check" 2>/dev/null; then
      python="$candidate"
      break
    fi
  done
  if [[ -z "$python" ]]; then
    echo "Python 3.11 or later is required; tried ${PYTHON:-python3.11, python3, python}. Set PYTHON=/path/to/python." >&2
    exit 1
  fi
  echo "making .venv with $("$python" --version) ..."
  if ! "$python" -m venv .venv; then
    rm -rf .venv
    echo "$python cannot make environments (Debian, Ubuntu: sudo apt-get install python3-venv)" >&2
    exit 1
  fi
elif ! .venv/bin/python -c "$version_check"; then
  echo ".venv must have Python 3.11 or later, got $(.venv/bin/python --version): remove .venv and run this again." >&2
  exit 1
fi

# The stamp is removed first and written last, so that a failed or interrupted install is repeated.
rm -f "$stamp"
echo "installing requirements-dev.txt into .venv (torch is large: some minutes on a new machine) ..."
quiet=--quiet
if [[ -t 1 ]]; then
  quiet=--progress-bar=on # show progress on a terminal
fi
pip=(.venv/bin/python -m pip install --disable-pip-version-check)
"${pip[@]}" "$quiet" -r requirements-dev.txt
"${pip[@]}" --quiet --no-deps --no-build-isolation --editable .
printf '%s\n' "$pins" >"$stamp"
echo ".venv is ready"
