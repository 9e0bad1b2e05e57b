#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A misuse must not compile, and the compiler must give the reason that its file expects (a regular expression: GCC
# and Clang word it differently). Without TALLY_MISUSE the same file compiles, so it is that line that fails.
# usage: run.sh FILE INCLUDE CXX [PRECOMPILED]     PRECOMPILED: where GCC keeps tally.hpp precompiled, or, with FILE '-', is to make it
set -euo pipefail
file=$1 include=$2 cxx=$3 precompiled=${4:-}
export LC_ALL=C
options=(-std=c++20 -I"$include" -Wall -Wextra -Werror)
if ! "$cxx" --version | grep -q clang; then options+=(-fconcepts-diagnostics-depth=4); fi
if [[ -n $precompiled ]]; then
  if [[ $file == - ]]; then
    echo '#include <tally/tally.hpp>' >"$precompiled"
    exec "$cxx" "${options[@]}" -x c++-header "$precompiled" -o "$precompiled.gch"
  fi
  options+=(-include "$precompiled")
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
compile() { "$cxx" "${options[@]}" -fsyntax-only "$@" "$file" 2>&1; }

expected=$(sed -n 's|^// expect: ||p' "$file")
[[ -n $expected ]] || { echo "$file expects nothing"; exit 1; }
compile >"$work/use" &
use=$!
compile -DTALLY_MISUSE >"$work/misuse" &
misuse=$!
if ! wait $use; then
  cat "$work/use"
  echo "does not compile without the misuse either"
  exit 1
fi
if wait $misuse; then
  echo "the misuse compiles"
  exit 1
fi
if ! grep -E "$expected" "$work/misuse"; then
  cat "$work/misuse"
  echo "the misuse does not compile, but the compiler does not say: $expected"
  exit 1
fi
