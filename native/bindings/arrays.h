// Arrays between NumPy and the engine.
#pragma once

#include "base/error.h"
#include "engine/engine.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <optional>

namespace ggft {

namespace nb = nanobind;

using IntArray = nb::ndarray<const int32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using FloatArray = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using FloatMatrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using ByteArray = nb::ndarray<const uint8_t, nb::c_contig, nb::device::cpu>;

// A NumPy array that owns `n` floats.
inline nb::object new_array(size_t n, std::initializer_list<size_t> shape, float *& data) {
    data = new float[n]();
    nb::capsule owner(data, [](void * p) noexcept { delete[] (float *)p; });
    return nb::cast(nb::ndarray<nb::numpy, float>(data, shape, owner));
}

inline MicroBatch batch_of(const IntArray & tokens, const IntArray & positions,
                           const IntArray & segments, const int32_t * targets, uint64_t seed) {
    require(tokens.shape(0) == positions.shape(0) && tokens.shape(1) == positions.shape(1) &&
                tokens.shape(0) == segments.shape(0) && tokens.shape(1) == segments.shape(1),
            ErrorKind::input, "tokens, positions and segments differ in shape");
    return {(int64_t)tokens.shape(0),
            (int64_t)tokens.shape(1),
            tokens.data(),
            positions.data(),
            segments.data(),
            targets,
            seed};
}

// Factors on the targets' losses, which live as long as `weights`.
inline void set_weights(MicroBatch & b, const std::optional<FloatMatrix> & weights) {
    if (weights) {
        require((int64_t)weights->shape(0) == b.B && (int64_t)weights->shape(1) == b.T,
                ErrorKind::input, "targets and weights differ in shape");
        b.weights = weights->data();
    }
}

inline void check_targets(const IntArray & tokens, const IntArray & targets) {
    require(tokens.shape(0) == targets.shape(0) && tokens.shape(1) == targets.shape(1),
            ErrorKind::input, "tokens and targets differ in shape");
}

} // namespace ggft
