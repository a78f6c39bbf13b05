// What the inputs of a stage say about its weights: second moments, and their factor.
//
// A stage is the linears that read one input. x are its inputs in the model that is wanted, y those
// that it gets when all that comes before is written already; both are rows of n numbers.
#pragma once

#include "kernels/calibrate/calibrate.h"

#include <atomic>
#include <vector>

namespace ggft {

class Moments {
public:
    /// n inputs, a multiple of 32.
    Moments(int64_t n, int n_threads);

    /// Adds `n_tokens` rows of x and y, (n_tokens, n).
    void add(const float * x, const float * y, int64_t n_tokens);

    /// Factors the damped moments: second() + damping * mean diagonal = R Rᵀ, R upper triangular.
    /// Without a positive pivot the damping grows tenfold, a few times. Returns what it was.
    /// Throws Error(numeric) when no damping helps.
    float factor(float damping);

    /// Of the factor; 0 before.
    float damping() const { return damping_; }
    Factored factored() const {
        return {n_, stride_, second_.data(), unit_.data(), pivots_.data()};
    }
    const CalibrateKernels & kernels() const { return kernels_; }

    int64_t n() const { return n_; }
    int64_t n_tokens() const { return n_tokens_; }
    /// Mean of y_j (x - y)_i: row j.
    const float * cross() const { return cross_.data(); }
    int64_t stride() const { return stride_; }
    double mean_square() const;

    void cancel() { cancelled_ = true; }
    const std::atomic<bool> & cancelled() const { return cancelled_; }
    int n_threads() const { return n_threads_; }

private:
    void add_block(const float * x, const float * y, int64_t n_tokens);
    void finish();
    bool try_factor();
    void damp(float share);
    void factor_columns(int64_t first, int64_t i);
    bool factor_corner(int64_t first);

    const CalibrateKernels & kernels_;
    int64_t n_, stride_, n_tokens_ = 0;
    int n_threads_;
    bool finished_ = false;
    float damping_ = 0;
    std::vector<float> second_, cross_, unit_, pivots_, diagonal_;
    std::atomic<bool> cancelled_{false};
};

} // namespace ggft
