// SPDX-License-Identifier: Apache-2.0
// Gloo as a contestant of compare: TCP over loopback, which is all it has between processes of one host.
#include <gloo/allgather.h>
#include <gloo/allreduce.h>
#include <gloo/barrier.h>
#include <gloo/broadcast.h>
#include <gloo/math.h>
#include <gloo/reduce.h>
#include <gloo/rendezvous/context.h>
#include <gloo/rendezvous/file_store.h>
#include <gloo/transport/tcp/device.h>

#include <filesystem>

#include "contestant.hpp"

namespace {

using bench::Op;

void (*const add)(void*, const void*, const void*, std::size_t) = &gloo::sum<float>;

/// Options are made once per operation and size, as a careful user would: they hold registered buffers.
bench::Library library(const std::shared_ptr<gloo::Context>& context) {
  bench::Library l;
  l.version = "Gloo, TCP over loopback";
  l.prepare = [context](const bench::Work& w) -> bench::Call {
    switch (w.op) {
      case Op::all_reduce: {
        const auto options = std::make_shared<gloo::AllreduceOptions>(context);
        options->setOutput(w.in.data(), w.count);
        options->setReduceFunction(add);
        return [options] { gloo::allreduce(*options); };
      }
      case Op::reduce: {
        const auto options = std::make_shared<gloo::ReduceOptions>(context);
        options->setInput(w.in.data(), w.count);
        options->setOutput(w.out.data(), w.count);
        options->setRoot(0);
        options->setReduceFunction(add);
        return [options] { gloo::reduce(*options); };
      }
      case Op::broadcast: {
        const auto options = std::make_shared<gloo::BroadcastOptions>(context);
        options->setOutput(w.in.data(), w.count);
        options->setRoot(0);
        return [options] { gloo::broadcast(*options); };
      }
      case Op::all_gather: {
        const auto options = std::make_shared<gloo::AllgatherOptions>(context);
        options->setInput(w.in.data(), w.block());
        options->setOutput(w.out.data(), w.count);
        return [options] { gloo::allgather(*options); };
      }
      case Op::barrier: {
        const auto options = std::make_shared<gloo::BarrierOptions>(context);
        return [options] { gloo::barrier(*options); };
      }
      default: return {};  // reduce_scatter: only for powers of two and by an interface of its own; the others were not written for it
    }
    return {};
  };
  return l;
}

void start(const bench::Seat& seat) {
  const std::string meeting_point = seat.directory() + "/gloo";
  std::filesystem::create_directory(meeting_point);
  seat.fork_ranks([&](int rank) {
    // Before pinning: Gloo's own thread may run wherever the kernel puts it.
    gloo::transport::tcp::attr where("127.0.0.1");
    std::shared_ptr<gloo::transport::Device> device = gloo::transport::tcp::CreateDevice(where);
    seat.pin(rank);
    gloo::rendezvous::FileStore store(meeting_point);
    const auto context = std::make_shared<gloo::rendezvous::Context>(rank, seat.ranks());
    context->connectFullMesh(store, device);
    seat.compete(rank, library(context));
  });
}

}  // namespace

int main(int argc, char** argv) { return bench::run_contestant(argc, argv, {{"gloo", start}}); }
