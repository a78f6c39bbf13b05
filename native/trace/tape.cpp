#include "trace/tape.h"

#include <cstdlib>
#include <cstring>

namespace ggft {

bool TapeTensor::is_view() const {
    switch (op) {
    case GGML_OP_NONE:
    case GGML_OP_VIEW:
    case GGML_OP_RESHAPE:
    case GGML_OP_PERMUTE:
    case GGML_OP_TRANSPOSE:
        return true;
    default:
        return false;
    }
}

float TapeTensor::param_f32(int i) const {
    float value;
    std::memcpy(&value, &op_params[i], sizeof(value));
    return value;
}

int Tape::block_of(int i) const {
    const std::string & name = (*this)[i].name;
    return name.compare(0, 4, "blk.") == 0 ? std::atoi(name.c_str() + 4) : -1;
}

std::string Tape::describe(int i) const {
    const TapeTensor & t = (*this)[i];
    if (t.op == GGML_OP_UNARY) {
        return ggml_unary_op_name((ggml_unary_op)t.op_params[0]);
    }
    if (t.op == GGML_OP_GLU) {
        return ggml_glu_op_name((ggml_glu_op)t.op_params[0]);
    }
    return ggml_op_name(t.op);
}

bool is_linear(const Tape & tape, int node) {
    const TapeTensor & t = tape[node];
    if (t.op != GGML_OP_MUL_MAT) {
        return false;
    }
    const TapeTensor & w = tape[t.src[0]];
    return w.kind == TapeTensor::Kind::weight && w.ne[2] == 1 && w.ne[3] == 1;
}

} // namespace ggft
