// SPDX-License-Identifier: Apache-2.0
// An algorithm of one's own: what moves where, in the order in which one would say it. The checker proves it for all rank
// and element counts asked for, and then it runs like the library's own.

#include <iostream>
#include <string>
#include <vector>

#include <tally/check.hpp>
#include <tally/tally.hpp>

/// Everyone's data walks down a line to rank 0, every rank adding its own, and the result walks back up.
struct Line {
  static constexpr std::string_view name = "line";

  static tally::Steps all_reduce(tally::Shape shape) {
    const auto [me, n, root, in, out, group] = shape;  // in and out are cut into n blocks; all() is the whole
    if (n == 1) co_yield tally::copy(in.all(), out.all());
    if (me + 1 < n) co_yield tally::receive_combine(me + 1, in.all(), out.all());  // out = in . what comes
    if (me > 0) {
      co_yield tally::send(me - 1, me + 1 < n ? out.all() : in.all());
      co_yield tally::receive(me - 1, out.all());
    }
    if (me + 1 < n) co_yield tally::send(me + 1, out.all());
  }
};

int main() {
  for (int n = 1; n <= 16; ++n)
    for (const std::size_t elements : {0u, 1u, 100u}) {
      const std::string problem = tally::check({{tally::Collective::all_reduce, 0, n, 0, elements}}, Line::all_reduce);
      if (!problem.empty()) {
        std::cerr << n << " ranks, " << elements << " elements: " << problem << '\n';
        return 1;
      }
    }
  std::cout << "proven for 1 to 16 ranks: no deadlock, no unordered access, each input folded once, in order, the same on all ranks\n";

  tally::launch(4, [](tally::Communicator& comm) {
    std::vector<double> data(1000, comm.rank() + 1.0);
    const tally::Report report = comm.all_reduce<Line>(data, tally::sum);
    if (comm.rank() == 0) std::cout << "1 + 2 + 3 + 4 = " << data[0] << "\n" << report << '\n';
  });
}
