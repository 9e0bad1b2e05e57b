#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# tally/cuda.hpp compiles with nvcc without a warning (some of the types, as fast as nvcc can); and where there is a GPU, ranks that share it
# pass the suite in each way.
# usage: run.sh INCLUDE
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
for nvcc in nvcc /usr/local/cuda/bin/nvcc ""; do
  if [[ -n $nvcc ]] && command -v "$nvcc" >/dev/null; then break; fi
done
[[ -n $nvcc ]] || { echo "skipped: no nvcc is here"; exit 77; }
"$nvcc" --version | grep -m1 release
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
compile=("$nvcc" -std=c++20 --expt-relaxed-constexpr -Werror all-warnings -Xcompiler=-Wall,-Wextra -I"$1" "$here/cuda_test.cu")
if [[ ! -e /dev/nvidiactl ]]; then
  "${compile[@]}" -arch=sm_80 -DONLY_COMPILED -Xptxas=-O0 -Xcicc=-O0 -Xcompiler=-O0 -c -o "$work/cuda_test.o"
  echo "it compiles; no GPU is here to run it on"
  exit 0
fi
"${compile[@]}" -arch=native -o "$work/cuda_test"
for way in groups threads processes; do
  for ranks in 2 5; do "$work/cuda_test" "$way" "$ranks"; done
done
"$nvcc" -std=c++20 --expt-relaxed-constexpr -I"$1" "$here/../../examples/train_cuda.cu" -arch=native -o "$work/train_cuda"
for options in "" --no-graph; do "$work/train_cuda" --ranks 2 --steps 300 --verify $options; done
