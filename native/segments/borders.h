// Cuts a tape at block borders, where the fewest tensors cross: what crosses is kept between the
// passes, everything else is recomputed a segment at a time.
#pragma once

#include "trace/tape.h"

#include <set>
#include <string>
#include <vector>

namespace ggft {

struct Segment {
    int first = 0, last = 0;  // nodes [first, last) of Tape::order
    std::vector<int> in, out; // roots that come from earlier segments, that go to later ones
};

struct Segments {
    std::vector<Segment> blocks; // the last one ends before the output matrix
    int head = 0;                // of Tape::order: the product by the output matrix
    std::set<int> reached;       // roots that a gradient reaches
};

// sites: names of the matrices whose adapters are trained. Throws Error(input) that names the
// operation that stands in the way.
Segments cut(const Tape & tape, const std::set<std::string> & sites, int64_t n_vocab);

} // namespace ggft
