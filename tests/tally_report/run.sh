#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# examples/energy makes a rank late, and tally_report names it: from good files, from broken ones with warnings, in each format
# as its own tools read it; and says what is wrong where there is nothing to report.
# usage: run.sh TALLY_REPORT ENERGY     the programs; empty: not built
set -euo pipefail
report=$1 energy=$2
[[ -n $report ]] || { echo "skipped: tally_report is not built (TALLY_BUILD_BENCH)"; exit 77; }
[[ -n $energy ]] || { echo "skipped: examples/energy is not built (TALLY_BUILD_EXAMPLES)"; exit 77; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

failures=0
fail() { echo "$*"; failures=$((failures + 1)); }
# runs STATUS ARGUMENT...: tally_report ends with that status; what it prints goes to out and err.
runs() {
  local wanted=$1 status=0
  shift
  "$report" "$@" >out 2>err || status=$?
  ((status == wanted)) || fail "tally_report $* ended with $status, not $wanted: $(cat err)"
}
has() { grep -qF -- "$2" "$1" || fail "$1 lacks: $2; it is: $(head -c 2000 "$1")"; }
lacks() { ! grep -qF -- "$2" "$1" || fail "$1 has: $2"; }
# python PROGRAM: with the report on stdin.
python() { python3 -c "$1" <out || fail "of ${format:-the report}: $1"; }

# The late rank is found. It is late by 20 ms, which noise is not.
"$energy" --ranks 4 --steps 50 --late 2 --by 20 --elements 64 --out four --json four.json >four.txt
has four.txt 'Rank 2 slows this job.'
has four/report.html '<p class="headline">Rank 2 slows this job.</p>'
python3 -c '
import json
result = json.load(open("four.json"))
worst = result["stragglers"][0]
assert result["finding"] == "one_rank" and result["ranks"] == [2], result
assert worst["rank"] == 2 and worst["share"] >= 0.9, worst
assert worst["caused_seconds"] >= 0.9 * 3 * 50 * 0.020, worst' || fail "energy --json is not as it should be"
status=0
"$energy" --ranks 4 --late 4 --out five >out 2>err || status=$?
((status == 2)) || fail "energy takes a late rank that is not there"

# Three ranks in two files make a page, and the same with standard input.
"$energy" --ranks 3 --steps 50 --late 1 --by 20 --elements 64 --out three >/dev/null
cat three/accounts-rank[01].jsonl >a.jsonl
cp three/accounts-rank2.jsonl b.jsonl
runs 0 a.jsonl b.jsonl
has err 'written to report.html'
lacks err 'warning'
has report.html '<p class="headline">Rank 1 slows this job.</p>'
runs 0 a.jsonl - -o other.html <b.jsonl
cmp -s report.html other.html || fail "standard input makes another page than the same file"
runs 0 a.jsonl b.jsonl -o -
cmp -s report.html out || fail "standard output has another page than the file"
[[ ! -s err ]] || fail "a page to standard output is accompanied by: $(cat err)"

# Each format is what its readers take.
for format in text json perfetto csv prometheus openmetrics; do
  runs 0 a.jsonl b.jsonl --format "$format"
  case $format in
    text)
      [[ $(head -n 1 out) == 'Rank 1 slows this job.' ]] || fail "text begins with: $(head -n 1 out)"
      has out 'Totals of energy: 3 ranks, 1 host, 1 communicator'
      ;;
    json)
      python '
import json, sys
job = json.load(sys.stdin)
assert job["schema"] == "tally.job/1" and job["job"] == "energy" and job["ranks"] == 3
assert job["verdict"]["ranks"] == [1] and job["stragglers"][0]["rank"] == 1
assert sum(each["caused_ns"] for each in job["stragglers"]) == sum(each["resolved_arrival_ns"] for each in job["waits"])
assert sum(each["arrival_ns"] for each in job["waits"]) == job["time"]["wait_arrival_ns"] == sum(row["time"]["wait_arrival_ns"] for row in job["rows"])
assert sum(row["calls"] for row in job["rows"]) == 3 * 51'
      ;;
    perfetto) python 'import json, sys; assert len(json.load(sys.stdin)["traceEvents"]) > 100' ;;
    csv) python 'import csv, sys; rows = list(csv.reader(sys.stdin)); assert len(rows) > 3 and len({len(row) for row in rows}) == 1' ;;
    *)
      has out 'tally_collective_ops_total{job="energy",comm="world",rank="1",op="all_reduce",size_bucket="256"} 50'
      [[ $format != openmetrics ]] || [[ $(tail -n 1 out) == '# EOF' ]] || fail "OpenMetrics has no end"
      if [[ $format == prometheus ]] && command -v promtool >/dev/null; then
        said=$(promtool check metrics <out 2>&1) && [[ -z $said ]] || fail "promtool: $said"
      fi
      ;;
  esac
done
unset format

# What is broken is named, and the rest is reported.
{ echo 'no JSON'; head -c 300 a.jsonl; echo; cat a.jsonl; } >broken.jsonl
runs 0 broken.jsonl b.jsonl missing.jsonl -o broken.html
has err 'tally_report: broken.jsonl:1: line skipped: it is not JSON'
has err 'tally_report: broken.jsonl:2: line skipped: it is not JSON'
has err 'tally_report: missing.jsonl: cannot be opened: No such file or directory; it is left out'
has broken.html '<p class="headline">Rank 1 slows this job.</p>'
runs 0 b.jsonl -o alone.html
has err 'has 3 ranks, but the accounts of 2 are missing (0, 1): sums over its ranks are too low'

# Nothing usable, several jobs, nowhere to write to: no report, and the reason.
echo '{}' >empty.jsonl
runs 1 empty.jsonl missing.jsonl -o none.html
has err 'there is nothing to report: none of the 2 files holds an account'
[[ ! -e none.html ]] || fail "nothing made a page"
sed 's/"job":"energy"/"job":"another"/g' b.jsonl >another.jsonl
runs 1 a.jsonl b.jsonl another.jsonl -o none.html
has err 'several jobs: name one with --job ("another", "energy")'
runs 0 a.jsonl b.jsonl another.jsonl --job energy -o energy.html
has energy.html '<p class="headline">Rank 1 slows this job.</p>'
runs 1 a.jsonl b.jsonl --job neither
has err 'no account of that job'
runs 1 a.jsonl b.jsonl -o none/report.html
has err "cannot write 'none/report.html'"
runs 1 a.jsonl b.jsonl --max-ranks 2 -o none.html
has err 'jobs of at most 2 ranks are read'

# Arguments.
runs 2 --nonsense a.jsonl
has err 'tally_report: '
runs 2
runs 2 a.jsonl --format pdf
runs 2 a.jsonl b.jsonl -o a.jsonl
has err 'is one of the files to read'
runs 0 a.jsonl b.jsonl --format text  # it was not overwritten
runs 0 --help
has out 'Examples:'
compgen -G '*.partial' >/dev/null && fail "partial files are left: $(echo ./*.partial)"

((failures == 0)) || { echo "$failures failures"; exit 1; }
echo "rank 2 was found with $(python3 -c 'import json; print(round(100 * json.load(open("four.json"))["stragglers"][0]["share"], 1))') % of the arrival waiting"
