#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The device protocol compiles as CUDA kernels, without a warning.
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
"$nvcc" -std=c++20 --expt-relaxed-constexpr -arch=sm_80 -Werror all-warnings -Xcompiler=-Wall,-Wextra -I"$1" -c "$here/kernels.cu" -o "$work/kernels.o"
