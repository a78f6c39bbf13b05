#include "calibrate/moments.h"

#include "calibrate/threads.h"
#include "kernels/isa/dispatch.h"

#include <algorithm>
#include <cmath>

namespace ggft {

namespace {

constexpr int64_t TOKENS = 256; // whose products are summed in registers
constexpr int DAMPINGS = 6;     // tried before giving up

// Rows of CHUNK lanes for any matrix of n columns, an odd number of cache lines long: columns are
// read downwards, and a power of two would bring them all to the same place in the cache.
int64_t padded(int64_t n) {
    const int64_t line = 16, lines = round_up(n, CHUNK) / line;
    return (lines | 1) * line;
}

// Columns [first, first + width) of n_tokens rows of n numbers, token by token; 0 beyond them.
void pack(const float * x, const float * minus, int64_t n, int64_t n_tokens, int64_t first,
          int64_t width, float * out) {
    for (int64_t t = 0; t < n_tokens; t++) {
        for (int64_t i = 0; i < width; i++) {
            const int64_t at = t * n + first + i;
            const bool inside = first + i < n;
            out[t * width + i] = !inside ? 0.0f : minus != nullptr ? x[at] - minus[at] : x[at];
        }
    }
}

} // namespace

Moments::Moments(int64_t n, int n_threads)
    : kernels_(find_kernels().calibrate), n_(n), stride_(padded(n)), n_threads_(n_threads),
      second_((size_t)(n * stride_)), cross_((size_t)(n * stride_)), pivots_((size_t)n),
      diagonal_((size_t)n) {
    require(n > 0 && n % PANEL == 0, ErrorKind::input,
            "a stage of " + std::to_string(n) + " inputs is not whole panels of 32");
    require(n_threads > 0, ErrorKind::input, "threads must be at least 1");
}

void Moments::add(const float * x, const float * y, int64_t n_tokens) {
    require(!finished_, ErrorKind::input, "moments are finished once they are factored");
    for (int64_t t = 0; t < n_tokens; t += TOKENS)
        add_block(x + t * n_, y + t * n_, std::min(TOKENS, n_tokens - t));
    n_tokens_ += n_tokens;
}

void Moments::add_block(const float * x, const float * y, int64_t n_tokens) {
    const int64_t width = kernels_.tile_columns, lanes = kernels_.tile_lanes; // of a tile
    const int64_t strips = (n_ + lanes - 1) / lanes, tiles = n_ / width;
    const int64_t strip_size = n_tokens * lanes, tile_size = n_tokens * width;
    std::vector<float> columns((size_t)(tiles * tile_size));
    for_pieces(n_threads_, tiles, cancelled_, [&](int64_t i) {
        pack(y, nullptr, n_, n_tokens, i * width, width, columns.data() + i * tile_size);
    });
    for_pieces(n_threads_, strips, cancelled_, [&](int64_t s) {
        const int64_t first = s * lanes;
        std::vector<float> same((size_t)strip_size), other((size_t)strip_size);
        pack(y, nullptr, n_, n_tokens, first, lanes, same.data());
        pack(x, y, n_, n_tokens, first, lanes, other.data());
        for (int64_t j = 0; j < n_; j += width) {
            const float * b = columns.data() + j * n_tokens;
            const int64_t at = j * stride_ + first;
            kernels_.add_tile(cross_.data() + at, stride_, other.data(), b, n_tokens);
            // The lower half; finish() mirrors it.
            if (j + width > first)
                kernels_.add_tile(second_.data() + at, stride_, same.data(), b, n_tokens);
        }
    });
}

void Moments::finish() {
    require(n_tokens_ > 0, ErrorKind::input, "there are no tokens to calibrate on");
    const float factor = 1.0f / (float)n_tokens_;
    for_pieces(n_threads_, n_, cancelled_, [&](int64_t j) {
        for (int64_t i = 0; i < n_; i++) {
            cross_[(size_t)(j * stride_ + i)] *= factor;
            if (i <= j)
                second_[(size_t)(j * stride_ + i)] *= factor;
        }
    });
    for_pieces(n_threads_, n_, cancelled_, [&](int64_t j) {
        for (int64_t i = j + 1; i < n_; i++)
            second_[(size_t)(j * stride_ + i)] = second_[(size_t)(i * stride_ + j)];
        diagonal_[(size_t)j] = second_[(size_t)(j * stride_ + j)];
    });
    finished_ = true;
}

double Moments::mean_square() const {
    double sum = 0;
    for (float x : diagonal_)
        sum += x;
    return sum / (double)n_;
}

void Moments::damp(float share) {
    // A stage whose inputs are all 0 has weights that do not matter.
    const float more = mean_square() > 0 ? share * (float)mean_square() : 1.0f;
    for (int64_t j = 0; j < n_; j++)
        second_[(size_t)(j * stride_ + j)] = diagonal_[(size_t)j] + more;
}

float Moments::factor(float damping) {
    require(damping > 0, ErrorKind::input, "damping must be above 0");
    if (!finished_)
        finish();
    require(std::isfinite(mean_square()), ErrorKind::numeric,
            "the inputs of a stage are not finite");
    if (damping_ == damping)
        return damping_;
    damping_ = 0;
    unit_.resize((size_t)(n_ * stride_));
    for (int i = 0; i < DAMPINGS; i++, damping *= 10.0f) {
        damp(damping);
        if (try_factor()) {
            damping_ = damping;
            return damping;
        }
    }
    fail(ErrorKind::numeric, "the moments of a stage cannot be factored");
}

// Cholesky's method from the last column to the first, PANEL columns at a time. While it runs,
// unit_ holds Rᵀ: row k is column k of R.
bool Moments::try_factor() {
    for (int64_t first = n_ - PANEL; first >= 0; first -= PANEL) {
        const int64_t end = first + PANEL, strips = (end + CHUNK - 1) / CHUNK;
        for_pieces(n_threads_, strips, cancelled_, [&](int64_t s) {
            const int64_t i = s * CHUNK;
            float * rows = unit_.data() + first * stride_ + i;
            for (int64_t j = 0; j < PANEL; j++)
                std::copy_n(second_.data() + (first + j) * stride_ + i, CHUNK, rows + j * stride_);
            const float * below = unit_.data() + end * stride_;
            kernels_.add_products(rows, stride_, below + i, stride_, below + first, {1, stride_},
                                  PANEL, n_ - end, -1.0f);
        });
        if (!factor_corner(first))
            return false;
        for_pieces(n_threads_, (first + CHUNK - 1) / CHUNK, cancelled_,
                   [&](int64_t s) { factor_columns(first, s * CHUNK); });
    }
    for_pieces(n_threads_, n_, cancelled_, [&](int64_t k) {
        float * row = unit_.data() + k * stride_;
        for (int64_t j = 0; j < k; j++)
            row[j] /= row[k];
        pivots_[(size_t)k] = row[k] * row[k];
    });
    return true;
}

// The PANEL x PANEL corner at the diagonal.
bool Moments::factor_corner(int64_t first) {
    float * corner = unit_.data() + first * stride_ + first;
    for (int64_t k = PANEL - 1; k >= 0; k--) {
        float * row = corner + k * stride_;
        for (int64_t i = k; i >= 0; i--) {
            double sum = row[i];
            for (int64_t l = k + 1; l < PANEL; l++)
                sum -= (double)corner[l * stride_ + k] * corner[l * stride_ + i];
            if (i == k && !(sum > 0))
                return false;
            row[i] = (float)(i == k ? std::sqrt(sum) : sum / row[k]);
        }
    }
    return true;
}

// The rows above the corner, CHUNK at a time from i on; those of the corner itself stay.
void Moments::factor_columns(int64_t first, int64_t i) {
    const int64_t n = std::min<int64_t>(CHUNK, first - i);
    float * block = unit_.data() + first * stride_;
    for (int64_t k = PANEL - 1; k >= 0; k--) {
        float * row = block + k * stride_ + i;
        const float inverse = 1.0f / block[k * stride_ + first + k];
        for (int64_t l = k + 1; l < PANEL; l++) {
            const float factor = block[l * stride_ + first + k];
            const float * other = block + l * stride_ + i;
            for (int64_t lane = 0; lane < n; lane++)
                row[lane] -= factor * other[lane];
        }
        for (int64_t lane = 0; lane < n; lane++)
            row[lane] *= inverse;
    }
}

} // namespace ggft
