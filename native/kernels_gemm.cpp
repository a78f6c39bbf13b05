#include "kernels_gemm.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "kernels_dropout.h"
#include "kernels_micro.h"
#include "kernels_pack.h"

namespace ggft {
namespace {

// Panels that are in the L2 cache together: 768 KB; 384 KB where L2 caches are small.
#if defined(GGFT_AVX512) || defined(__aarch64__)
constexpr int64_t GROUP_WORDS = 192 << 10;
#else
constexpr int64_t GROUP_WORDS = 96 << 10;
#endif
constexpr int64_t round_up(int64_t n, int64_t unit) {
    return (n + unit - 1) / unit * unit;
}

struct FreeDeleter {
    void operator()(void * p) const { std::free(p); }
};

// Tokens whose rows of 16-bit integers are made at once, for all groups of panels: 2 MB.
constexpr int64_t TOKENS_AHEAD = 1024;

constexpr int64_t ROW_WORDS = MR * TILE_STRIDE, SCALE_WORDS = round_up(MR * I16_BLOCKS, 16);

/// Working memory of one thread.
struct Scratch {
    std::unique_ptr<uint32_t, FreeDeleter> memory;
    size_t words = 0;
    uint32_t * panels;
    uint32_t * rows;    // [tiles][MR][TILE_STRIDE]
    float * row_scales; // [tiles][MR][I16_BLOCKS], each tile's rounded up to cache lines
    float * spill;      // [MR][NR], a tile at the right edge
    float * keep;       // [MR][NR], dropout factors
    std::vector<float> low_panels;

    void hold(int64_t tiles) {
        const size_t needed =
            GROUP_WORDS + tiles * (ROW_WORDS + SCALE_WORDS) + 2 * round_up(MR * NR, 16);
        if (needed > words) {
            memory.reset((uint32_t *)std::aligned_alloc(64, round_up(needed * 4, 64)));
            words = memory ? needed : 0;
            if (!memory)
                throw std::bad_alloc();
        }
        panels = memory.get();
        rows = panels + GROUP_WORDS;
        row_scales = (float *)rows + tiles * ROW_WORDS;
        spill = row_scales + tiles * SCALE_WORDS;
        keep = spill + round_up(MR * NR, 16);
    }
};

std::atomic<bool> timing = false;
std::atomic<double> panels_took = 0.0; // written by one thread at a time

/// Adds the time that it lives to panels_took.
class PanelTimer {
public:
    explicit PanelTimer(bool on) : on_(on && timing) {
        if (on_)
            start_ = std::chrono::steady_clock::now();
    }
    ~PanelTimer() {
        if (on_) {
            const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start_;
            panels_took = panels_took + took.count();
        }
    }

private:
    bool on_;
    std::chrono::steady_clock::time_point start_;
};

/// A product out = x * panels, in one direction.
struct Product {
    Format format;
    bool nt;
    const Weight & w;
    Rows x;
    const LowRank * low;
    Output y;
    int64_t n_tokens, n_cols, depth; // n_cols: of the output; depth: of the reduction

    int64_t block() const { return ggml_blck_size(w.type); }
    int64_t column_unit() const { return nt ? NR : std::max<int64_t>(NR, block()); }
    // Block sizes are powers of two, as these are, so that the larger is a multiple of both.
    int64_t depth_unit() const {
        const int64_t unit = format == Format::i16 ? I16_DEPTH : 32;
        return nt ? std::max(unit, block()) : unit;
    }
    /// Of a group of panels: what a tile row holds, or less, so that one unit of columns fits.
    int64_t max_depth() const {
        const int64_t fits = GROUP_WORDS / column_unit();
        if (format == Format::i16)
            return std::min<int64_t>(I16_BLOCKS, fits / (I16_STEPS + 1)) * I16_DEPTH;
        return std::min<int64_t>(MAX_STEPS, fits / 32 * 32) * per_word(format);
    }
};

/// Tokens and columns of thread `ith`: as many column ranges as threads, unless columns are so few
/// that splitting tokens, too, shortens the longest thread's work (dequantizing counts as
/// `unpack_tokens` tokens).
void choose_part(const Product & p, int ith, int nth, Range & tokens, Range & columns) {
    const int64_t unpack_tokens = 24;
    const int64_t tiles = (p.n_tokens + MR - 1) / MR;
    const int64_t units = (p.n_cols + p.column_unit() - 1) / p.column_unit();
    int best = 1;
    int64_t best_cost = INT64_MAX;
    for (int by_tokens = 1; by_tokens <= nth; by_tokens++) {
        if (nth % by_tokens)
            continue;
        const int64_t by_columns = nth / by_tokens;
        const int64_t cost = ((units + by_columns - 1) / by_columns) *
                             ((tiles + by_tokens - 1) / by_tokens * MR + unpack_tokens);
        if (cost < best_cost) {
            best = by_tokens;
            best_cost = cost;
        }
    }
    tokens = split_range(p.n_tokens, MR, ith % best, best);
    columns = split_range(p.n_cols, p.column_unit(), ith / best, nth / best);
}

/// scale * right for columns [c0, c0+nc) as panels [nc/NR][rank][NR].
void pack_low_rank(const Product & p, int64_t c0, int64_t nc, std::vector<float> & out) {
    const LowRank & low = *p.low;
    out.assign((size_t)(round_up(nc, NR) * low.rank), 0.0f);
    for (int64_t c = 0; c < std::min(nc, p.n_cols - c0); c++) {
        float * panel = out.data() + c / NR * low.rank * NR + c % NR;
        const float * right = p.nt ? low.right + (c0 + c) * low.rank : low.right + c0 + c;
        const int64_t step = p.nt ? 1 : p.n_cols;
        for (int r = 0; r < low.rank; r++)
            panel[r * NR] = low.scale * right[r * step];
    }
}

void fill_keep(const LowRank & low, int64_t t0, int rows, int64_t column, float * keep) {
    const int32_t threshold = dropout_threshold(low.dropout);
    const V kept = splat(1.0f / (1.0f - low.dropout));
    for (int i = 0; i < rows; i++) {
        const uint32_t key = dropout_row_key(low.seed, t0 + i);
        for (int j = 0; j < NR; j += LANES) {
            store(keep + i * NR + j, dropout_factors(key, column + j, threshold, kept));
        }
    }
}

/// Rows in memory, for prefetching: `bytes` each, `stride` bytes apart.
struct Lines {
    const char * first;
    int64_t rows, stride, bytes;
};

/// Ask for a share of the next tile's rows, so that they arrive while this tile is at work.
void prefetch_rows(const Lines & x, int64_t share, int64_t shares) {
    if (x.rows == 0)
        return;
    const int64_t lines = (x.bytes + 63) / 64;
    const Range part = split_range(x.rows * lines, 1, (int)share, (int)shares);
    int64_t row = part.first / lines, line = part.first % lines;
    for (int64_t i = part.first; i < part.last; i++) {
        __builtin_prefetch(x.first + row * x.stride + line * 64);
        if (++line == lines) {
            line = 0;
            row++;
        }
    }
}

void prefetch_output(const float * y, int64_t stride, int rows) {
    for (int i = 0; i < rows; i++) {
        for (int j = 0; j < NR; j += 16)
            __builtin_prefetch(y + i * stride + j, 1);
    }
}

TileFunction tile_of_format(Format format, int rows) {
#if defined(GGFT_I16)
    if (format == Format::i16)
        return tile_of_i16(rows, std::make_index_sequence<MR>());
#endif
    return tile_function(format == Format::bf16, rows);
}

/// A row tile and the block of panels that it runs past.
struct TileJob {
    const uint32_t * rows;
    const float * row_scales;
    Range columns, tokens;
    Lines next;
    int64_t k0, kc;
};

void run_tile(const Product & p, Scratch & s, const TileJob & job) {
    const int64_t t0 = job.tokens.first, c0 = job.columns.first;
    const int64_t nc = job.columns.last - c0, panels = (nc + NR - 1) / NR;
    const int rows = (int)(job.tokens.last - t0);
    const TileFunction tile = tile_of_format(p.format, rows);
    const int64_t steps = tile_steps(p.format, job.kc), words = panel_steps(p.format, job.kc);
    const int rank = job.k0 == 0 && p.low ? p.low->rank : 0;
    const bool add = p.y.add || job.k0 > 0;
    for (int64_t c = 0; c < nc; c += NR) {
        TileArgs g = {};
        g.rows = job.rows;
        g.row_scales = job.row_scales;
        g.panel = s.panels + c * words;
        g.steps = (int)steps;
        if (rank) {
            g.low_rows = p.low->left + t0 * p.low->left_stride;
            g.low_stride = p.low->left_stride;
            g.low_panel = s.low_panels.data() + c * rank;
            g.low_steps = rank;
            if (!p.nt && p.low->dropout > 0.0f) {
                fill_keep(*p.low, t0, rows, c0 + c, s.keep);
                g.keep = s.keep;
            }
        }
        float * y = p.y.data + t0 * p.y.stride + c0 + c;
        const int64_t width = std::min<int64_t>(NR, p.n_cols - c0 - c);
        prefetch_rows(job.next, c / NR, panels);
        if (c + NR < nc)
            prefetch_output(y + NR, p.y.stride, rows);
        g.y = width < NR ? s.spill : y;
        g.ldy = width < NR ? NR : p.y.stride;
        g.add = width < NR ? false : add;
        tile(g);
        if (width == NR)
            continue;
        for (int i = 0; i < rows; i++) {
            float * to = y + i * p.y.stride;
            const float * from = s.spill + i * NR;
            for (int64_t j = 0; j < width; j++)
                to[j] = add ? to[j] + from[j] : from[j];
        }
    }
}

/// The i-th of `tiles` parts of [tokens.first, tokens.last), as even as can be.
Range tile_tokens(const Range & tokens, int64_t i, int64_t tiles) {
    const Range part = split_range(tokens.last - tokens.first, 1, (int)i, (int)tiles);
    return {tokens.first + part.first, tokens.first + part.last};
}

/// What one thread does of a product: a range of columns for a range of tokens.
struct Part {
    const Product & p;
    Scratch & s;
    Range tokens, columns;
    int64_t kc_full;
    bool is_first; // of the threads

    int64_t tiles() const { return (tokens.last - tokens.first + MR - 1) / MR; }
    /// 16-bit rows are costly to make: those of all tokens are made before the groups' turns.
    bool ahead() const { return p.format == Format::i16; }
    int64_t depth_at(int64_t k0) const { return std::min(kc_full, p.depth - k0); }

    void make_rows(int64_t tile, int64_t slot, int64_t k0) const {
        const Range now = tile_tokens(tokens, tile, tiles());
        pack_rows(p.format, p.x, now.first, (int)(now.last - now.first), k0, depth_at(k0),
                  s.rows + slot * ROW_WORDS, s.row_scales + slot * SCALE_WORDS);
    }

    /// Where the rows of a tile are before its turn.
    Lines source(int64_t tile, int64_t k0) const {
        if (tile >= tiles())
            return {};
        const Range now = tile_tokens(tokens, tile, tiles());
        const int64_t n = now.last - now.first, kc = depth_at(k0);
        if (ahead()) {
            return {(const char *)(s.rows + tile * ROW_WORDS), n, TILE_STRIDE * 4,
                    tile_steps(p.format, kc) * 4};
        }
        const int64_t size = p.x.is_bf16 ? 2 : 4;
        return {(const char *)p.x.data + (now.first * p.x.stride + k0) * size, n, p.x.stride * size,
                kc * size};
    }

    void run_group(int64_t c0, int64_t nc, int64_t k0) const {
        const int64_t kc = depth_at(k0);
        if (p.low && k0 == 0)
            pack_low_rank(p, c0, nc, s.low_panels);
        {
            const PanelTimer timer(is_first);
            (p.nt ? pack_panels_nt : pack_panels_nn)(p.format, p.w, c0, nc, k0, kc, s.panels);
        }
        for (int64_t i = 0; i < tiles(); i++) {
            const int64_t slot = ahead() ? i : 0;
            if (!ahead())
                make_rows(i, 0, k0);
            run_tile(p, s,
                     {s.rows + slot * ROW_WORDS,
                      s.row_scales + slot * SCALE_WORDS,
                      {c0, c0 + nc},
                      tile_tokens(tokens, i, tiles()),
                      source(i + 1, k0),
                      k0,
                      kc});
        }
    }

    void run() const {
        s.hold(ahead() ? tiles() : 1);
        const int64_t width = columns.last - columns.first, unit = p.column_unit();
        const int64_t most = GROUP_WORDS / panel_steps(p.format, kc_full) / unit * unit;
        const int64_t groups = (width + most - 1) / most;
        const int64_t blocks = (p.depth + kc_full - 1) / kc_full;
        for (int64_t i = 0; i < groups * blocks; i++) {
            const int64_t group = ahead() ? i % groups : i / blocks;
            const int64_t k0 = (ahead() ? i / groups : i % blocks) * kc_full;
            if (ahead() && group == 0) {
                for (int64_t tile = 0; tile < tiles(); tile++)
                    make_rows(tile, tile, k0);
            }
            // Groups are of even size, so that none is tiny.
            const Range part = split_range(width, unit, (int)group, (int)groups);
            run_group(columns.first + part.first, part.last - part.first, k0);
        }
    }
};

void run_product(const Product & p, int ith, int nth) {
    static thread_local Scratch scratch;
    Range tokens, columns;
    choose_part(p, ith, nth, tokens, columns);
    if (tokens.first >= tokens.last)
        return;
    const int64_t blocks = (p.depth + p.max_depth() - 1) / p.max_depth();
    const int64_t kc_full = round_up((p.depth + blocks - 1) / blocks, p.depth_unit());
    const int64_t n = tokens.last - tokens.first;
    const int64_t turns = p.format == Format::i16 ? (n + TOKENS_AHEAD - 1) / TOKENS_AHEAD : 1;
    for (int64_t i = 0; i < turns; i++) {
        const Range turn = split_range(n, 1, (int)i, (int)turns);
        Part{p,       scratch, {tokens.first + turn.first, tokens.first + turn.last},
             columns, kc_full, ith == 0}
            .run();
    }
}

Format format_of(Precision precision) {
    if (precision == Precision::f32)
        return Format::f32;
    return HAS_BF16 ? Format::bf16 : HAS_I16 ? Format::i16 : Format::f32;
}

} // namespace

bool has_bf16_dot() {
    return HAS_BF16;
}

void time_panels(bool on) {
    timing = on;
    if (on)
        panels_took = 0.0;
}

double panel_seconds() {
    return panels_took;
}

const char * fast_format() {
    switch (format_of(Precision::fast)) {
    case Format::bf16:
        return "BF16";
    case Format::i16:
        return "16-bit integers";
    default:
        return "F32";
    }
}

void matmul_nt(Precision precision, const Weight & w, Rows x, const LowRank * low_rank, Output y,
               int64_t n_tokens, int ith, int nth) {
    run_product({format_of(precision), true, w, x, low_rank, y, n_tokens, w.n_rows, w.n_cols}, ith,
                nth);
}

void matmul_nn(Precision precision, const Weight & w, Rows dy, const LowRank * low_rank, Output dx,
               int64_t n_tokens, int ith, int nth) {
    run_product({format_of(precision), false, w, dy, low_rank, dx, n_tokens, w.n_cols, w.n_rows},
                ith, nth);
}

} // namespace ggft
