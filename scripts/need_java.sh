#!/usr/bin/env bash
# Check that Java 17 or later is installed. TorchServe's frontend is a Java program.
set -euo pipefail

if [[ "${1:-}" == --help ]]; then
  echo "usage: scripts/need_java.sh   exit with 0 if Java 17 or later is installed (JAVA_HOME, else java on PATH)"
  exit 0
fi

java="java"
if [[ -n "${JAVA_HOME:-}" ]]; then
  java="$JAVA_HOME/bin/java"
fi
# On a Mac without Java, /usr/bin/java exists and fails. Therefore its output is read.
banner="$("$java" -version 2>&1 || true)"
major="$(sed -n 's/.* version "\([0-9]*\).*/\1/p' <<<"$banner" | head -n 1)"
if [[ "${major:-0}" -ge 17 ]]; then
  exit 0
fi

{
  if [[ -n "$major" ]]; then
    echo "TorchServe needs Java 17 or later; $java is version $major."
  else
    echo "TorchServe needs Java 17 or later; $java does not run."
  fi
  echo "  Debian, Ubuntu:  sudo apt-get install openjdk-17-jre-headless"
  echo "  macOS:           brew install openjdk@17"
  echo "  elsewhere:       https://adoptium.net"
  if [[ -n "${JAVA_HOME:-}" ]]; then
    echo "JAVA_HOME is $JAVA_HOME; it has priority over PATH."
  fi
} >&2
exit 1
