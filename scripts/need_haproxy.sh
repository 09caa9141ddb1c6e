#!/usr/bin/env bash
# Check that HAProxy 2.6 or later is installed. It runs in front of TorchServe, and the tests need it.
set -euo pipefail

if [[ "${1:-}" == --help ]]; then
  echo "usage: scripts/need_haproxy.sh [--install]   exit with 0 if HAProxy 2.6 or later is installed"
  echo "  --install   if it is missing, install Debian's or Ubuntu's package, as root or by sudo without a password"
  exit 0
fi

found() {
  PATH="$PATH:/usr/sbin" haproxy -v 2>/dev/null | sed -n 's/^HAProxy version \([0-9]*\)\.\([0-9]*\).*/\1 \2/p' || true
}

recent_enough() {
  local major minor
  read -r major minor <<<"$(found)"
  [[ "${major:-0}" -gt 2 || ("${major:-0}" -eq 2 && "${minor:-0}" -ge 6) ]]
}

if recent_enough; then
  exit 0
fi

if [[ "${1:-}" == --install ]]; then
  "$(dirname "${BASH_SOURCE[0]}")/debian_package.sh" haproxy || true
  if recent_enough; then
    exit 0
  fi
fi

version="$(found)"
{
  if [[ -n "$version" ]]; then
    echo "HAProxy 2.6 or later is required; this one is version ${version/ /.}."
  else
    echo "HAProxy 2.6 or later is required; it is not installed."
  fi
  echo "  Debian, Ubuntu:  sudo apt-get install haproxy"
  echo "  macOS:           brew install haproxy"
  echo "  elsewhere:       https://www.haproxy.org"
} >&2
exit 1
