// SPDX-License-Identifier: Apache-2.0
// Where ranks are started by what speaks PMIx (mpirun of Open MPI, prterun, srun --mpi=pmix), they learn by it where to meet: include this
// beside tally/tcp.hpp, link libpmix (CMake target tally::pmix), and init() needs no address.
#pragma once

#include <pmix.h>

#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "environment.hpp"
#include "network/meeting.hpp"

namespace tally::inline v0::detail {

class Pmix {
 public:
  Pmix() { check(::PMIx_Init(&me_, nullptr, 0), "be reached"); }
  ~Pmix() { ::PMIx_Finalize(nullptr, 0); }
  Pmix(const Pmix&) = delete;
  Rank rank() const { return static_cast<Rank>(me_.rank); }

  std::string from_rank_0(std::string_view word, nanoseconds limit) {
    if (me_.rank == 0) {
      pmix_value_t value;
      PMIX_VALUE_CONSTRUCT(&value);
      value.type = PMIX_STRING;
      std::string text(word);
      value.data.string = text.data();  // of which PMIx takes a copy
      check(::PMIx_Put(PMIX_GLOBAL, key, &value), "keep where rank 0 is");
      check(::PMIx_Commit(), "say where rank 0 is");
    }
    pmix_info_t how[2];
    PMIX_INFO_CONSTRUCT(&how[0]);
    PMIX_INFO_CONSTRUCT(&how[1]);
    bool collect = true;
    int seconds = static_cast<int>(std::chrono::ceil<std::chrono::seconds>(limit).count());
    PMIX_INFO_LOAD(&how[0], PMIX_COLLECT_DATA, &collect, PMIX_BOOL);
    PMIX_INFO_LOAD(&how[1], PMIX_TIMEOUT, &seconds, PMIX_INT);
    pmix_proc_t all = me_, first = me_;
    all.rank = PMIX_RANK_WILDCARD;
    first.rank = 0;
    const pmix_status_t met = ::PMIx_Fence(&all, 1, how, 2);
    if (met == PMIX_ERR_TIMEOUT) throw Error(Errc::timeout, {"PMIx did not say in time where rank 0 is: some ranks did not ask"}, {rank(), -1, 0, {}});
    check(met, "wait for all ranks");
    pmix_value_t* found = nullptr;
    check(::PMIx_Get(&first, key, nullptr, 0, &found), "say where rank 0 is");
    std::string where = found->type == PMIX_STRING && found->data.string ? found->data.string : "";
    PMIX_VALUE_RELEASE(found);
    return where;
  }

 private:
  static constexpr const char* key = "tally";
  void check(pmix_status_t status, const char* what) const {
    if (status != PMIX_SUCCESS) throw Error(Errc::protocol, {"PMIx cannot ", what, ": ", ::PMIx_Error_string(status), "; name a place to meet by TALLY_ADDRESS"});
  }
  pmix_proc_t me_{};
};

inline std::optional<Teller> pmix_teller() {
  if (!environment("PMIX_RANK") || !environment("PMIX_NAMESPACE")) return std::nullopt;
  auto pmix = std::make_shared<Pmix>();
  return Teller{pmix->rank(), [pmix](std::string_view word, nanoseconds limit) { return pmix->from_rank_0(word, limit); }};
}
inline const bool pmix_tells = (tellers().push_back(pmix_teller), true);

}  // namespace tally::inline v0::detail
