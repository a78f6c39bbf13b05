#include "bindings/calibration.h"

#include "bindings/arrays.h"
#include "calibrate/quantizer.h"

#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

using namespace nanobind::literals;

namespace ggft {

static void check_matrix(const FloatMatrix & array, int64_t n_rows, int64_t width,
                         const char * what) {
    require((int64_t)array.shape(1) == width && (n_rows < 0 || (int64_t)array.shape(0) == n_rows),
            ErrorKind::input,
            std::string(what) + " has shape (" + std::to_string(array.shape(0)) + ", " +
                std::to_string(array.shape(1)) + "), expected rows of " + std::to_string(width));
}

static nb::object new_matrix(int64_t n_rows, int64_t width, float *& data) {
    return new_array((size_t)(n_rows * width), {(size_t)n_rows, (size_t)width}, data);
}

// ---- streams ----

static nb::object embed(Engine & e, IntArray tokens, IntArray positions, IntArray segments) {
    const MicroBatch b = batch_of(tokens, positions, segments, nullptr, 0);
    float * data;
    nb::object residual = new_matrix(b.B * b.T, e.model().hparams.n_embd, data);
    nb::gil_scoped_release release;
    e.embed(b, data);
    return residual;
}

// A weight given by the name of its linear: (ggml's number of the type, bytes).
static std::vector<GivenWeight> given_weights(Engine & e, int64_t layer, int stage,
                                              nb::dict weights) {
    const int64_t block = stage == Decoder::IN_ATTN ? layer - 1 : layer;
    std::vector<GivenWeight> given;
    for (auto [key, value] : weights) {
        const auto name = nb::cast<std::string>(key);
        const auto [type, bytes] = nb::cast<std::pair<int, ByteArray>>(value);
        int site = 0;
        while (site < N_SITES && name != site_name(site)) {
            site++;
        }
        require(site < N_SITES && block >= 0 && block < e.model().hparams.n_layer, ErrorKind::input,
                "there is no linear '" + name + "' here");
        require(type >= 0 && type < GGML_TYPE_COUNT, ErrorKind::input, "unknown tensor type");
        const Tensor own = e.model().layers[(size_t)block].linear[site].weight;
        require(own->ne[0] % ggml_blck_size((ggml_type)type) == 0 &&
                    bytes.size() == ggml_row_size((ggml_type)type, own->ne[0]) * (size_t)own->ne[1],
                ErrorKind::input, "the weight given for " + name + " has another size");
        given.push_back({site, (ggml_type)type, bytes.data()});
    }
    return given;
}

static nb::tuple advance(Engine & e, int64_t layer, int stage, IntArray tokens, IntArray positions,
                         IntArray segments, nb::dict weights, FloatMatrix input,
                         FloatMatrix residual) {
    const MicroBatch b = batch_of(tokens, positions, segments, nullptr, 0);
    const int64_t N = b.B * b.T, C = e.model().hparams.n_embd;
    require(stage >= 0 && stage < Decoder::N_STAGES, ErrorKind::input, "there is no such stage");
    check_matrix(residual, N, C, "the residual");
    if (layer > 0 || stage > 0) {
        check_matrix(input, N, e.stage_width((stage + 3) % 4), "the input");
    }
    const std::vector<GivenWeight> given = given_weights(e, layer, stage, weights);
    float *sum, *out;
    nb::object sums = new_matrix(N, C, sum), outs = new_matrix(N, e.stage_width(stage), out);
    {
        nb::gil_scoped_release release;
        std::copy_n(residual.data(), N * C, sum);
        e.advance(layer, stage, b, given, input.data(), sum, out);
    }
    return nb::make_tuple(sums, outs);
}

static nb::tuple loss_of(Engine & e, IntArray tokens, IntArray positions, IntArray segments,
                         IntArray targets, FloatMatrix residual) {
    check_targets(tokens, targets);
    const MicroBatch b = batch_of(tokens, positions, segments, targets.data(), 0);
    check_matrix(residual, b.B * b.T, e.model().hparams.n_embd, "the residual");
    LossSum sum;
    {
        nb::gil_scoped_release release;
        sum = e.loss_of(b, residual.data());
    }
    return nb::make_tuple(sum.nats, sum.n_targets);
}

// ---- moments ----

static void add(Moments & m, FloatMatrix x, FloatMatrix y) {
    check_matrix(x, -1, m.n(), "x");
    check_matrix(y, (int64_t)x.shape(0), m.n(), "y");
    nb::gil_scoped_release release;
    m.add(x.data(), y.data(), (int64_t)x.shape(0));
}

static nb::object targets(Moments & m, FloatMatrix w) {
    check_matrix(w, -1, m.n(), "the weights");
    float * data;
    nb::object out = new_matrix((int64_t)w.shape(0), m.n(), data);
    nb::gil_scoped_release release;
    find_targets(m, w.data(), (int64_t)w.shape(0), data);
    return out;
}

static nb::tuple quantize_rows(Moments & m, int type, FloatMatrix w, int sweeps) {
    check_matrix(w, -1, m.n(), "the weights");
    const BlockFormat * format = find_format((ggml_type)type);
    require(format != nullptr, ErrorKind::input, "this type cannot be calibrated");
    const size_t n_rows = w.shape(0), row_bytes = ggml_row_size(format->type, m.n());
    auto * data = new uint8_t[n_rows * row_bytes]();
    nb::capsule owner(data, [](void * p) noexcept { delete[] (uint8_t *)p; });
    nb::object out = nb::cast(nb::ndarray<nb::numpy, uint8_t>(data, {n_rows, row_bytes}, owner));
    OutputError error;
    {
        nb::gil_scoped_release release;
        error = quantize(m, *format, w.data(), (int64_t)n_rows, sweeps, data);
    }
    return nb::make_tuple(out, error.fed_back, error.swept);
}

void bind_calibration(nb::module_ & m, nb::class_<Engine> & engine) {
    engine.def("embed", &embed, "tokens"_a, "positions"_a, "segments"_a)
        .def("advance", &advance, "layer"_a, "stage"_a, "tokens"_a, "positions"_a, "segments"_a,
             "weights"_a, "input"_a, "residual"_a)
        .def("loss_of", &loss_of, "tokens"_a, "positions"_a, "segments"_a, "targets"_a,
             "residual"_a);
    m.def(
        "can_calibrate", [](int type) { return find_format((ggml_type)type) != nullptr; },
        "type"_a);
    nb::class_<Moments>(m, "Moments")
        .def(nb::init<int64_t, int>(), "n_inputs"_a, "threads"_a)
        .def("add", &add, "x"_a, "y"_a)
        .def("factor", &Moments::factor, "damping"_a, nb::call_guard<nb::gil_scoped_release>())
        .def("targets", &targets, "weights"_a)
        .def("quantize", &quantize_rows, "type"_a, "weights"_a, "sweeps"_a)
        .def("cancel", &Moments::cancel);
}

} // namespace ggft
