#include "trace/adapter_sites.h"

#include "base/error.h"
#include "trace/log.h"

#include <gguf.h>

#include <algorithm>
#include <cstdio>
#include <set>

namespace ggft {

static constexpr const char *A_SUFFIX = ".lora_a", *B_SUFFIX = ".lora_b";

// An adapter of rank 1 and zeros for every linear of the tape, as a file without a name.
static FILE * write_adapter(const TracedModel & model, const Tape & tape) {
    std::set<int> weights;
    int64_t n_values = 0;
    for (int i : tape.order) {
        if (is_linear(tape, i) && tape[tape[i].src[0]].name != "token_embd.weight" &&
            weights.insert(tape[i].src[0]).second) {
            n_values += tape[tape[i].src[0]].ne[0] + tape[tape[i].src[0]].ne[1];
        }
    }
    const size_t size = 2 * weights.size() * (ggml_tensor_overhead() + 64) +
                        (size_t)n_values * sizeof(float) + 1024;
    ggml_context_ptr ctx(ggml_init({size, nullptr, /*no_alloc=*/false}));
    gguf_context_ptr file(gguf_init_empty());
    FILE * out = std::tmpfile();
    require(ctx != nullptr && file != nullptr && out != nullptr, ErrorKind::resource,
            "no room for a temporary adapter");
    gguf_set_val_str(file.get(), "general.type", "adapter");
    gguf_set_val_str(file.get(), "general.architecture", model.architecture().c_str());
    gguf_set_val_str(file.get(), "adapter.type", "lora");
    gguf_set_val_f32(file.get(), "adapter.lora.alpha", 1);
    auto add = [&](int64_t ne0, int64_t ne1, const std::string & name) {
        Tensor t = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, ne0, ne1);
        std::fill((float *)t->data, (float *)t->data + ne0 * ne1, 0.0f);
        ggml_set_name(t, name.c_str());
        gguf_add_tensor(file.get(), t);
    };
    for (int w : weights) {
        add(tape[w].ne[0], 1, tape[w].name + A_SUFFIX);
        add(1, tape[w].ne[1], tape[w].name + B_SUFFIX);
    }
    const bool written = gguf_write_to_file_ptr(file.get(), out, /*only_meta=*/false);
    require(written && std::fflush(out) == 0, ErrorKind::resource,
            "cannot write a temporary adapter");
    std::rewind(out);
    return out;
}

static llama_adapter_lora * load_adapter(const TracedModel & model, FILE * file) {
    HeldLog log;
    llama_adapter_lora * adapter = llama_adapter_lora_init_from_file_ptr(model.get(), file);
    std::fclose(file);
    require(adapter != nullptr, ErrorKind::input,
            "llama.cpp takes no adapter for " + model.architecture() +
                " models: " + log.first_error());
    return adapter;
}

// What stands between the product by a matrix and the sum of it and its adapter's, see above.
static int find_scale(const Tape & adapted, const Tape & tape, int adapters_product) {
    int last = adapters_product;
    for (int i : adapted.order) {
        const TapeTensor & t = adapted[i];
        if (t.op == GGML_OP_SCALE && t.src[0] == last) {
            last = i;
        } else if (t.op == GGML_OP_ADD && t.src[1] == last) {
            const TapeTensor & sum = adapted[t.src[0]];
            if (sum.op != GGML_OP_MUL) {
                return -1;
            }
            for (size_t w = 0; w < tape.tensors.size(); w++) {
                if (tape.tensors[w].name == adapted[sum.src[1]].name) {
                    return (int)w;
                }
            }
        }
    }
    return -1;
}

std::map<std::string, int> adapter_sites(const TracedModel & model, Recorder & recorder,
                                         const Tape & tape) {
    FILE * file = write_adapter(model, tape);
    llama_adapter_lora * adapter = load_adapter(model, file);
    recorder.set_adapter(adapter);
    const Tape adapted = recorder.record({{0}, {0}, {0}}, 1);
    recorder.set_adapter(nullptr);
    std::map<std::string, int> sites;
    for (int i : adapted.order) {
        const TapeTensor & t = adapted[i];
        const std::string name = t.op == GGML_OP_MUL_MAT ? adapted[t.src[0]].name : "";
        const size_t suffix = name.rfind(B_SUFFIX);
        if (suffix != std::string::npos) {
            sites[name.substr(0, suffix)] = find_scale(adapted, tape, i);
        }
    }
    llama_adapter_lora_free(adapter);
    return sites;
}

} // namespace ggft
