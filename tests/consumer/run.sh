#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds and runs a user's project that gets tally by find_package from an installation, or by add_subdirectory.
# usage: run.sh find_package|add_subdirectory SOURCE CMAKE GENERATOR CXX
set -euo pipefail
way=$1 source=$2 cmake=$3 generator=$4 cxx=$5
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
configure() { "$cmake" -G "$generator" -DCMAKE_CXX_COMPILER="$cxx" "$@" >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }; }
build() { "$cmake" --build "$@" >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }; }

if [[ $way == find_package ]]; then
  configure -S "$source" -B "$work/tally" -DTALLY_BUILD_TESTS=OFF -DTALLY_BUILD_EXAMPLES=OFF -DTALLY_BUILD_BENCH=OFF -DCMAKE_INSTALL_PREFIX="$work/prefix"
  build "$work/tally" --target install
  rm -rf "$work/tally"
  configure -S "$source/tests/consumer" -B "$work/consumer" -DCMAKE_PREFIX_PATH="$work/prefix"
else
  configure -S "$source/tests/consumer" -B "$work/consumer" -DTALLY_FOLDER="$source"
fi
build "$work/consumer"
[[ $("$work/consumer/consumer") == "1 + 2 = 3" ]] || { echo "the program prints something else"; exit 1; }
[[ ! -e $work/consumer/carbon || $("$work/consumer/carbon") == "400 g" ]] || { echo "the program that accounts carbon prints something else"; exit 1; }
