// SPDX-License-Identifier: Apache-2.0
// The engine that all tests link; see prebuilt.hpp.
#include "prebuilt.hpp"

template class tally::Progress<tally::SlotTransport>;
template class tally::Engine<tally::SlotTransport>;
