#include "trace/clone.h"

#include "base/error.h"

#include <algorithm>

namespace ggft {

Tensor Clone::get(int i) {
    const auto known = made_.find(i);
    if (known != made_.end()) {
        return known->second;
    }
    const TapeTensor & t = tape_[i];
    if (t.root == i) {
        require(t.kind == TapeTensor::Kind::weight, ErrorKind::input,
                "the recorded graph reads " + t.name + " before it is there");
        return made_[i] = t.source;
    }
    // Every view is one of its root; what the root looks like here does not matter.
    Tensor root = get(t.root);
    Tensor v = ggml_view_4d(g_.ctx(), root, t.ne[0], t.ne[1], t.ne[2], t.ne[3], t.nb[1], t.nb[2],
                            t.nb[3], t.offs);
    v->nb[0] = t.nb[0];
    ggml_set_name(v, t.name.c_str());
    return made_[i] = v;
}

Tensor Clone::add(int i) {
    const TapeTensor & t = tape_[i];
    require(t.root == i, ErrorKind::input,
            tape_.describe(i) + " (" + t.name +
                ") overwrites memory in a way that ggft cannot train yet");
    Tensor n = ggml_new_tensor(g_.ctx(), t.type, GGML_MAX_DIMS, t.ne);
    n->op = t.op == GGML_OP_CPY ? GGML_OP_DUP : t.op; // a copy without the tensor it went into
    std::copy(std::begin(t.op_params), std::end(t.op_params), n->op_params);
    for (size_t s = 0; s < t.src.size() && (t.op != GGML_OP_CPY || s == 0); s++) {
        n->src[s] = t.src[s] < 0 ? nullptr : get(t.src[s]);
    }
    ggml_set_name(n, t.name.c_str());
    return made_[i] = n;
}

} // namespace ggft
