#!/usr/bin/env bash
# Check that Chromium is installed. The tests of the web chat drive it. Playwright's own browsers are not used.
set -euo pipefail

if [[ "${1:-}" == --help ]]; then
  echo "usage: scripts/need_chromium.sh [--install]   exit with 0 if the tests find Chromium, and print its path"
  echo "  --install   if it is missing, install Debian's package, as root or by sudo without a password"
  echo "  CHROMIUM=/path/to/chromium   use this browser"
  exit 0
fi

found() {
  local name
  for name in "${CHROMIUM:-chromium}" chromium-browser google-chrome; do
    command -v "$name" && return 0
  done
  return 1
}

if found >/dev/null; then
  [[ "${1:-}" == --install ]] || found
  exit 0
fi

if [[ "${1:-}" == --install ]]; then
  "$(dirname "${BASH_SOURCE[0]}")/debian_package.sh" chromium || true
  if found >/dev/null; then
    exit 0
  fi
fi

{
  echo "Chromium is required by the tests of the web chat; it is not installed."
  echo "  Debian:          sudo apt-get install chromium"
  echo "  macOS:           brew install --cask chromium"
  echo "  elsewhere:       set CHROMIUM=/path/to/chromium"
} >&2
exit 1
