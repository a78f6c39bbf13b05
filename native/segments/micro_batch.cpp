#include "segments/micro_batch.h"

#include "base/error.h"

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstring>

namespace ggft {

// llama.cpp makes room for the logits of every row that is asked for, so a few are, and their
// number is then replaced. It must not be another size of the graph, too.
static constexpr int64_t MARKERS[] = {11, 13, 17, 19, 23, 29, 31};

void PreparedBatch::record(const TracedModel & model, Recorder & recorder,
                           const Sequences & batch) {
    std::vector<int64_t> candidates(std::begin(MARKERS), std::end(MARKERS));
    if (marker_ != 0) {
        candidates.insert(candidates.begin(), marker_);
    }
    const int64_t n = batch.n_tokens();
    for (int64_t marker : candidates) {
        if (marker >= n) {
            continue;
        }
        tape_ = recorder.record(batch, marker);
        output_ids_ = find_output_ids(tape_, marker);
        if (output_ids_ >= 0 && is_distinct(tape_, output_ids_, marker)) {
            marker_ = marker;
            mask_inputs_ = bypass_caches(tape_, n);
            resize_outputs(tape_, output_ids_, marker, outputs_.n());
            return;
        }
    }
    // All rows: for few tokens, and for graphs whose sizes are all of the markers.
    const size_t bytes = (size_t)n * (size_t)model.n_vocab() * sizeof(float);
    require(bytes <= (64u << 20), ErrorKind::input,
            "the outputs of a " + model.architecture() + " model cannot be told apart");
    tape_ = recorder.record(batch, n);
    output_ids_ = find_output_ids(tape_, n);
    mask_inputs_ = bypass_caches(tape_, n);
    OutputRows all;
    for (int32_t i = 0; i < (int32_t)n; i++) {
        const auto row = std::find(outputs_.rows.begin(), outputs_.rows.end(), i);
        all.rows.push_back(i);
        const auto at = (size_t)(row - outputs_.rows.begin());
        all.labels.push_back(row == outputs_.rows.end() ? -1 : outputs_.labels[at]);
        if (!outputs_.weights.empty()) {
            all.weights.push_back(row == outputs_.rows.end() ? 0 : outputs_.weights[at]);
        }
    }
    outputs_ = std::move(all);
}

void PreparedBatch::prepare(const TracedModel & model, Recorder & recorder, const Sequences & batch,
                            OutputRows outputs, const std::set<std::string> & sites) {
    outputs_ = std::move(outputs);
    record(model, recorder, batch);
    drop_dead(tape_);
    segments_ = cut(tape_, sites, model.n_vocab());
    const size_t n_blocks = segments_.blocks.size();
    for (first_trained_ = 0; first_trained_ < n_blocks; first_trained_++) {
        const Segment & s = segments_.blocks[first_trained_];
        const auto begin = tape_.order.begin();
        if (std::any_of(begin + s.first, begin + s.last,
                        [&](int i) { return segments_.reached.count(i) != 0; })) {
            break;
        }
    }
    arena_.clear();
    inputs.clear();
    kept.clear();
    gradients.clear();
    masks_.clear();
    add_inputs();
    add_crossing();
    arena_.allocate();
    fill_inputs(batch);
}

void PreparedBatch::add_inputs() {
    for (int i : tape_.order) {
        for (int s : tape_[i].src) {
            const int root = s < 0 ? -1 : tape_[s].root;
            if (root >= 0 && tape_[root].kind == TapeTensor::Kind::input &&
                inputs.count(root) == 0) {
                inputs[root] =
                    arena_.add(tape_[root].type, tape_[root].ne, tape_[root].name, 0, INT_MAX);
            }
        }
    }
    for (const MaskInput & m : mask_inputs_) {
        if (inputs.count(m.tensor) == 0) {
            continue; // whatever read it was dead
        }
        MaskSpans & spans = masks_[m.tensor];
        spans.mask = inputs[m.tensor];
        spans.spans.B = 1;
        spans.spans.T = tape_[m.tensor].ne[0];
        spans.spans.fused.starts =
            arena_.add(GGML_TYPE_I32, {spans.spans.T, 1, 1, 1}, "starts", 0, INT_MAX);
    }
    labels = arena_.add(GGML_TYPE_I32, {outputs_.n(), 1, 1, 1}, "labels", 0, INT_MAX);
    weights = outputs_.weights.empty()
                  ? nullptr
                  : arena_.add(GGML_TYPE_F32, {1, outputs_.n(), 1, 1}, "weights", 0, INT_MAX);
    nats = arena_.add(GGML_TYPE_F64, {outputs_.n(), 1, 1, 1}, "nats", 0, INT_MAX);
}

// Times: segment b computes at b, the loss head forward and backward at the number of segments, and
// segment b goes back at twice that number - b.
void PreparedBatch::add_crossing() {
    const int n = (int)segments_.blocks.size();
    struct Use {
        int home, first, last; // segments
    };
    std::map<int, Use> uses;
    for (int b = 0; b < n; b++) {
        for (int root : segments_.blocks[(size_t)b].out) {
            uses[root] = {b, n, n};
        }
    }
    for (auto & [root, use] : uses) {
        use.last = tape_[tape_[tape_.order[(size_t)segments_.head]].src[1]].root == root ? n : 0;
        for (int b = 0; b < n; b++) {
            const std::vector<int> & in = segments_.blocks[(size_t)b].in;
            if (std::find(in.begin(), in.end(), root) != in.end()) {
                use.first = std::min(use.first, b);
                use.last = std::max(use.last, b);
            }
        }
    }
    const bool training = !segments_.reached.empty();
    for (const auto & [root, use] : uses) {
        const TapeTensor & t = tape_[root];
        const int back = std::max(use.first, (int)first_trained_); // first segment that recomputes
        const bool again = training && use.last < n && back <= use.last;
        kept[root] = arena_.add(t.type, t.ne, t.name, use.home, again ? 2 * n - back : use.last);
        if (segments_.reached.count(root)) {
            gradients[root] =
                arena_.add(t.type, t.ne, "d " + t.name, 2 * n - use.last, 2 * n - use.home);
        }
    }
}

void PreparedBatch::put(Tensor t, const void * data) {
    if (!arena_.measured()) {
        ggml_backend_tensor_set(t, data, 0, ggml_nbytes(t));
    }
    input_bytes_ += ggml_nbytes(t);
}

void PreparedBatch::fill_inputs(const Sequences & batch) {
    input_bytes_ = 0;
    for (const MaskInput & m : mask_inputs_) {
        if (masks_.count(m.tensor) != 0) {
            fill_mask(m, batch.n_tokens());
        }
    }
    for (const auto & [i, tensor] : inputs) {
        if (i == output_ids_) {
            put(tensor, outputs_.rows.data());
        } else if (masks_.count(i) == 0) {
            put(tensor, tape_[i].source->data);
        }
    }
    put(labels, outputs_.labels.data());
    if (weights != nullptr) {
        put(weights, outputs_.weights.data());
    }
}

// The columns of the cache's rows that this micro-batch writes; and, if each query sees all keys
// from some key to itself, those keys' numbers.
void PreparedBatch::fill_mask(const MaskInput & mask, int64_t n) {
    MaskSpans & spans = masks_[mask.tensor];
    const ggml_tensor * from = tape_[mask.leaf].source;
    std::vector<float> values((size_t)(n * n));
    std::vector<int32_t> starts((size_t)n);
    spans.contiguous = true;
    for (int64_t i = 0; i < n; i++) {
        float * row = values.data() + i * n;
        const char * data = (const char *)from->data + (size_t)i * from->nb[1];
        if (from->type == GGML_TYPE_F16) {
            ggml_fp16_to_fp32_row((const ggml_fp16_t *)data, row, n);
        } else {
            std::memcpy(row, data, (size_t)n * sizeof(float));
        }
        const int32_t start =
            (int32_t)(std::find_if(row, row + n, [](float x) { return !std::isinf(x); }) - row);
        starts[(size_t)i] = start;
        for (int64_t j = start; j < n; j++) {
            spans.contiguous = spans.contiguous && (j <= i ? row[j] == 0.0f : std::isinf(row[j]));
        }
        spans.contiguous = spans.contiguous && start <= i && (i == 0 || start >= starts[i - 1]);
    }
    put(spans.mask, values.data());
    put(spans.spans.fused.starts, starts.data());
}

} // namespace ggft
