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

if [[ "${1:-}" == --install ]] && command -v apt-get >/dev/null; then
  as_root=()
  if [[ "$(id -u)" -ne 0 ]]; then
    as_root=(sudo -n)
  fi
  if [[ "${#as_root[@]}" -eq 0 ]] || sudo -n true 2>/dev/null; then
    echo "installing Chromium (apt-get install chromium) ..."
    export DEBIAN_FRONTEND=noninteractive
    install=("${as_root[@]}" apt-get -o DPkg::Lock::Timeout=300 install -y -q --no-install-recommends chromium)
    "${install[@]}" >/dev/null || { "${as_root[@]}" apt-get -q update >/dev/null && "${install[@]}" >/dev/null; } || true
    if found >/dev/null; then
      exit 0
    fi
  fi
fi

{
  echo "Chromium is required by the tests of the web chat; it is not installed."
  echo "  Debian:          sudo apt-get install chromium"
  echo "  macOS:           brew install --cask chromium"
  echo "  elsewhere:       set CHROMIUM=/path/to/chromium"
} >&2
exit 1
