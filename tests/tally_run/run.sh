#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# tally_run starts ranks here and, by a shell that only pretends to be on another host, elsewhere: they learn who they are, their
# lines are marked, signals reach them, a failure ends them all, and nothing is left of them.
# usage: run.sh TALLY_RUN TALLY_PERF     the programs; empty: not built
set -euo pipefail
run=$1 perf=$2
[[ -n $run ]] || { echo "skipped: tally_run is not built (TALLY_BUILD_BENCH)"; exit 77; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
unset TALLY_RANK TALLY_SIZE TALLY_JOB TALLY_ADDRESS TALLY_MEETING TALLY_SECRET TALLY_TRANSPORT

failures=0
fail() { echo "$*"; failures=$((failures + 1)); }
# runs STATUS ARGUMENT...: tally_run ends with that status; what it prints goes to out and err.
runs() {
  local wanted=$1 status=0
  shift
  "$run" "$@" >out 2>err || status=$?
  ((status == wanted)) || fail "tally_run $* ended with $status, not $wanted: $(cat out err)"
}
has() { grep -qF -- "$2" "$1" || fail "$1 lacks: $2; it is: $(head -c 2000 "$1")"; }
lacks() { ! grep -qF -- "$2" "$1" || fail "$1 has: $2"; }
# Nothing that sleeps so long is left: each case has a number of seconds of its own.
gone() {
  local try
  for try in {1..100}; do
    pgrep -f "sleep $1" >/dev/null || return 0
    sleep 0.1
  done
  fail "a rank is left: $(pgrep -af "sleep $1")"
}
# What each rank is to do, as a program of its own.
program() { printf '#!/bin/sh\n%s\n' "$1" >program && chmod +x program; }

cat >there <<'E2'
#!/bin/sh
echo "$1" >>"$(dirname "$0")/hosts_used"
shift
exec sh -c "$*"
E2
chmod +x there
printf '# two hosts\n\none slots=1\ntwo slots=2  # larger\n' >hosts

here=()
for way in here there; do
  [[ $way == here ]] || here=(--hosts hosts --rsh "$work/there")

  program 'echo "I am $TALLY_RANK of $TALLY_SIZE, $1"; echo "to err" >&2; printf "no end"'
  runs 0 -n 3 "${here[@]}" ./program "it's a 'word'"
  for rank in 0 1 2; do
    has out "[$rank] I am $rank of 3, it's a 'word'"
    has out "[$rank] no end"
    has err "[$rank] to err"
  done
  runs 0 -n 3 "${here[@]}" --plain ./program word
  has out "I am 2 of 3, word"
  lacks out "[2]"

  # The first failure is named, and ends those that go on.
  program "[ \$TALLY_RANK = 1 ] && exit 7; sleep 8661; sleep 8661"
  runs 7 -n 3 "${here[@]}" --grace 0.2 ./program
  has err "rank 1"
  has err "ended with status 7"
  has err "ending the 2 ranks that are left"
  gone 8661
  program 'trap "" TERM; [ $TALLY_RANK = 0 ] && exit 3; sleep 8662; sleep 8662; sleep 8662'
  runs 3 -n 2 "${here[@]}" --grace 0.1 ./program
  gone 8662

  # Signals.
  program 'trap "echo one" USR1; trap "echo over; exit 0" TERM; echo ready; while :; do sleep 0.05; done'
  "$run" -n 2 "${here[@]}" ./program >out 2>err &
  job=$!
  for try in {1..200}; do [[ $(grep -c ready out) == 2 ]] && break; sleep 0.05; done
  kill -USR1 $job
  for try in {1..200}; do [[ $(grep -c one out) == 2 ]] && break; sleep 0.05; done
  kill -TERM $job
  status=0
  wait $job || status=$?
  ((status == 143)) || fail "a job that is told to end ends with $status"
  for rank in 0 1; do has out "[$rank] one"; has out "[$rank] over"; done

  # Who is killed takes its ranks along.
  program 'exec sleep 8663'
  "$run" -n 2 "${here[@]}" ./program &
  job=$!
  for try in {1..200}; do [[ $(pgrep -fc "sleep 8663") == 2 ]] && break; sleep 0.05; done
  kill -KILL $job
  wait $job 2>/dev/null || true
  gone 8663
done
[[ $(sort hosts_used | uniq -c | awk '{print $1 $2}' | head -1) == *one ]] || fail "hosts were used as: $(sort hosts_used | uniq -c)"

# By a shell elsewhere ranks get an address to meet at, and a secret that no other process can read off a command line.
program 'echo "$TALLY_ADDRESS ${#TALLY_SECRET} $EXTRA"'
EXTRA=more runs 0 -n 1 --hosts hosts --rsh "$work/there" -x EXTRA ./program
grep -qE '^\[0\] one:[23][0-9]{4} 32 more$' out || fail "ranks elsewhere are told: $(cat out)"

runs 2
has err "--ranks is required"
runs 2 -n 2
has err "no program is named"
runs 2 -n 0 true
runs 2 -n 2 ./not_there
has err "cannot start './not_there': No such file or directory"
runs 2 -n 9 --hosts hosts true
has err "have slots for 3 ranks, not for 9"
runs 2 -n 1 --hosts nowhere true
has err "cannot read 'nowhere'"
printf 'one\ntwo slots=many\n' >odd
runs 2 -n 1 --hosts odd true
has err "odd line 2: 'slots=many' is not slots=N"
printf -- '-oProxyCommand=evil\n' >odd
runs 2 -n 1 --hosts odd true
has err "is no host"
runs 0 --help
has out "--hosts"

# A real job, in memory and over TCP.
if [[ -n $perf ]]; then
  runs 0 -n 3 --plain "$perf" -e 1K -f 8 --seconds 0.02
  has out "# transport  shm"
  has out "wrong values: 0 OK"
  runs 0 -n 3 --plain "$perf" -e 1K -f 8 --seconds 0.02 --transport tcp
  has out "# transport  tcp"
  TALLY_TRANSPORT=tcp runs 0 -n 2 --plain "$perf" -e 1K -f 8 --seconds 0.02
  has out "# transport  tcp"
  runs 0 -n 3 --plain --hosts hosts --rsh "$work/there" --address "file:$work/meeting" "$perf" -e 1K -f 8 --seconds 0.02 --transport tcp
  has out "# transport  tcp"
  has out "wrong values: 0 OK"
  [[ ! -e meeting ]] || fail "the file in which ranks met is left"
  # Started by a process manager that passes on where rank 0 is.
  if mpiexec=$(command -v mpiexec.mpich || command -v mpiexec.hydra); then
    "$mpiexec" -launcher fork -n 3 "$perf" -e 1K -f 8 --seconds 0.02 --transport tcp >out 2>err || fail "mpiexec with tally_perf: $(cat out err)"
    has out "# transport  tcp"
    has out "wrong values: 0 OK"
  else
    echo "not tried: PMI, without mpiexec of MPICH"
  fi
fi

((failures == 0)) && echo "tally_run: all as it should be"
((failures == 0))
