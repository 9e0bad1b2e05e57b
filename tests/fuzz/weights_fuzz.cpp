// SPDX-License-Identifier: Apache-2.0
// Whatever a weights file holds, it is read as it would be written again, or refused with an Error.
// libFuzzer: tests/fuzz/run.sh
#include <cstddef>
#include <cstdint>
#include <string_view>

#include <tally/energy/weights_file.hpp>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  std::vector<tally::MachineWeights> machines;
  try {
    machines = tally::parse_weights({reinterpret_cast<const char*>(data), size}, "fuzzed");
  } catch (const tally::Error& error) {
    if (error.text().find("run tally_calibrate again") == std::string_view::npos) __builtin_trap();
    return 0;
  }
  const std::string text = tally::weights_text(machines);
  const auto again = tally::parse_weights(text, "written");
  if (again.size() != machines.size() || tally::weights_text(again) != text) __builtin_trap();
  for (std::size_t i = 0; i < again.size(); ++i)
    if (again[i].machine != machines[i].machine || again[i].weights.watts != machines[i].weights.watts) __builtin_trap();
  return 0;
}
