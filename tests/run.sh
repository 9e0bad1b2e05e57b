#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds and runs all tests, from any folder and on a bare Debian 12: installs what is missing, then runs three
# configurations in build/: all with GCC, the tests with Clang 14 under ASan and UBSan (with TALLY_TEST_LONG=1 examples and bench, too),
# and the tests with Clang 14 under TSan.
# usage: tests/run.sh [--fast] [arguments of ctest]     --fast: the first configuration only
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [[ ${1:-} == --help || ${1:-} == -h ]]; then
  sed -n '3,7s/^# //p' "${BASH_SOURCE[0]}"
  exit 0
fi
fast=
if [[ ${1:-} == --fast ]]; then
  fast=yes
  shift
fi
ctest_arguments=("$@")

missing=()
for tool in g++ cmake make; do
  command -v "$tool" >/dev/null || missing+=("$tool")
done
[[ -n $fast ]] || command -v clang++-14 >/dev/null || missing+=(clang-14)
[[ -n $fast ]] || compgen -G "/usr/lib/llvm-14/lib/clang/*/lib/linux/libclang_rt.asan-*" >/dev/null || missing+=(libclang-rt-14-dev)
[[ -e /usr/include/catch2/catch.hpp ]] || missing+=(catch2)
[[ -e /usr/include/CLI/CLI.hpp ]] || missing+=(libcli11-dev)
[[ -e /usr/include/nlohmann/json.hpp ]] || missing+=(nlohmann-json3-dev)
[[ -e /usr/include/ucp/api/ucp.h ]] || missing+=(libucx-dev)
[[ -e /usr/include/rdma/rdma_cma.h ]] || missing+=(libibverbs-dev librdmacm-dev)
[[ -e /usr/include/openssl/ssl.h ]] || missing+=(libssl-dev)
compgen -G "/usr/lib/*/pkgconfig/pmix.pc" >/dev/null || missing+=(libpmix-dev pkg-config)
command -v mpirun.openmpi >/dev/null || missing+=(openmpi-bin libopenmpi-dev pkg-config)
command -v mpiexec.mpich >/dev/null || missing+=(mpich libmpich-dev pkg-config)
# What checks the exporters; a test whose tool is missing says so and is skipped.
command -v promtool >/dev/null || missing+=(prometheus)
command -v chromium >/dev/null || missing+=(chromium)
python3 -c 'import jsonschema' 2>/dev/null || missing+=(python3-jsonschema)
if ((${#missing[@]})); then
  as_root=()
  if ((EUID != 0)); then
    command -v sudo >/dev/null || { echo "run.sh: please install, as root: ${missing[*]}" >&2; exit 2; }
    as_root=(sudo)
  fi
  echo "run.sh: installing ${missing[*]}"
  "${as_root[@]}" apt-get update -qq
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

# The sanitizers of GCC 12 do not know where newer kernels may place memory; without randomisation all is as they expect.
fixed_addresses=()
if setarch -R true 2>/dev/null; then fixed_addresses=(setarch -R); fi

failed=()
fail() { failed+=("$1"); echo "run.sh: $1: $2"; }

# configuration NAME WHAT CMAKE-ARGUMENT... [-- CTEST-ARGUMENT...]
configuration() {
  local name=$1 what=$2 start=$SECONDS
  shift 2
  local options=()
  while (($#)) && [[ $1 != -- ]]; do options+=("$1"); shift; done
  (($# == 0)) || shift
  local build=$root/build/$name
  mkdir -p "$build"
  echo "run.sh: $name: building $what in build/$name"
  if ! { cmake -S "$root" -B "$build" "${options[@]}" && cmake --build "$build" -j "$(nproc)"; } >"$build/build.log" 2>&1; then
    cat "$build/build.log"
    fail "$name" "the build failed"
    return
  fi
  echo "run.sh: $name: built in $((SECONDS - start)) s"
  (cd "$build" && "${run[@]}" ctest --output-on-failure --no-tests=error -j "$(nproc)" "$@" "${ctest_arguments[@]}") || fail "$name" "tests failed"
  grep '^skipped: ' "$build/Testing/Temporary/LastTest.log" || true
}

run=()
configuration tests "everything" -DCMAKE_BUILD_TYPE=Release
if [[ -z $fast ]]; then
  # With sanitizers Clang takes three to four times as long to compile at -O1, and GCC twice as long as Clang. What only compiles
  # was compiled above.
  run=("${fixed_addresses[@]}")
  programs=(-DTALLY_BUILD_EXAMPLES=OFF -DTALLY_BUILD_BENCH=OFF) without='|tally_'
  [[ -z ${TALLY_TEST_LONG:-} ]] || programs=() without=
  configuration tests-clang "the tests with Clang 14, ASan and UBSan" "${programs[@]}" -DCMAKE_BUILD_TYPE=Debug "-DCMAKE_CXX_FLAGS_DEBUG=-O0 -g1" -DTALLY_SANITIZE=address -DCMAKE_CXX_COMPILER=clang++-14 -- -E "^(layers|headers_compile|compile_fail|object_size|two_units|consumer|export_|report_page_in$without)"
  configuration tests-thread "the tests with Clang 14 and TSan" -DCMAKE_BUILD_TYPE=Debug "-DCMAKE_CXX_FLAGS_DEBUG=-O0 -g1" -DTALLY_SANITIZE=thread -DCMAKE_CXX_COMPILER=clang++-14 -DTALLY_BUILD_EXAMPLES=OFF -DTALLY_BUILD_BENCH=OFF -- -LE build
fi

minutes="$((SECONDS / 60)) min $((SECONDS % 60)) s"
if ((${#failed[@]})); then
  echo "run.sh: FAILED in $minutes: ${failed[*]}"
  exit 1
fi
echo "run.sh: all tests passed in $minutes"
