// SPDX-License-Identifier: Apache-2.0
// What a ledger is given: where joules come from, meters where there are any, else the model; what they are in carbon; and whom
// it tells of long waits and of what goes on.
#pragma once

#include <memory>
#include <utility>

#include "../energy/model.hpp"
#include "../energy/source.hpp"
#include "observer.hpp"
#include "slack.hpp"

namespace tally::inline v0 {

struct AccountSettings {
  AccountSettings(ModelMeter m = {}, EnergySources s = {}, CarbonRate c = {}, OnSlack f = {}, std::shared_ptr<Observer> o = {}) : model(m), sources(std::move(s)), carbon(std::move(c)), on_slack(std::move(f)), watched(std::move(o)) {}

  ModelMeter model;
  EnergySources sources;
  CarbonRate carbon;
  OnSlack on_slack;
  detail::Watched watched;
};

}  // namespace tally::inline v0
