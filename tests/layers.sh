#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What the headers may include, and other rules about the tree. A header includes from lower layers, and from its
# own layer only what is named here.
# usage: layers.sh [ROOT]
set -euo pipefail
root=$(cd "${1:-$(dirname "${BASH_SOURCE[0]}")/..}" && pwd)
cd "$root/include/tally"

layers=(
  "text error environment floats grouping types steps plan check algorithms/*"
  "clock wait thread_rule file quiet_thread local_socket figures host memory topology copy operators reduce share kernel_copy objective network/* transport/* energy/* account/* device/*"
  "call staging gate prepared progress run neighbours diagnosis local_steps mailbox share_work engine choose cost group options"
  "calls operation progress_thread fusion communicator mesh bootstrap launch parameter_server parameter_server/* device_communicator device_group/*"
  "tally carbon_files cuda energy job_account nvtx table_guest tcp ucx mpi verbs pmix tls"
)
# Header: what it may include of its own layer. Siblings in algorithms/, transport/ and energy/ stay apart.
exceptions=(
  "error: text"
  "environment: error"
  "steps: grouping"
  "types: floats grouping steps"
  "plan: error steps text types"
  "check: error steps text types plan"
  "algorithms/*: steps"
  "algorithms/hierarchical: grouping algorithms/direct algorithms/recursive algorithms/tree"
  "wait: clock"
  "thread_rule: wait"
  "reduce: operators"
  "share: copy reduce"
  "kernel_copy: share"
  "transport/concept: clock reduce"
  "transport/slots: clock copy topology wait reduce transport/concept transport/queue transport/slot_layout"
  "transport/queue: transport/concept"
  "transport/slot_layout: reduce"
  "transport/thread: transport/slots"
  "transport/simulated: clock transport/concept transport/fiber transport/queue"
  "transport/networked: topology transport/concept network/node"
  "transport/channels: transport/concept transport/queue"
  "transport/tcp: transport/channels transport/concept transport/networked transport/queue transport/tcp_channel"
  "transport/tcp_channel: environment transport/concept transport/queue transport/tcp_stripes network/frame network/socket network/stream"
  "transport/tcp_stripes: clock network/stream"
  "transport/fabric: transport/channels transport/concept transport/networked transport/queue"
  "transport/mpi: transport/fabric"
  "transport/verbs: file transport/connection_thread transport/fabric transport/rdma_cm transport/registrations"
  "transport/rdma_cm: network/interfaces"
  "transport/registrations: transport/memory_watch"
  "transport/memory_watch: file quiet_thread"
  "transport/connection_thread: error file quiet_thread"
  "transport/ucx: environment transport/fabric"
  "transport/doorbell: local_socket transport/slots"
  "transport/any: transport/concept"
  "transport/route: grouping transport/concept transport/slots"
  "network/socket: file"
  "network/frame: network/crc32c transport/concept"
  "network/clock_map: clock transport/concept"
  "network/stream: network/socket"
  "network/control: clock network/frame network/hmac network/socket network/stream"
  "network/interfaces: network/socket"
  "network/meeting: environment file types network/interfaces network/pmi network/socket"
  "network/pmi: environment types network/socket"
  "network/node: clock quiet_thread network/clock_map network/control"
  "network/registry: clock quiet_thread network/control"
  "transport/shm: file transport/slots"
  "energy/board: file energy/attribution energy/source"
  "energy/hub: energy/attribution energy/board energy/regression energy/source"
  "energy/member: local_socket quiet_thread energy/board energy/hub energy/meters energy/source"
  "energy/host_files: file"
  "energy/*: energy/activity energy/meter energy/quantity"
  "energy/counters: energy/host_files"
  "energy/powercap: energy/counters energy/host_files"
  "energy/carbon: figures"
  "energy/perf: energy/counters energy/host_files topology"
  "energy/hwmon: energy/counters energy/host_files"
  "energy/meters: energy/amdsmi energy/host_files energy/hwmon energy/nvml energy/perf energy/powercap"
  "energy/nvml: energy/dynamic_library energy/gpu_board"
  "energy/amdsmi: energy/dynamic_library energy/gpu_board"
  "energy/carbon_csv: energy/carbon"
  "energy/carbon_settings: energy/carbon energy/carbon_csv"
  "energy/carbon_rate: energy/carbon energy/source"
  "energy/regression: energy/least_squares"
  "energy/calibration: energy/least_squares"
  "energy/weights_file: file energy/host_files topology"
  "energy/core_loads: energy/calibration reduce topology wait"
  "objective: energy/activity"
  "account/states: clock"
  "account/snapshot: account/amounts account/states energy/quantity energy/source"
  "account/merge: account/snapshot"
  "account/job: account/merge account/snapshot energy/quantity"
  "account/amounts: energy/activity energy/quantity"
  "local_socket: file"
  "figures: energy/quantity"
  "account/report: account/amounts account/states figures energy/quantity"
  "account/row_energy: account/amounts energy/attribution energy/source"
  "account/wire: account/merge account/snapshot"
  "account/observer: account/report"
  "account/settings: account/observer account/slack energy/model energy/source"
  "account/ledger: host account/amounts account/report account/row_energy account/settings account/slack account/snapshot"
  "account/forms: account/snapshot"
  "account/json_lines: account/forms account/snapshot"
  "account/csv: account/forms account/snapshot"
  "account/prometheus: account/forms account/snapshot"
  "account/perfetto: account/forms account/snapshot"
  "account/verdict: figures account/job"
  "account/summary: figures account/job account/verdict"
  "account/html_charts: figures account/html_text account/job"
  "account/html: account/html_charts account/html_style account/html_text account/job account/merge account/verdict figures"
  "device/window: device/seam"
  "device/session: device/seam device/window"
  "device/fold: device/seam reduce"
  "device/packets: device/fold device/session"
  "device/share: device/fold device/session"
  "device/interpreter: device/fold device/session"
  "device/driver: device/seam"
  "device/kernels: device/interpreter device/packets device/share"
  "device/cuda_block: device/seam"
  "device/cuda_driver: device/cuda_block device/driver host"
  "run: call prepared progress"
  "share_work: call prepared run staging"
  "neighbours: run"
  "diagnosis: call run"
  "local_steps: run"
  "mailbox: call run"
  "engine: call diagnosis gate local_steps mailbox neighbours prepared progress run share_work"
  "prepared: call"
  "staging: call"
  "choose: call"
  "cost: choose"
  "group: cost"
  "options: choose"
  "operation: progress_thread"
  "fusion: calls operation"
  "communicator: calls fusion operation"
  "device_communicator: communicator device_group/engine"
  "device_group/engine: communicator device_group/plans device_group/results device_group/shared_memory"
  "device_group/shared_memory: communicator device_group/relay"
  "bootstrap: communicator"
  "mesh: communicator"
  "parameter_server: communicator parameter_server/node parameter_server/snapshot"
  "parameter_server/snapshot: parameter_server/node"
  "parameter_server/server: parameter_server/post parameter_server/shard"
  "parameter_server/client: parameter_server/operation parameter_server/server"
  "parameter_server/operation: parameter_server/table"
  "parameter_server/node: parameter_server/client parameter_server/door parameter_server/seat"
  "parameter_server/door: parameter_server/post"
  "parameter_server/guest: parameter_server/client parameter_server/door"
  "parameter_server/table: parameter_server/rules"
  "parameter_server/store: parameter_server/rules"
  "parameter_server/post: parameter_server/store parameter_server/table"
  "parameter_server/shard: parameter_server/association parameter_server/rules parameter_server/store parameter_server/table"
  "launch: bootstrap"
  "ucx: tcp"
  "mpi: tcp"
  "verbs: tcp"
)
# Header: the libraries it may include besides the standard one and Linux's. Each has a CMake target of its own; the rest of the
# tree does without.
third_party=(
  "carbon_files: nlohmann"
  "transport/ucx: ucp"
  "transport/mpi: mpi.h"
  "transport/rdma_cm: rdma"
  "transport/verbs: rdma"
  "transport/registrations: infiniband"
  "mpi: mpi.h"
  "pmix: pmix.h"
  "tls: openssl"
  "nvtx: nvtx3"
)
longest=700
top_level="CMakeLists.txt include examples bench tests cmake LICENSE README.md"

failures=0
fail() { echo "$*"; failures=$((failures + 1)); }
shopt -s globstar
headers=(**/*.hpp)
((${#headers[@]} > 1)) || { echo "no headers in $PWD"; exit 1; }

# The layer of a header named without .hpp, or -1.
layer_of() {
  local i pattern
  set -f
  for i in "${!layers[@]}"; do
    for pattern in ${layers[i]}; do
      # shellcheck disable=SC2053
      if [[ $1 == $pattern ]]; then set +f; layer=$i; return; fi
    done
  done
  set +f
  layer=-1
}
excepted() {
  local line pattern
  for line in "${exceptions[@]}"; do
    pattern=${line%%:*}
    # shellcheck disable=SC2053
    if [[ $1 == $pattern && " ${line#*:} " == *" $2 "* ]]; then return 0; fi
  done
  return 1
}

edges=
for header in "${headers[@]}"; do
  name=${header%.hpp}
  layer_of "$name"
  own=$layer
  ((own >= 0)) || fail "$header has no layer: name it in tests/layers.sh"

  while read -r included; do
    [[ -n $included ]] || continue
    # In #include "...", relative to the header.
    target=$(realpath -m --relative-to=. "$(dirname "$header")/$included")
    [[ -f $target ]] || { fail "$header includes $included, which is not a header of include/tally"; continue; }
    edges+="$header $target"$'\n'
    layer_of "${target%.hpp}"
    if ((layer > own)); then
      fail "$header (layer $own) includes $target of a higher layer ($layer)"
    elif ((layer == own)) && ! excepted "$name" "${target%.hpp}"; then
      fail "$header includes $target of its own layer ($own): no exception allows that"
    fi
  done < <(grep -oP '^\s*#\s*include\s*"\K[^"]+' "$header" || true)

  folders="sys|linux|arpa|net|netinet"
  for line in "${third_party[@]}"; do
    [[ ${line%%:*} != "$name" ]] || folders+="|$(sed 's/^ *//; s/ \+/|/g' <<<"${line#*:}")"
  done
  if others=$(grep -nE '^\s*#\s*include\s*<[^>]*/' "$header" | grep -vE "<($folders)/"); then
    fail "$header includes what is neither the standard library, Linux nor relative to it: $others"
  fi
  grep -qx '#pragma once' "$header" || fail "$header has no #pragma once"
  [[ $(head -n 1 "$header") == "// SPDX-License-Identifier: Apache-2.0" ]] || fail "$header does not begin with the SPDX line"
  if macros=$(grep -nP '^\s*#\s*define\s+(?!TALLY_)' "$header"); then fail "$header defines a macro that does not begin with TALLY_: $macros"; fi
  lines=$(grep -c '' "$header")
  ((lines <= longest)) || fail "$header has $lines lines, more than $longest"
done

cycle=$(tsort <<<"$edges" 2>&1 >/dev/null) || fail "the includes are cyclic: $(grep -o '[a-z_/]*\.hpp' <<<"$cycle" | tr '\n' ' ')"

cd "$root"
if files=$(git -c safe.directory='*' ls-files 2>/dev/null) && [[ -n $files ]]; then
  for entry in $(cut -d/ -f1 <<<"$files" | sort -u); do
    [[ $entry == .* || " $top_level " == *" $entry "* ]] || fail "$entry does not belong at the top level"
  done
else
  echo "not a git checkout: the top level is not checked"
fi

((failures == 0)) || { echo "$failures rules broken"; exit 1; }
echo "${#headers[@]} headers in ${#layers[@]} layers: all rules kept"
