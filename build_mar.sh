#!/usr/bin/env bash
# Packs a LLaVA checkpoint and the handler into model_store/. All of it is in deploy/pack/; see --help.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="$here/.venv/bin/python"
if [[ ! -x "$python" ]]; then
  python="$(command -v python3 || true)"
fi
if [[ -z "$python" ]] || ! "$python" -c 'import model_archiver, yaml' 2>/dev/null; then
  echo "build_mar.sh: no Python with torch-model-archiver here. Run \`make env\` first." >&2
  exit 2
fi
# -P: the folder in which the command is typed is not searched for modules.
PYTHONPATH="$here" exec "$python" -P -m deploy.pack "$@"
