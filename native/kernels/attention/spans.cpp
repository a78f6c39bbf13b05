#include "kernels/attention/spans.h"

#include <algorithm>

namespace ggft {
namespace {

constexpr int64_t SMALL = 64; // shorter examples of a row are joined into spans of this many tokens

struct Piece {
    int64_t first, last;
    double cost; // query-key pairs, plus something per token
};

std::vector<Piece> pieces_of(const AttentionShape & s, const int32_t * start) {
    std::vector<Piece> pieces;
    for (int64_t i = 0; i < s.n_tokens; i++) {
        const bool starts_row = i % s.row_tokens == 0, starts_example = start[i] == i;
        if (starts_row || (starts_example && i - pieces.back().first >= SMALL)) {
            pieces.push_back({i, i, 0});
        }
        pieces.back().last = i + 1;
        pieces.back().cost += (double)(i - start[i]) + 32;
    }
    return pieces;
}

} // namespace

Spans::Spans(const AttentionShape & s, const int32_t * start, int ith, int nth) {
    std::vector<Piece> pieces = pieces_of(s, start);
    std::stable_sort(pieces.begin(), pieces.end(),
                     [](const Piece & a, const Piece & b) { return a.cost > b.cost; });
    double total = 0;
    for (const Piece & p : pieces)
        total += p.cost * s.n_head_kv;
    std::vector<double> load((size_t)nth);
    for (const Piece & p : pieces) {
        for (int h = 0; h < s.n_head_kv; h++) {
            const size_t least =
                (size_t)(std::min_element(load.begin(), load.end()) - load.begin());
            const bool shared = load[least] + p.cost > 1.05 * total / nth;
            if (shared) {
                for (double & l : load)
                    l += p.cost / nth;
            } else {
                load[least] += p.cost;
            }
            if (shared || least == (size_t)ith)
                spans_.push_back({p.first, p.last, h, shared});
        }
    }
}

Spans::~Spans() = default;

const ExampleSpan * Spans::begin() const {
    return spans_.data();
}
const ExampleSpan * Spans::end() const {
    return spans_.data() + spans_.size();
}

} // namespace ggft
