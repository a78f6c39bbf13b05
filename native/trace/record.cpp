#include "trace/record.h"

#include "base/error.h"
#include "trace/log.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>

#include <sys/mman.h>
#include <unistd.h>

namespace ggft {

// llama.cpp makes room for a row of logits per example (llama_context::output_reserve).
static constexpr size_t LOGIT_ROWS_BYTES = 128u << 20;
static constexpr int64_t KV_MULTIPLE = 256; // llama.cpp pads the rows of a cache to this

namespace {

// Gives memory back that llama.cpp has filled with zeros and nothing will ever read or write.
void release(void * data, size_t n_bytes) {
    const auto page = (uintptr_t)sysconf(_SC_PAGESIZE);
    const uintptr_t begin = ((uintptr_t)data + page - 1) / page * page;
    const uintptr_t end = ((uintptr_t)data + n_bytes) / page * page;
    if (data != nullptr && begin < end) {
        madvise((void *)begin, end - begin, MADV_DONTNEED); // may fail: it is only a wish
    }
}

bool is_weight(const ggml_tensor * t) {
    return t->op == GGML_OP_NONE && t->buffer != nullptr &&
           ggml_backend_buffer_get_usage(t->buffer) == GGML_BACKEND_BUFFER_USAGE_WEIGHTS;
}

} // namespace

TracedModel::TracedModel(const std::vector<std::string> & paths) {
    require(!paths.empty(), ErrorKind::input, "no model file is given");
    llama_backend_init();
    llama_model_params params = llama_model_default_params();
    params.n_gpu_layers = 0;
    params.use_extra_bufts = false; // weights keep their types and lie in the mapping
    params.load_mode = LLAMA_LOAD_MODE_MMAP;
    params.lazy_mode = LLAMA_LAZY_MODE_OFF;
    params.progress_callback = [](float, void *) { return true; };
    std::vector<const char *> names;
    for (const std::string & p : paths) {
        names.push_back(p.c_str());
    }
    HeldLog log;
    model_.reset(llama_model_load_from_splits(names.data(), names.size(), params));
    require(model_ != nullptr, ErrorKind::input,
            "llama.cpp cannot load " + paths[0] + ": " + log.first_error());
}

std::shared_ptr<const TracedModel> TracedModel::open(const std::vector<std::string> & paths) {
    static std::mutex mutex;
    static std::map<std::vector<std::string>, std::weak_ptr<const TracedModel>> models;
    std::lock_guard<std::mutex> lock(mutex);
    std::weak_ptr<const TracedModel> & known = models[paths];
    std::shared_ptr<const TracedModel> model = known.lock();
    if (model == nullptr) {
        model = std::make_shared<const TracedModel>(paths);
        known = model;
    }
    return model;
}

void TracedModel::Free::operator()(llama_model * m) const {
    HeldLog quiet;
    llama_model_free(m);
}

std::string TracedModel::architecture() const {
    char text[128] = "";
    llama_model_meta_val_str(model_.get(), "general.architecture", text, sizeof(text));
    return text;
}

int64_t TracedModel::n_vocab() const {
    return llama_vocab_n_tokens(llama_model_get_vocab(model_.get()));
}

Recorder::Recorder(const TracedModel & model, int64_t n_tokens_max)
    : model_(model), n_tokens_max_(n_tokens_max) {
    const size_t row_bytes = (size_t)model.n_vocab() * sizeof(float);
    n_examples_max_ = (int)std::clamp<int64_t>((int64_t)(LOGIT_ROWS_BYTES / row_bytes), 1,
                                               std::min<int64_t>(n_tokens_max, 256));
    llama_context_params p = llama_context_default_params();
    p.n_ctx = (uint32_t)((n_tokens_max + KV_MULTIPLE - 1) / KV_MULTIPLE * KV_MULTIPLE);
    p.n_batch = p.n_ubatch = p.n_ctx; // else a micro-batch would be split
    p.n_seq_max = (uint32_t)n_examples_max_;
    p.n_threads = p.n_threads_batch = 1;
    p.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
    p.kv_unified = true;
    p.swa_full = true; // caches of windows hold the whole micro-batch
    p.no_perf = true;
    p.offload_kqv = p.op_offload = false;
    p.cb_eval = on_node;
    p.cb_eval_user_data = this;
    p.abort_callback = [](void *) { return true; };
    HeldLog log;
    context_.reset(llama_init_from_model(model.get(), p));
    require(context_ != nullptr, ErrorKind::resource,
            "llama.cpp cannot open a context of " + std::to_string(n_tokens_max) +
                " tokens: " + log.first_error());
    release(llama_get_logits(context_.get()), (size_t)n_examples_max_ * row_bytes);
}

void Recorder::Free::operator()(llama_context * c) const {
    HeldLog quiet;
    llama_free(c);
}

bool Recorder::on_node(ggml_tensor * t, bool ask, void * self) {
    if (ask) {
        ((Recorder *)self)->seen_.push_back(t);
    }
    return false;
}

void Recorder::set_adapter(llama_adapter_lora * adapter) {
    HeldLog quiet;
    float scale = 1;
    llama_set_adapters_lora(context_.get(), &adapter, adapter != nullptr ? 1 : 0, &scale);
}

Tape Recorder::record(const Sequences & batch, int64_t n_outputs) {
    const int64_t n = batch.n_tokens();
    require(n >= 1 && n <= n_tokens_max_ && batch.n_examples() <= n_examples_max_, ErrorKind::input,
            "a micro-batch is larger than the recorder was opened for");
    llama_batch b = llama_batch_init((int32_t)n, 0, 1);
    b.n_tokens = (int32_t)n;
    for (size_t i = 0; i < (size_t)n; i++) {
        b.token[i] = batch.tokens[i];
        b.pos[i] = batch.positions[i];
        b.n_seq_id[i] = 1;
        b.seq_id[i][0] = batch.ids[i];
        b.logits[i] = (int64_t)i < n_outputs;
    }
    seen_.clear();
    int rc;
    std::string complaint;
    {
        HeldLog log; // being aborted is one
        llama_memory_clear(llama_get_memory(context_.get()), false);
        rc = llama_decode(context_.get(), b);
        complaint = log.first_error();
    }
    llama_batch_free(b);
    require(rc == 2 && !seen_.empty(), ErrorKind::input,
            "llama.cpp does not build the graph of a micro-batch: " + complaint);
    build();
    check_inputs(batch);
    return std::move(tape_);
}

int Recorder::add(ggml_tensor * t) {
    const auto known = index_.find(t);
    if (known != index_.end()) {
        return known->second;
    }
    const int i = (int)tape_.tensors.size();
    index_[t] = i;
    tape_.tensors.emplace_back();
    TapeTensor r;
    r.op = t->op;
    r.type = t->type;
    std::copy(t->ne, t->ne + 4, r.ne);
    std::copy(t->nb, t->nb + 4, r.nb);
    std::memcpy(r.op_params, t->op_params, sizeof(r.op_params));
    r.name = t->name;
    r.source = t;
    r.offs = t->view_src != nullptr ? t->view_offs : 0;
    r.root = t->view_src != nullptr ? add(t->view_src) : i;
    if (t->op == GGML_OP_NONE && t->view_src == nullptr) {
        r.kind = is_weight(t) ? TapeTensor::Kind::weight : TapeTensor::Kind::input;
    }
    int n_src = GGML_MAX_SRC;
    while (n_src > 0 && t->src[n_src - 1] == nullptr) {
        n_src--;
    }
    for (int s = 0; s < n_src; s++) {
        // A cast names itself as its second source.
        const bool none = t->src[s] == nullptr || t->src[s] == t;
        r.src.push_back(none ? -1 : add(t->src[s]));
    }
    tape_[i] = std::move(r);
    return i;
}

void Recorder::build() {
    tape_ = Tape();
    index_.clear();
    for (ggml_tensor * t : seen_) {
        tape_.order.push_back(add(t));
    }
    for (int i : tape_.order) {
        const TapeTensor & t = tape_[i];
        TapeTensor & root = tape_[t.root];
        if (!t.is_view() && t.root != i && root.kind == TapeTensor::Kind::input) {
            root.kind = TapeTensor::Kind::cache;
            release(root.source->data, ggml_nbytes(root.source));
        }
        if (t.name == "result_output") {
            tape_.out = i;
        }
    }
    if (tape_.out < 0) {
        tape_.out = tape_.order.back();
    }
}

// What a split or reordered micro-batch would not survive: the rows of the graph are the batch's.
void Recorder::check_inputs(const Sequences & batch) const {
    for (const TapeTensor & t : tape_.tensors) {
        if (t.kind != TapeTensor::Kind::input || t.name != "inp_tokens") {
            continue;
        }
        const bool same =
            t.ne[0] == batch.n_tokens() && std::memcmp(t.source->data, batch.tokens.data(),
                                                       batch.tokens.size() * sizeof(int32_t)) == 0;
        require(same, ErrorKind::input,
                "llama.cpp splits micro-batches of " + model_.architecture() +
                    " models by example; ggft cannot train them");
    }
}

} // namespace ggft
