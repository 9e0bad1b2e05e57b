#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Ranks that an MPI starts, meeting through it and talking by memory, TCP and MPI itself.
# Or ranks that Open MPI starts and that hear of each other by PMIx.
# usage: run.sh open_mpi|mpich|pmix PROGRAM
set -euo pipefail
mpi=$1 program=$2
if [[ $mpi != mpich ]]; then
  launcher=$(command -v mpirun.openmpi || command -v mpirun)
  command=("$launcher" --oversubscribe --bind-to none --mca btl self,vader)
  export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
else
  launcher=$(command -v mpiexec.mpich || command -v mpiexec.hydra)
  command=("$launcher" -launcher fork -bind-to none)
fi
said=$(timeout 60 "${command[@]}" -n 2 true 2>&1) || { echo "skipped: $launcher cannot start ranks here: $said"; exit 77; }
if [[ $mpi == pmix ]]; then
  for ranks in 1 2 5; do
    said=$(TALLY_TRANSPORT=tcp timeout 100 "${command[@]}" -n "$ranks" "$program" 2>&1) || { echo "$said"; echo "run.sh: $ranks ranks failed"; exit 1; }
    grep -qE '^(tcp|thread) ok$' <<<"$said" || { echo "$said"; echo "run.sh: $ranks ranks did not say ok"; exit 1; }
  done
  said=$(TALLY_TRANSPORT=tcp timeout 100 "${command[@]}" -n 2 "$program" late 2>&1) && { echo "$said"; echo "run.sh: rank 0 was late, and nobody minded"; exit 1; }
  grep -q '^deadline passed: PMIx did not say in time where rank 0 is' <<<"$said" || { echo "$said"; echo "run.sh: who waited for rank 0 did not say so"; exit 1; }
  exit 0
fi
for transport in "" tcp mpi; do
  for ranks in 1 2 5; do
    said=$(timeout 100 "${command[@]}" -n "$ranks" "$program" $transport 2>&1) || { echo "$said"; echo "run.sh: $ranks ranks over '$transport' failed"; exit 1; }
    grep -qx ok <<<"$said" || { echo "$said"; echo "run.sh: $ranks ranks over '$transport' did not say ok"; exit 1; }
  done
done
