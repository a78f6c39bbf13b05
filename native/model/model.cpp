#include "model/model.h"

#include "base/error.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>

namespace ggft {

static const char * SITE_NAMES[N_SITES] = {"attn_q",   "attn_k", "attn_v",  "attn_output",
                                           "ffn_gate", "ffn_up", "ffn_down"};

const char * site_name(int site) {
    return SITE_NAMES[site];
}

std::string weight_name(int64_t layer, int site) {
    return "blk." + std::to_string(layer) + "." + site_name(site) + ".weight";
}

const std::vector<ArchTraits> & supported_archs() {
    static const std::vector<ArchTraits> archs = {
        {"llama", GGML_ROPE_TYPE_NORMAL, false},
        {"qwen2", GGML_ROPE_TYPE_NEOX, false},
        {"qwen3", GGML_ROPE_TYPE_NEOX, true},
    };
    return archs;
}

static const ArchTraits & traits_of(const std::string & arch) {
    std::string known;
    for (const auto & t : supported_archs()) {
        if (arch == t.name) {
            return t;
        }
        known += std::string(known.empty() ? "" : ", ") + t.name;
    }
    fail(ErrorKind::input,
         "architecture '" + arch + "' is not supported (supported: " + known + ")");
}

// ---- files ----

struct Model::Shard {
    std::string path;
    gguf_context_ptr gguf;
    ggml_context_ptr ctx;
    void * map = nullptr;
    size_t map_size = 0;
    bool mapped = false; // the tensors point into the map
    ggml_backend_buffer_ptr buffer;

    // Of a tensor's data in the file.
    size_t offset_of(Tensor t) const {
        return gguf_get_data_offset(gguf.get()) +
               gguf_get_tensor_offset(gguf.get(), gguf_find_tensor(gguf.get(), t->name));
    }

    ~Shard() {
        buffer.reset();
        if (map != nullptr) {
            munmap(map, map_size);
        }
    }
};

void Model::open_shard(const std::string & path, ggml_backend_dev_t device, Memory memory) {
    auto shard = std::make_unique<Shard>();
    ggml_context * ctx = nullptr;
    shard->path = path;
    shard->gguf.reset(gguf_init_from_file(path.c_str(), {/*no_alloc=*/true, &ctx}));
    shard->ctx.reset(ctx);
    require(shard->gguf != nullptr && ctx != nullptr, ErrorKind::input,
            path + ": not a readable GGUF file");

    const int fd = open(path.c_str(), O_RDONLY);
    require(fd >= 0, ErrorKind::input, path + ": cannot open");
    struct stat st;
    if (fstat(fd, &st) == 0 && st.st_size > 0) {
        shard->map_size = (size_t)st.st_size;
        void * map = mmap(nullptr, shard->map_size, PROT_READ, MAP_SHARED, fd, 0);
        shard->map = map == MAP_FAILED ? nullptr : map;
    }
    close(fd);
    require(shard->map != nullptr, ErrorKind::resource, path + ": cannot map the file into memory");

    const size_t data = gguf_get_data_offset(shard->gguf.get());
    for (int64_t i = 0; i < gguf_get_n_tensors(shard->gguf.get()); i++) {
        const size_t end = data + gguf_get_tensor_offset(shard->gguf.get(), i) +
                           gguf_get_tensor_size(shard->gguf.get(), i);
        require(end <= shard->map_size, ErrorKind::input,
                path + ": tensor " + gguf_get_tensor_name(shard->gguf.get(), i) +
                    " reaches past the end of the file");
    }
    if (memory == Memory::measured) {
        for (Tensor t = ggml_get_first_tensor(ctx); t != nullptr;
             t = ggml_get_next_tensor(ctx, t)) {
            t->data = (uint8_t *)shard->map + shard->offset_of(t);
        }
    } else {
        place_weights(*shard, device);
    }
    for (Tensor t = ggml_get_first_tensor(ctx); t != nullptr; t = ggml_get_next_tensor(ctx, t)) {
        tensors_[t->name] = t;
    }
    shards_.push_back(std::move(shard));
}

// Points the shard's tensors into the map where the device reads host memory, else copies them in
// pieces.
void Model::place_weights(Shard & shard, ggml_backend_dev_t device) {
    ggml_backend_dev_props props;
    ggml_backend_dev_get_props(device, &props);
    const auto type = ggml_backend_dev_buffer_type(device);
    auto * const base = (uint8_t *)shard.map;
    size_t max_tensor = 0;
    bool aligned = true;
    for (Tensor t = ggml_get_first_tensor(shard.ctx.get()); t;
         t = ggml_get_next_tensor(shard.ctx.get(), t)) {
        max_tensor = std::max(max_tensor, ggml_nbytes(t));
        aligned &= shard.offset_of(t) % ggml_backend_buft_get_alignment(type) == 0;
    }
    if (props.caps.buffer_from_host_ptr && aligned && max_tensor > 0) {
        shard.buffer.reset(
            ggml_backend_dev_buffer_from_host_ptr(device, base, shard.map_size, max_tensor));
    }
    if (shard.buffer) {
        shard.mapped = true;
        ggml_backend_buffer_set_usage(shard.buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        for (Tensor t = ggml_get_first_tensor(shard.ctx.get()); t;
             t = ggml_get_next_tensor(shard.ctx.get(), t)) {
            ggml_backend_tensor_alloc(shard.buffer.get(), t, base + shard.offset_of(t));
        }
        return;
    }
    if (max_tensor == 0) {
        return;
    }
    shard.buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(shard.ctx.get(), type));
    require(shard.buffer != nullptr, ErrorKind::resource,
            std::string("no room for the weights on ") + ggml_backend_dev_name(device) + ": " +
                shard.path);
    ggml_backend_buffer_set_usage(shard.buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    const size_t piece = 16u << 20;
    for (Tensor t = ggml_get_first_tensor(shard.ctx.get()); t;
         t = ggml_get_next_tensor(shard.ctx.get(), t)) {
        for (size_t at = 0; at < ggml_nbytes(t); at += piece) {
            ggml_backend_tensor_set(t, base + shard.offset_of(t) + at, at,
                                    std::min(piece, ggml_nbytes(t) - at));
        }
    }
    munmap(shard.map, shard.map_size);
    shard.map = nullptr;
}

// ---- metadata ----

namespace {

// Typed look-ups in the first shard's metadata; a value of another type is an error, not an abort.
class Metadata {
public:
    Metadata(const gguf_context * gguf, const std::string & path) : gguf_(gguf), path_(path) {}

    std::string str(const std::string & key, const char * fallback) const {
        const int64_t id = gguf_find_key(gguf_, key.c_str());
        if (id < 0) {
            return fallback;
        }
        require(gguf_get_kv_type(gguf_, id) == GGUF_TYPE_STRING, ErrorKind::input,
                path_ + ": " + key + " is not a string");
        return gguf_get_val_str(gguf_, id);
    }

    double number(const std::string & key, double fallback) const {
        const int64_t id = gguf_find_key(gguf_, key.c_str());
        return id < 0 ? fallback : value(id, key);
    }

    double number(const std::string & key) const {
        const int64_t id = gguf_find_key(gguf_, key.c_str());
        require(id >= 0, ErrorKind::input, path_ + ": metadata key " + key + " is missing");
        return value(id, key);
    }

    int64_t array_length(const std::string & key) const {
        const int64_t id = gguf_find_key(gguf_, key.c_str());
        if (id < 0 || gguf_get_kv_type(gguf_, id) != GGUF_TYPE_ARRAY) {
            return 0;
        }
        return (int64_t)gguf_get_arr_n(gguf_, id);
    }

private:
    double value(int64_t id, const std::string & key) const {
        switch (gguf_get_kv_type(gguf_, id)) {
        case GGUF_TYPE_UINT8:
            return gguf_get_val_u8(gguf_, id);
        case GGUF_TYPE_INT8:
            return gguf_get_val_i8(gguf_, id);
        case GGUF_TYPE_UINT16:
            return gguf_get_val_u16(gguf_, id);
        case GGUF_TYPE_INT16:
            return gguf_get_val_i16(gguf_, id);
        case GGUF_TYPE_UINT32:
            return gguf_get_val_u32(gguf_, id);
        case GGUF_TYPE_INT32:
            return gguf_get_val_i32(gguf_, id);
        case GGUF_TYPE_UINT64:
            return (double)gguf_get_val_u64(gguf_, id);
        case GGUF_TYPE_INT64:
            return (double)gguf_get_val_i64(gguf_, id);
        case GGUF_TYPE_FLOAT32:
            return gguf_get_val_f32(gguf_, id);
        case GGUF_TYPE_FLOAT64:
            return gguf_get_val_f64(gguf_, id);
        case GGUF_TYPE_ARRAY:
            return uniform(id, key);
        default:
            fail(ErrorKind::input, path_ + ": " + key + " is not a number");
        }
    }

    // Some converters write one value per layer; trainable when all are equal.
    double uniform(int64_t id, const std::string & key) const {
        const gguf_type type = gguf_get_arr_type(gguf_, id);
        const bool ok =
            (type == GGUF_TYPE_INT32 || type == GGUF_TYPE_UINT32) && gguf_get_arr_n(gguf_, id) > 0;
        require(ok, ErrorKind::input, path_ + ": " + key + " is not a number");
        const auto * values = (const int32_t *)gguf_get_arr_data(gguf_, id);
        for (size_t i = 1; i < gguf_get_arr_n(gguf_, id); i++) {
            require(values[i] == values[0], ErrorKind::input,
                    path_ + ": " + key + " differs from layer to layer, which is not supported");
        }
        return values[0];
    }

    const gguf_context * gguf_;
    const std::string & path_;
};

} // namespace

void Model::read_hparams() {
    const Metadata meta(shards_[0]->gguf.get(), shards_[0]->path);
    const std::string arch = meta.str("general.architecture", "");
    const ArchTraits & traits = traits_of(arch);
    const std::string p = arch + ".";
    auto count = [&](const std::string & key, double fallback) {
        const double v = meta.number(p + key, fallback);
        require(v >= 1 && v < 1e9 && v == std::floor(v), ErrorKind::input,
                shards_[0]->path + ": " + p + key + " is out of range (found " + std::to_string(v) +
                    ")");
        return (int64_t)v;
    };
    Hparams & h = hparams;
    h.arch = arch;
    h.n_layer = count("block_count", 0);
    h.n_embd = count("embedding_length", 0);
    h.n_head = count("attention.head_count", 0);
    h.n_head_kv = count("attention.head_count_kv", (double)h.n_head);
    h.n_ff = count("feed_forward_length", 0);
    h.n_ctx_train = count("context_length", 0);
    require(meta.number(p + "expert_count", 0) == 0, ErrorKind::input,
            shards_[0]->path + ": mixture-of-experts models are not supported");
    h.n_embd_head = count("attention.key_length", (double)(h.n_embd / h.n_head));
    require(count("attention.value_length", (double)h.n_embd_head) == h.n_embd_head,
            ErrorKind::input,
            shards_[0]->path + ": key and value heads of different size are not supported");
    require(h.n_head % h.n_head_kv == 0, ErrorKind::input,
            shards_[0]->path + ": head_count is not a multiple of head_count_kv");
    h.norm_eps = (float)meta.number(p + "attention.layer_norm_rms_epsilon");
    const double s = meta.number(p + "attention.scale", 0);
    h.attn_scale = s != 0 ? (float)s : 1.0f / std::sqrt((float)h.n_embd_head);

    const std::string scaling = meta.str(p + "rope.scaling.type", "linear");
    const bool yarn = scaling == "yarn";
    require(yarn || scaling == "linear" || scaling == "none" || scaling == "llama3",
            ErrorKind::input,
            shards_[0]->path + ": rope scaling '" + scaling + "' is not supported");
    double factor = meta.number(p + "rope.scaling.factor", meta.number(p + "rope.scale_linear", 1));
    factor = factor > 0 && scaling != "none" ? factor : 1;
    h.rope = {traits.rope_mode,
              (int)count("rope.dimension_count", (double)h.n_embd_head),
              (int)count("rope.scaling.original_context_length", (double)h.n_ctx_train),
              (float)meta.number(p + "rope.freq_base", 10000.0),
              (float)(1.0 / factor),
              yarn ? 1.0f : 0.0f,
              (float)meta.number(p + "rope.scaling.attn_factor", 1.0),
              (float)meta.number(p + "rope.scaling.yarn_beta_fast", 32.0),
              (float)meta.number(p + "rope.scaling.yarn_beta_slow", 1.0),
              nullptr};
    require(h.rope.n_dims <= h.n_embd_head && h.rope.n_dims % 2 == 0, ErrorKind::input,
            shards_[0]->path + ": rope.dimension_count does not fit the head size");
}

// ---- tensors ----

Tensor Model::find(const std::string & name, std::initializer_list<int64_t> ne, bool required) {
    const auto it = tensors_.find(name);
    if (it == tensors_.end()) {
        require(!required, ErrorKind::input, shards_[0]->path + ": tensor " + name + " is missing");
        return nullptr;
    }
    Tensor t = it->second;
    int64_t i = 0;
    bool ok = ggml_n_dims(t) <= (int)ne.size();
    for (int64_t n : ne) {
        ok &= t->ne[i++] == n;
    }
    require(ok, ErrorKind::input,
            shards_[0]->path + ": tensor " + name + " has shape [" + std::to_string(t->ne[0]) +
                ", " + std::to_string(t->ne[1]) + "], expected [" + std::to_string(*ne.begin()) +
                ", " + std::to_string(ne.size() > 1 ? *(ne.begin() + 1) : 1) + "]");
    require(ne.size() > 1 || t->type == GGML_TYPE_F32, ErrorKind::input,
            shards_[0]->path + ": tensor " + name + " has type " + ggml_type_name(t->type) +
                ", expected f32");
    const bool readable =
        t->type == GGML_TYPE_F32 || ggml_get_type_traits(t->type)->to_float != nullptr;
    require(readable, ErrorKind::input,
            shards_[0]->path + ": tensor " + name + " has type " + ggml_type_name(t->type) +
                ", which cannot be dequantized");
    return t;
}

void Model::read_tensors() {
    Hparams & h = hparams;
    const int64_t C = h.n_embd, F = h.n_ff, D = h.n_embd_head;
    const auto emb = tensors_.find("token_embd.weight");
    require(emb != tensors_.end(), ErrorKind::input,
            shards_[0]->path + ": tensor token_embd.weight is missing");
    h.n_vocab = emb->second->ne[1];
    token_embd = find("token_embd.weight", {C, h.n_vocab}, true);
    output_norm = find("output_norm.weight", {C}, true);
    output = find("output.weight", {C, h.n_vocab}, false);
    if (output == nullptr) {
        output = token_embd;
    }
    h.rope.freq_factors = find("rope_freqs.weight", {h.rope.n_dims / 2}, false);

    const int64_t in[N_SITES] = {C, C, C, h.n_head * D, C, C, F};
    const int64_t out[N_SITES] = {h.n_head * D, h.n_head_kv * D, h.n_head_kv * D, C, F, F, C};
    const bool qk_norm = traits_of(h.arch).qk_norm;
    layers.resize((size_t)h.n_layer);
    for (int64_t l = 0; l < h.n_layer; l++) {
        Layer & layer = layers[(size_t)l];
        const std::string p = "blk." + std::to_string(l) + ".";
        layer.attn_norm = find(p + "attn_norm.weight", {C}, true);
        layer.ffn_norm = find(p + "ffn_norm.weight", {C}, true);
        if (qk_norm) {
            layer.attn_q_norm = find(p + "attn_q_norm.weight", {D}, true);
            layer.attn_k_norm = find(p + "attn_k_norm.weight", {D}, true);
        }
        for (int s = 0; s < N_SITES; s++) {
            layer.linear[s].weight = find(p + SITE_NAMES[s] + ".weight", {in[s], out[s]}, true);
            layer.linear[s].bias = find(p + SITE_NAMES[s] + ".bias", {out[s]}, false);
        }
    }
}

Model::Model(const std::vector<std::string> & paths, ggml_backend_dev_t device, Memory memory) {
    require(!paths.empty(), ErrorKind::input, "no model file given");
    for (const auto & path : paths) {
        open_shard(path, device, memory);
    }
    read_hparams();
    read_tensors();
}

Model::~Model() = default;

size_t Model::bytes() const {
    size_t sum = 0;
    for (const auto & [name, t] : tensors_) {
        sum += ggml_nbytes(t);
    }
    return sum;
}

bool Model::mapped() const {
    return std::all_of(shards_.begin(), shards_.end(), [](const auto & s) { return s->mapped; });
}

int64_t Model::n_params_matmul() const {
    int64_t n = ggml_nelements(output);
    for (const auto & layer : layers) {
        for (const auto & linear : layer.linear) {
            n += ggml_nelements(linear.weight);
        }
    }
    return n;
}

} // namespace ggft
