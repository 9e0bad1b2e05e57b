#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The tests of verbs in a virtual machine with RDMA devices made of software: over RoCE; with TALLY_TEST_LONG=1 over iWARP, too, whose
# module has to be built first.
# usage: run.sh PROGRAM
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
program=$1

# run_in_vm PROVIDER SECONDS ARGUMENT...: what the program says, and a failure where a test only says that it cannot run.
run_in_vm() {
  local provider=$1 limit=$2 status=0 said
  shift 2
  # ulimit: memory that is registered counts as locked.
  said=$("$here/run-in-vm" --provider "$provider" --timeout "$limit" --with "$program" sh -c 'ulimit -l unlimited && exec "$@"' sh "$program" "$@" 2>&1) || status=$?
  echo "$said" | tail -60
  ((status == 0)) || { echo "run.sh: over $provider it failed with $status"; exit 1; }
  ! grep -q '^skipped: ' <<<"$said" || { echo "run.sh: over $provider a test did not run"; exit 1; }
}
said=$("$here/run-in-vm" true 2>&1) || { echo "$said" | tail -20; echo "skipped: no virtual machine can be had here"; exit 77; }
run_in_vm rxe 600
if [[ -n ${TALLY_TEST_LONG:-} ]]; then
  run_in_vm siw 600 "~*three queue pairs*"
fi
