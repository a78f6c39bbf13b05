#include "kernels/gemm/gemm.h"

#include <time.h>

#include <atomic>

#include "kernels/gemm/prepacked.h"
#include "kernels/gemm/product.h"
#include "kernels/isa/memory.h"
#include "kernels/isa/work_stealing.h"
#include "kernels/rowwise/dropout_lanes.h"

namespace ggft::GGFT_ISA_NAMESPACE {
namespace {

/// Words of a group's low-rank panels, at most.
template <class F> int64_t low_panel_words(const Product<F> & p, int rank) {
    const int64_t most = GROUP_WORDS / panel_steps<F>(p.chunk());
    return round_up(round_up(min(p.n_cols, most), NR) * rank, 16);
}

/// What a thread's working memory holds.
struct Scratch {
    static constexpr int64_t TILE_WORDS = round_up(MR * NR, 16);
    uint32_t * panels;  // [GROUP_WORDS]
    uint32_t * rows;    // [MR][TILE_STRIDE]
    float * spill;      // [MR][NR], a tile at the right edge
    float * keep;       // [MR][NR], dropout factors
    float * work;       // [PANEL_WORK]
    float * low_panels; // [low_panel_words]

    template <class F> static int64_t words(const Product<F> & p, int rank) {
        return GROUP_WORDS + MR * TILE_STRIDE + 2 * TILE_WORDS + PANEL_WORK +
               low_panel_words(p, rank);
    }
    explicit Scratch(uint32_t * memory)
        : panels(memory), rows(panels + GROUP_WORDS), spill((float *)rows + MR * TILE_STRIDE),
          keep(spill + TILE_WORDS), work(keep + TILE_WORDS), low_panels(work + PANEL_WORK) {}
};

// ---- profiling ----

std::atomic<bool> timing = false;
std::atomic<double> panels_took = 0.0; // written by one thread at a time

double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/// Adds the time that it lives to panels_took.
class PanelTimer {
public:
    explicit PanelTimer(bool on) : on_(on && timing), start_(on_ ? now() : 0.0) {}
    ~PanelTimer() {
        if (on_)
            panels_took = panels_took + (now() - start_);
    }

private:
    bool on_;
    double start_;
};

void time_panels(bool on) {
    timing = on;
    if (on)
        panels_took = 0.0;
}

double panel_seconds() {
    return panels_took;
}

// ---- pieces of a product ----

/// scale * right for columns [c0, c0+nc) as panels [nc/NR][rank][NR].
template <class F> void pack_low_rank(const Product<F> & p, int64_t c0, int64_t nc, float * out) {
    const LowRank & low = *p.low;
    fill(out, out + round_up(nc, NR) * low.rank, 0.0f);
    for (int64_t c = 0; c < min(nc, p.n_cols - c0); c++) {
        float * panel = out + c / NR * low.rank * NR + c % NR;
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

void prefetch_output(const Output & y, const Range & tokens, int64_t column) {
    for (int64_t t = tokens.first; t < tokens.last; t++) {
        for (int j = 0; j < NR; j += 16)
            __builtin_prefetch(y.data + t * y.stride + column + j, 1);
    }
}

/// A row tile at work on a chunk of the reduction.
struct TileJob {
    Range tokens;
    TileFunction tile;
    TileArgs args; // but for what belongs to a panel
    Lines next;
};

/// One row tile past one panel: columns [c, c+NR) of the group that begins at c0.
template <class F>
void run_tile(const Product<F> & p, Scratch & s, TileJob & job, int64_t c0, int64_t c,
              const uint32_t * panel) {
    TileArgs & g = job.args;
    const int64_t t0 = job.tokens.first, width = min<int64_t>(NR, p.n_cols - c0 - c);
    const int rows = (int)(job.tokens.last - t0);
    const bool add = g.add;
    float * y = p.y.data + t0 * p.y.stride + c0 + c;
    g.panel = panel;
    g.y = y;
    if (g.low_steps) {
        g.low_panel = s.low_panels + c * g.low_steps;
        if (!p.nt && p.low->dropout > 0.0f) {
            fill_keep(*p.low, t0, rows, c0 + c, s.keep);
            g.keep = s.keep;
        }
    }
    if (width == NR) {
        job.tile(g);
        return;
    }
    TileArgs edge = g;
    edge.y = s.spill;
    edge.ldy = NR;
    edge.add = false;
    job.tile(edge);
    for (int i = 0; i < rows; i++) {
        float * to = y + i * p.y.stride;
        const float * from = s.spill + i * NR;
        for (int64_t j = 0; j < width; j++)
            to[j] = add ? to[j] + from[j] : from[j];
    }
}

/// A thread's share of a product: a range of columns for a range of tokens.
template <class F> struct Part {
    const Product<F> & p;
    Scratch & s;
    Range tokens, columns;
    int64_t kc_full;
    bool is_first; // whether the first thread computes it

    int64_t tiles() const {
        const int64_t mr = TILE_ROWS<F>;
        return (tokens.last - tokens.first + mr - 1) / mr;
    }
    int64_t depth_at(int64_t k0) const { return min(kc_full, p.depth - k0); }
    /// Tiles are as even as can be.
    Range tokens_of(int64_t tile) const {
        const Range part = split_range(tokens.last - tokens.first, 1, (int)tile, (int)tiles());
        return {tokens.first + part.first, tokens.first + part.last};
    }

    /// A tile, its rows made if they are not yet.
    TileJob job(int64_t tile, int64_t k0) const {
        const Range now = tokens_of(tile);
        const int rows = (int)(now.last - now.first);
        TileJob job = {now, tile_function<F, TILE_STRIDE>(rows), {}, {}};
        TileArgs & g = job.args;
        g.steps = (int)tile_steps<F>(depth_at(k0));
        g.ldy = p.y.stride;
        g.add = p.y.add || k0 > 0;
        if (p.low && k0 == 0) {
            g.low_rows = p.low->left + now.first * p.low->left_stride;
            g.low_stride = p.low->left_stride;
            g.low_steps = p.low->rank;
        }
        if constexpr (F::BLOCKED) {
            const PackedRows x = {row_packing(kc_full, p.depth), (uint32_t *)p.x.data, p.n_tokens};
            if (x.packing.stride == HALF_STRIDE)
                job.tile = tile_function<F, HALF_STRIDE>(rows);
            g.rows = x.words(now.first, k0);
            g.row_scales = x.scales(now.first, k0);
            g.row_pairs = x.pairs(now.first, k0);
        } else {
            g.rows = s.rows;
            job.next = source(tile + 1, k0);
            pack_rows(F::FORMAT, p.x, now.first, rows, k0, depth_at(k0), s.rows);
        }
        return job;
    }

    /// Where the rows of a tile are before they are made.
    Lines source(int64_t tile, int64_t k0) const {
        if (tile >= tiles())
            return {};
        const Range now = tokens_of(tile);
        const int64_t size = p.x.is_bf16 ? 2 : 4;
        return {(const char *)p.x.data + (now.first * p.x.stride + k0) * size, now.last - now.first,
                p.x.stride * size, depth_at(k0) * size};
    }

    /// The panels of columns [c0, c0+nc) for a chunk of the reduction: those that are kept, or new.
    const uint32_t * panels_of(int64_t c0, int64_t nc, int64_t k0) const {
        const Prepacked * kept = p.w.prepacked;
        char * made = kept ? kept->made + p.panel_index(c0, k0) : nullptr;
        uint32_t * panels = s.panels;
        if (kept && all_made(made, nc))
            return kept->words + p.panel_offset(c0, k0);
        // Where tokens are split, too, other threads need the same panels at the same time.
        const bool keep = kept && tokens.last - tokens.first == p.n_tokens;
        if (keep)
            panels = kept->words + p.panel_offset(c0, k0);
        const PanelTimer timer(is_first);
        if (p.nt)
            pack_panels_nt(F::FORMAT, p.w, c0, nc, k0, depth_at(k0), panels);
        else
            pack_panels_nn(F::FORMAT, p.w, c0, nc, k0, depth_at(k0), s.work, panels);
        if (keep)
            std::memset(made, 1, (size_t)((nc + NR - 1) / NR));
        return panels;
    }
    static bool all_made(const char * made, int64_t nc) {
        for (int64_t i = 0; i * NR < nc; i++) {
            if (!made[i])
                return false;
        }
        return true;
    }

    /// Columns [c0, c0+nc), a group, for a chunk of the reduction.
    void run_group(int64_t c0, int64_t nc, int64_t k0) const {
        const int64_t n_panels = (nc + NR - 1) / NR;
        const int64_t panel_words = panel_steps<F>(depth_at(k0)) * NR;
        if (p.low && k0 == 0)
            pack_low_rank(p, c0, nc, s.low_panels);
        const uint32_t * panels = panels_of(c0, nc, k0);
        // Packed rows stay in the L2 cache, panel by panel; others are made, and stay in the L1.
        constexpr int64_t together = F::BLOCKED ? PACKED_TILES : 1;
        TileJob jobs[together];
        for (int64_t first = 0; first < tiles(); first += together) {
            const int64_t n = min(together, tiles() - first);
            for (int64_t i = 0; i < n; i++)
                jobs[i] = job(first + i, k0);
            for (int64_t c = 0; c < nc; c += NR) {
                for (int64_t i = 0; i < n; i++) {
                    prefetch_rows(jobs[i].next, c / NR, n_panels);
                    // The next tile's output, in this panel or the next.
                    if (i + 1 < n)
                        prefetch_output(p.y, jobs[i + 1].tokens, c0 + c);
                    else if (c + NR < nc)
                        prefetch_output(p.y, jobs[0].tokens, c0 + c + NR);
                    run_tile(p, s, jobs[i], c0, c, panels + c / NR * panel_words);
                }
            }
        }
    }

    /// Of `left` columns, those of the next piece: half, so that threads end together, but no more
    /// than a group.
    int64_t piece_width(int64_t left) const {
        const int64_t unit = p.column_unit();
        const int64_t most = GROUP_WORDS / panel_steps<F>(kc_full) / unit * unit;
        const int64_t half = left < 2 * SMALLEST_PIECE ? left : round_up((left + 1) / 2, unit);
        return min(left, min(most, half));
    }
    int64_t pieces() const {
        int64_t n = 0;
        for (int64_t left = columns.last - columns.first; left > 0; n++)
            left -= piece_width(left);
        return tokens.first < tokens.last ? n : 0;
    }
    void run_piece(int64_t piece) const {
        int64_t c0 = columns.first;
        while (piece-- > 0)
            c0 += piece_width(columns.last - c0);
        const int64_t nc = piece_width(columns.last - c0);
        for (int64_t k0 = 0; k0 < p.depth; k0 += kc_full)
            run_group(c0, nc, k0);
    }
};

template <class F>
void run_product(const Product<F> & p, WorkStealing * stealing, int ith, int nth) {
    Scratch scratch(thread_words((size_t)Scratch::words(p, p.low ? p.low->rank : 0)));
    const bool help = stealing && nth <= stealing->n_threads();
    for (int i = 0; i < (help ? nth : 1); i++) {
        const int owner = (ith + i) % nth;
        Range tokens, columns;
        choose_part(p, owner, nth, tokens, columns);
        const Part<F> part = {p, scratch, tokens, columns, p.chunk(), ith == 0};
        const int64_t n = part.pieces();
        const auto after = [&](int64_t piece) {
            return help ? stealing->take(owner, n, nth) : piece + 1 < n ? piece + 1 : -1;
        };
        for (int64_t piece = after(-1); piece >= 0; piece = after(piece))
            part.run_piece(piece);
    }
}

template <bool NT>
void matmul(Format format, const Weight & w, Rows x, const LowRank * low, Output y,
            int64_t n_tokens, WorkStealing * stealing, int ith, int nth) {
    with_format(format, [&](auto f) {
        run_product(Product<decltype(f)>(NT, w, x, low, y, n_tokens), stealing, ith, nth);
    });
}

// ---- sizes ----

RowPacking packing_nt(Format format, int64_t n_inputs) {
    const Weight w = {GGML_TYPE_F32, 0, n_inputs, nullptr, 0};
    return with_format(format, [&](auto f) { return Product<decltype(f)>(true, w).packing(); });
}

RowPacking packing_nn(Format format, const Weight & w) {
    return with_format(format, [&](auto f) { return Product<decltype(f)>(false, w).packing(); });
}

PanelSize panel_size(Format format, const Weight & w, bool nt) {
    return with_format(format, [&](auto f) { return Product<decltype(f)>(nt, w).panel_size(); });
}

size_t scratch_bytes(Format format, const Weight & w, int rank) {
    return with_format(format, [&](auto f) {
        using P = Product<decltype(f)>;
        return 4 * (size_t)max(Scratch::words(P(true, w), rank), Scratch::words(P(false, w), rank));
    });
}

} // namespace

extern const GemmKernels gemm_kernels;
const GemmKernels gemm_kernels = {matmul<true>,  matmul<false>, packing_nt,
                                  packing_nn,    pack_tokens,   panel_size,
                                  scratch_bytes, time_panels,   panel_seconds};

} // namespace ggft::GGFT_ISA_NAMESPACE
