// SPDX-License-Identifier: Apache-2.0
// Precompiled for all tests: compiling the engine once, in prebuilt.cpp, instead of in each of them saves a third of the time.
#pragma once

#include <catch2/catch.hpp>

#include <tally/tally.hpp>

extern template class tally::Engine<tally::SlotTransport>;
extern template class tally::Progress<tally::SlotTransport>;
