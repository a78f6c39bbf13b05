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

constexpr int64_t LARGEST_BLOCK = 256; // of all types

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

/// Working memory of one thread.
struct Scratch {
    std::unique_ptr<uint32_t, FreeDeleter> memory;
    uint32_t * panels;
    uint32_t * rows; // [MR][TILE_STRIDE]
    float * spill;   // [MR][NR], a tile at the right edge
    float * keep;    // [MR][NR], dropout factors
    std::vector<float> low_panels;

    void hold() {
        constexpr int64_t TILE_WORDS = round_up(MR * NR, 16);
        if (memory)
            return;
        const size_t words = GROUP_WORDS + MR * TILE_STRIDE + 2 * TILE_WORDS;
        memory.reset((uint32_t *)std::aligned_alloc(64, round_up(words * 4, 64)));
        if (!memory)
            throw std::bad_alloc();
        panels = memory.get();
        rows = panels + GROUP_WORDS;
        spill = (float *)rows + MR * TILE_STRIDE;
        keep = spill + TILE_WORDS;
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
        // Packed rows do not know which weights they will meet: their unit suits all.
        if (format == Format::i16)
            return nt ? LARGEST_BLOCK : I16_DEPTH;
        return nt ? std::max<int64_t>(32, block()) : 32;
    }
    /// Of a group of panels: what a tile row holds, or less, so that one unit of columns fits.
    int64_t max_depth() const {
        const int64_t fits = GROUP_WORDS / column_unit();
        if (format == Format::i16)
            return std::min<int64_t>(I16_BLOCKS, fits / I16_PANEL_STEPS) * I16_DEPTH;
        return std::min<int64_t>(MAX_STEPS, fits / 32 * 32) * per_word(format);
    }
    /// What of the reduction is done at a time: even parts of up to max_depth().
    int64_t chunk() const {
        const int64_t parts = (depth + max_depth() - 1) / max_depth();
        return round_up((depth + parts - 1) / parts, depth_unit());
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

/// A row tile at work on a block of the reduction.
struct TileJob {
    const uint32_t * rows;
    const float * row_scales;
    Range tokens;
    Lines next;
    int64_t k0, kc;
};

/// One row tile past the panels of `columns`.
void run_tile(const Product & p, Scratch & s, const Range & columns, const TileJob & job) {
    const int64_t t0 = job.tokens.first, c0 = columns.first;
    const int64_t nc = columns.last - c0, panels = (nc + NR - 1) / NR;
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
    int64_t depth_at(int64_t k0) const { return std::min(kc_full, p.depth - k0); }

    /// The rows of a tile, made if they are not yet.
    TileJob job(int64_t tile, int64_t k0) const {
        const Range now = tile_tokens(tokens, tile, tiles());
        TileJob job = {};
        job.tokens = now;
        job.next = source(tile + 1, k0);
        job.k0 = k0;
        job.kc = depth_at(k0);
        if (p.format == Format::i16) {
            job.rows = packed_row(now.first, k0);
            job.row_scales = packed_scales(now.first, k0);
        } else {
            job.rows = s.rows;
            pack_rows(p.format, p.x, now.first, (int)(now.last - now.first), k0, job.kc, s.rows,
                      nullptr);
        }
        return job;
    }

    const uint32_t * packed_row(int64_t t, int64_t k0) const {
        return (const uint32_t *)p.x.data + (k0 / kc_full * p.n_tokens + t) * TILE_STRIDE;
    }
    const float * packed_scales(int64_t t, int64_t k0) const {
        const int64_t chunks = (p.depth + kc_full - 1) / kc_full;
        return (const float *)p.x.data + chunks * p.n_tokens * TILE_STRIDE +
               (k0 / kc_full * p.n_tokens + t) * I16_BLOCKS;
    }

    /// Where the rows of a tile are before its turn.
    Lines source(int64_t tile, int64_t k0) const {
        if (tile >= tiles())
            return {};
        const Range now = tile_tokens(tokens, tile, tiles());
        const int64_t n = now.last - now.first, kc = depth_at(k0);
        if (p.format == Format::i16) {
            return {(const char *)packed_row(now.first, k0), n, TILE_STRIDE * 4,
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
        for (int64_t i = 0; i < tiles(); i++)
            run_tile(p, s, {c0, c0 + nc}, job(i, k0));
    }

    void run() const {
        s.hold();
        const int64_t width = columns.last - columns.first, unit = p.column_unit();
        const int64_t most = GROUP_WORDS / panel_steps(p.format, kc_full) / unit * unit;
        const int64_t groups = (width + most - 1) / most;
        const int64_t blocks = (p.depth + kc_full - 1) / kc_full;
        for (int64_t i = 0; i < groups * blocks; i++) {
            const int64_t group = i / blocks, k0 = i % blocks * kc_full;
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
    Part{p, scratch, tokens, columns, p.chunk(), ith == 0}.run();
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

namespace {

Product forward(Precision precision, const Weight & w) {
    return {format_of(precision), true, w, {}, nullptr, {}, 0, w.n_rows, w.n_cols};
}

Product backward(Precision precision, const Weight & w) {
    return {format_of(precision), false, w, {}, nullptr, {}, 0, w.n_cols, w.n_rows};
}

RowPacking packing_of(const Product & p) {
    return {p.format == Format::i16 ? p.chunk() : 0, p.depth};
}

} // namespace

size_t RowPacking::words(int64_t n_tokens) const {
    return (size_t)((depth + chunk - 1) / chunk * n_tokens * (TILE_STRIDE + I16_BLOCKS));
}

RowPacking packing_nt(Precision precision, int64_t n_inputs) {
    return packing_of(forward(precision, {GGML_TYPE_F32, 0, n_inputs, nullptr, 0}));
}

RowPacking packing_nn(Precision precision, const Weight & w) {
    return packing_of(backward(precision, w));
}

void pack_tokens(const RowPacking & packing, Rows x, int64_t n_tokens, void * out, int ith,
                 int nth) {
    const Range part = split_range(n_tokens, 1, ith, nth);
    const int64_t chunks = (packing.depth + packing.chunk - 1) / packing.chunk;
    for (int64_t i = 0; i < chunks; i++) {
        const int64_t k0 = i * packing.chunk, at = i * n_tokens + part.first;
        pack_rows(Format::i16, x, part.first, (int)(part.last - part.first), k0,
                  std::min(packing.chunk, packing.depth - k0), (uint32_t *)out + at * TILE_STRIDE,
                  (float *)out + chunks * n_tokens * TILE_STRIDE + at * I16_BLOCKS);
    }
}

void matmul_nt(Precision precision, const Weight & w, Rows x, const LowRank * low_rank, Output y,
               int64_t n_tokens, int ith, int nth) {
    Product p = forward(precision, w);
    p.x = x, p.low = low_rank, p.y = y, p.n_tokens = n_tokens;
    run_product(p, ith, nth);
}

void matmul_nn(Precision precision, const Weight & w, Rows dy, const LowRank * low_rank, Output dx,
               int64_t n_tokens, int ith, int nth) {
    Product p = backward(precision, w);
    p.x = dy, p.low = low_rank, p.y = dx, p.n_tokens = n_tokens;
    run_product(p, ith, nth);
}

} // namespace ggft
