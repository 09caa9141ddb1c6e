#!/usr/bin/env bash
# Check that the tests find Prometheus and promtool: on the PATH, or unpacked in .cache/prometheus of this checkout.
set -euo pipefail

if [[ "${1:-}" == --help ]]; then
  echo "usage: scripts/need_prometheus.sh [--install]   exit with 0 if the tests find prometheus and promtool"
  echo "  --install   if they are missing, download Debian's package and unpack it into .cache/prometheus. This needs no"
  echo "              root; only if apt knows no packages yet, its lists are fetched as root or by sudo without a password"
  exit 0
fi

cache="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.cache/prometheus"

found() {
  local folder="$cache/usr/bin"
  if command -v prometheus >/dev/null && command -v promtool >/dev/null; then
    return 0
  fi
  [[ -x "$folder/prometheus" && -x "$folder/promtool" ]]
}

# Download into a temporary folder and unpack into a folder that is renamed at the end: the cache is complete or missing,
# also if two calls run at once.
unpack() {
  local work
  work="$(mktemp -d)"
  chmod 755 "$work"
  (cd "$work" && apt-get -q download prometheus >/dev/null 2>&1) || { rm -rf "$work"; return 1; }
  mkdir -p "$(dirname "$cache")"
  dpkg-deb -x "$work"/prometheus_*.deb "$cache.$$" || { rm -rf "$work" "$cache.$$"; return 1; }
  rm -rf "$work"
  mv -T "$cache.$$" "$cache" 2>/dev/null || rm -rf "$cache.$$"
}

update() {
  if [[ "$(id -u)" -eq 0 ]]; then
    apt-get -q update >/dev/null
  else
    sudo -n apt-get -q update >/dev/null 2>&1
  fi
}

if found; then
  exit 0
fi

if [[ "${1:-}" == --install ]] && command -v apt-get >/dev/null && command -v dpkg-deb >/dev/null; then
  echo "unpacking Prometheus into .cache/prometheus (apt-get download prometheus) ..."
  unpack || { update && unpack; } || true
  if found; then
    exit 0
  fi
fi

{
  echo "Prometheus and promtool are required by a test; they are not installed."
  echo "  Debian, Ubuntu:  sudo apt-get install prometheus   (it starts a service on port 9090)"
  echo "  macOS:           brew install prometheus"
  echo "  elsewhere:       https://prometheus.io/download"
} >&2
exit 1
