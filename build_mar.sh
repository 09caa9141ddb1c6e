#!/usr/bin/env bash
# Pack a LLaVA checkpoint and the handler into model_store/ (deploy/pack/). See --help.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="$here/.venv/bin/python"
if [[ ! -x "$python" ]]; then
  python="$(command -v python3 || true)"
fi
if [[ -z "$python" ]] || ! "$python" -c 'import model_archiver, yaml' 2>/dev/null; then
  echo "build_mar.sh: no Python with torch-model-archiver was found. Run \`make env\` first." >&2
  exit 2
fi
# -P: do not import modules from the working directory.
PYTHONPATH="$here" exec "$python" -P -m deploy.pack "$@"
