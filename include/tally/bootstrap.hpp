// SPDX-License-Identifier: Apache-2.0
// How ranks that were started separately find each other: the environment says who they are, and on one host
// rank 0 hands out the shared memory over an abstract Unix socket named after job and user. No file is made.
#pragma once

#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "communicator.hpp"
#include "local_socket.hpp"
#include "options.hpp"
#include "topology.hpp"
#include "transport/shm.hpp"
#include "transport/thread.hpp"

namespace tally::inline v0 {

/// Who this process is.
struct JobInfo {
  Rank rank = 0;
  int size = 1;
  std::string job;       // the same for all ranks, different from other jobs; empty if nothing says
  std::string launcher;  // which of the known ones; empty if none
  bool one_host = true;  // false if the launcher says that some ranks are on others
};

namespace detail {

/// What all ranks are to choose algorithms by.
[[gnu::cold]] inline CostModel model_for(std::string_view transport, int size, const Options& options) {
  CostModel model;
  const int online = static_cast<int>(::sysconf(_SC_NPROCESSORS_ONLN));
  const cpu_set_t allowed = own_cores();
  const int mine = CPU_COUNT(&allowed);
  model.cores = mine > 1 ? mine : online;  // one: launchers bind each rank to a core of its own
  model.objective = options.objective;
  const auto watts = [&](Activity activity) { return static_cast<float>(options.weights.of(activity)); };
  model.copy_watts = (watts(Activity::copy) + watts(Activity::reduce)) / 2;
  model.protocol_watts = watts(Activity::protocol);
  model.spin_watts = watts(Activity::spin);
  model.sleep_watts = watts(Activity::sleep);
  model.spins = options.wait_policy() == WaitPolicy::latency ? 20000 : options.wait_policy() == WaitPolicy::energy ? 5 : 50;
  model.group = std::min(options.group, std::max(size, 1));
  if (!options.model.empty()) read_model(options.model, transport, size, model);
  return model;
}
/// For whoever makes the memory, before the ranks begin.
inline void write_model(const SlotMemory& memory, const Options& options) { memory.write_note(model_for(memory.name(), memory.layout().size(), options)); }

/// An engine over a transport.
template <Transport T>
[[gnu::cold]] Communicator make_communicator(std::unique_ptr<T> transport, const CostModel& model, const Options& options, const Clock& clock = Clock::host()) {
  ModelMeter meter = options.meter;
  meter.enabled = meter.enabled && options.accounting;
  meter.cores_per_rank = std::min(1.0, static_cast<double>(::sysconf(_SC_NPROCESSORS_ONLN)) / transport->size());
  return {std::make_unique<Engine<T>>(std::move(transport), clock, AccountSettings(meter, options.accounting ? options.meters : nullptr, options.carbon, options.on_slack, options.observer), options.wait_policy(), options.accounting), options.timeout, model, options.algorithms, options.order};
}

inline Communicator make_communicator(std::shared_ptr<SlotMemory> memory, Rank me, const Options& options) {
  CostModel model;
  memory->read_note(model);
  return make_communicator(std::make_unique<SlotTransport>(std::move(memory), me), model, options);
}

/// Launchers by the variables they set: rank, size, ranks on this host, job.
[[gnu::cold]] inline JobInfo job_from_environment() {
  struct Launcher {
    const char *name, *rank, *size, *local_size;
    std::initializer_list<const char*> job;
  };
  static const Launcher launchers[] = {
      {"tally", "TALLY_RANK", "TALLY_SIZE", nullptr, {"TALLY_JOB"}},
      {"Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", {"OMPI_MCA_ess_base_jobid", "PMIX_NAMESPACE"}},
      {"MPICH", "PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS", {"PMI_JOBID"}},
      {"torchrun", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", {"TORCHELASTIC_RUN_ID", "MASTER_PORT"}},
      {"Slurm", "SLURM_PROCID", "SLURM_NTASKS", nullptr, {"SLURM_JOB_ID", "SLURM_STEP_ID"}},
  };
  for (const Launcher& l : launchers) {
    const auto size = environment_number<int>(l.size, 1, 1 << 15);
    if (!environment(l.rank)) {
      if (size && l.rank == launchers[0].rank) throw Error(Errc::invalid_argument, "TALLY_SIZE is set but TALLY_RANK is not");
      continue;
    }
    if (!size) {
      if (l.rank == launchers[0].rank) throw Error(Errc::invalid_argument, "TALLY_RANK is set but TALLY_SIZE is not");
      continue;
    }
    JobInfo info{*environment_number<int>(l.rank, 0, *size - 1), *size, "", l.name};
    if (l.local_size)
      if (const auto local = environment_number<int>(l.local_size, 1, 1 << 15); local && *local != *size)
        info.one_host = false;
    for (const char* name : l.job)
      if (const auto part = environment(name)) info.job.append(info.job.empty() ? "" : ".").append(*part);
    if (const auto nodes = environment_number<int>("SLURM_NNODES", 1, 1 << 20); nodes && *nodes > 1 && info.launcher == std::string("Slurm"))
      info.one_host = false;
    return info;
  }
  return {};
}

/// What each rank says first. Rank 0 compares it with its own before any mapping is used.
struct Hello {
  std::uint64_t magic = 0x796c6c6174ull;  // "tally", so other byte orders differ
  std::uint64_t layout = 0;
  std::int32_t rank = 0, size = 0;
  std::uint8_t accounting = 0, tsc = 0, unused[6] = {};
  Place place;
};
struct Welcome {
  std::uint32_t accepted = 0, code = 0;
  char text[504] = {};
};

class Rendezvous {
 public:
  /// `name`: of the place; none: after user and job.
  Rendezvous(const JobInfo& job, const Options& options, std::string name = {}) : job_(job), options_(options), layout_(job.size, options.slots), deadline_(std::chrono::steady_clock::now() + options.timeout), name_(std::move(name)) {
    static std::atomic<unsigned> count{0};  // several init() in one process meet one after another
    if (name_.empty()) name_ = concat({"tally/", ::getuid(), "/", job.job, "/", count++});
    if (name_.size() > longest_local_name) name_ = concat({"tally/", ::getuid(), "/", hash_text(name_)});
  }

  std::shared_ptr<ShmMemory> meet() { return job_.rank == 0 ? host() : join(); }

 private:
  Hello hello() const {
    Hello mine;
    mine.layout = layout_.hash();
    mine.rank = job_.rank;
    mine.size = job_.size;
    mine.accounting = options_.accounting;
    mine.tsc = Clock::host().is_tsc();
    return mine;
  }

  /// What is wrong with a rank that said hello; empty if nothing.
  std::string refuse(const Hello& theirs, const std::vector<Connection>& joined) const {
    const Hello mine = hello();
    const std::string them = concat({"rank ", theirs.rank});
    if (theirs.magic != mine.magic) return "a process of another byte order or version connected";
    if (theirs.size != mine.size) return concat({"ranks disagree on size: rank 0 says ", mine.size, ", ", them, " says ", theirs.size});
    if (theirs.rank <= 0 || theirs.rank >= mine.size) return concat({them, " is not one of ", mine.size});
    if (joined[static_cast<std::size_t>(theirs.rank)]) return concat({"two processes say that they are ", them});
    if (theirs.accounting != mine.accounting) return concat({"accounting is on at some ranks and off at others (rank 0: ", mine.accounting ? "on" : "off", ", ", them, " not)"});
    if (theirs.tsc != mine.tsc) return concat({them, " and rank 0 use different clocks"});
    if (theirs.layout != mine.layout) return concat({them, " and rank 0 have different slot settings or versions of the library"});
    return {};
  }

  [[gnu::cold]] std::shared_ptr<ShmMemory> host() {
    FileDescriptor listener = local_socket();
    const auto [where, length] = local_address(name_);
    if (::bind(listener.get(), reinterpret_cast<const sockaddr*>(&where), length) != 0)
      throw Error(errno == EADDRINUSE ? Errc::invalid_argument : Errc::no_resources,
                  {"rank 0 cannot listen as job '", job_.job, "': ", errno == EADDRINUSE ? "another rank 0 of that job runs; set TALLY_JOB to a name of your own" : errno_text(errno)});
    if (::listen(listener.get(), job_.size) != 0) throw Error(Errc::no_resources, {"rank 0 cannot listen: ", errno_text(errno)});
    const Connection door(std::move(listener));

    auto file = std::make_shared<ShmFile>();
    auto memory = std::make_shared<ShmMemory>(file, layout_, 0, 0);
    CostModel model = model_for(memory->name(), job_.size, options_);
    std::vector<Connection> joined(static_cast<std::size_t>(job_.size));
    std::vector<pid_t> pids(joined.size(), ::getpid());
    std::vector<Place> places(joined.size(), place_of(own_cores()));
    std::string problem;
    std::vector<Connection> silent;  // guests that have not said hello yet: they hold nobody up
    Errc code = Errc::mismatch;
    for (int missing = job_.size - 1; missing > 0 && problem.empty();) {
      std::vector<pollfd> events{{door.get(), POLLIN, 0}};
      for (const auto& guest : silent) events.push_back({guest.get(), POLLIN, 0});
      if (!Connection::wait_any(events, deadline_)) {
        for (Rank r = 1; r < job_.size; ++r)
          if (!joined[static_cast<std::size_t>(r)]) problem += concat({problem.empty() ? "" : ", ", r});
        problem = concat({"rank 0 of job '", job_.job, "' waited ", time_text(options_.timeout), ", but rank ", problem,
                          " did not appear: each must be started on this host, by this user, with the same TALLY_JOB and TALLY_SIZE; ranks on several hosts need TALLY_ADDRESS, too"});
        code = Errc::timeout;
        break;
      }
      for (std::size_t i = silent.size(); i-- > 0 && problem.empty();) {
        if (!events[i + 1].revents) continue;
        Connection guest = std::move(silent[i]);
        silent.erase(silent.begin() + static_cast<std::ptrdiff_t>(i));
        Hello theirs;
        if (!guest.receive(&theirs, sizeof theirs, nullptr, deadline_)) continue;  // no rank
        problem = refuse(theirs, joined);
        if (!problem.empty()) {
          tell(guest, code, problem);
          break;
        }
        const auto r = static_cast<std::size_t>(theirs.rank);
        pids[r] = guest.peer().pid;
        places[r] = theirs.place;
        joined[r] = std::move(guest);
        --missing;
      }
      if (!events[0].revents || !problem.empty()) continue;
      Connection guest(FileDescriptor(::accept4(door.get(), nullptr, nullptr, SOCK_CLOEXEC)));
      const int error = errno;
      if (!guest && (error == EMFILE || error == ENFILE || error == ENOMEM || error == ENOBUFS)) {
        problem = concat({"rank 0 has no descriptor for a rank that joins: ", errno_text(error)});
        code = Errc::no_resources;
      } else if (guest && guest.peer().uid == ::getuid()) {
        silent.push_back(std::move(guest));
      }
    }
    if (!problem.empty()) {
      for (const auto& guest : joined)
        if (guest) tell(guest, code, problem);
      throw Error(code, problem, {0, -1, 0, {}});
    }
    if (options_.group == 0) model.group = group_of(places);
    memory->write_note(model);
    for (const auto& guest : joined) {
      if (!guest) continue;
      Welcome welcome;
      welcome.accepted = 1;
      guest.send(&welcome, sizeof welcome, file->get());
      guest.send(pids.data(), pids.size() * sizeof(pid_t));
    }
    file->watch(pids);
    return memory;
  }

  [[gnu::cold]] std::shared_ptr<ShmMemory> join() {
    const auto [where, length] = local_address(name_);
    Connection host;
    while (!host) {
      FileDescriptor fd = local_socket();
      if (::connect(fd.get(), reinterpret_cast<const sockaddr*>(&where), length) == 0) host = Connection(std::move(fd));
      else if (std::chrono::steady_clock::now() > deadline_)
        throw Error(Errc::timeout, {"rank ", job_.rank, ": rank 0 of job '", job_.job, "' did not appear on this host within the deadline; all ranks need the same TALLY_JOB, and TALLY_ADDRESS where they are on several hosts"}, {job_.rank, 0, 0, {}});
      else std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    if (host.peer().uid != ::getuid()) throw Error(Errc::protocol, {"another user answers as rank 0 of job '", job_.job, "'"});
    Hello mine = hello();
    mine.place = place_of(own_cores());
    Welcome welcome;
    FileDescriptor fd;
    if (!host.send(&mine, sizeof mine) || !host.receive(&welcome, sizeof welcome, &fd, deadline_)) {
      if (std::chrono::steady_clock::now() >= deadline_)
        throw Error(Errc::timeout, {"rank ", job_.rank, " joined job '", job_.job, "', but not all others did within the deadline"}, {job_.rank, 0, 0, {}});
      throw Error(Errc::peer_lost, {"rank 0 of job '", job_.job, "' went away while rank ", job_.rank, " joined"}, {job_.rank, 0, 0, {}});
    }
    welcome.text[sizeof welcome.text - 1] = 0;
    if (!welcome.accepted) throw Error(static_cast<Errc>(welcome.code), welcome.text, {job_.rank, 0, 0, {}});
    if (!fd) throw Error(Errc::no_resources, {"rank ", job_.rank, " has no descriptor for the shared memory"}, {job_.rank, 0, 0, {}});
    std::vector<pid_t> pids(static_cast<std::size_t>(job_.size));
    if (!host.receive(pids.data(), pids.size() * sizeof(pid_t), nullptr, deadline_) || !fd) throw Error(Errc::protocol, "rank 0 sent no shared memory", {job_.rank, 0, 0, {}});
    if (pids[static_cast<std::size_t>(job_.rank)] != ::getpid()) throw Error(Errc::unsupported, "ranks run in different process id namespaces, so they cannot watch each other", {job_.rank, 0, 0, {}});
    auto file = std::make_shared<ShmFile>(std::move(fd));
    file->watch(pids);
    return std::make_shared<ShmMemory>(file, layout_, 0, job_.rank);
  }
  static void tell(const Connection& guest, Errc code, const std::string& problem) {
    Welcome refusal;
    refusal.code = static_cast<std::uint32_t>(code);
    problem.copy(refusal.text, sizeof refusal.text - 1);
    guest.send(&refusal, sizeof refusal);
  }

  const JobInfo& job_;  // of the caller, who waits for this
  const Options& options_;
  SlotLayout layout_;
  Connection::Instant deadline_;
  std::string name_;
};

}  // namespace detail

namespace detail {

class Meeting;
/// Makes a communicator of ranks on several hosts; they meet there, or, where that is null, at the place that the environment names.
using InitNetwork = Communicator (*)(const JobInfo&, const Options&, Meeting*);
/// Those of this program, by name: the header of each adds itself.
inline std::map<std::string_view, InitNetwork>& networks() {
  static std::map<std::string_view, InitNetwork> all;
  return all;
}

}  // namespace detail

/// Who this process is, by what a launcher (mpirun, srun, torchrun, TALLY_RANK) left in its environment.
inline JobInfo job_info() { return detail::job_from_environment(); }

/// The communicator of all ranks that were started together: by mpirun, srun, torchrun, by hand with TALLY_RANK,
/// TALLY_SIZE and TALLY_JOB, or one rank alone; of several hosts where tally/tcp.hpp is included. Arguments are defaults that the
/// environment overrides.
inline Communicator init(const Options& defaults = {}) {
  const Options options = Options::from_environment(defaults);
  JobInfo job = detail::job_from_environment();
  if (job.size == 1) {
    if (!options.is_flat()) options.expect_transport("thread", "alone in their process");
    const auto memory = std::make_shared<ThreadMemory>(SlotLayout(1, options.slots));
    detail::write_model(*memory, options);
    return detail::make_communicator(memory, 0, options);
  }
  if (!job.one_host || options.is_flat() || (options.transport.empty() && detail::environment("TALLY_ADDRESS"))) {
    const std::string_view name = options.network_name();
    if (!options.is_flat()) options.expect_transport(name, "on several hosts");
    if (const auto found = detail::networks().find(name); found != detail::networks().end()) return found->second(job, options, nullptr);
    throw Error(Errc::unsupported, {job.one_host ? "TALLY_ADDRESS or TALLY_TRANSPORT asks for a network" : detail::concat({job.launcher, " started some of the ", job.size, " ranks on other hosts"}), ", and this program has no '", name, name == "mpi" ? "' yet: make the communicator by tally::mpi::communicator" : detail::concat({"': include tally/", name, ".hpp in it"})});
  }
  options.expect_transport("shm", "processes of one host");
  // Without a name of the job, ranks of one job share their parent: the launcher's daemon, or a shell.
  if (job.job.empty()) job.job = detail::concat({"parent", ::getppid()});
  return detail::make_communicator(detail::Rendezvous(job, options).meet(), job.rank, options);
}

}  // namespace tally::inline v0
