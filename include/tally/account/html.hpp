// SPDX-License-Identifier: Apache-2.0
// The account of a job as one HTML page that needs nothing but itself: which rank slows the job and what that costs, on top and
// in words; below, the figures and pictures that show it, and what to know about them. What is unknown is said to be.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <ostream>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "../error.hpp"
#include "../figures.hpp"
#include "../text.hpp"
#include "html_charts.hpp"
#include "html_style.hpp"
#include "html_text.hpp"
#include "job.hpp"
#include "merge.hpp"
#include "verdict.hpp"

namespace tally::inline v0 {

struct HtmlOptions {
  std::string title = {};  // of the page; empty: the job's name
  int ranks_drawn = 64;    // of more than these the wait matrix is drawn in blocks, and the timeline for some; 2 to 256
  int calls_drawn = 24;    // per rank, in the timeline; 1 to 256
};

namespace detail {

class HtmlPage {
 public:
  HtmlPage(const JobAccount& job, std::span<const Account> accounts, const HtmlOptions& options) : job_(job), accounts_(accounts), options_(options) {
    options_.ranks_drawn = std::clamp(options_.ranks_drawn, 2, 256);
    options_.calls_drawn = std::clamp(options_.calls_drawn, 1, 256);
    check_all();
    sum_up_ranks();
    for (const AccountRow& row : job.rows) calls_ += row.calls, failed_ += row.failed;
  }

  std::string run() {
    const std::string title = escaped(!options_.title.empty() ? options_.title : !job_.job.empty() ? "tally: " + job_.job : "tally: account of a job");
    add({"<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">"
         "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'\">\n<title>",
         title, "</title>\n<style>", html_style, "</style></head>\n<body>\n"});
    add_header(title);
    add({"<main>\n"});
    add_verdict();
    add_figures();
    if (calls_ + failed_ > 0) {
      if (job_.size > 1) add_ranking(), add_matrix();
      add_timeline();
    }
    add_energy();
    if (calls_ + failed_ > 0) add_sizes(), add_durations(), add_rows();
    add_slack();
    add_notes();
    add({"</main>\n<footer>Written by tally. This page loads nothing: it can be kept, mailed and printed as it is.</footer>\n<script>", html_script, "</script>\n</body></html>\n"});
    return std::move(html_.text);
  }

 private:
  struct RankSum {
    std::string host;
    bool any = false;  // there is an account
    std::uint64_t calls = 0, failed = 0;
    AccountTimes time;
    Quantity energy;
  };

  void add(std::initializer_list<Piece> pieces) { html_.add(pieces); }
  static std::string_view unknown() { return "<span class=\"unknown\">unknown</span>"; }
  static std::string joules(const Quantity& q) { return q.known() && std::isfinite(q.value) ? typeset(joules_text(q)) : std::string(unknown()); }
  static std::string grams(const Quantity& q) { return q.known() && std::isfinite(q.value) ? typeset(grams_text(q)) : std::string(unknown()); }
  static std::string time(nanoseconds t) { return typeset(time_text(t)); }
  static std::string sort_value(double value) { return std::isfinite(value) ? concat({" data-v=\"", std::to_string(value), "\""}) : std::string(" data-v=\"\""); }
  /// "1,234,567"
  static std::string grouped(std::uint64_t value) {
    std::string text = std::to_string(value);
    for (std::size_t i = text.size(); i > 3; i -= 3) text.insert(i - 3, 1, ',');
    return text;
  }
  static std::string size_text(std::uint8_t size_class, std::uint64_t bytes) { return size_class == 0 ? std::string(bytes > 0 ? "up to 1 B" : "no data") : concat({"up to ", bytes_text(std::uint64_t{1} << std::min<int>(63, size_class))}); }

  void check_all() const {
    const auto wrong = [](auto&&... what) { throw Error(Errc::invalid_argument, {"write_html: ", what...}); };
    const std::size_t n = job_.size < 0 ? 0 : static_cast<std::size_t>(job_.size);
    if (job_.size < 0 || job_.waits.size() != n * n || job_.resolved.size() != n * n) wrong("the job's account has ", job_.waits.size(), " and ", job_.resolved.size(), " wait cells, which ", job_.size, " ranks have not: make it with job_of()");
    for (const Straggler& each : job_.stragglers)
      if (each.rank < 0 || each.rank >= job_.size) wrong("the job of ", job_.size, " ranks names a straggler ", each.rank);
    for (const Account& account : accounts_) {
      check(account);
      if (account.in_job(account.rank) >= job_.size || account.size > job_.size) wrong("the account of rank ", account.in_job(account.rank), " is not of this job of ", job_.size, " ranks");
      for (const Rank r : account.members)
        if (r >= job_.size) wrong("rank ", r, " is named as a member in a job of ", job_.size, " ranks");
    }
  }
  void sum_up_ranks() {
    ranks_.resize(static_cast<std::size_t>(job_.size));
    for (const Account& account : accounts_) {
      RankSum& sum = ranks_[static_cast<std::size_t>(account.in_job(account.rank))];
      sum.host = account.host;
      sum.any = true;
      for (const AccountRow& row : account.rows) {
        sum.energy = sum.calls + sum.failed == 0 ? row.energy.gross : sum.energy + row.energy.gross;
        sum.calls += row.calls, sum.failed += row.failed;
        detail::add(sum.time, row.time);
      }
    }
  }
  std::string host_of(Rank r) const { return escaped(ranks_[static_cast<std::size_t>(r)].host, 24); }

  void add_header(std::string_view title) {
    std::set<std::string_view> hosts, communicators, transports;
    for (const Account& account : accounts_) hosts.insert(account.host), communicators.insert(account.communicator), transports.insert(account.transport);
    add({"<header><h1>", title, "</h1>", job_.size, job_.size == 1 ? " rank" : " ranks"});
    if (!accounts_.empty()) {
      add({" on ", hosts.size(), hosts.size() == 1 ? " host" : " hosts", ", ", communicators.size(), communicators.size() == 1 ? " communicator" : " communicators", ", over "});
      std::size_t named = 0;
      for (const std::string_view transport : transports)
        if (named++ < 4) add({named > 1 ? ", " : "", escaped(transport.empty() ? "an unnamed transport" : transport, 24)});
      if (named > 4) add({" and others"});
    }
    add({"\n<nav aria-label=\"sections\">"});
    const bool any = calls_ + failed_ > 0;
    if (any && job_.size > 1) add({"<a href=\"#ranking\">Who is late</a><a href=\"#matrix\">Who waited for whom</a>"});
    if (any) add({"<a href=\"#timeline\">Recent calls</a>"});
    add({"<a href=\"#energy\">Energy</a>"});
    if (any) add({"<a href=\"#sizes\">Sizes</a><a href=\"#durations\">Durations</a><a href=\"#rows\">All figures</a>"});
    add({"<a href=\"#notes\">What to know</a></nav></header>\n"});
  }

  void add_verdict() {
    const Verdict verdict = verdict_of(job_, accounts_);
    culprits_ = verdict.ranks;
    const Finding f = verdict.finding;
    const bool calm = f == Finding::little_waiting || f == Finding::single_rank || f == Finding::spread, open = f == Finding::no_calls || f == Finding::not_timed;
    add({"<section id=\"verdict\" aria-label=\"verdict\" class=\"", calm ? "calm" : open ? "open" : "found", "\" data-finding=\"", name_of(f), "\" data-ranks=\""});
    for (std::size_t i = 0; i < culprits_.size(); ++i) add({i ? " " : "", culprits_[i]});
    add({"\"><p class=\"headline\">", typeset(verdict.headline), "</p>\n<p class=\"detail\">", typeset(verdict.detail), "</p>\n"});
    if (!verdict.asides.empty()) {
      add({"<ul>"});
      for (const std::string& aside : verdict.asides) add({"<li>", typeset(aside), "</li>"});
      add({"</ul>"});
    }
    add({"</section>\n"});
  }

  void card(std::string_view id, std::string_view name, std::string_view figure, std::string_view below) {
    add({"<div class=\"card\" id=\"", id, "\"><dt>", name, "</dt><dd class=\"big\">", figure, "</dd><dd class=\"small\">", below, "</dd></div>\n"});
  }
  /// What there is to know about a figure in a few words.
  static std::string source_text(const Quantity& q) { return q.known() ? concat({name_of(q.provenance), q.provenance == Provenance::prorated ? concat({", ", name_of(q.split)}) : ""}) : std::string("no meter, no model"); }

  void add_figures() {
    const AccountTimes& t = job_.time;
    const nanoseconds others = t.wait_arrival + t.wait_transfer + t.wait_credit;
    const double all = ns(job_.elapsed) * job_.there(), in_calls = ns(t.elapsed);
    add({"<dl class=\"cards\">\n"});
    card("figure-time", "Time covered", job_.elapsed > nanoseconds{0} ? time(job_.elapsed) : unknown(),
         concat({grouped(calls_), calls_ == 1 ? " call" : " calls", failed_ > 0 ? concat({", <span class=\"bad\">", grouped(failed_), " failed</span>"}) : "", in_calls > 0 ? concat({"; ", time(t.elapsed), " in calls, summed over ranks"}) : ""}));
    if (job_.size > 1) {
      const double share = in_calls <= 0 ? std::nan("") : all > 0 ? ns(others) / all : ns(others) / in_calls;
      card("figure-waiting", "Waiting for others", in_calls > 0 ? typeset(percent_text(share)) : unknown(),
           in_calls > 0 ? concat({all > 0 ? "of the ranks&#39; time; " : "of the time in calls; ", time(others), ", ", typeset(percent_text(ns(others) / in_calls)), " of the time in calls"}) : std::string("the calls were not timed"));
    }
    const auto spent = [&](std::string_view id, std::string_view name, const Quantity& q, std::string text, std::string_view below) {
      const bool known = q.known() && std::isfinite(q.value);
      card(id, name, known ? typeset(text) : unknown(), concat({known && q.value > 0 && q.sigma >= 0 ? typeset(concat({"+- ", percent_text(q.sigma / q.value), ", "})) : "", source_text(q), known ? below : ""}));
    };
    spent("figure-energy", "Energy of the calls", job_.energy.gross, joules_text(job_.energy.gross.value), job_.energy.idle.known() ? concat({"; of it ", typeset(joules_text(job_.energy.idle.value)), " waiting"}) : "");
    spent("figure-avoidable", "Avoidable energy", job_.energy.idle_avoidable, joules_text(job_.energy.idle_avoidable.value), "; by sleeping in waits, not spinning (TALLY_WAIT=energy)");
    if (job_.energy.carbon.known()) spent("figure-carbon", "Carbon of the calls", job_.energy.carbon, grams_text(job_.energy.carbon.value), "; CO<sub>2</sub>-equivalent");
    add({"</dl>\n"});
  }

  void begin_section(std::string_view id, std::string_view heading, std::string_view lead) { add({"<section id=\"", id, "\"><h2>", heading, "</h2>\n<p class=\"lead\">", lead, "</p>\n"}); }

  void add_ranking() {
    begin_section("ranking", "Who is late", "Time the other ranks together waited for each rank to arrive, followed back from call to call to the rank that was late of its own.");
    double largest = 0;
    for (const Straggler& each : job_.stragglers) largest = std::max(largest, ns(each.caused) + ns(each.passed_on));
    if (largest <= 0) {
      add({"<p>No rank came late.</p>\n"});
    } else {
      add({"<ul class=\"legend\"><li><i class=\"k-arrival\"></i>caused</li><li><i class=\"k-passed\"></i>passed on: charged to it, but it had been kept waiting itself</li></ul>\n<div class=\"bars wide\">\n"});
      constexpr std::size_t most = 10;
      std::size_t shown = 0, waited_for = 0;
      nanoseconds rest{};
      for (const Straggler& each : job_.stragglers) {
        if (each.caused <= nanoseconds{0} && each.passed_on <= nanoseconds{0}) continue;
        if (++waited_for > most) rest += each.caused;
        else ++shown, add_straggler(each, largest);
      }
      add({"</div>\n"});
      const std::size_t others = waited_for - shown, innocent = job_.stragglers.size() - waited_for;
      if (others > 0) add({"<p class=\"lead\" data-left-out=\"ranking\">The other ", others, " ranks that were late caused ", time(rest), " together; the table has each.</p>\n"});
      if (innocent > 0) add({"<p class=\"lead\">", innocent == 1 ? "One rank" : concat({innocent, " ranks"}), " kept nobody waiting.</p>\n"});
    }
    add_all_ranks();
    add({"</section>\n"});
  }

  void add_straggler(const Straggler& each, double largest) {
    const auto part = [&](std::string_view kind, nanoseconds t) {
      if (t > nanoseconds{0}) add({"<b class=\"", kind, "\" style=\"width:", decimal(100 * ns(t) / largest), "%\"></b>"});
    };
    add({"<div class=\"row\" data-rank=\"", each.rank, "\" data-caused-ns=\"", each.caused.count(), "\"><div class=\"name\">rank ", each.rank, "<small>", host_of(each.rank), "</small></div><div class=\"track\">"});
    part("k-arrival", each.caused);
    part("k-passed", each.passed_on);
    add({"</div><div class=\"value\">", time(each.caused), ", ", typeset(percent_text(each.share)), "<small>"});
    if (each.caused > nanoseconds{0}) add({joules(each.energy), each.energy.known() ? "" : " J", each.carbon.known() ? concat({", ", typeset(grams_text(each.carbon.value)), " CO<sub>2</sub>e"}) : ""});
    if (each.passed_on > nanoseconds{0}) add({each.caused > nanoseconds{0} ? "; " : "", "passed on ", time(each.passed_on)});
    add({"</small></div></div>\n"});
  }

  void add_all_ranks() {
    constexpr std::size_t most = 4096;
    std::vector<const Straggler*> caused(ranks_.size());
    for (const Straggler& each : job_.stragglers) caused[static_cast<std::size_t>(each.rank)] = &each;
    add({"<details id=\"ranks\"><summary>All ranks as a table</summary><div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"all ranks\"><table class=\"sortable\"><thead><tr><th>rank</th><th class=\"l\">host</th><th>calls</th><th>in calls</th><th>busy</th>"
         "<th>waited: arrival</th><th>transfer</th><th>credit</th><th>made others wait</th><th>passed on</th><th>energy</th></tr></thead><tbody>\n"});
    for (std::size_t r = 0; r < ranks_.size() && r < most; ++r) {
      const RankSum& sum = ranks_[r];
      const bool culprit = std::find(culprits_.begin(), culprits_.end(), static_cast<Rank>(r)) != culprits_.end();
      add({"<tr data-rank=\"", r, "\"", culprit ? " class=\"hot\"" : "", "><td data-v=\"", r, "\">", r, "</td>"});
      if (sum.any) {
        add({"<td class=\"l\">", escaped(sum.host, 24), "</td><td data-v=\"", sum.calls, "\">", grouped(sum.calls), sum.failed ? concat({" <span class=\"bad\">+ ", grouped(sum.failed), " failed</span>"}) : "", "</td>"});
        for (const nanoseconds part : {sum.time.elapsed, sum.time.busy(), sum.time.wait_arrival, sum.time.wait_transfer, sum.time.wait_credit}) time_cell(part, sum.time.elapsed > nanoseconds{0});
      } else {
        add({"<td class=\"l unknown\">no account</td>"});
        for (int i = 0; i < 6; ++i) add({"<td data-v=\"\">", unknown(), "</td>"});
      }
      for (const auto part : {&Straggler::caused, &Straggler::passed_on}) time_cell(caused[r] ? caused[r]->*part : nanoseconds{0}, caused[r] != nullptr);
      add({"<td", sort_value(sum.energy.known() ? sum.energy.value : std::nan("")), ">", joules(sum.energy), "</td></tr>\n"});
    }
    add({"</tbody></table></div>"});
    if (ranks_.size() > most) add({"<p class=\"lead\" data-left-out=\"ranks\">", ranks_.size() - most, " ranks more are left out.</p>"});
    add({"</details>\n"});
  }
  void time_cell(nanoseconds t, bool known) {
    if (known) add({"<td data-v=\"", t.count(), "\">", time(t), "</td>"});
    else add({"<td data-v=\"\">", unknown(), "</td>"});
  }

  void add_matrix() {
    begin_section("matrix", "Who waited for whom", "Rows waited, columns were waited for: waits for its arrival, its data and its room, after following chains back from call to call. The stronger the colour, the longer.");
    const bool any = std::any_of(job_.resolved.begin(), job_.resolved.end(), [](const WaitCell& cell) { return cell.total() > nanoseconds{0}; });
    if (any) {
      add({"<figure>\n"});
      draw_waits(html_, job_, culprits_, options_.ranks_drawn);
      add({"</figure>\n"});
    } else {
      add({"<p>No wait is charged to any rank.</p>\n"});
    }
    add({"<p class=\"lead\">", typeset(percent_text(job_.followed)), " of the arrival waiting could be followed back from call to call", job_.followed < 0.9999 ? ", where both are among the recent ones that are kept one by one; the rest is shown as its calls charged it" : "", ".</p></section>\n"});
  }

  void add_timeline() {
    begin_section("timeline", "Recent calls", "What each rank did in its last calls. A late rank begins its bar where the orange of the others ends.");
    add({"<figure>\n"});
    Timeline(job_, accounts_, options_.ranks_drawn, options_.calls_drawn).draw(html_);
    add({"</figure></section>\n"});
  }

  /// A bar of up to three parts, with the error of the whole.
  struct Part {
    std::string_view kind;
    double value;
  };
  void bar(std::initializer_list<Part> parts, double largest, double sigma = 0) {
    double sum = 0;
    add({"<div class=\"track\">"});
    const auto percent = [&](double v) { return decimal(std::clamp(100 * v / largest, 0.0, 100.0)); };
    for (const Part& part : parts)
      if (part.value > 0) add({"<b class=\"", part.kind, "\" style=\"width:", percent(part.value), "%\"></b>"}), sum += part.value;
    if (sigma > 0.005 * largest && std::isfinite(sigma)) {
      const double from = std::max(0.0, sum - sigma), to = std::min(largest, sum + sigma);
      add({"<i class=\"err\" style=\"left:", percent(from), "%;width:", percent(to - from), "%\"></i>"});
    }
    add({"</div>"});
  }

  void add_energy() {
    begin_section("energy", "Energy", "What the calls drew, and what the hosts drew meanwhile.");
    std::map<Collective, AccountEnergy> operations;
    for (const AccountRow& row : job_.rows) {
      const auto [at, is_new] = operations.try_emplace(row.operation, row.energy);
      if (!is_new) detail::add(at->second, row.energy);
    }
    double largest = 0;
    for (const auto& [operation, energy] : operations)
      if (energy.gross.known()) largest = std::max(largest, energy.gross.value + std::max(0.0, std::isfinite(energy.gross.sigma) ? energy.gross.sigma : 0));
    if (operations.empty()) add({"<p>No calls, so no joules of calls.</p>\n"});
    else if (largest <= 0) add({"<p><span class=\"unknown\">Unknown</span>: no meter and no model tells what the calls drew. ", job_.domains.empty() ? "Attach a meter to the communicator to know." : "See below for what the meters could tell.", "</p>\n"});
    if (largest > 0) {
      add({"<h3>By operation</h3>\n<ul class=\"legend\"><li><i class=\"k-busy\"></i>busy</li><li><i class=\"k-transfer\"></i>waiting</li><li><i class=\"k-arrival\"></i>waiting, avoidable by sleeping</li><li>⊢⊣ standard error</li></ul>\n<div class=\"bars wide\" id=\"energy-operations\">\n"});
      for (const auto& [operation, energy] : operations) {
        add({"<div class=\"row\" data-operation=\"", name_of(operation), "\"><div class=\"name\">", name_of(operation), "</div>"});
        const double avoidable = energy.idle_avoidable.known() ? energy.idle_avoidable.value : 0, idle = energy.idle.known() ? energy.idle.value : avoidable;
        if (energy.gross.known()) bar({{"k-busy", energy.gross.value - idle}, {"k-transfer", idle - avoidable}, {"k-arrival", avoidable}}, largest, energy.gross.sigma);
        else add({"<div></div>"});
        add({"<div class=\"value\">", joules(energy.gross), energy.gross.known() ? "" : " J", "<small>", source_text(energy.gross)});
        if (energy.idle.known()) add({"; waiting ", typeset(joules_text(energy.idle.value))});
        if (energy.idle_avoidable.known()) add({", avoidable ", typeset(joules_text(energy.idle_avoidable.value))});
        add({"</small></div></div>\n"});
      }
      add({"</div>\n<p class=\"lead\" id=\"energy-places\">Of all that: processor ", joules(job_.energy.cpu), ", memory ", joules(job_.energy.dram), ", GPU ", joules(job_.energy.gpu), "; above the machines&#39; floor ", joules(job_.energy.net), ".</p>\n"});
    }
    add_domains();
    const std::size_t place = html_.text.size();
    if (draw_watts(html_, accounts_)) html_.text.insert(place, "<h3>Watts over time</h3>\n");
    add_carbon();
    add({"</section>\n"});
  }

  void add_domains() {
    if (job_.domains.empty()) return;
    constexpr std::size_t most = 48;
    add({"<h3>What the hosts drew</h3>\n<ul class=\"legend\"><li><i class=\"k-busy\"></i>in operations</li><li><i class=\"k-local\"></i>in the same processes, outside of operations</li><li><i class=\"k-undriven\"></i>unattributed: other processes, and the machine&#39;s floor</li></ul>\n<div class=\"bars wide\" id=\"domains\">\n"});
    double largest = 0;
    const auto known = [](const DomainAccount& d) { return d.provenance != Provenance::none; };
    for (const HostDomain& each : job_.domains)
      if (known(each.account)) largest = std::max(largest, static_cast<double>(each.account.total));
    std::vector<const HostDomain*> order;
    for (const HostDomain& each : job_.domains) order.push_back(&each);
    // By host, parts below what they are parts of.
    const auto place = [&](const HostDomain* each) {
      const DomainAccount& d = each->account;
      const bool part = d.parent >= 0 && static_cast<std::size_t>(d.parent) < job_.domains.size();
      return std::tuple(std::string_view(each->host), std::string_view(part ? job_.domains[static_cast<std::size_t>(d.parent)].account.key : d.key), part, std::string_view(d.key));
    };
    std::sort(order.begin(), order.end(), [&](const HostDomain* a, const HostDomain* b) { return place(a) < place(b); });
    for (std::size_t i = 0; i < order.size() && i < most; ++i) {
      const DomainAccount& d = order[i]->account;
      add({"<div class=\"row", std::get<2>(place(order[i])) ? " part" : "", "\" data-domain=\"", escaped(d.key), "\"><div class=\"name\">", escaped(order[i]->host, 24), " ", escaped(d.key, 40), "<small>", name_of(d.kind), " by ", escaped(d.source, 24)});
      if (std::get<2>(place(order[i]))) add({", part of ", escaped(std::get<1>(place(order[i])), 40)});
      add({"</small></div>"});
      const auto watt_seconds = [](Nanojoules nj) { return typeset(joules_text(1e-9 * static_cast<double>(nj))); };
      if (known(d)) {
        bar({{"k-busy", static_cast<double>(d.operations)}, {"k-local", static_cast<double>(d.application)}, {"k-undriven", static_cast<double>(d.unattributed)}}, std::max(1.0, largest));
        add({"<div class=\"value\">", watt_seconds(d.total), "<small>", name_of(d.provenance), "; operations ", watt_seconds(d.operations), ", application ", watt_seconds(d.application), ", unattributed ", watt_seconds(d.unattributed), d.watts_floor > 0 ? concat({"; floor ", digits(d.watts_floor), " W"}) : "", "</small></div></div>\n"});
      } else {
        add({"<div></div><div class=\"value\">", unknown(), " J<small>", d.caveats ? escaped(meaning_of(static_cast<Caveat>(d.caveats & (~d.caveats + 1))), std::string::npos) : "not measured", "</small></div></div>\n"});
      }
    }
    add({"</div>\n"});
    if (order.size() > most) add({"<p class=\"lead\" data-left-out=\"domains\">", order.size() - most, " domains more are left out.</p>\n"});
  }

  void add_carbon() {
    add({"<h3>Carbon</h3>\n<p id=\"carbon\">"});
    if (job_.energy.carbon.known()) add({"The calls account for ", grams(job_.energy.carbon), " of CO<sub>2</sub>-equivalent (", source_text(job_.energy.carbon), ")."});
    else add({"<span class=\"unknown\">Unknown</span>: ", job_.energy.gross.known() ? "nothing tells the carbon intensity of the grid, and a world average would be a guess." : "it follows from joules, which are unknown."});
    std::set<std::string> told;
    for (const Account& account : accounts_) {
      if (!account.carbon_intensity.known() || told.size() == 8) continue;
      const Quantity& intensity = account.carbon_intensity;
      std::string text = concat({" Grid: ", digits(intensity.value), intensity.sigma > 0 ? concat({" +- ", digits(intensity.sigma)}) : "", " g/kWh"});
      if (told.insert(text + account.carbon_source + std::to_string(account.pue)).second)
        add({typeset(text), " (", account.carbon_source.empty() ? "source not named" : escaped(account.carbon_source, 120), "), times ", digits(account.pue), " for the building (PUE)."});
    }
    add({"</p>\n"});
  }

  void add_sizes() {
    begin_section("sizes", "Message sizes", "Calls, and the caller&#39;s bytes that they moved, by the size of a call.");
    std::map<std::uint8_t, std::pair<std::uint64_t, std::uint64_t>> sizes;
    std::uint64_t most_calls = 1, most_bytes = 1;
    for (const AccountRow& row : job_.rows) {
      auto& [calls, bytes] = sizes[row.size_class];
      most_calls = std::max(most_calls, calls += row.calls);
      most_bytes = std::max(most_bytes, bytes += row.bytes);
    }
    add({"<ul class=\"legend\"><li><i class=\"k-busy\"></i>calls</li><li><i class=\"k-transfer\"></i>bytes</li></ul>\n<div class=\"bars\">\n"});
    for (const auto& [size_class, sum] : sizes) {
      const auto thin = [&](std::string_view kind, double share) { add({"<div class=\"track thin\"><b class=\"", kind, "\" style=\"width:", decimal(100 * share), "%\"></b></div>"}); };
      add({"<div class=\"row\" data-size-class=\"", size_class, "\"><div class=\"name\">", size_text(size_class, sum.second), "</div><div>"});
      thin("k-busy", static_cast<double>(sum.first) / static_cast<double>(most_calls));
      thin("k-transfer", static_cast<double>(sum.second) / static_cast<double>(most_bytes));
      add({"</div><div class=\"value\">", grouped(sum.first), sum.first == 1 ? " call, " : " calls, ", bytes_text(sum.second), "</div></div>\n"});
    }
    add({"</div></section>\n"});
  }

  void add_durations() {
    begin_section("durations", "How long calls took", "Each column is twice as long as the one before it; heights are of each row&#39;s own.");
    add({"<figure>\n"});
    draw_durations(html_, job_.rows);
    add({"</figure></section>\n"});
  }

  void add_rows() {
    constexpr std::size_t most = 400;
    begin_section("rows", "All figures", "Sums over all ranks. Blocked: of that time, what the caller could do nothing else in.");
    std::vector<const AccountRow*> rows;
    for (const AccountRow& row : job_.rows) rows.push_back(&row);
    std::stable_sort(rows.begin(), rows.end(), [](const AccountRow* a, const AccountRow* b) { return a->time.elapsed > b->time.elapsed; });
    add({"<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"all figures\"><table class=\"sortable\"><thead><tr><th class=\"l\">operation</th><th>size</th><th class=\"l\">algorithm</th><th>calls</th><th>bytes</th><th>time</th><th>blocked</th>"
         "<th>busy</th><th>arrival</th><th>transfer</th><th>credit</th><th>local</th><th>energy</th><th>of it idle</th></tr></thead><tbody>\n"});
    for (std::size_t i = 0; i < rows.size() && i < most; ++i) {
      const AccountRow& row = *rows[i];
      const AccountTimes& t = row.time;
      add({"<tr><td class=\"l\">", name_of(row.operation), "</td><td data-v=\"", row.size_class, "\">", size_text(row.size_class, row.bytes), "</td><td class=\"l\">", escaped(row.algorithm, 40), "</td><td data-v=\"", row.calls, "\">", grouped(row.calls),
           row.failed ? concat({" <span class=\"bad\">+ ", grouped(row.failed), " failed</span>"}) : "", "</td><td data-v=\"", row.bytes, "\">", bytes_text(row.bytes), "</td>"});
      for (const nanoseconds part : {t.elapsed, t.exposed, t.busy(), t.wait_arrival, t.wait_transfer, t.wait_credit, t.wait_local}) time_cell(part, t.elapsed > nanoseconds{0});
      add({"<td", sort_value(row.energy.gross.known() ? row.energy.gross.value : std::nan("")), ">", joules(row.energy.gross), "<small>", name_of(row.energy.gross.provenance), "</small></td><td", sort_value(row.energy.idle.known() ? row.energy.idle.value : std::nan("")), ">", row.energy.idle.known() ? typeset(joules_text(row.energy.idle.value)) : std::string(unknown()), "</td></tr>\n"});
    }
    add({"</tbody></table></div>\n"});
    if (rows.size() > most) add({"<p class=\"lead\" data-left-out=\"rows\">", rows.size() - most, " rows that took less time are left out.</p>\n"});
    add({"</section>\n"});
  }

  void add_slack() {
    constexpr std::size_t most = 12;
    struct Row {
      Rank rank;
      Rank peer;
      const SlackRow* slack;
    };
    std::vector<Row> rows;
    for (const Account& account : accounts_)
      for (const SlackRow& slack : account.slack)
        if (slack.peer >= 0 && slack.peer < account.size && slack.calls >= SlackRow::fewest_calls) rows.push_back({account.in_job(account.rank), account.in_job(slack.peer), &slack});
    if (rows.empty()) return;
    std::stable_sort(rows.begin(), rows.end(), [](const Row& a, const Row& b) { return a.slack->expected > b.slack->expected; });
    begin_section("slack", "Waits to come", "How long ranks expect to wait, learned from the calls so far: time that can be slept or used.");
    add({"<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"expected waits\"><table class=\"sortable\"><thead><tr><th>rank</th><th>expects to wait for</th><th class=\"l\">in</th><th>for</th><th>nine times in ten longer than</th><th>seen in calls</th></tr></thead><tbody>\n"});
    for (std::size_t i = 0; i < rows.size() && i < most; ++i) {
      const SlackRow& s = *rows[i].slack;
      add({"<tr><td data-v=\"", rows[i].rank, "\">", rows[i].rank, "</td><td data-v=\"", rows[i].peer, "\">rank ", rows[i].peer, "</td><td class=\"l\">", name_of(s.operation), "</td>"});
      time_cell(s.expected, true);
      time_cell(s.tenth_percentile, true);
      add({"<td data-v=\"", s.calls, "\">", grouped(s.calls), "</td></tr>\n"});
    }
    add({"</tbody></table></div>\n"});
    if (rows.size() > most) add({"<p class=\"lead\" data-left-out=\"slack\">", rows.size() - most, " shorter ones are left out.</p>\n"});
    add({"</section>\n"});
  }

  void note(std::initializer_list<Piece> pieces) {
    add({"<li>"});
    add(pieces);
    add({"</li>\n"});
  }

  void add_notes() {
    begin_section("notes", "What to know about these figures", "");
    add({"<ul class=\"notes\">\n"});
    add_provenance_notes();
    add_caveat_notes();
    for (std::size_t i = 0; i < job_.warnings.size() && i < most_warnings; ++i) note({escaped(job_.warnings[i], 400)});
    if (job_.warnings.size() > most_warnings) note({job_.warnings.size() - most_warnings, " warnings more are left out."});
    add_account_notes();
    note({"Times are sums over ranks unless a text says otherwise: eight ranks that wait for one second each waited for eight."});
    add({"</ul>\n<h3>Words</h3>\n<dl class=\"glossary\">"
         "<dt>busy</dt><dd>the thread copied, reduced, encoded or kept the protocol</dd>"
         "<dt>arrival wait</dt><dd>another rank had not called the operation yet</dd>"
         "<dt>transfer wait</dt><dd>all had called, and bytes were on their way</dd>"
         "<dt>credit wait</dt><dd>the receiver had no room for more</dd>"
         "<dt>local wait</dt><dd>something of the rank itself was not ready: its device, or its thread served another operation</dd>"
         "<dt>caused, passed on</dt><dd>a rank that is late because it was kept waiting in another call passes the wait on; caused is what is left when such chains are followed back</dd>"
         "<dt>avoidable</dt><dd>of the joules of waiting, what sleeping would have saved; a saving is proven only by measuring with and without</dd>"
         "<dt>units</dt><dd>1 KiB is 1024 B; &#177; is one standard error; J: joules, watts times seconds; CO<sub>2</sub>e: grams of CO<sub>2</sub>-equivalent</dd></dl></section>\n"});
  }
  void add_provenance_notes() {
    const Quantity& gross = job_.energy.gross;
    switch (gross.provenance) {
      case Provenance::none: note({"The joules of the calls are unknown, which is not zero: ", job_.domains.empty() ? "no meter was attached or could be read." : "the meters that were read do not cover all calls."}); break;
      case Provenance::modelled: note({"Joules are <b>modelled</b>: time awake and asleep times watts that are assumed, not measured here. They show where energy goes better than how much it is."}); break;
      case Provenance::prorated: note({"Joules are <b>prorated</b>: a meter measured the whole, and the share of the calls was divided off (", name_of(gross.split), "). Totals are good; a single short call is not."}); break;
      case Provenance::measured: note({"Joules are <b>measured</b>: meters covered the calls and nothing else."}); break;
    }
    if (gross.known()) note({"Errors of one meter or model go the same way, so they are added up, not averaged out. A sum is worth as much as its least part."});
  }
  /// Each caveat once, and of which domains it was said.
  void add_caveat_notes() {
    for (std::size_t bit = 0; bit < caveat_count; ++bit) {
      const auto caveat = static_cast<Caveat>(1u << bit);
      if (!has(job_.caveats, caveat)) continue;
      std::string where;
      std::size_t named = 0;
      for (const HostDomain& each : job_.domains)
        if (has(each.account.caveats, caveat) && ++named <= 4) where += concat({named > 1 ? ", " : "", escaped(each.host, 24), " ", escaped(each.account.key, 40)});
      if (named > 4) where += concat({" and ", named - 4, " more"});
      std::string text = escaped(meaning_of(caveat), std::string::npos);
      if (text[0] >= 'a' && text[0] <= 'z') text[0] = static_cast<char>(text[0] - 'a' + 'A');
      add({"<li data-caveat=\"", name_of(caveat), "\">", text, where.empty() ? "" : concat({" (", where, ")"}), ".</li>\n"});
    }
  }
  void add_account_notes() {
    if (accounts_.empty()) {
      if (job_.size > 0) note({"Only the job&#39;s sums were given, so there is nothing to tell of single calls, hosts and watts."});
      return;
    }
    const std::vector<Rank>& missing = job_.missing;
    if (!missing.empty()) note({missing.size() == 1 ? "There is no account of rank " : "There are no accounts of ranks ", ranks_text(missing), ": what they waited and drew is unknown and in no sum."});
    std::set<std::string_view> hosts;
    for (const Account& account : accounts_) {
      const bool coverage = std::isfinite(account.host_coverage), residual = std::isfinite(account.residual);
      if ((!coverage && !residual) || hosts.size() == 16 || !hosts.insert(account.host).second) continue;
      add({"<li>", escaped(account.host, 24), ": "});
      if (coverage) add({percent_text(account.host_coverage), " of the processor time used there was this job&#39;s"});
      if (residual) add({coverage ? "; " : "", "in the last window the power model was off by ", percent_text(std::abs(account.residual))});
      add({".</li>\n"});
    }
  }

  static constexpr std::size_t most_warnings = 64;
  const JobAccount& job_;
  std::span<const Account> accounts_;
  HtmlOptions options_;
  Html html_;
  std::vector<RankSum> ranks_;
  std::vector<Rank> culprits_;
  std::uint64_t calls_ = 0, failed_ = 0;
};

}  // namespace detail

/// One self-contained page: no network, and complete without JavaScript. `accounts` are those that job_of() was given, or none, and
/// then it tells of sums only. Its size is bounded: what is not drawn is said. Throws Errc::invalid_argument, before it writes, where
/// the two do not belong together; whether `out` took it all is for the caller to check.
inline void write_html(std::ostream& out, const JobAccount& job, std::span<const Account> accounts = {}, HtmlOptions options = {}) { out << detail::HtmlPage(job, accounts, options).run(); }

}  // namespace tally::inline v0
