// SPDX-License-Identifier: Apache-2.0
// The model that train.cpp trains: it looks at the last few bytes of a text and predicts the next one. An embedding
// of each byte, one hidden layer, a softmax over all bytes; forward and backward are written out. Nothing here
// knows about ranks.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <random>
#include <span>
#include <string>
#include <vector>

#include <tally/device/seam.hpp>

inline constexpr std::size_t context = 8, features = 16, inputs = context * features, hidden = 128, symbols = 256;
inline constexpr std::size_t chunk = 32;  // samples computed together

/// All parameters, or their gradient, in one piece of memory, so that it can be sent in one piece.
struct Parameters {
  static constexpr std::size_t count = symbols * features + inputs * hidden + hidden + hidden * symbols + symbols;
  std::vector<float> all = std::vector<float>(count + 2);
  float* const embedding = all.data();                                 // [symbols][features]
  float* const hidden_weights = embedding + symbols * features;        // [inputs][hidden]
  float* const hidden_bias = hidden_weights + inputs * hidden;         // [hidden]
  float* const output_weights = hidden_bias + hidden;                  // [hidden][symbols]
  float* const output_bias = output_weights + hidden * symbols;        // [symbols]
  float* const loss = output_bias + symbols;                           // in a gradient: travels with it, so that it needs no call of its own,
  float* const stop = loss + 1;                                        // and so does a rank's word that this step is to be the last, unless it is 0

  /// In the order in which back-propagation is done with them: the output layer with loss and stop, then the rest.
  std::span<float> output_part() { return {output_weights, all.data() + all.size()}; }
  std::span<float> input_part() { return {all.data(), output_weights}; }

  Parameters() = default;
  Parameters(const Parameters&) = delete;  // the pointers point into this one
};

/// out[rows][columns] += a[rows][inner] * b[inner][columns]; a's strides are free, so it may be a transposed matrix.
/// All bounds are constants and four products are added per pass: compilers turn the last loop into vector code.
template <std::size_t rows, std::size_t inner, std::size_t columns>
void multiply_add(float* __restrict out, const float* __restrict a, std::size_t row_stride, std::size_t inner_stride, const float* __restrict b) {
  static_assert(inner % 4 == 0);
  for (std::size_t r = 0; r < rows; ++r)
    for (std::size_t k = 0; k < inner; k += 4) {
      const float* const from = a + r * row_stride + k * inner_stride;
      const float a0 = from[0], a1 = from[inner_stride], a2 = from[2 * inner_stride], a3 = from[3 * inner_stride];
      float* __restrict const sum = out + r * columns;
      const float* __restrict const b0 = b + k * columns;
      for (std::size_t c = 0; c < columns; ++c)
        sum[c] += (a0 * b0[c] + a1 * b0[columns + c]) + (a2 * b0[2 * columns + c] + a3 * b0[3 * columns + c]);
    }
}

template <std::size_t rows, std::size_t columns>
void transpose(const float* from, float* to) {
  for (std::size_t r = 0; r < rows; ++r)
    for (std::size_t c = 0; c < columns; ++c) to[c * rows + r] = from[r * columns + c];
}

/// Adds the losses (in bits) and gradients of samples to a gradient. A sample is a position in the text: the byte
/// there is to be predicted from those before it.
class Learner {
 public:
  /// Call when the parameters have changed.
  void use(const Parameters& p) {
    transpose<inputs, hidden>(p.hidden_weights, hidden_weights_t_.data());
    transpose<hidden, symbols>(p.output_weights, output_weights_t_.data());
  }

  /// At most `chunk` positions; the loss of each counts `weight`. Missing ones are computed with weight 0. `output_done()` is
  /// called when the gradient of the output layer, and the loss, have all that these samples add to them.
  template <class F>
  void add(const Parameters& p, const std::string& text, std::span<const std::size_t> positions, float weight, Parameters& gradient, F&& output_done) {
    const auto byte_at = [&](std::size_t s, std::size_t back) {
      return static_cast<unsigned char>(text[positions[s < positions.size() ? s : 0] - back]);
    };
    // Forward: embed, hidden = tanh(input * W + bias), output = hidden * V + bias.
    for (std::size_t s = 0; s < chunk; ++s) {
      for (std::size_t c = 0; c < context; ++c) std::copy_n(p.embedding + byte_at(s, c + 1) * features, features, &input_[s * inputs + c * features]);
      std::copy_n(p.hidden_bias, hidden, &hidden_[s * hidden]);
      std::copy_n(p.output_bias, symbols, &output_[s * symbols]);
    }
    multiply_add<chunk, inputs, hidden>(hidden_.data(), input_.data(), inputs, 1, p.hidden_weights);
    for (float& h : hidden_) h = std::tanh(h);
    multiply_add<chunk, hidden, symbols>(output_.data(), hidden_.data(), hidden, 1, p.output_weights);

    // Softmax and cross entropy. The gradient at the output is (probabilities - what came) * weight.
    for (std::size_t s = 0; s < chunk; ++s) {
      const std::span<float> out(&output_[s * symbols], symbols);
      const unsigned char target = byte_at(s, 0);
      const float sample_weight = s < positions.size() ? weight : 0.0f;
      const float highest = *std::max_element(out.begin(), out.end()), of_target = out[target];
      float sum = 0;
      for (float& o : out) sum += o = std::exp(o - highest);
      *gradient.loss += sample_weight * (highest + std::log(sum) - of_target) / std::log(2.0f);
      for (float& o : out) o *= sample_weight / sum;
      out[target] -= sample_weight;
    }

    // Backward, layer by layer: weights get input^T * error, the layer below gets error * weights^T.
    multiply_add<hidden, chunk, symbols>(gradient.output_weights, hidden_.data(), 1, hidden, output_.data());
    for (std::size_t s = 0; s < chunk; ++s)
      for (std::size_t o = 0; o < symbols; ++o) gradient.output_bias[o] += output_[s * symbols + o];
    output_done();
    hidden_error_.assign(chunk * hidden, 0.0f);
    multiply_add<chunk, symbols, hidden>(hidden_error_.data(), output_.data(), symbols, 1, output_weights_t_.data());
    for (std::size_t i = 0; i < chunk * hidden; ++i) hidden_error_[i] *= 1 - hidden_[i] * hidden_[i];  // tanh' = 1 - tanh^2
    multiply_add<inputs, chunk, hidden>(gradient.hidden_weights, input_.data(), 1, inputs, hidden_error_.data());
    input_error_.assign(chunk * inputs, 0.0f);
    multiply_add<chunk, hidden, inputs>(input_error_.data(), hidden_error_.data(), hidden, 1, hidden_weights_t_.data());
    for (std::size_t s = 0; s < chunk; ++s) {
      for (std::size_t h = 0; h < hidden; ++h) gradient.hidden_bias[h] += hidden_error_[s * hidden + h];
      for (std::size_t c = 0; c < context; ++c)
        for (std::size_t f = 0; f < features; ++f) gradient.embedding[byte_at(s, c + 1) * features + f] += input_error_[s * inputs + c * features + f];
    }
  }

 private:
  std::vector<float> input_ = std::vector<float>(chunk * inputs), hidden_ = std::vector<float>(chunk * hidden), output_ = std::vector<float>(chunk * symbols);
  std::vector<float> input_error_, hidden_error_;
  std::vector<float> hidden_weights_t_ = std::vector<float>(inputs * hidden), output_weights_t_ = std::vector<float>(hidden * symbols);
};

/// The mean loss of samples, in bits. `scratch` is overwritten.
inline double mean_loss(Learner& learner, const Parameters& p, const std::string& text, std::span<const std::size_t> positions, Parameters& scratch) {
  double sum = 0;
  learner.use(p);
  for (std::size_t i = 0; i < positions.size(); i += chunk) {
    *scratch.loss = 0;
    learner.add(p, text, positions.subspan(i, std::min(chunk, positions.size() - i)), 1, scratch, [] {});
    sum += static_cast<double>(*scratch.loss);
  }
  return sum / static_cast<double>(positions.size());
}

/// Adam (Kingma and Ba, 2015): each parameter moves by its mean gradient, relative to how large its gradients usually are.
struct AdamStep {
  static constexpr float keep_mean = 0.9f, keep_square = 0.99f;
  float mean_scale, square_scale;  // make up for means that begin at 0
  AdamStep() = default;
  TALLY_DEVICE AdamStep(float rate, float steps) : mean_scale(rate / (1 - std::pow(keep_mean, steps))), square_scale(1 / (1 - std::pow(keep_square, steps))) {}
  TALLY_DEVICE float operator()(float value, float gradient, float& mean, float& square) const {
    mean += (1 - keep_mean) * (gradient - mean);
    square += (1 - keep_square) * (gradient * gradient - square);
    return value - mean_scale * mean / (std::sqrt(square_scale * square) + 1e-8f);
  }
};
class Optimizer {
 public:
  explicit Optimizer(float rate) : rate_(rate) {}
  void begin_step() { ++steps_; }
  /// A part of the parameters, which is as far as its gradient is known.
  void step(Parameters& p, const Parameters& gradient, std::span<const float> part) {
    const AdamStep adam(rate_, steps_);
    const auto first = static_cast<std::size_t>(part.data() - gradient.all.data());
    for (std::size_t i = first; i < std::min(first + part.size(), Parameters::count); ++i) p.all[i] = adam(p.all[i], gradient.all[i], mean_[i], square_[i]);
  }

 private:
  const float rate_;
  float steps_ = 0;
  std::vector<float> mean_ = std::vector<float>(Parameters::count), square_ = mean_;
};

inline void initialize(Parameters& p, std::uint64_t seed) {
  std::mt19937_64 random(seed);
  const auto fill = [&](float* first, std::size_t count, double deviation) {
    std::normal_distribution<double> normal(0.0, deviation);
    std::generate_n(first, count, [&] { return static_cast<float>(normal(random)); });
  };
  fill(p.embedding, symbols * features, 0.5);
  fill(p.hidden_weights, inputs * hidden, 1 / std::sqrt(static_cast<double>(inputs)));
  fill(p.output_weights, hidden * symbols, 0.1 / std::sqrt(static_cast<double>(hidden)));  // small: begin near 8 bits
}
