// SPDX-License-Identifier: Apache-2.0
// Time against size as a picture, a panel per operation, drawn by gnuplot as SVG. Limits are dashed.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "jobs.hpp"

namespace bench {

struct Point {
  double bytes, us;
};
struct Line {
  std::string title;
  bool limit;
  int colour;  // the same in all panels
  std::vector<Point> points;
};
struct Panel {
  std::string title;
  bool one_size;  // a bar per line instead of a curve
  std::vector<Line> lines;
};
struct Picture {
  std::string title;
  std::vector<Panel> panels;
};

namespace picture {

inline std::string size_label(double bytes) {
  static constexpr const char* units[] = {"B", "KiB", "MiB", "GiB"};
  std::size_t i = 0;
  while (i < 3 && bytes >= 1024) bytes /= 1024, ++i;
  std::ostringstream text;
  text << bytes << ' ' << units[i];
  return text.str();
}
inline std::string time_label(double us) {
  std::ostringstream text;
  if (us < 1) text << us * 1e3 << " ns";
  else if (us < 1e3) text << us << " µs";
  else if (us < 1e6) text << us / 1e3 << " ms";
  else text << us / 1e6 << " s";
  return text.str();
}

struct Bounds {
  double least = std::numeric_limits<double>::infinity(), most = 0;
  void add(double x) { least = std::min(least, x), most = std::max(most, x); }
};

/// Colours that the colour-blind can tell apart (Okabe and Ito), the first line's the strongest.
inline std::string style(const Line& line) {
  static constexpr std::array colours{"#0072b2", "#d55e00", "#009e73", "#cc79a7", "#666666", "#999999", "#000000", "#e69f00"};
  static constexpr std::array points{7, 5, 9, 13, 15, 0, 0, 11};
  static constexpr std::array dashes{1, 1, 1, 1, 4, 3, 2, 1};
  const auto i = static_cast<std::size_t>(line.colour) % colours.size();
  std::ostringstream text;
  if (line.limit) text << "with lines lw 1.6 dt " << dashes[i];
  else text << "with linespoints lw " << (line.colour == 0 ? 3 : 2) << " pt " << points[i] << " ps 0.6";
  text << " lc rgb '" << colours[i] << "'";
  return text.str();
}

/// One legend for all panels, above them.
inline std::string legend(const Picture& picture) {
  std::vector<const Line*> lines;
  for (const Panel& panel : picture.panels)
    for (const Line& line : panel.lines)
      if (std::none_of(lines.begin(), lines.end(), [&](const Line* known) { return known->colour == line.colour; })) lines.push_back(&line);
  std::sort(lines.begin(), lines.end(), [](const Line* a, const Line* b) { return a->colour < b->colour; });
  std::ostringstream out;
  for (const Line* line : lines) out << ", NaN " << style(*line) << " title \"" << line->title << '"';
  return out.str();
}

inline void time_axis(std::ostream& out, Bounds times) {
  const double from = std::pow(10, std::floor(std::log10(times.least))), to = std::pow(10, std::ceil(std::log10(times.most) + 0.05));
  out << "set yrange [" << from << ":" << to << "]\nset ytics nomirror (";
  for (double t = from; t <= to * 1.01; t *= 10) out << (t == from ? "" : ", ") << "\"" << time_label(t) << "\" " << t;
  out << ")\n";
}

inline void curves(std::ostream& out, const Panel& panel) {
  Bounds sizes, times;
  for (const Line& line : panel.lines)
    for (const Point& point : line.points) {
      sizes.add(point.bytes);
      if (!line.limit) times.add(point.us);  // a copy of a few bytes takes next to nothing
    }
  out << "set logscale x 2\nset xrange [" << sizes.least / 1.3 << ":" << sizes.most * 1.3 << "]\nset xtics nomirror norotate (";
  // No more than about eight labels, at powers of two.
  const double first = std::ceil(std::log2(sizes.least)), last = std::floor(std::log2(sizes.most)), step = std::max(1.0, std::ceil((last - first) / 7));
  for (double e = first; e <= last; e += step) out << (e == first ? "" : ", ") << '"' << size_label(std::exp2(e)) << "\" " << std::exp2(e);
  out << ")\n";
  time_axis(out, times);
  out << "plot ";
  for (std::size_t i = 0; i < panel.lines.size(); ++i) out << (i ? ", " : "") << "'-' using 1:2 notitle " << style(panel.lines[i]);
  out << '\n';
  for (const Line& line : panel.lines) {
    for (const Point& point : line.points) out << point.bytes << ' ' << point.us << '\n';
    out << "e\n";
  }
}

/// Points with their times, in columns with names.
inline void columns(std::ostream& out, const Panel& panel) {
  Bounds times;
  for (const Line& line : panel.lines) times.add(line.points.front().us);
  const auto count = panel.lines.size();
  out << "unset logscale x\nset xrange [-0.6:" << static_cast<double>(count) - 0.4 << "]\nset xtics nomirror norotate (";
  for (std::size_t i = 0; i < count; ++i) {
    std::string name = panel.lines[i].title;
    constexpr std::size_t widest = 11;  // characters, or it would run into its neighbours
    for (std::size_t begin = 0; name.size() - begin > widest;) {
      std::size_t space = name.rfind(' ', begin + widest);
      if (space == name.npos || space < begin) space = name.find(' ', begin);
      if (space == name.npos) break;
      name.replace(space, 1, "\\n");
      begin = space + 2;
    }
    out << (i ? ", " : "") << '"' << name << "\" " << i;
  }
  out << ")\n";
  time_axis(out, times);
  out << "plot ";
  for (std::size_t i = 0; i < count; ++i) out << (i ? ", " : "") << "'-' using 1:2 notitle " << style(panel.lines[i]);
  out << ", '-' using 1:2:3 with labels offset 0,1 font ',11' notitle\n";
  for (std::size_t i = 0; i < count; ++i) {
    const double us = panel.lines[i].points.front().us, x = static_cast<double>(i);
    if (panel.lines[i].limit) out << x - 0.3 << ' ' << us << '\n' << x + 0.3 << ' ' << us << "\ne\n";
    else out << x << ' ' << us << "\ne\n";
  }
  for (std::size_t i = 0; i < count; ++i) {
    const double us = panel.lines[i].points.front().us;
    out << i << ' ' << us << " \"" << time_label(std::stod(cell(us))) << "\"\n";
  }
  out << "e\n";
}

inline std::string script(const Picture& picture, const std::string& file) {
  const auto panels = picture.panels.size(), across = std::min<std::size_t>(panels, panels == 4 ? 2 : 3), down = (panels + across - 1) / across;
  const double width = across == 1 ? 900 : 520.0 * static_cast<double>(across), top = across == 1 ? 100 : 70, height = across == 1 ? 520 : 400, whole = top + height * static_cast<double>(down);
  std::ostringstream out;
  out << "set encoding utf8\n"
      << "set terminal svg size " << width << ',' << whole << " font 'DejaVu Sans,Helvetica,sans-serif,12' background rgb 'white'\n"
      << "set output \"" << file << "\"\nset multiplot\n"
      // The legend is a plot without anything.
      << "set size 1," << top / whole << "\nset origin 0," << 1 - top / whole << "\nset title \"" << picture.title << "\" font ',14'\nunset border\nunset tics\n"
      << "set key center center horizontal Left reverse samplen 3 font ',11'\nset xrange [0:1]\nset yrange [0:1]\nset lmargin 1\nset rmargin 1\nset bmargin 0\n"
      << "plot NaN notitle" << legend(picture) << '\n'
      << "unset key\nset lmargin 10\nset rmargin 2\nset bmargin 4.5\nset border 3 lc rgb '#444444'\nset tics nomirror out\nset grid xtics ytics lc rgb '#dddddd' lw 0.6\nset logscale y\n"
      << "set size " << 1 / static_cast<double>(across) << ',' << height / whole << '\n';
  for (std::size_t i = 0; i < panels; ++i) {
    const Panel& panel = picture.panels[i];
    if (panel.lines.empty()) continue;
    out << "set origin " << static_cast<double>(i % across) / static_cast<double>(across) << ',' << 1 - (top + height * static_cast<double>(i / across + 1)) / whole << '\n'
        << "set title \"" << panel.title << ", time per call\" font ',13' noenhanced\n";
    if (panel.one_size) columns(out, panel);
    else curves(out, panel);
  }
  out << "unset multiplot\n";
  return out.str();
}

}  // namespace picture

inline void draw(const Picture& what, const std::string& file) {
  if (what.panels.empty() || file.find_first_of("\"\\\n") != file.npos) throw std::runtime_error("cannot draw to " + file);
  FILE* const gnuplot = ::popen(find_program("gnuplot").c_str(), "w");
  if (!gnuplot) throw_errno("gnuplot");
  const std::string text = picture::script(what, file);
  std::fwrite(text.data(), 1, text.size(), gnuplot);
  if (::pclose(gnuplot) != 0) throw std::runtime_error("gnuplot could not draw " + file);
}

}  // namespace bench
