// SPDX-License-Identifier: Apache-2.0
// Trains the model of train.cpp with text, parameters and gradient on GPUs: every rank computes the gradient of its slice of each batch, one
// all_reduce on its stream adds the slices up, and every rank takes the same step. The host only launches: a step is a CUDA graph that is
// replayed, unless --no-graph says otherwise. Ranks may have a GPU each, share one, or be on several hosts.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <iomanip>
#include <iostream>
#include <optional>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>
#include <tally/cuda.hpp>
#include <tally/energy.hpp>
#include <tally/tally.hpp>
#include <tally/tcp.hpp>

#include "account_file.hpp"
#include "byte_model.hpp"
#include "command_line.hpp"
#include "device_learner.hpp"
#include "ledger_json.hpp"
#include "progress.hpp"
#include "text.hpp"
#include "training.hpp"

namespace {

using tally::Communicator, tally::CudaCommunicator, tally::CudaDriver, tally::device::cuda::check;

struct Settings {
  int ranks = 2;
  Training training;
  bool processes = false, no_graph = false, verify = false;
  std::vector<std::string> text_files;
  std::string json, account;
};

struct Stream {
  Stream() { check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), {"a stream"}); }
  ~Stream() { (void)cudaStreamDestroy(stream); }
  Stream(const Stream&) = delete;
  cudaStream_t stream = nullptr;
};
template <class T>
class Array {
 public:
  explicit Array(std::size_t count) : count_(count) {
    void* memory = nullptr;
    check(cudaMalloc(&memory, std::max<std::size_t>(count, 1) * sizeof(T)), {count * sizeof(T), " bytes"});
    data_ = static_cast<T*>(memory);
    check(cudaMemset(data_, 0, count * sizeof(T)), {count * sizeof(T), " bytes"});
  }
  Array(const T* from, std::size_t count) : Array(count) { check(cudaMemcpy(data_, from, count * sizeof(T), cudaMemcpyHostToDevice), {"copying to the GPU"}); }
  ~Array() { (void)cudaFree(data_); }
  Array(const Array&) = delete;
  T* data() const { return data_; }
  std::vector<T> values() const {
    std::vector<T> all(count_);
    check(cudaMemcpy(all.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost), {"copying from the GPU"});
    return all;
  }

 private:
  T* data_ = nullptr;
  std::size_t count_;
};

struct Team {
  __device__ int thread() const { return static_cast<int>(threadIdx.x); }
  __device__ int threads() const { return static_cast<int>(blockDim.x); }
  __device__ void sync() const { __syncthreads(); }
  __device__ void add(float& to, float x) const { atomicAdd(&to, x); }
};
/// This rank's samples of a batch; which batch, the device counts itself.
struct Slice {
  std::uint64_t first, end, batch, seed, text_size;
};
__global__ void learn(const float* parameters, float* gradient, const char* text, Slice slice, const std::uint64_t* step) {
  __shared__ DeviceLearner learner;
  Team team;
  const std::uint64_t begin = slice.first + blockIdx.x * DeviceLearner::samples;
  const auto position = [&](std::size_t s) { return context + drawn(*step * slice.batch + begin + s, slice.seed) % (slice.text_size - context); };
  learner.add(team, parameters, gradient, text, position, min(DeviceLearner::samples, slice.end - begin), 1 / static_cast<float>(slice.batch));
}
__global__ void optimize(float* parameters, const float* gradient, float* mean, float* square, float rate, const std::uint64_t* step) {
  const AdamStep adam(rate, static_cast<float>(*step + 1));
  const std::size_t i = blockIdx.x * std::size_t{blockDim.x} + threadIdx.x;
  if (i < Parameters::count) parameters[i] = adam(parameters[i], gradient[i], mean[i], square[i]);
}
__global__ void end_step(const float* gradient, float* losses, std::uint64_t* step) { losses[(*step)++] = gradient[DeviceLearner::loss]; }

/// The model on this rank's GPU.
class Trainer {
 public:
  Trainer(Communicator& comm, CudaCommunicator& gpu, const Settings& settings, const std::string& text)
      : gpu_(gpu), settings_(settings), text_(text.data(), text.size()), parameters_(gpu.allocate<float>(Parameters::count)), gradient_(gpu.allocate<float>(Parameters::count + 1)), mean_(Parameters::count), square_(Parameters::count), losses_(settings.training.steps + 1), step_(1) {
    const auto r = static_cast<std::uint64_t>(comm.rank()), n = static_cast<std::uint64_t>(comm.size());
    const Training& training = settings.training;
    slice_ = {training.batch * r / n, training.batch * (r + 1) / n, training.batch, training.seed, text.size()};
    if (comm.rank() == 0) {
      initialize(first_, training.seed);
      check(cudaMemcpy(parameters_.data(), first_.all.data(), Parameters::count * sizeof(float), cudaMemcpyHostToDevice), {"the first parameters"});
    }
    comm.barrier();  // having memory may wait for kernels, and these for ranks that have none yet
    gpu.broadcast(parameters_, 0, stream_.stream).wait();
    check(cudaMemcpy(first_.all.data(), parameters_.data(), Parameters::count * sizeof(float), cudaMemcpyDeviceToHost), {"the first parameters"});
    if (!settings.no_graph) capture();
  }
  ~Trainer() {
    if (graph_) (void)cudaGraphExecDestroy(graph_);
  }
  Trainer(const Trainer&) = delete;

  void step() {
    if (graph_) check(cudaGraphLaunch(graph_, stream_.stream), {"a step"});
    else enqueue();
  }
  void wait() {
    check(cudaStreamSynchronize(stream_.stream), {"the training"});
    gpu_.wait();
  }
  std::vector<float> losses() const {
    std::vector<float> all = losses_.values();
    all.pop_back();
    return all;
  }
  /// This rank's gradient of the first step against the host's: the largest difference, in parts of the largest element.
  double verify(const std::string& text) {
    compute();
    Parameters got, expected;
    check(cudaMemcpyAsync(got.all.data(), gradient_.data(), (Parameters::count + 1) * sizeof(float), cudaMemcpyDeviceToHost, stream_.stream), {"the gradient"});
    check(cudaStreamSynchronize(stream_.stream), {"the gradient"});
    Learner learner;
    learner.use(first_);
    for (std::uint64_t i = slice_.first; i < slice_.end;) {
      std::vector<std::size_t> positions;
      for (; i < slice_.end && positions.size() < chunk; ++i) positions.push_back(settings_.training.position_of(i, text.size()));
      learner.add(first_, text, positions, 1 / static_cast<float>(slice_.batch), expected, [] {});
    }
    double largest = 1e-30, worst = 0;
    for (std::size_t i = 0; i < Parameters::count; ++i) {
      largest = std::max(largest, static_cast<double>(std::abs(expected.all[i])));
      worst = std::max(worst, static_cast<double>(std::abs(expected.all[i] - got.all[i])));
    }
    return worst / largest;
  }

 private:
  void compute() {
    check(cudaMemsetAsync(gradient_.data(), 0, (Parameters::count + 1) * sizeof(float), stream_.stream), {"the gradient"});
    const std::uint64_t blocks = (slice_.end - slice_.first + DeviceLearner::samples - 1) / DeviceLearner::samples;
    if (blocks > 0) learn<<<static_cast<unsigned>(blocks), 256, 0, stream_.stream>>>(parameters_.data(), gradient_.data(), text_.data(), slice_, step_.data());
    check(cudaGetLastError(), {"the gradient"});
  }
  void enqueue() {
    compute();
    (void)gpu_.all_reduce(gradient_, tally::sum, stream_.stream);  // the loss is its last element
    optimize<<<(Parameters::count + 255) / 256, 256, 0, stream_.stream>>>(parameters_.data(), gradient_.data(), mean_.data(), square_.data(), settings_.training.rate, step_.data());
    end_step<<<1, 1, 0, stream_.stream>>>(gradient_.data(), losses_.data(), step_.data());
    check(cudaGetLastError(), {"a step"});
  }
  void capture() {
    cudaGraph_t graph = nullptr;
    check(cudaStreamBeginCapture(stream_.stream, cudaStreamCaptureModeThreadLocal), {"capturing a step"});
    enqueue();
    check(cudaStreamEndCapture(stream_.stream, &graph), {"capturing a step"});
    check(cudaGraphInstantiate(&graph_, graph, 0), {"the graph of a step"});
    (void)cudaGraphDestroy(graph);
  }

  CudaCommunicator& gpu_;
  const Settings& settings_;
  Stream stream_;
  const Array<char> text_;
  tally::DeviceSymmetric<float> parameters_, gradient_;
  const Array<float> mean_, square_, losses_;
  const Array<std::uint64_t> step_;
  Slice slice_{};
  Parameters first_;
  cudaGraphExec_t graph_ = nullptr;
};

void report(const Settings& settings, CudaCommunicator& gpu, const std::vector<float>& losses, double seconds, int ranks) {
  std::ostream& out = settings.json == "-" ? std::cerr : std::cout;
  const tally::Ledger& ledger = gpu.ledger();
  ledger.wait_for_energy();
  if (!losses.empty()) {
    print_curve(out, losses);
    const double samples = static_cast<double>(losses.size() * settings.training.batch);
    out << "first " << losses.front() << ", last " << losses.back() << "; " << std::setprecision(0) << samples << " samples in " << std::setprecision(2) << seconds << " s, " << std::setprecision(0) << samples / seconds << " per second; ranks: " << ranks << '\n';
  }
  out << '\n' << ledger << std::flush;
  if (settings.json.empty()) return;
  nlohmann::json json{{"steps", losses.size()}, {"ranks", ranks}, {"seconds", seconds}, {"graph", !settings.no_graph}, {"loss_first", nullptr}, {"loss_last", nullptr}, {"ledger", to_json(ledger)}};
  if (!losses.empty()) json["loss_first"] = number_or_null(losses.front()), json["loss_last"] = number_or_null(losses.back());
  write_json(json, settings.json);
}

/// What every rank does.
void train(Communicator& comm, const Settings& settings, const std::string& text) {
  int gpus = 0;
  if (cudaGetDeviceCount(&gpus) != cudaSuccess || gpus == 0) gpus = 1;  // which the driver says more of
  const CudaDriver driver(comm.rank() % gpus);
  check(cudaSetDevice(driver.device()), {"GPU ", driver.device()});
  CudaCommunicator gpu(comm, driver, {}, tally::device_meters(driver.meter_key()));
  Trainer trainer(comm, gpu, settings, text);
  const Training& training = settings.training;
  if (settings.verify) {
    double worst = trainer.verify(text);
    comm.all_reduce(std::span(&worst, 1), tally::max);
    if (worst > 1e-4) throw tally::Error(tally::Errc::protocol, "the GPU's gradient differs from the host's by " + std::to_string(worst) + " of the largest element");
    if (comm.rank() == 0) std::cerr << "the GPUs' gradients are the host's, within " << worst << " of the largest element\n";
  }
  Progress progress(training);
  comm.barrier();
  const Clock::time_point start = Clock::now();
  for (std::uint64_t step = 0; step < training.steps; ++step) {
    if (training.straggler > 0 && training.is_late(comm.rank(), comm.size(), step)) std::this_thread::sleep_for(std::chrono::duration<double, std::milli>(training.straggler));
    trainer.step();
    if ((step + 1) % 256 == 0) trainer.wait();  // no more than that is launched ahead, and what went wrong is heard of
    if (comm.rank() == 0 && (step + 1) % 256 == 0) progress.show(step + 1, trainer.losses()[step]);
  }
  trainer.wait();
  const double seconds = seconds_since(start);
  const std::vector<float> losses = trainer.losses();
  if (comm.rank() == 0 && !losses.empty()) progress.show(training.steps, losses.back());
  if (!settings.account.empty()) write_account_file(settings.account, gpu.account("devices", "train_cuda"));
  if (comm.rank() == 0) report(settings, gpu, losses, seconds, comm.size());
}

}  // namespace

int main(int argc, char** argv) {
  ::setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);  // for ranks that share a GPU; CUDA reads it when it begins
  Settings settings;
  Training& training = settings.training;
  CLI::App app("Trains a byte-level language model by data parallelism, all of it on GPUs, and shows what the synchronising cost.", "train_cuda");
  app.add_option("--ranks", settings.ranks, "ranks to start; they share the GPUs there are. Under a launcher such as mpirun, that decides")->check(CLI::Range(1, 128))->capture_default_str();
  app.add_flag("--processes", settings.processes, "make the ranks processes instead of threads; on one GPU these take turns");
  app.add_option("--steps", training.steps, "steps of the optimizer")->check(CLI::Range(0, 10000000))->capture_default_str();
  app.add_option("--batch", training.batch, "samples per step, all ranks together")->check(CLI::Range(1, 10000000))->capture_default_str();
  app.add_option("--rate", training.rate, "of the optimizer")->check(CLI::Range(1e-6, 10.0))->capture_default_str();
  app.add_option("--seed", training.seed, "of the first parameters and the samples")->capture_default_str();
  app.add_flag("--no-graph", settings.no_graph, "launch each kernel of each step");
  app.add_flag("--verify", settings.verify, "compare the first gradient with what the host computes");
  app.add_option("--straggler", training.straggler, "ms by which a rank's host is late in each step")->check(CLI::Range(0.0, 10'000.0));
  app.add_option("--straggler-rank", training.straggler_rank, "which one: a rank, last, or rotating: in each step another")->capture_default_str()->needs("--straggler");
  app.add_option("--text", settings.text_files, "what to learn; without it, the library's own headers")->option_text("FILE...");
  app.add_option("--json", settings.json, "write the result there too; '-' is standard output")->option_text("FILE");
  app.add_option("--account", settings.account, "each rank writes its account there, for tally_report")->option_text("DIR");
  return run_program(app, argc, argv, [&] {
    const tally::JobInfo job = tally::job_info();
    training.expect_straggler(job.launcher.empty() ? settings.ranks : job.size);
    const std::string text = read_text(settings.text_files);
    on_all_ranks(settings.ranks, !settings.processes, [&](Communicator& comm) { train(comm, settings, text); });
  });
}
