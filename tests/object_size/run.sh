#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What it costs to include the umbrella: a program with one all_reduce, at -O2, stays below 896 KiB of object code. The
# time is printed; it depends on what else the machine does.
# usage: run.sh INCLUDE COMPILER
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
object=$(mktemp)
trap 'rm -f "$object"' EXIT
TIMEFORMAT='%U s'
time "$2" -std=c++20 -O2 -I"$1" -c "$here/program.cpp" -o "$object"
bytes=$(stat -c %s "$object")
echo "$bytes bytes"
((bytes < 896 * 1024)) || { echo "more than 896 KiB"; exit 1; }
