#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# tally against Open MPI, MPICH and Gloo on this machine: installs what is missing (Debian), builds, and races them.
# usage: bench/compare.sh [arguments of compare; see --help]
set -eu
build=$(cd "$(dirname "$0")/.." && pwd)/build/bench

missing_of() {
  for package in "$@"; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || printf ' %s' "$package"
  done
}
root=
[ "$(id -u)" -eq 0 ] || root=sudo
updated=
install_packages() {
  echo "installing: $*" >&2
  [ -n "$updated" ] || $root apt-get update -qq >&2
  updated=yes
  $root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >&2
}

if command -v apt-get >/dev/null; then
  missing=$(missing_of g++ cmake make pkg-config libcli11-dev nlohmann-json3-dev)
  [ -z "$missing" ] || install_packages $missing
  case " $* " in
    *' --svg'*) [ -n "$(command -v gnuplot)" ] || install_packages gnuplot-nox ;;
  esac
  # A library that cannot be had is left out of the race.
  for library in 'openmpi-bin libopenmpi-dev' 'mpich libmpich-dev' libgloo-dev; do
    missing=$(missing_of $library)
    [ -z "$missing" ] || install_packages $missing || echo "compare.sh: cannot install$missing" >&2
  done
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! { cmake -S "$build/../.." -B "$build" -DCMAKE_BUILD_TYPE=Release -DTALLY_BUILD_TESTS=OFF -DTALLY_BUILD_EXAMPLES=OFF -DTALLY_BUILD_BENCH=ON &&
       cmake --build "$build" --target tally_perf comparison -j "$(nproc)"; } >"$log" 2>&1; then
  cat "$log" >&2
  exit 1
fi
"$build/bench/compare" "$@"
