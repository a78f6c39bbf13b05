#include "segments/borders.h"

#include "base/error.h"
#include "rules/table.h"

#include <algorithm>
#include <climits>
#include <map>

namespace ggft {

namespace {

// Roots that a gradient reaches: what depends on a trained matrix.
std::set<int> reach(const Tape & tape, const std::set<std::string> & sites) {
    std::set<int> reached;
    for (int i : tape.order) {
        const TapeTensor & t = tape[i];
        bool reaches = is_linear(tape, i) && sites.count(tape[t.src[0]].name) != 0;
        for (int s : t.src) {
            reaches = reaches || (s >= 0 && reached.count(tape[s].root) != 0);
        }
        if (reaches && t.type == GGML_TYPE_F32) {
            reached.insert(t.root);
        }
    }
    return reached;
}

// The product by the output matrix: the last one, of nothing but its rows the logits are made.
int find_head(const Tape & tape, int64_t n_vocab) {
    for (int at = (int)tape.order.size() - 1; at >= 0; at--) {
        const int i = tape.order[(size_t)at];
        if (is_linear(tape, i) && tape[tape[i].src[0]].ne[1] == n_vocab &&
            tape.block_of(tape[i].src[0]) < 0) {
            return at;
        }
    }
    fail(ErrorKind::input, "the recorded graph has no product by an output matrix");
}

void check_head(const Tape & tape, int head) {
    std::set<int> own = {tape.order[(size_t)head]};
    for (size_t at = (size_t)head + 1; at < tape.order.size(); at++) {
        const int i = tape.order[at];
        const TapeTensor & t = tape[i];
        bool by_row = t.op == GGML_OP_SCALE || t.op == GGML_OP_UNARY || t.op == GGML_OP_ADD ||
                      t.op == GGML_OP_MUL;
        for (int s : t.src) {
            by_row = by_row && s >= 0 &&
                     (own.count(tape[s].root) || tape.root(s).kind == TapeTensor::Kind::weight);
        }
        require(by_row, ErrorKind::input,
                tape.describe(i) + " (" + t.name +
                    ") behind the output matrix cannot be trained by ggft yet");
        own.insert(i);
    }
}

void check_rules(const Tape & tape, const Segments & s) {
    for (int i : tape.order) {
        const TapeTensor & t = tape[i];
        if (!s.reached.count(t.root)) {
            continue;
        }
        bool inner = false; // a gradient passes through it, not only into it
        for (int source : t.src) {
            inner = inner || (source >= 0 && s.reached.count(tape[source].root));
        }
        const bool known = t.op == GGML_OP_FLASH_ATTN_EXT || find_rule(tape.describe(i)) != nullptr;
        require(known || !inner, ErrorKind::input,
                "ggft has no gradient rule for the operation " + tape.describe(i) + " (tensor " +
                    t.name + ")");
    }
}

struct Range {
    int first = INT_MAX, last = -1;
};

// Where the segments begin: between the last use of a block's weights and the first of the next's,
// at the position that the fewest tensors cross. Blocks that interleave stay together.
std::vector<int> find_cuts(const Tape & tape, int head, const std::set<int> & reached) {
    std::map<int, Range> uses;      // of a block's weights
    std::map<int, Range> lifetimes; // of a root: from its node to its last reader
    for (int at = 0; at <= head; at++) {
        const int i = tape.order[(size_t)at];
        lifetimes[i].first = at;
        for (int s : tape[i].src) {
            if (s < 0) {
                continue;
            }
            const int root = tape[s].root, block = tape.block_of(root);
            lifetimes[root].last = at;
            if (block >= 0) {
                uses[block].first = std::min(uses[block].first, at);
                uses[block].last = std::max(uses[block].last, at);
            }
        }
    }
    std::vector<int> crossing((size_t)head + 1, 0); // weight of what crosses before each position
    for (const auto & [root, life] : lifetimes) {
        if (life.first != INT_MAX) {
            for (int at = life.first + 1; at <= life.last; at++) {
                crossing[(size_t)at] += reached.count(root) ? 100 : 1;
            }
        }
    }
    std::vector<int> cuts = {0};
    int last = -1;
    for (auto block = uses.begin(); block != uses.end(); ++block) {
        last = std::max(last, block->second.last);
        const auto next = std::next(block);
        if (next == uses.end() || next->second.first <= last) {
            continue;
        }
        const auto low = crossing.begin() + last + 1;
        const auto high = crossing.begin() + next->second.first + 1;
        cuts.push_back((int)(std::min_element(low, high) - crossing.begin()));
    }
    cuts.push_back(head);
    return cuts;
}

} // namespace

Segments cut(const Tape & tape, const std::set<std::string> & sites, int64_t n_vocab) {
    Segments s;
    s.reached = reach(tape, sites);
    s.head = find_head(tape, n_vocab);
    check_head(tape, s.head);
    check_rules(tape, s);
    const std::vector<int> cuts = find_cuts(tape, s.head, s.reached);
    std::map<int, size_t> home;
    for (size_t b = 0; b + 1 < cuts.size(); b++) {
        s.blocks.push_back({cuts[b], cuts[b + 1], {}, {}});
        for (int at = cuts[b]; at < cuts[b + 1]; at++) {
            home[tape.order[(size_t)at]] = b;
        }
    }
    auto note = [](std::vector<int> & list, int root) {
        if (std::find(list.begin(), list.end(), root) == list.end()) {
            list.push_back(root);
        }
    };
    auto visit = [&](int node, size_t b) {
        for (int source : tape[node].src) {
            const auto from = source < 0 ? home.end() : home.find(tape[source].root);
            if (from != home.end() && from->second < b) {
                note(s.blocks[from->second].out, from->first);
                if (b < s.blocks.size()) {
                    note(s.blocks[b].in, from->first);
                }
            }
        }
    };
    for (size_t b = 0; b < s.blocks.size(); b++) {
        for (int at = s.blocks[b].first; at < s.blocks[b].last; at++) {
            visit(tape.order[(size_t)at], b);
        }
    }
    visit(tape.order[(size_t)s.head], s.blocks.size());
    return s;
}

} // namespace ggft
