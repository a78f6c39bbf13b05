// A micro-batch ready to be trained: its tape, cut into segments, with its inputs on the device and
// memory for all that lives from one graph to the next.
#pragma once

#include "base/arena.h"
#include "segments/borders.h"
#include "segments/builder.h"
#include "trace/record.h"
#include "trace/simplify.h"

#include <map>

namespace ggft {

// Rows whose logits are wanted, in the tokens' order, what they should predict (-1: nothing), and
// the factors on their losses, none for 1.
struct OutputRows {
    std::vector<int32_t> rows, labels;
    std::vector<float> weights;

    int64_t n() const { return (int64_t)rows.size(); }
};

class PreparedBatch {
public:
    PreparedBatch(ggml_backend_buffer_type_t type, Memory memory)
        : arena_("saved activations", type, memory) {}

    // Records and lays out. `sites` are trained, none if no gradient is wanted.
    void prepare(const TracedModel & model, Recorder & recorder, const Sequences & batch,
                 OutputRows outputs, const std::set<std::string> & sites);

    const Tape & tape() const { return tape_; }
    const Segments & segments() const { return segments_; }
    const std::map<int, MaskSpans> & masks() const { return masks_; }
    const OutputRows & outputs() const { return outputs_; }
    // First segment that a gradient has to go back through.
    size_t first_trained() const { return first_trained_; }
    const Arena & arena() const { return arena_; }
    size_t input_bytes() const { return input_bytes_; } // written by the last call of prepare

    std::map<int, Tensor> inputs;    // by tape tensor
    std::map<int, Tensor> kept;      // roots that cross a border
    std::map<int, Tensor> gradients; // of those that a gradient reaches
    Tensor labels = nullptr;         // I32 [M]
    Tensor weights = nullptr;        // F32 [1, M], null for 1
    Tensor nats = nullptr;           // F64 [M]

private:
    void record(const TracedModel & model, Recorder & recorder, const Sequences & batch);
    void add_inputs();
    void add_crossing();
    void fill_inputs(const Sequences & batch);
    void put(Tensor t, const void * data);
    void fill_mask(const MaskInput & mask, int64_t n);

    Tape tape_;
    Segments segments_;
    OutputRows outputs_;
    std::vector<MaskInput> mask_inputs_;
    std::map<int, MaskSpans> masks_;
    int output_ids_ = -1;
    size_t input_bytes_ = 0;
    size_t first_trained_ = 0;
    int64_t marker_ = 0; // number of output rows that told them from other sizes last time
    Arena arena_;
};

} // namespace ggft
