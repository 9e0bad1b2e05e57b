#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What accounts are written as is read by the tools that it is for: Prometheus' own linter and its parser of OpenMetrics, and
# the published schema of JSON lines. What is broken on purpose must be refused, so that a check that checks nothing shows.
# usage: run.sh promtool|jsonschema INCLUDE COMPILER
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
check=$1
python=
case $check in
  promtool)
    command -v promtool >/dev/null || { echo "skipped: no promtool (Debian: prometheus)"; exit 77; }
    ;;
  jsonschema)
    for name in python3 /usr/bin/python3; do
      if [[ -z $python ]] && "$name" -c 'import jsonschema' 2>/dev/null; then python=$name; fi
    done
    [[ -n $python ]] || { echo "skipped: no jsonschema for Python (Debian: python3-jsonschema)"; exit 77; }
    ;;
  *) echo "run.sh: what is '$check'?"; exit 2 ;;
esac

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$3" -std=c++20 -I"$2" "$here/program.cpp" -o "$work/program"

fail() { echo "$*"; exit 1; }
# imports FILE: whether Prometheus reads it as OpenMetrics; it wants times for that.
imports() {
  awk '/^#/ {print; next} {print $0, 1700000000}' "$1" >"$work/timed"
  rm -rf "$work/blocks"
  promtool tsdb create-blocks-from openmetrics "$work/timed" "$work/blocks" >"$work/said" 2>&1
}

for energy in "" without_energy; do
  kinds=$([[ -z $energy ]] && echo 7 || echo 5)  # without meters there are no domains and no power
  # shellcheck disable=SC2086
  if [[ $check == promtool ]]; then
    "$work/program" prometheus $energy >"$work/prometheus"
    complaints=$(promtool check metrics <"$work/prometheus" 2>&1) || fail "promtool: $complaints"
    [[ -z $complaints ]] || fail "promtool: $complaints"
    "$work/program" openmetrics $energy >"$work/openmetrics"
    imports "$work/openmetrics" || fail "promtool: $(cat "$work/said")"
    samples=$(grep -vc '^#' "$work/openmetrics")
    read -r -a block < <(tail -n 1 "$work/said")  # the seventh column says how many series there are
    ((block[6] == samples)) || fail "$samples samples are of ${block[6]} series: some are there twice"
    echo "promtool: $samples samples are fine"
  else
    "$work/program" json_lines $energy >"$work/lines"
    "$python" "$here/validate.py" "$here/../../examples/report.schema.json" "$work/lines" "$kinds"
  fi
done

if [[ $check == promtool ]]; then
  sed 's/_total{/{/; s/_total /_ /' "$work/prometheus" >"$work/wrong"
  if promtool check metrics <"$work/wrong" >/dev/null 2>&1; then fail "promtool takes counters without _total"; fi
  grep -v '^# EOF' "$work/openmetrics" >"$work/wrong"
  if imports "$work/wrong"; then fail "promtool takes OpenMetrics without an end"; fi
fi
