// SPDX-License-Identifier: Apache-2.0
// The transfers of one direction between two ranks, in the order they were posted, linked through themselves.
#pragma once

#include <utility>

#include "concept.hpp"

namespace tally::inline v0 {

struct TransferQueue {
  Transfer *head = nullptr, *tail = nullptr;

  /// True if it is the first one.
  bool push(Transfer& t) {
    t.pending = true;
    t.next = nullptr;
    if (tail) {
      tail->next = &t;
      tail = &t;
      return false;
    }
    head = tail = &t;
    return true;
  }
  void pop() {
    head->pending = false;
    head = head->next;
    if (!head) tail = nullptr;
  }
  void remove(Transfer& t) {
    Transfer* before = nullptr;
    for (Transfer* x = head; x && x != &t; x = x->next) before = x;
    (before ? before->next : head) = t.next;
    if (tail == &t) tail = before;
    t.pending = false;
  }
  /// Of receives: puts the one that a message is for at the head. False if there is none, and the message stays where it is.
  template <Probe P>
  bool match(const FrameInfo& frame, P& probe) {
    Transfer *before = nullptr, *found = head;
    while (found && found->matching != Matching::any && found->fingerprint != frame.fingerprint) before = std::exchange(found, found->next);
    if (found == head) return true;
    if (found) {
      before->next = found->next;
      if (tail == found) tail = before;
    } else {
      found = probe.unexpected(head->peer, frame);
      if (!found) return false;
      found->pending = true;
    }
    found->next = head;
    head = found;
    return true;
  }
};

}  // namespace tally::inline v0
