// SPDX-License-Identifier: Apache-2.0
// Where joules come from: meters where there are any, else the model.
#pragma once

#include <utility>

#include "model.hpp"
#include "source.hpp"

namespace tally::inline v0 {

struct EnergySettings {
  EnergySettings(ModelMeter m = {}, EnergySources s = {}) : model(m), sources(std::move(s)) {}

  ModelMeter model;
  EnergySources sources;
};

}  // namespace tally::inline v0
