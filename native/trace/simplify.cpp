#include "trace/simplify.h"

#include "base/error.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

namespace ggft {

namespace {

// A cache's view as the same view of what was written into it.
void read_value(Tape & tape, int i, int written, int64_t n_tokens) {
    const TapeTensor cache = tape.root(i), value = tape[written];
    TapeTensor & t = tape[i];
    const size_t size = ggml_type_size(cache.type), row = cache.nb[1];
    require(ggml_blck_size(cache.type) == 1 && t.offs < row && value.nb[0] == sizeof(float),
            ErrorKind::input, "llama.cpp reads the cache of " + t.name + " in an unknown way");
    for (int d = 0; d < 4; d++) {
        if (t.nb[d] == row && t.ne[d] > 1) {
            t.ne[d] = n_tokens;
            t.nb[d] = value.nb[1];
        } else {
            t.nb[d] = t.nb[d] / size * sizeof(float);
        }
    }
    t.type = GGML_TYPE_F32;
    t.offs = value.offs + t.offs / size * sizeof(float);
    t.root = value.root;
    t.op = GGML_OP_VIEW;
    t.src = {value.root};
}

// The input that a mask comes from: itself, or through a cast.
int mask_leaf(const Tape & tape, int i) {
    while (i >= 0 && tape[i].kind == TapeTensor::Kind::node) {
        const TapeTensor & t = tape[i];
        const bool passes = t.op == GGML_OP_CPY || t.op == GGML_OP_CONT || t.is_view();
        require(passes && !t.src.empty(), ErrorKind::input,
                "an attention mask is computed by " + tape.describe(i) + " (" + t.name +
                    "), which ggft cannot train yet");
        i = t.src[0];
    }
    return i;
}

// The input without unwritten rows that stands for a mask.
int narrow_mask(Tape & tape, std::vector<MaskInput> & masks, int leaf, int64_t n_tokens) {
    for (const MaskInput & m : masks) {
        if (m.leaf == leaf) {
            return m.tensor;
        }
    }
    TapeTensor mask;
    mask.kind = TapeTensor::Kind::input;
    mask.ne[0] = mask.ne[1] = n_tokens;
    mask.nb[0] = sizeof(float);
    mask.nb[1] = (size_t)n_tokens * mask.nb[0];
    mask.nb[2] = mask.nb[3] = (size_t)n_tokens * mask.nb[1];
    mask.name = "mask";
    mask.root = (int)tape.tensors.size();
    tape.tensors.push_back(mask);
    masks.push_back({leaf, mask.root});
    return mask.root;
}

// Keys and values without a cast to 16 bits, through which no gradient would come.
int before_cast(const Tape & tape, int i) {
    const TapeTensor & t = tape[i];
    const bool cast = t.op == GGML_OP_CPY && tape[t.src[0]].type == GGML_TYPE_F32;
    return cast ? t.src[0] : i;
}

} // namespace

std::vector<MaskInput> bypass_caches(Tape & tape, int64_t n_tokens) {
    std::map<int, int> writes; // what was written, [row, tokens], by cache
    std::vector<int> order;
    for (int i : tape.order) {
        const TapeTensor & t = tape[i];
        if (t.op == GGML_OP_SET_ROWS && tape.root(i).kind == TapeTensor::Kind::cache) {
            const bool rows = tape[t.src[0]].ne[1] == n_tokens && tape.root(i).ne[2] == 1;
            require(rows && writes.count(t.root) == 0, ErrorKind::input,
                    "the cache of " + t.name + " is written in a way that ggft cannot train yet");
            writes[t.root] = t.src[0];
        } else {
            order.push_back(i);
        }
    }
    tape.order = order;
    for (size_t i = 0; i < tape.tensors.size(); i++) {
        const TapeTensor & t = tape.tensors[i];
        const auto write = writes.find(t.root);
        if (write != writes.end() && t.root != (int)i && t.is_view()) {
            read_value(tape, (int)i, write->second, n_tokens);
        }
    }
    std::vector<MaskInput> masks;
    for (int i : order) {
        if (tape[i].op == GGML_OP_FLASH_ATTN_EXT && tape[i].src.size() > 3 && tape[i].src[3] >= 0) {
            const int mask = narrow_mask(tape, masks, mask_leaf(tape, tape[i].src[3]), n_tokens);
            tape[i].src[3] = mask;
            tape[i].src[1] = before_cast(tape, tape[i].src[1]);
            tape[i].src[2] = before_cast(tape, tape[i].src[2]);
        }
    }
    for (int i : order) {
        const TapeTensor & t = tape[i];
        for (int s : t.src) {
            require(t.is_view() || s < 0 || tape.root(s).kind != TapeTensor::Kind::cache,
                    ErrorKind::input,
                    tape.describe(i) + " (" + t.name +
                        ") reads a cache in a way that ggft cannot train yet");
        }
    }
    return masks;
}

void require_causal(const Tape & tape, const std::vector<MaskInput> & masks) {
    for (const MaskInput & m : masks) {
        const ggml_tensor * from = tape[m.leaf].source;
        const auto at = [&](size_t key) { // of the first query
            return from->type == GGML_TYPE_F16
                       ? ggml_fp16_to_fp32(((const ggml_fp16_t *)from->data)[key])
                       : ((const float *)from->data)[key];
        };
        require(std::isfinite(at(0)) && !std::isfinite(at(1)), ErrorKind::input,
                "tokens of this model see the ones behind them, so that it cannot learn to predict "
                "them");
    }
}

int find_output_ids(const Tape & tape, int64_t n_outputs) {
    for (int i : tape.order) {
        const TapeTensor & t = tape[i];
        if (t.op == GGML_OP_GET_ROWS && tape[t.src[1]].kind == TapeTensor::Kind::input &&
            tape[t.src[1]].ne[0] == n_outputs &&
            tape.root(t.src[0]).kind == TapeTensor::Kind::node) {
            return t.src[1];
        }
    }
    return -1;
}

// Tensors that depend on the output ids, by index.
static std::set<int> after_outputs(const Tape & tape, int output_ids) {
    std::set<int> after = {output_ids};
    for (int i : tape.order) {
        for (int s : tape[i].src) {
            if (s >= 0 && (after.count(s) || after.count(tape[s].root))) {
                after.insert(i);
            }
        }
    }
    return after;
}

bool is_distinct(const Tape & tape, int output_ids, int64_t n) {
    const std::set<int> after = after_outputs(tape, output_ids);
    for (int i : tape.order) {
        if (after.count(i)) {
            continue;
        }
        const TapeTensor & t = tape[i];
        if (std::count(t.ne, t.ne + 4, n) != 0) {
            return false;
        }
    }
    for (const TapeTensor & t : tape.tensors) {
        if (t.kind == TapeTensor::Kind::weight && std::count(t.ne, t.ne + 4, n) != 0) {
            return false;
        }
    }
    return true;
}

void resize_outputs(Tape & tape, int output_ids, int64_t from, int64_t to) {
    for (int i : after_outputs(tape, output_ids)) {
        TapeTensor & t = tape[i];
        int rows = -1;
        for (int d = 0; d < 4; d++) {
            if (t.ne[d] == from) {
                t.ne[d] = to;
                rows = d;
            }
        }
        for (int d = rows + 1; rows >= 0 && d < 4; d++) {
            if (t.nb[d] % (size_t)from == 0 && t.nb[d] >= t.nb[rows] * (size_t)from) {
                t.nb[d] = t.nb[d] / (size_t)from * (size_t)to;
            }
        }
    }
}

void drop_dead(Tape & tape) {
    std::set<int> live = {tape[tape.out].root};
    for (auto i = tape.order.rbegin(); i != tape.order.rend(); ++i) {
        const TapeTensor & t = tape[*i];
        if (!t.is_view() && live.count(t.root)) {
            for (int s : t.src) {
                if (s >= 0) {
                    live.insert(tape[s].root);
                }
            }
        }
    }
    std::vector<int> order;
    for (int i : tape.order) {
        if (!tape[i].is_view() && live.count(tape[i].root)) {
            order.push_back(i);
        }
    }
    tape.order = std::move(order);
}

} // namespace ggft
