// SPDX-License-Identifier: Apache-2.0
// What Learner of byte_model.hpp does, by the threads of a block: for devices, and for the host, where tests compare the two.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include <tally/device/seam.hpp>

#include "byte_model.hpp"

/// What a block works in.
struct DeviceLearner {
  static constexpr std::size_t samples = 8;  // computed together
  float input[samples * inputs], hidden_layer[samples * hidden], output[samples * symbols], hidden_error[samples * hidden];

  // Where parameters, and their gradient, lie in one piece: as in Parameters.
  static constexpr std::size_t hidden_weights = symbols * features, hidden_bias = hidden_weights + inputs * hidden, output_weights = hidden_bias + hidden, output_bias = output_weights + hidden * symbols, loss = output_bias + symbols;
  static_assert(loss == Parameters::count);

  /// Adds the losses and gradients of at most `samples` samples; position(s): where sample s lies. All threads of the team call it. A team has
  /// thread(), threads(), sync(), and add(float& to, float), which others may do at the same time.
  template <class Team, class Position>
  TALLY_DEVICE void add(Team& team, const float* p, float* gradient, const char* text, const Position& position, std::size_t count, float weight) {
    const auto each = [&](std::size_t n, auto&& f) {
      for (auto i = static_cast<std::size_t>(team.thread()); i < n; i += static_cast<std::size_t>(team.threads())) f(i);
    };
    const auto byte_at = [&](std::size_t s, std::size_t back) { return static_cast<unsigned char>(text[position(s < count ? s : 0) - back]); };
    each(samples * inputs, [&](std::size_t i) { input[i] = p[byte_at(i / inputs, i % inputs / features + 1) * features + i % features]; });
    team.sync();
    each(samples * hidden, [&](std::size_t i) {
      const std::size_t s = i / hidden, h = i % hidden;
      float sum = p[hidden_bias + h];
      for (std::size_t k = 0; k < inputs; ++k) sum += input[s * inputs + k] * p[hidden_weights + k * hidden + h];
      hidden_layer[i] = std::tanh(sum);
    });
    team.sync();
    each(samples * symbols, [&](std::size_t i) {
      const std::size_t s = i / symbols, o = i % symbols;
      float sum = p[output_bias + o];
      for (std::size_t h = 0; h < hidden; ++h) sum += hidden_layer[s * hidden + h] * p[output_weights + h * symbols + o];
      output[i] = sum;
    });
    team.sync();
    each(samples, [&](std::size_t s) {  // softmax and cross entropy
      float* const out = output + s * symbols;
      const std::size_t target = byte_at(s, 0);
      const float sample_weight = s < count ? weight : 0.0f, of_target = out[target];
      float highest = out[0], sum = 0;
      for (std::size_t o = 1; o < symbols; ++o) highest = out[o] > highest ? out[o] : highest;
      for (std::size_t o = 0; o < symbols; ++o) sum += out[o] = std::exp(out[o] - highest);
      team.add(gradient[loss], sample_weight * (highest + std::log(sum) - of_target) / 0.69314718f);
      for (std::size_t o = 0; o < symbols; ++o) out[o] *= sample_weight / sum;
      out[target] -= sample_weight;
    });
    team.sync();
    each(hidden * symbols, [&](std::size_t i) {
      float sum = 0;
      for (std::size_t s = 0; s < samples; ++s) sum += hidden_layer[s * hidden + i / symbols] * output[s * symbols + i % symbols];
      team.add(gradient[output_weights + i], sum);
    });
    each(symbols, [&](std::size_t o) {
      float sum = 0;
      for (std::size_t s = 0; s < samples; ++s) sum += output[s * symbols + o];
      team.add(gradient[output_bias + o], sum);
    });
    each(samples * hidden, [&](std::size_t i) {
      const std::size_t s = i / hidden, h = i % hidden;
      float sum = 0;
      for (std::size_t o = 0; o < symbols; ++o) sum += output[s * symbols + o] * p[output_weights + h * symbols + o];
      hidden_error[i] = sum * (1 - hidden_layer[i] * hidden_layer[i]);  // tanh' = 1 - tanh^2
    });
    team.sync();
    each(inputs * hidden, [&](std::size_t i) {
      float sum = 0;
      for (std::size_t s = 0; s < samples; ++s) sum += input[s * inputs + i / hidden] * hidden_error[s * hidden + i % hidden];
      team.add(gradient[hidden_weights + i], sum);
    });
    each(hidden, [&](std::size_t h) {
      float sum = 0;
      for (std::size_t s = 0; s < samples; ++s) sum += hidden_error[s * hidden + h];
      team.add(gradient[hidden_bias + h], sum);
    });
    each(samples * inputs, [&](std::size_t i) {
      const std::size_t s = i / inputs, k = i % inputs;
      float sum = 0;
      for (std::size_t h = 0; h < hidden; ++h) sum += hidden_error[s * hidden + h] * p[hidden_weights + k * hidden + h];
      team.add(gradient[byte_at(s, k / features + 1) * features + k % features], sum);
    });
    team.sync();
  }
};
