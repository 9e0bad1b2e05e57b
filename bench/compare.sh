#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# tally against Open MPI on this machine: installs what is missing (Debian), builds, and runs both in one job.
# usage: bench/compare.sh [-n RANKS] [arguments of compare; see --help]
set -eu
cd "$(dirname "$0")/.."

ranks=2
if [ "${1:-}" = -n ]; then
  ranks=${2:-}
  case $ranks in
    '' | *[!0-9]* | 0*) echo "compare.sh: -n takes a number of ranks, 2 or more" >&2; exit 2 ;;
  esac
  shift 2
fi

missing=
for package in g++ cmake make libcli11-dev nlohmann-json3-dev openmpi-bin libopenmpi-dev; do
  dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing="$missing $package"
done
if [ -n "$missing" ]; then
  root=
  [ "$(id -u)" -eq 0 ] || root=sudo
  echo "installing:$missing" >&2
  $root apt-get update -qq >&2
  $root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >&2
fi

build=build/bench
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if ! { cmake -S . -B $build -DCMAKE_BUILD_TYPE=Release -DTALLY_BUILD_TESTS=OFF -DTALLY_BUILD_EXAMPLES=OFF -DTALLY_BUILD_BENCH=ON &&
       cmake --build $build --target tally_perf compare -j "$(nproc)"; } >"$log" 2>&1; then
  cat "$log" >&2
  exit 1
fi

# Arguments are checked here, so that a mistake is one line and not mpirun's page about a failed rank.
compare=$build/bench/compare
"$compare" --only-arguments "$@" >"$log" || exit $?
if [ -s "$log" ]; then cat "$log"; exit 0; fi  # --help

set -- "$compare" "$@"
if [ "$ranks" -le "$(nproc)" ]; then set -- --bind-to core "$@"; else set -- --bind-to none --oversubscribe "$@"; fi
[ "$(id -u)" -ne 0 ] || set -- --allow-run-as-root "$@"
mpirun --mca btl self,vader -n "$ranks" "$@"
