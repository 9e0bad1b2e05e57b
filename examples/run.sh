#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds and runs the main job, from any folder and on a bare Debian 12: installs what is missing of compiler,
# CMake and two header libraries, builds in build/examples and runs train with the arguments given here.
# usage: run.sh [train | mesh | custom_algorithm | carbon | energy | parameter_server | federated] [arguments of that program]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build=$root/build/examples
program=train
if [[ ${1:-} == train || ${1:-} == mesh || ${1:-} == custom_algorithm || ${1:-} == carbon || ${1:-} == energy || ${1:-} == parameter_server || ${1:-} == federated ]]; then
  program=$1
  shift
fi

missing=()
for tool in g++ cmake make; do
  command -v "$tool" >/dev/null || missing+=("$tool")
done
[[ -e /usr/include/CLI/CLI.hpp ]] || missing+=(libcli11-dev)
[[ -e /usr/include/nlohmann/json.hpp ]] || missing+=(nlohmann-json3-dev)
if ((${#missing[@]})); then
  as_root=()
  if ((EUID != 0)); then
    command -v sudo >/dev/null || { echo "run.sh: please install, as root: ${missing[*]}" >&2; exit 2; }
    as_root=(sudo)
  fi
  echo "run.sh: installing ${missing[*]}" >&2
  "${as_root[@]}" apt-get update -qq >&2
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2
fi

mkdir -p "$build"
log=$build/build.log
[[ -x $build/examples/$program ]] || echo "run.sh: building (once)" >&2
if ! {
  cmake -S "$root" -B "$build" -DCMAKE_BUILD_TYPE=Release -DTALLY_BUILD_TESTS=OFF -DTALLY_BUILD_EXAMPLES=ON -DTALLY_BUILD_BENCH=OFF &&
    cmake --build "$build" --target "$program"
} >"$log" 2>&1; then
  cat "$log" >&2
  echo "run.sh: the build failed" >&2
  exit 1
fi
exec "$build/examples/$program" "$@"
