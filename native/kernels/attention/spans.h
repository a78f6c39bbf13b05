// Who computes what of attention: spans of tokens for threads, and blocks of query rows of a span.
#pragma once

#include <vector>

#include "kernels/attention/attention.h"
#include "kernels/isa/inline.h"

namespace ggft {

inline constexpr int64_t QUERY_ROWS = 96; // (token, head) of a block: pairs fill vectors

/// Tokens [first, last) whose queries see no key outside, for one key-value head: one example, or
/// short ones together.
struct ExampleSpan {
    int64_t first, last;
    int head_kv;
    bool shared; // all threads work on it: query blocks b with b % nth == ith
};

/// A thread's spans. Whole ones go to the least loaded thread, longest first; one that would leave
/// a thread more than 5% over its share is worked on by all threads instead.
class Spans {
public:
    Spans(const AttentionShape & s, const int32_t * start, int ith, int nth);
    ~Spans();
    Spans(const Spans &) = delete;

    const ExampleSpan * begin() const;
    const ExampleSpan * end() const;

private:
    std::vector<ExampleSpan> spans_;
};

/// Queries of consecutive tokens for consecutive heads of a span: row r is token
/// first + r / heads, head head + r % heads.
struct QueryBlock {
    int64_t first, last;
    int head, heads;

    GGFT_INLINE int64_t rows() const { return (last - first) * heads; }
};

/// The query blocks of a span: blocks of heads, for one run of tokens after the other.
struct QueryBlocks {
    ExampleSpan span;
    int group, heads; // query heads of the key-value head; of a block
    int64_t tokens;   // of a block

    GGFT_INLINE QueryBlocks(const AttentionShape & s, const ExampleSpan & span)
        : span(span), group(s.n_head / s.n_head_kv), heads(min(group, (int)QUERY_ROWS)),
          tokens(QUERY_ROWS / heads) {}
    GGFT_INLINE int per_tokens() const { return (group + heads - 1) / heads; }
    GGFT_INLINE int64_t size() const {
        return (span.last - span.first + tokens - 1) / tokens * per_tokens();
    }
    GGFT_INLINE QueryBlock operator[](int64_t i) const {
        const int64_t first = span.first + i / per_tokens() * tokens;
        const int head = (int)(i % per_tokens()) * heads;
        return {first, min(first + tokens, span.last), span.head_kv * group + head,
                min(heads, group - head)};
    }
};

/// Keys that each of the block's rows sees, relative to the span: [first, last). Both never
/// decrease. `rows`: block.rows().
GGFT_INLINE void seen_keys(const QueryBlock & block, const int32_t * start, int64_t span_first,
                           Range * rows) {
    for (int64_t t = block.first; t < block.last; t++) {
        for (int h = 0; h < block.heads; h++)
            *rows++ = {start[t] - span_first, t + 1 - span_first};
    }
}

} // namespace ggft
