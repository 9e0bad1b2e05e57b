// SPDX-License-Identifier: Apache-2.0
// The HTML report: what it says of jobs of every kind, that it is well-formed, loads nothing and lets nothing through, and that it
// never takes what is unknown for nothing.
#include <catch2/catch.hpp>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <locale>
#include <map>
#include <set>
#include <span>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <tally/account/html.hpp>
#include <tally/account/summary.hpp>

#include "report_accounts.hpp"
#include "sample_accounts.hpp"

using namespace tally;
using report_accounts::accounts;
using report_accounts::JobShape;

namespace {

std::string page_of(const std::vector<Account>& all, HtmlOptions options = {}) {
  std::ostringstream out;
  write_html(out, job_of(all), all, std::move(options));
  return out.str();
}
Verdict verdict(const std::vector<Account>& all) { return verdict_of(job_of(all), all); }
bool contains(std::string_view text, std::string_view part) { return text.find(part) != std::string_view::npos; }
std::size_t count(std::string_view text, std::string_view part) {
  std::size_t n = 0;
  for (std::size_t at = text.find(part); at != std::string_view::npos; at = text.find(part, at + part.size())) ++n;
  return n;
}
/// From `from` up to the next `to`.
std::string_view between(std::string_view text, std::string_view from, std::string_view to) {
  const std::size_t begin = text.find(from);
  REQUIRE(begin != std::string_view::npos);
  const std::size_t end = text.find(to, begin + from.size());
  REQUIRE(end != std::string_view::npos);
  return text.substr(begin + from.size(), end - begin - from.size());
}
std::string_view section(std::string_view page, std::string_view id) { return between(page, "<section id=\"" + std::string(id) + "\"", "</section>"); }

/// What is wrong with the markup: elements are closed in order, attributes are quoted, text is escaped, ids are unique and links
/// lead to them. Empty if nothing is.
std::string fault_of(std::string_view page) {
  std::vector<std::string> open;
  std::set<std::string, std::less<>> ids, wanted;
  std::size_t at = 0;
  const auto fault = [&](std::string_view what) { return std::string(what) + " at: " + std::string(page.substr(at, 60)); };
  if (!page.starts_with("<!DOCTYPE html>\n")) return "no doctype";
  at = 16;
  while (at < page.size()) {
    const char c = page[at];
    if (c == '&') {
      const std::size_t end = page.find(';', at);
      if (end == std::string_view::npos || end - at > 7) return fault("bare &");
      const std::string_view entity = page.substr(at + 1, end - at - 1);
      if (entity != "amp" && entity != "lt" && entity != "gt" && entity != "quot" && !entity.starts_with("#")) return fault("unknown entity");
      at = end + 1;
    } else if (c == '>') {
      return fault("bare >");
    } else if (c != '<') {
      if (static_cast<unsigned char>(c) < 0x20 && c != '\n') return fault("control character");
      ++at;
    } else if (page.substr(at, 2) == "</") {
      const std::size_t end = page.find('>', at);
      if (open.empty() || end == std::string_view::npos || page.substr(at + 2, end - at - 2) != open.back()) return fault("wrong end, expected " + (open.empty() ? "none" : open.back()));
      open.pop_back();
      at = end + 1;
    } else {
      std::size_t end = at + 1;
      const auto is_name = [&] { return end < page.size() && (std::isalnum(static_cast<unsigned char>(page[end])) != 0 || page[end] == '-'); };
      while (is_name()) ++end;
      const std::string name(page.substr(at + 1, end - at - 1));
      if (name.empty()) return fault("no name");
      std::set<std::string> attributes;
      while (end < page.size() && page[end] == ' ') {
        const std::size_t begin = ++end;
        while (is_name() || (end < page.size() && (page[end] == 'B' || page[end] == ':'))) ++end;
        const std::string attribute(page.substr(begin, end - begin));
        if (!attributes.insert(attribute).second) return fault("attribute twice");
        if (attribute.starts_with("on") || attribute == "src") return fault("attribute that must not be");
        if (end < page.size() && page[end] == '=') {
          if (page.substr(end, 2) != "=\"") return fault("attribute without quotes");
          const std::size_t close = page.find('"', end + 2);
          const std::string value(page.substr(end + 2, close - end - 2));
          if (contains(value, "<")) return fault("< in an attribute");
          if (attribute == "id" && !ids.insert(value).second) return fault("id twice");
          if (attribute == "href") {
            if (!value.starts_with("#")) return fault("link out of the page");
            wanted.insert(value.substr(1));
          }
          if (attribute == "aria-labelledby") {
            std::istringstream names(value);
            for (std::string id; names >> id;) wanted.insert(id);
          }
          end = close + 1;
        }
      }
      const bool closed = page.substr(end, 2) == "/>";
      if (!closed && page.substr(end, 1) != ">") return fault("tag not closed");
      at = end + (closed ? 2 : 1);
      if (closed || name == "meta") continue;
      if (name == "style" || name == "script") {
        const std::size_t close = page.find("</" + name + ">", at);
        if (close == std::string_view::npos || contains(page.substr(at, close - at), "<")) return fault("text of " + name);
        at = close + name.size() + 3;
        continue;
      }
      open.push_back(name);
    }
  }
  if (!open.empty()) return "not closed: " + open.back();
  for (const std::string& id : wanted)
    if (!ids.contains(id)) return "nothing has the id " + id;
  return {};
}

void check_page(std::string_view page) {
  CHECK(fault_of(page) == "");
  CHECK_FALSE(contains(page, "http://"));
  CHECK_FALSE(contains(page, "https://"));
  CHECK_FALSE(contains(page, "nan"));
  CHECK_FALSE(contains(page, "inf\""));
  CHECK(contains(page, "default-src 'none'"));
}

JobShape late(int ranks, std::vector<std::pair<Rank, std::int64_t>> ms) {
  JobShape shape;
  shape.ranks = ranks;
  shape.late = [ms = std::move(ms)](Rank r, int) {
    for (const auto& [rank, by] : ms)
      if (rank == r) return by * 1'000'000;
    return std::int64_t{0};
  };
  return shape;
}
/// Each rank is 3 ms late in its turn.
JobShape in_turn(int ranks, int calls) {
  JobShape shape;
  shape.ranks = ranks;
  shape.calls = calls;
  shape.late = [ranks](Rank r, int call) { return std::int64_t{call % ranks == r ? 3'000'000 : 0}; };
  return shape;
}

}  // namespace

TEST_CASE("One late rank is named, with what it costs in time and joules") {
  JobShape shape = late(4, {{2, 3}});
  shape.watts = 5;
  const std::vector<Account> all = accounts(shape);
  const Verdict v = verdict(all);
  CHECK(v.finding == Finding::one_rank);
  CHECK(v.ranks == std::vector<Rank>{2});
  CHECK(v.headline == "Rank 2 slows this job.");
  CHECK(v.detail == "The other 3 ranks waited 30 ms each for it, 90 ms together, 100 % of all arrival waiting and 30 % of their time, and drew 450 mJ (modelled, +- 40 %) meanwhile.");
  REQUIRE(v.asides.size() == 1);
  CHECK(v.asides[0] == "100 % of that waiting shows in all_reduce of up to 1 MiB (ring): what the rank does before that call is where to look.");
  const std::string page = page_of(all);
  check_page(page);
  const std::string_view on_page = section(page, "verdict");
  CHECK(contains(on_page, "data-finding=\"one_rank\" data-ranks=\"2\""));
  CHECK(contains(on_page, "<p class=\"headline\">Rank 2 slows this job.</p>"));
  CHECK(contains(on_page, "waited 30\u00A0ms each for it, 90\u00A0ms together, 100\u00A0% of all arrival waiting and 30\u00A0% of their time, and drew 450\u00A0mJ (modelled, ±\u00A040\u00A0%) meanwhile."));
}

TEST_CASE("What a late rank costs in joules is unknown without a meter, and the verdict says so") {
  const Verdict v = verdict(accounts(late(2, {{1, 3}})));
  CHECK(v.detail == "The other rank waited 30 ms for it, 100 % of all arrival waiting and 30 % of its time. What that cost in joules is not known: no meter.");
}

TEST_CASE("A rank that hands on what it waited itself is not taken for the culprit, though not all its waits can be followed") {
  const std::vector<Account> all = sample::accounts();
  const JobAccount job = job_of(all);
  REQUIRE(job.followed < 0.9);
  REQUIRE(2 * job.stragglers[1].share > job.stragglers[0].share);  // it looks as bad as the culprit
  const Verdict v = verdict_of(job, all);
  CHECK(v.finding == Finding::one_rank);
  CHECK(v.ranks == std::vector<Rank>{sample::straggler});
  CHECK(v.asides.front() == "Rank 5 runs on host node-b.");
  CHECK(v.asides.back() == "Rank 4 looks late, too, but hands on what it waited itself: 221 ms charged to it lead back to others, and so may much of its other 504 ms, which could not all be followed.");
}

TEST_CASE("Two ranks that are late alike are both named, many are counted") {
  JobShape shape = late(6, {});
  shape.late = [](Rank r, int call) { return std::int64_t{r == (call % 2 == 0 ? 1 : 4) ? 3'000'000 : 0}; };
  const Verdict two = verdict(accounts(shape));
  CHECK(two.finding == Finding::several_ranks);
  CHECK(two.headline == "Ranks 1 and 4 slow this job.");
  CHECK(two.detail == "The others waited 150 ms for them, 100 % of all arrival waiting and 38 % of their time. What that cost in joules is not known: no meter.");
  CHECK(two.asides.size() == 1);  // all ranks are on one host
  shape.ranks_per_host = 3;
  shape.late = [](Rank r, int call) { return std::int64_t{r == (call % 2 == 0 ? 3 : 4) ? 3'000'000 : 0}; };
  CHECK(verdict(accounts(shape)).asides.front() == "They run on host node-1.");
  shape.ranks = 20;
  shape.late = [](Rank r, int call) { return std::int64_t{r == call % 5 ? 3'000'000 : 0}; };
  CHECK(verdict(accounts(shape)).headline == "Ranks 0, 1, 2 and 2 others slow this job.");
}

TEST_CASE("Ranks that are late in turn are not blamed") {
  const Verdict four = verdict(accounts(in_turn(4, 12)));
  CHECK(four.finding == Finding::spread);
  CHECK(four.ranks.empty());
  CHECK(four.headline == "No single rank slows this job.");
  CHECK(four.detail == "The ranks come late in turn: they waited 108 ms for each other to arrive, 23 % of their time, and the worst, rank 0, caused 25 % of that; an even share would be 25 %. "
                       "What that cost in joules is not known: no meter.");
  CHECK(verdict(accounts(in_turn(2, 12))).finding == Finding::spread);
}

TEST_CASE("Slow data, receivers without room and waits for oneself are told from late ranks") {
  JobShape shape;
  shape.transfer = 2'000'000;
  Verdict v = verdict(accounts(shape));
  CHECK(v.finding == Finding::transfer);
  CHECK(v.headline == "Slow data, not a late rank, holds this job up.");
  CHECK(v.detail == "100 % of the waiting for others, 80 ms, was for bytes on their way (transfer), and no rank stands out. What that cost in joules is not known: no meter.");

  // One rank's data is slow.
  std::vector<Account> all = accounts(late(4, {}));
  AccountRow& row = all[1].rows[0];
  row.time.wait_transfer += nanoseconds(60'000'000);
  row.time.elapsed += nanoseconds(60'000'000), row.time.exposed += nanoseconds(60'000'000);
  row.waited_for = {{3, {}, nanoseconds(60'000'000), {}}};
  CHECK(contains(verdict(all).detail, "(transfer); most of it, 100 %, for data of rank 3."));

  shape.transfer = 0;
  shape.credit = 2'000'000;
  shape.watts = 5;
  v = verdict(accounts(shape));
  CHECK(v.finding == Finding::credit);
  CHECK(v.detail == "100 % of the waiting for others, 80 ms, was for a receiver to make room (credit), and no rank stands out. In all their waiting the ranks drew 400 mJ (modelled, +- 40 %).");

  shape.credit = 0;
  shape.local = 2'000'000;
  v = verdict(accounts(shape));
  CHECK(v.finding == Finding::local);
  CHECK(v.detail == "100 % of all waiting, 80 ms, was for something of the waiting rank's own, such as its device or its queue. In all their waiting the ranks drew 400 mJ (modelled, +- 40 %).");
}

TEST_CASE("A late rank is named though slow data is worse, and slow data though a late rank is") {
  JobShape shape = late(4, {{2, 3}});
  shape.transfer = 4'000'000;
  shape.watts = 5;
  Verdict v = verdict(accounts(shape));
  CHECK(v.finding == Finding::transfer);
  CHECK(v.ranks == std::vector<Rank>{2});
  CHECK(v.headline == "Slow data holds this job up, and so does rank 2.");
  REQUIRE(v.asides.size() == 1);
  CHECK(v.asides[0] == "Rank 2 is late: the other 3 ranks together waited 90 ms for it, 100 % of all arrival waiting, and drew 450 mJ (modelled, +- 40 %) meanwhile.");
  shape.transfer = 9'000'000;  // so much more that the late rank does not matter
  v = verdict(accounts(shape));
  CHECK(v.headline == "Slow data, not a late rank, holds this job up.");
  CHECK(v.asides.empty());
  CHECK(v.ranks.empty());
  shape.transfer = 1'500'000;
  v = verdict(accounts(shape));
  CHECK(v.headline == "Rank 2 slows this job.");
  CHECK(v.asides.back() == "Not only late ranks hold it up: the ranks waited another 60 ms for bytes on their way (transfer).");
}

TEST_CASE("Time in which the thread served other operations is no wait for oneself") {
  JobShape shape;
  shape.local = 2'000'000;
  std::vector<Account> all = accounts(shape);
  for (Account& a : all) a.rows[0].time.queued = a.rows[0].time.wait_local;
  CHECK(verdict(all).finding == Finding::little_waiting);
}

TEST_CASE("Little waiting is said to be little, whoever caused it") {
  JobShape shape = late(4, {{1, 1}});
  shape.between = 1'000'000'000;
  const Verdict v = verdict(accounts(shape));
  CHECK(v.finding == Finding::little_waiting);
  CHECK(v.headline == "No rank slows this job.");
  CHECK(v.detail == "Its ranks waited for each other in 0.07 % of their time, 30 ms together. What that cost in joules is not known: no meter.");
}

TEST_CASE("One rank, no calls, no times: nothing is made up") {
  JobShape shape;
  shape.ranks = 1;
  CHECK(verdict(accounts(shape)).headline == "This job has a single rank.");
  check_page(page_of(accounts(shape)));

  CHECK(verdict({}).headline == "Nothing to tell of.");
  check_page(page_of({}));
  shape.ranks = 3, shape.calls = 0;
  std::vector<Account> idle = accounts(shape);
  for (Account& a : idle) a.rows.clear();
  CHECK(verdict(idle).finding == Finding::no_calls);
  check_page(page_of(idle));

  std::vector<Account> untimed = accounts(late(3, {{1, 3}}));
  for (Account& a : untimed) {
    a.rows[0].time = {}, a.rows[0].histogram = {}, a.rows[0].waited_for.clear(), a.by_peer.clear(), a.recent.clear();
  }
  const Verdict v = verdict(untimed);
  CHECK(v.headline == "Who waited for whom is not known.");
  CHECK(v.detail == "These calls were counted, but not timed.");
  const std::string page = page_of(untimed);
  check_page(page);
  CHECK(contains(section(page, "rows"), "<td data-v=\"\"><span class=\"unknown\">unknown</span></td>"));
  CHECK_FALSE(contains(section(page, "rows"), "0 ns"));
}

TEST_CASE("Failed calls and work in the background are mentioned") {
  std::vector<Account> all = accounts(late(4, {{2, 3}}));
  all[0].rows[0].failed = 3;
  for (Account& a : all) a.rows[0].time.exposed = a.rows[0].time.elapsed / 10;
  const Verdict v = verdict(all);
  REQUIRE(v.asides.size() == 3);
  CHECK(v.asides[1] == "3 calls failed: a failed call's time, such as that of a deadline that passed, counts as well.");
  CHECK(v.asides[2] == "Callers were blocked for 13 ms of the 130 ms that calls took: the rest ran in the background, and so did part of the waiting.");
  CHECK(contains(page_of(all), "<span class=\"bad\">3 failed</span>"));
}

TEST_CASE("What is unknown is unknown on the whole page, and never nothing") {
  const std::string page = page_of(sample::accounts_without_energy());
  check_page(page);
  CHECK(contains(between(page, "id=\"figure-energy\"", "</div>"), "<span class=\"unknown\">unknown</span>"));
  CHECK(contains(between(page, "id=\"figure-avoidable\"", "</div>"), "<span class=\"unknown\">unknown</span>"));
  CHECK(contains(section(page, "energy"), "<span class=\"unknown\">Unknown</span>: no meter and no model tells what the calls drew."));
  CHECK(contains(between(page, "id=\"carbon\"", "</p>"), "Unknown"));
  CHECK_FALSE(contains(page, "figure-carbon"));
  for (const char* unit : {"nJ", "\u00B5J", "mJ", "kJ"}) CHECK_FALSE(contains(page, std::string("\u00A0") + unit));
  CHECK_FALSE(contains(page, "0\u00A0J"));
  CHECK(contains(section(page, "notes"), "The joules of the calls are unknown, which is not zero"));
  CHECK(contains(section(page, "notes"), "no energy counter can be read on this host: joules are unknown"));
}

TEST_CASE("Joules come with their error and source, domains with what they drew or why that is unknown") {
  const std::vector<Account> all = sample::accounts();
  const JobAccount job = job_of(all);
  const std::string page = page_of(all);
  check_page(page);
  CHECK(contains(between(page, "id=\"figure-energy\"", "</div>"), "±\u00A06\u00A0%, prorated, calibrated weights"));
  CHECK(contains(between(page, "data-operation=\"all_reduce\"", "</small>"), "<i class=\"err\""));
  const std::string_view domains = between(page, "id=\"domains\"", "<h3>");
  CHECK(count(domains, "data-domain=") == job.domains.size());
  CHECK(contains(between(domains, "data-domain=\"gpu-GPU-8a1f27c4\"", "data-domain"), "<span class=\"unknown\">unknown</span> J<small>the counter must not be read by this user</small>"));
  CHECK(contains(between(domains, "<div class=\"row part\" data-domain=\"package-0/core\"", "</small>"), "part of package-0"));
  CHECK(count(section(page, "energy"), "<path class=\"line q") == 8);  // four domains have watts: each in the legend and in the picture
  CHECK(contains(between(page, "id=\"carbon\"", "</p>"), "Grid: 380\u00A0±\u00A019\u00A0g/kWh (DE, average, lifecycle), times 1.20 for the building (PUE)."));
  CHECK(count(section(page, "slack"), "<tr>") == 13);
}

TEST_CASE("Every caveat and warning is told once, in words, with the domains it is of") {
  std::vector<Account> all = sample::accounts();
  for (std::size_t bit = 0; bit < caveat_count; ++bit) all[0].caveats |= static_cast<Caveat>(1u << bit);
  const std::string page = page_of(all);
  check_page(page);
  const std::string_view notes = section(page, "notes");
  for (std::size_t bit = 0; bit < caveat_count; ++bit) {
    const auto caveat = static_cast<Caveat>(1u << bit);
    CHECK(count(notes, "data-caveat=\"" + std::string(name_of(caveat)) + "\"") == 1);
    CHECK(contains(notes, detail::escaped(meaning_of(caveat).substr(1), std::string::npos)));
  }
  CHECK(contains(notes, "The counter must not be read by this user (node-b gpu-GPU-8a1f27c4)."));
  CHECK(count(notes, "the carbon intensity of DE is an estimate") == 1);
  CHECK(contains(notes, "node-b: 93 % of the processor time used there was this job&#39;s; in the last window the power model was off by 4 %."));
}

TEST_CASE("Hostile names are shown, and do nothing") {
  std::vector<Account> all = sample::accounts();
  const std::string script = "<script>document.documentElement.dataset.pwned=1</script>", quotes = "\"' onmouseover=\"alert(1)\" x='";
  for (Account& a : all) {
    a.job = script;
    a.communicator += "\x01&amp;";
    a.host += quotes;
    a.transport = "\xC0\xAF\xED\xA0\x80\xF5\xFF";
    a.carbon_source = "</p><img src=x onerror=alert(1)>";
    a.warnings = {script + quotes, std::string(100'000, 'w'), std::string("nul\0inside", 10), "turned \u202E around", "-->]]></style></script>"};
    for (AccountRow& row : a.rows) row.algorithm += script;
    for (AccountEvent& event : a.recent) event.algorithm += script;
    for (DomainAccount& d : a.domains) d.key += quotes, d.source = script;
  }
  const std::string page = page_of(all, {.title = script});
  check_page(page);
  CHECK(count(page, "<script") == 1);
  CHECK(count(page, "<style") == 1);
  CHECK_FALSE(contains(page, "<img"));
  CHECK(contains(page, "<title>&lt;script&gt;document.documentElement.dataset.pwned=1&lt;/script&gt;</title>"));
  CHECK(contains(page, "\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD"));
  CHECK(contains(page, "nul\u2400inside"));
  CHECK(contains(page, "turned \uFFFD around"));
  CHECK(contains(page, "… (99600 more bytes)"));
  CHECK(page.size() < 400'000);
}

TEST_CASE("Texts are escaped character by character") {
  using detail::escaped;
  CHECK(escaped("a<b>&\"'") == "a&lt;b&gt;&amp;&quot;&#39;");
  CHECK(escaped("größe 計 \U0001F600") == "größe 計 \U0001F600");
  CHECK(escaped(std::string_view("\0\t\x7F", 3)) == "\u2400\u2409\u2421");
  CHECK(escaped("\xC2\x85|\xEF\xBB\xBF|\xE2\x80\x8B") == "\uFFFD|\uFFFD|\uFFFD");
  CHECK(escaped("\xE2\x82") == "\uFFFD\uFFFD");           // cut off
  CHECK(escaped("\xF0\x80\x80\x80") == "\uFFFD\uFFFD\uFFFD\uFFFD");  // overlong
  CHECK(escaped("\xF4\x90\x80\x80") == "\uFFFD\uFFFD\uFFFD\uFFFD");  // beyond Unicode
  CHECK(escaped("abcd", 4) == "abcd");
  CHECK(escaped("abcde", 4) == "abcd… (1 more bytes)");
  CHECK(escaped("<<<<<", 4) == "&lt;&lt;&lt;&lt;… (1 more bytes)");
}

TEST_CASE("Figures are typeset with their units, and other words are left alone") {
  using detail::typeset;
  CHECK(typeset("1.25 +- 0.10 us, 3 users, +- 6 %") == "1.25\u00A0±\u00A00.10\u00A0µs, 3 users, ±\u00A06\u00A0%");
  CHECK(typeset("12 mJ (modelled); 4 ranks use 2 units") == "12\u00A0mJ (modelled); 4 ranks use 2 units");
  CHECK(typeset("") == "");
  CHECK(detail::percent_text(0.9312) == "93 %");
  CHECK(detail::percent_text(0.0312) == "3.10 %");
  CHECK(detail::percent_text(0.00001) == "less than 0.01 %");
  CHECK(detail::percent_text(0) == "0 %");
  CHECK(detail::percent_text(std::nan("")) == "unknown");
  CHECK(detail::joules_text(Quantity{2, std::nan(""), 0, 0, Provenance::measured, Split::direct}) == "2 J, error unknown");
  CHECK(detail::joules_text(Quantity{std::nan(""), 1, 0, 0, Provenance::measured, Split::direct}) == "unknown J");
  CHECK(detail::grams_text(Quantity{0.0025, 0.0005, 0, 1, Provenance::modelled, Split::direct}) == "2.50 +- 0.50 mg");
  CHECK(detail::decimal(1.25e300) == "1000000000");
  CHECK(detail::decimal(std::nan("")) == "0");
  CHECK(detail::decimal(-2.04) == "-2");
}

TEST_CASE("The matrix has a cell for each pair that waited, the table each rank") {
  const std::vector<Account> all = accounts(late(5, {{2, 3}}));
  const std::string page = page_of(all);
  const std::string_view matrix = section(page, "matrix");
  CHECK(count(matrix, "<rect class=\"cell\"") == 4);
  for (const Rank waiting : {0, 1, 3, 4}) CHECK(contains(matrix, "data-w=\"" + std::to_string(waiting) + "\" data-c=\"2\""));
  CHECK(contains(matrix, "<title>Rank 3 waited 30\u00A0ms for rank 2: arrival 30\u00A0ms, transfer 0\u00A0ns, credit 0\u00A0ns; unknown J</title>"));
  for (Rank r = 0; r < 5; ++r) CHECK(count(between(page, "<details id=\"ranks\">", "</details>"), "<tr data-rank=\"" + std::to_string(r) + "\"") == 1);
  CHECK(count(section(page, "ranking"), "data-caused-ns=\"120000000\"") == 1);
  CHECK(contains(section(page, "ranking"), "4 ranks kept nobody waiting."));
}

TEST_CASE("The timeline draws each recent call, with arrows from the late rank to those that waited") {
  const std::vector<Account> all = accounts(late(4, {{2, 3}}));
  const std::string page = page_of(all);
  const std::string_view timeline = section(page, "timeline");
  CHECK(count(timeline, "<g class=\"call\">") == 40);
  CHECK(count(timeline, "<path class=\"arrow\" data-from=\"2\"") == 18);  // of the six calls that were waited in longest
  CHECK(count(timeline, "data-to=\"2\"") == 0);
  CHECK(contains(timeline, "40 calls are kept one by one; 40 of them are drawn"));
  const std::string few = page_of(all, {.calls_drawn = 3});
  CHECK(count(section(few, "timeline"), "<g class=\"call\">") == 12);
}

TEST_CASE("Clocks that are an hour apart are aligned by their offset") {
  std::vector<Account> all = accounts(late(4, {{2, 3}}));
  const std::string same = page_of(all);
  for (const std::size_t r : {1u, 2u}) {
    all[r].clock_offset = nanoseconds(3'600'000'000'000) * (r == 1 ? 1 : -1);
    all[r].begin -= all[r].clock_offset, all[r].end -= all[r].clock_offset;
    for (AccountEvent& event : all[r].recent) event.begin -= all[r].clock_offset;
  }
  CHECK(page_of(all) == same);
}

TEST_CASE("Calls of one rank that overlapped lie beside each other") {
  std::vector<Account> all = accounts(late(2, {}));
  Account& a = all[0];
  a.recent.resize(2);
  all[1].recent.clear();
  a.recent[1].begin = a.recent[0].begin + a.recent[0].time.elapsed / 2;
  const std::string page = page_of(all);
  const std::string_view timeline = section(page, "timeline");
  CHECK(contains(timeline, "y=\"10\" width="));
  CHECK(contains(timeline, "y=\"25\" width="));  // half of the lane's 30 further down
}

TEST_CASE("A large job is drawn in blocks, some of its ranks in the timeline, and all in the table") {
  JobShape shape;
  shape.ranks = 1024;
  shape.calls = 6;
  shape.late = [](Rank r, int call) { return std::int64_t{r == 700 ? 3'000'000 : (r * 31 + call * 17) % 97 * 1'000}; };
  const std::vector<Account> all = accounts(shape);
  const std::string page = page_of(all);
  CHECK(page.size() < 3'000'000);
  CHECK(fault_of(page) == "");
  CHECK(contains(section(page, "verdict"), "Rank 700 slows this job."));
  const std::string_view matrix = section(page, "matrix");
  CHECK(count(matrix, "<rect class=\"cell\"") == 64);
  CHECK(contains(matrix, "1024 ranks are too many to draw each: a cell sums up 16 ranks by 16."));
  CHECK(contains(matrix, "<title>Ranks 0-15 waited"));
  const std::string_view timeline = section(page, "timeline");
  CHECK(count(timeline, "<g data-rank=") == 64);
  CHECK(contains(timeline, "<g data-rank=\"700\">"));
  CHECK(contains(timeline, "64 of 1024 ranks are drawn"));
  for (const Rank r : {0, 513, 1023}) CHECK(contains(page, "<tr data-rank=\"" + std::to_string(r) + "\""));
}

TEST_CASE("An account that is missing is said to be, and its figures are unknown") {
  std::vector<Account> all = accounts(late(4, {{2, 3}}));
  all.erase(all.begin() + 1);
  const std::string page = page_of(all);
  check_page(page);
  CHECK(contains(section(page, "notes"), "There is no account of rank 1: what they waited and drew is unknown and in no sum."));
  CHECK(contains(between(page, "<tr data-rank=\"1\"", "</tr>"), "no account"));
  CHECK(contains(between(page, "<tr data-rank=\"1\"", "</tr>"), "unknown"));
}

TEST_CASE("The sums alone make a page, too") {
  const JobAccount job = job_of(sample::accounts());
  std::ostringstream out;
  write_html(out, job);
  check_page(out.str());
  CHECK(contains(out.str(), "Rank 5 slows this job."));
  CHECK(contains(out.str(), "Only the job&#39;s sums were given"));
}

TEST_CASE("The page does not depend on the program's locale") {
  struct Punctuation : std::numpunct<char> {
    char do_decimal_point() const override { return ','; }
    char do_thousands_sep() const override { return '.'; }
    std::string do_grouping() const override { return "\3"; }
  };
  const std::vector<Account> all = sample::accounts();
  const std::string page = page_of(all);
  const std::locale before = std::locale::global(std::locale(std::locale::classic(), new Punctuation));
  const std::string again = page_of(all);
  std::locale::global(before);
  CHECK(again == page);
}

TEST_CASE("Where ranks' accounts are missing, shares are of those that are there, and it is said first") {
  std::vector<Account> all = accounts(late(4, {{2, 3}}));
  all.pop_back();
  const JobAccount job = job_of(all);
  const Verdict v = verdict_of(job, all);
  REQUIRE(v.ranks == std::vector<Rank>{2});
  CHECK(v.detail == "The other 2 ranks waited 30 ms each for it, 60 ms together, 100 % of all arrival waiting and 30 % of their time. What that cost in joules is not known: no meter.");
  REQUIRE_FALSE(v.asides.empty());
  CHECK(v.asides[0] == "Only 3 of 4 ranks' accounts are here: that of rank 3 is missing, and in no sum.");
}

TEST_CASE("Numbers out of their range in an account are refused or left out, not believed") {
  const std::vector<Account> all = accounts(late(4, {{2, 3}}));
  const JobAccount job = job_of(all);
  std::ostringstream out;
  const auto refused = [&](const JobAccount& j, const std::vector<Account>& a, std::string_view why) {
    try {
      write_html(out, j, a);
      FAIL("it was not refused: " << why);
    } catch (const Error& e) {
      CHECK(e.errc() == Errc::invalid_argument);
      CHECK(contains(e.what(), why));
    }
    CHECK(out.str().empty());
  };
  JobAccount wrong = job;
  wrong.resolved.pop_back();
  refused(wrong, all, "the job's account has 16 and 15 wait cells, which 4 ranks have not: make it with job_of()");
  wrong = job;
  wrong.size = -1;
  refused(wrong, {}, "which -1 ranks have not");
  wrong = job;
  wrong.stragglers[0].rank = 4;
  refused(wrong, all, "names a straggler 4");
  refused(job, accounts(late(5, {})), "is not of this job of 4 ranks");
  std::vector<Account> other = all;
  other[0].members = {0, 1, 2, 9};
  refused(job, other, "rank 9 is named as a member in a job of 4 ranks");
  other = all;
  other[3].recent[0].waited_for = {{4, nanoseconds(1), {}, {}}};
  refused(job, other, "it waited for rank 4 of 4");
  other = all;
  other[1].recent[0].begin = nanoseconds::max();
  refused(job, other, "the begin of a call is 9223372036854775807 ns, more than 36 years");

  other = all;
  other[0].power = {{7, nanoseconds(0), nanoseconds(1), 100}, {0, nanoseconds(0), nanoseconds(1), std::nan("")}};
  other[0].slack = {{Collective::all_reduce, -3, 9, nanoseconds(1), nanoseconds(1)}};
  other[0].rows[0].size_class = 255;
  other[0].rows[0].operation = static_cast<Collective>(200);
  wrong = job_of(other);
  other[0].recent[0].begin = nanoseconds(std::int64_t{1} << 60);
  other[0].recent[1].begin = -nanoseconds(std::int64_t{1} << 60);
  wrong.domains.push_back({"node", {}, ""});
  wrong.domains[0].account.parent = 7;
  write_html(out, wrong, other);
  CHECK(fault_of(out.str()) == "");
  CHECK_FALSE(contains(out.str(), "id=\"watts\""));
  CHECK_FALSE(contains(out.str(), "id=\"slack\""));
  CHECK(contains(out.str(), "unknown operation"));
}

TEST_CASE("The checker of this test finds what is wrong with a page") {
  const std::string page = page_of({});
  REQUIRE(fault_of(page) == "");
  const auto broken = [&](std::string_view from, std::string_view to) {
    std::string text = page;
    text.replace(text.find(from), from.size(), to);
    return fault_of(text);
  };
  CHECK(contains(broken("</section>", ""), "wrong end"));
  CHECK(contains(broken("<p class", "<p onclick=\"\" class"), "attribute that must not be"));
  CHECK(contains(broken("Nothing to tell", "<Nothing to tell"), "tag not closed"));
  CHECK(contains(broken("Nothing to tell", "Nothing & tell"), "bare &"));
  CHECK(contains(broken("id=\"notes\"", "id=\"other\""), "nothing has the id notes"));
  CHECK(contains(broken("id=\"notes\"", "id=\"energy\""), "id twice"));
  CHECK(contains(broken("href=\"#notes\"", "href=\"x\""), "link out of the page"));
  CHECK(contains(broken("<main>", "<main><p>"), "wrong end"));
  CHECK(contains(broken("</html>\n", ""), "not closed: html"));
}

TEST_CASE("A summary for the terminal has the verdict, the worst ranks and the totals, and nothing that moves the cursor") {
  JobShape shape = late(12, {{2, 3}, {7, 9}});
  shape.watts = 5;
  std::vector<Account> all = accounts(shape);
  for (Account& account : all) account.host = "evil\x1b[2J\nhost";
  all[0].warnings.push_back("a \x1b]0;title\a warning");
  const auto summary_of = [](const std::vector<Account>& given) {
    std::ostringstream out;
    write_summary(out, job_of(given), given);
    return out.str();
  };
  std::string text = summary_of(all);
  CHECK(text.starts_with("Rank 7 slows this job.\nThe other 11 ranks waited 87.3 ms each for it, 960 ms together, "));
  CHECK(contains(text, "     7  evil?[2J?host         960 ms   100 %       0 ns    4.80 +- 1.92 J\n"));
  CHECK(contains(text, "\nTotals of job: 12 ranks, 1 host, 1 communicator, 100 ms\n  calls      120; "));
  CHECK(contains(text, "\nWhat to know\n- a ?]0;title? warning\n"));
  for (const char c : text) CHECK((c == '\n' || (c >= ' ' && c <= '~')));

  text = summary_of(accounts(in_turn(12, 24)));
  CHECK(contains(text, "  and 4 more ranks, which were less late\n"));
  CHECK(contains(text, "  energy     unknown J; waiting unknown J"));
  CHECK_FALSE(contains(text, "What to know"));
  text = summary_of({});
  CHECK(text.starts_with("Nothing to tell of.\n"));
  CHECK_FALSE(contains(text, "Who was late"));
}
