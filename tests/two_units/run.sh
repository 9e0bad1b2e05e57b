#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Two translation units that include the umbrella compile without a warning, link and run, with nothing but an
# include path and -pthread. Under nvcc as host code.
# usage: [TALLY_TEST_CXX=COMPILER] run.sh gcc|clang|nvcc INCLUDE
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
kind=$1 include=$2
case $kind in
  gcc) names=(g++) ;;
  clang) names=(clang++-14 clang++) ;;
  nvcc) names=(nvcc /usr/local/cuda/bin/nvcc) ;;
esac
compiler=
for name in ${TALLY_TEST_CXX:-} "${names[@]}"; do
  if [[ -z $compiler ]] && command -v "$name" >/dev/null; then compiler=$name; fi
done
[[ -n $compiler ]] || { echo "skipped: none of ${names[*]} is here"; exit 77; }
echo "$compiler: $("$compiler" --version | grep -m1 -E '[0-9]+\.[0-9]+')"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [[ $kind == nvcc ]]; then
  # Without -Wpedantic, because what nvcc hands to the host compiler is full of line directives that it dislikes.
  compile=(-x cu -Werror all-warnings -Xcompiler=-pthread,-Wall,-Wextra,-Wconversion,-Wshadow,-Werror)
  link=(-Xcompiler=-pthread)
else
  compile=(-pthread -Wall -Wextra -Wconversion -Wshadow -Wpedantic -Werror)
  link=(-pthread)
fi
for unit in first second; do
  "$compiler" -std=c++20 -I"$include" "${compile[@]}" -c "$here/$unit.cpp" -o "$work/$unit.o"
done
"$compiler" "${link[@]}" "$work/first.o" "$work/second.o" -o "$work/program"
"$work/program"
