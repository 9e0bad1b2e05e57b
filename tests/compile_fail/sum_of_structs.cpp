// SPDX-License-Identifier: Apache-2.0
// expect: takes<T> \[with T = Point; Op = tally::v0::Sum\]' evaluated to|Sum::takes<Point>' evaluated to
#include <tally/tally.hpp>

struct Point {
  int x, y;
};

void f(tally::Communicator& comm, std::span<Point> points) {
  comm.all_reduce(points, tally::commutative([](Point a, Point b) { return Point{a.x + b.x, a.y + b.y}; }));
#ifdef TALLY_MISUSE
  comm.all_reduce(points, tally::sum);
#endif
}
