#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# tally over RDMA verbs beside perftest's ib_write_bw, taking turns, in a virtual machine whose RDMA device is made of software. Its
# absolute figures say nothing about hardware.
# usage: rdma.sh [PROGRAM]     bench/rdma of a build; without, it is built in build/bench
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  sed -n '3,5s/^# //p' "${BASH_SOURCE[0]}"
  exit 0
fi
program=${1:-}
if [[ -z $program ]]; then
  cmake -S "$root" -B "$root/build/bench" -DTALLY_BUILD_TESTS=OFF -DTALLY_BUILD_EXAMPLES=OFF >/dev/null
  cmake --build "$root/build/bench" --target rdma -j >/dev/null
  program=$root/build/bench/bench/rdma
fi
program=$(realpath "$program")
said=$("$root/tests/rdma/run-in-vm" --timeout 300 --with "$program" sh -c '
  ulimit -l unlimited
  for round in 1 2 3; do
    for bytes in 1048576 4194304 16777216; do
      ib_write_bw -d rxe0 -x 1 -s $bytes -n 16 -F >/dev/null 2>&1 &
      sleep 0.5
      ib_write_bw -d rxe0 -x 1 -s $bytes -n 16 -F 127.0.0.1 | awk -v b=$bytes "\$1 == b {print \"peer\", b, \$4}"
      wait
      echo tally $('"$program"' $bytes --rounds 1 --messages 4)
    done
  done') || { echo "$said" >&2; exit 1; }
awk '
  function median(text,   v, n, i, j, t) {
    n = split(text, v, " ")
    for (i = 2; i <= n; i++) for (j = i; j > 1 && v[j] + 0 < v[j - 1] + 0; j--) { t = v[j]; v[j] = v[j - 1]; v[j - 1] = t }
    return v[int((n + 1) / 2)]
  }
  $1 == "peer" {peer[$2] = peer[$2] " " $3 + 0}
  $1 == "tally" {way[$2] = way[$2] " " $3 + 0; all[$2] = all[$2] " " $4 + 0}
  END {
    printf "%10s %18s %16s %8s %20s\n", "bytes", "ib_write_bw MiB/s", "tally MiB/s", "ratio", "all_reduce MiB/s"
    for (b = 1048576; b <= 16777216; b *= 4) printf "%10d %18.1f %16.1f %8.2f %20.1f\n", b, median(peer[b]), median(way[b]), median(way[b]) / median(peer[b]), median(all[b])
  }' <<<"$said"
