#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Runs each *_fuzz.cpp beside it with libFuzzer, ASan and UBSan: any bytes as a file that is read. A byte string that fails is
# shown and kept in the folder that the last line names. Part of the tests where TALLY_TEST_LONG is set when they are configured.
# usage: run.sh [SECONDS of each; otherwise 60]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$here/../..
seconds=${1:-60}
[[ $seconds =~ ^[1-9][0-9]{0,5}$ ]] || { echo "run.sh: '$seconds' is no number of seconds"; exit 2; }
command -v clang++-14 >/dev/null || { echo "skipped: no clang++-14 (Debian: clang-14)"; exit 77; }

work=$(mktemp -d)
trap '[[ -n ${kept:-} ]] || rm -rf "$work"' EXIT
flags=(-std=c++20 -O1 -g "-I$root/include" -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all)
echo 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }' >"$work/empty.cpp"
clang++-14 "${flags[@]}" "$work/empty.cpp" -o "$work/empty" 2>/dev/null || { echo "skipped: clang++-14 has no libFuzzer (Debian: libclang-rt-14-dev)"; exit 77; }

mkdir "$work"/{accounts,weights,carbon,powercap}
clang++-14 -std=c++20 "-I$root/include" "$here/seeds.cpp" -o "$work/seeds"
"$work/seeds" "$work"
cp "$root/examples/carbon_sample.json" "$work/carbon/"
printf 'datetime,carbon_intensity\n2024-01-15T00:00:00Z,412\n2024-01-15T01:00:00Z,398.5\n' >"$work/carbon/csv"
i=0
for text in 123456 event=0x02 2.3283064365386962890625e-10 intel-rapl:0:1 package-0-die-1 psys-1 'Grace Power Socket 1' 'CPU Power Socket 0' Esocket0 0-3,8,12-15 $'processor\t: 0\nflags\t\t: fpu hypervisor sgx\n'; do
  printf %s "$text" >"$work/powercap/$((i++))"
done

failed=
for source in "$here"/*_fuzz.cpp; do
  name=$(basename "$source" _fuzz.cpp)
  mkdir -p "$work/$name"
  clang++-14 "${flags[@]}" "$source" -o "$work/$name.run"
  log=$work/$name.log
  if "$work/$name.run" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=4096 -max_len=8192 -print_final_stats=1 -artifact_prefix="$work/$name." "$work/$name" >"$log" 2>&1; then
    echo "$name: $(sed -n 's/^stat::number_of_executed_units: *//p' "$log") inputs in $seconds s, $(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$log" | tail -n 1) places of the code reached"
  else
    failed+=" $name"
    grep -v '^#' "$log" | tail -n 60
  fi
done
[[ -n $failed ]] || exit 0
kept=yes
rm -rf "$work"/{accounts,weights,carbon,powercap,*.run,seeds,empty*}
echo "failed:$failed; the inputs are in $work"
exit 1
