#!/usr/bin/env bash
# Install a package of Debian or Ubuntu, as root or by sudo without a password.
set -euo pipefail

if [[ "${1:-}" == --help || "$#" -ne 1 ]]; then
  echo "usage: scripts/debian_package.sh PACKAGE   exit with 0 if the package is installed"
  [[ "${1:-}" == --help ]] && exit 0
  exit 2
fi

command -v apt-get >/dev/null || exit 1
as_root=()
if [[ "$(id -u)" -ne 0 ]]; then
  as_root=(sudo -n)
  sudo -n true 2>/dev/null || exit 1
fi

echo "installing $1 (apt-get install $1) ..."
export DEBIAN_FRONTEND=noninteractive
install=("${as_root[@]}" apt-get -o DPkg::Lock::Timeout=300 install -y -q --no-install-recommends "$1")
"${install[@]}" >/dev/null || { "${as_root[@]}" apt-get -q update >/dev/null && "${install[@]}" >/dev/null; }
