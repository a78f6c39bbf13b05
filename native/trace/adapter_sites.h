// Where llama.cpp applies an adapter: found by recording a graph with one.
#pragma once

#include "trace/record.h"

#include <map>
#include <string>

namespace ggft {

// The matrices whose products have an adapter's beside them when an adapter for every matrix of
// `tape` is loaded; some architectures load one and never apply it. With each, what the product is
// multiplied by before the adapter's is added: a weight of one element, -1 for nothing.
std::map<std::string, int> adapter_sites(const TracedModel & model, Recorder & recorder,
                                         const Tape & tape);

} // namespace ggft
