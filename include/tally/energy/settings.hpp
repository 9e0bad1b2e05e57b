// SPDX-License-Identifier: Apache-2.0
// Where joules come from, meters where there are any, else the model; and what they are in carbon.
#pragma once

#include <utility>

#include "model.hpp"
#include "source.hpp"

namespace tally::inline v0 {

struct EnergySettings {
  EnergySettings(ModelMeter m = {}, EnergySources s = {}, CarbonRate c = {}) : model(m), sources(std::move(s)), carbon(std::move(c)) {}

  ModelMeter model;
  EnergySources sources;
  CarbonRate carbon;
};

}  // namespace tally::inline v0
