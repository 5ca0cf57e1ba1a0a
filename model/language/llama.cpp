#include "model/language/llama.h"

#include <algorithm>

#include "base/error.h"
#include "model/language/rope.h"
#include "model/ops/ops.h"

// Legend: T tokens of the packed row, N rows wanted, D width, H query heads, G key/value heads, K head width,
// F MLP width, V vocabulary.
namespace caldera {
namespace {

struct LlamaConfig {
  int64_t vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads,
      num_key_value_heads, head_dim, max_position_embeddings;
  double rms_norm_eps, initializer_range;
  bool attention_bias, mlp_bias, tie_word_embeddings;
  Json others;  // ids of special tokens, handed through
};

int64_t positive(const Json& config, const char* key, int64_t fallback) {
  const auto found = config.find(key);
  const bool given = found != config.end() && !found->is_null();
  CALDERA_CHECK(given || fallback > 0, CheckpointError, "config.json of a llama model: \"{}\" is missing",
                key);
  if (!given) return fallback;
  CALDERA_CHECK(
      found->is_number_integer() && found->get<int64_t>() > 0 && found->get<int64_t>() < (int64_t{1} << 31),
      CheckpointError, "config.json of a llama model: {}: expected a positive integer, got {}", key,
      found->dump());
  return found->get<int64_t>();
}

template <class T>
T value_or(const Json& config, const char* key, T fallback) {
  const auto found = config.find(key);
  if (found == config.end() || found->is_null()) return fallback;
  const bool fits = std::is_same_v<T, bool> ? found->is_boolean() : found->is_number();
  CALDERA_CHECK(fits, CheckpointError, "config.json of a llama model: {}: expected a {}, got {}", key,
                std::is_same_v<T, bool> ? "boolean" : "number", found->dump());
  return found->get<T>();
}

LlamaConfig read_config(const Json& json) {
  LlamaConfig c;
  c.vocab_size = positive(json, "vocab_size", 0);
  c.hidden_size = positive(json, "hidden_size", 0);
  c.intermediate_size = positive(json, "intermediate_size", 0);
  c.num_hidden_layers = positive(json, "num_hidden_layers", 0);
  c.num_attention_heads = positive(json, "num_attention_heads", 0);
  c.num_key_value_heads = positive(json, "num_key_value_heads", c.num_attention_heads);
  c.head_dim = positive(json, "head_dim", std::max<int64_t>(1, c.hidden_size / c.num_attention_heads));
  c.max_position_embeddings = positive(json, "max_position_embeddings", 2048);
  c.rms_norm_eps = value_or(json, "rms_norm_eps", 1e-6);
  c.initializer_range = value_or(json, "initializer_range", 0.02);
  c.attention_bias = value_or(json, "attention_bias", false);
  c.mlp_bias = value_or(json, "mlp_bias", false);
  c.tie_word_embeddings = value_or(json, "tie_word_embeddings", false);
  CALDERA_CHECK(
      c.num_attention_heads % c.num_key_value_heads == 0, CheckpointError,
      "config.json of a llama model: num_attention_heads ({}) must be a multiple of num_key_value_heads ({})",
      c.num_attention_heads, c.num_key_value_heads);
  CALDERA_CHECK(c.head_dim % 2 == 0, CheckpointError,
                "config.json of a llama model: head_dim: expected an even number, got {}", c.head_dim);
  const Json act = json.value("hidden_act", Json("silu"));
  CALDERA_CHECK(act == "silu", CheckpointError,
                "config.json of a llama model: hidden_act: only \"silu\" is supported, got {}", act.dump());
  for (const char* key : {"bos_token_id", "eos_token_id", "pad_token_id"}) {
    if (json.contains(key)) c.others[key] = json[key];
  }
  return c;
}

struct Block {
  at::Tensor input_norm, qkv, qkv_bias, o, o_bias, post_norm, gate_up, gate_up_bias, down, down_bias;
};

// What every block needs to know of the packed row.
struct Row {
  Rotary rotary;
  std::vector<int64_t> cu_seqlens;
  std::span<KvCache*> caches;
};

class Llama : public LanguageModel {
 public:
  explicit Llama(const Json& json) : config_(read_config(json)) {
    rope_ = make_rope(json, config_.head_dim, config_.max_position_embeddings);
    const int64_t D = config_.hidden_size, F = config_.intermediate_size, K = config_.head_dim;
    const int64_t HK = config_.num_attention_heads * K, GK = config_.num_key_value_heads * K;
    const auto weight = [](at::IntArrayRef shape) { return at::empty(shape, at::kFloat); };
    embed_tokens_ = weight({config_.vocab_size, D});
    if (!config_.tie_word_embeddings) lm_head_ = weight({config_.vocab_size, D});
    norm_ = weight({D});
    blocks_.resize(static_cast<size_t>(config_.num_hidden_layers));
    for (Block& block : blocks_) {
      block.input_norm = weight({D});
      block.post_norm = weight({D});
      block.qkv = weight({HK + 2 * GK, D});
      block.o = weight({D, HK});
      block.gate_up = weight({2 * F, D});
      block.down = weight({D, F});
      if (config_.attention_bias) {
        block.qkv_bias = weight({HK + 2 * GK});
        block.o_bias = weight({D});
      }
      if (config_.mlp_bias) {
        block.gate_up_bias = weight({2 * F});
        block.down_bias = weight({D});
      }
    }
  }

  at::Tensor embed(const at::Tensor& ids_T) override { return at::embedding(embed_tokens_, ids_T); }

  at::Tensor forward(const at::Tensor& x_TD, const at::Tensor& positions_T,
                     const std::vector<int64_t>& cu_seqlens, const at::Tensor& rows_N,
                     std::span<KvCache*> caches) override {
    CALDERA_ASSERT(x_TD.size(0) == cu_seqlens.back() && positions_T.size(0) == x_TD.size(0));
    CALDERA_ASSERT(caches.empty() || caches.size() + 1 == cu_seqlens.size());
    CALDERA_ASSERT(caches.empty() || !at::GradMode::is_enabled());
    const auto row = std::make_shared<Row>();
    row->rotary =
        rotary_tables(rope_.inv_freq.to(x_TD.device()), positions_T, rope_.attention_scaling, at::kFloat);
    row->cu_seqlens = cu_seqlens;
    row->caches = caches;
    at::Tensor x = x_TD;
    for (size_t layer = 0; layer < blocks_.size(); ++layer) {
      const at::Tensor rows = layer + 1 == blocks_.size() ? rows_N : at::Tensor();
      const auto run = [this, layer, row, rows](const at::Tensor& input) {
        return run_block(layer, input, *row, rows);
      };
      x = gradient_checkpointing_ ? recompute(run, x, leaves(blocks_[layer])) : run(x);
    }
    for (size_t s = 0; s < caches.size(); ++s) caches[s]->length += cu_seqlens[s + 1] - cu_seqlens[s];
    return rms_norm(x, norm_, config_.rms_norm_eps);
  }

  const at::Tensor& head_weight() const override { return lm_head_.defined() ? lm_head_ : embed_tokens_; }

  KvCache make_cache(int64_t capacity) const override {
    KvCache cache;
    for (size_t layer = 0; layer < blocks_.size(); ++layer) {
      for (std::vector<at::Tensor>* tensors : {&cache.keys, &cache.values})
        tensors->push_back(
            at::empty({capacity, config_.num_key_value_heads, config_.head_dim}, embed_tokens_.options()));
    }
    return cache;
  }

  NamedTensors tensors() override {
    const int64_t F = config_.intermediate_size, K = config_.head_dim;
    const int64_t HK = config_.num_attention_heads * K, GK = config_.num_key_value_heads * K;
    NamedTensors list = {{"model.embed_tokens.weight", &embed_tokens_}};
    for (size_t layer = 0; layer < blocks_.size(); ++layer) {
      Block& block = blocks_[layer];
      const std::string prefix = fmt::format("model.layers.{}.", layer);
      const auto add = [&](const std::string& name, at::Tensor& owner, int64_t begin = 0, int64_t rows = -1) {
        if (owner.defined()) list.push_back({prefix + name, &owner, begin, rows});
      };
      const auto add_attention = [&](const char* kind, at::Tensor& qkv, at::Tensor& o) {
        add(std::string("self_attn.q_proj.") + kind, qkv, 0, HK);
        add(std::string("self_attn.k_proj.") + kind, qkv, HK, GK);
        add(std::string("self_attn.v_proj.") + kind, qkv, HK + GK, GK);
        add(std::string("self_attn.o_proj.") + kind, o);
      };
      const auto add_mlp = [&](const char* kind, at::Tensor& gate_up, at::Tensor& down) {
        add(std::string("mlp.gate_proj.") + kind, gate_up, 0, F);
        add(std::string("mlp.up_proj.") + kind, gate_up, F, F);
        add(std::string("mlp.down_proj.") + kind, down);
      };
      add("input_layernorm.weight", block.input_norm);
      add_attention("weight", block.qkv, block.o);
      add_attention("bias", block.qkv_bias, block.o_bias);
      add("post_attention_layernorm.weight", block.post_norm);
      add_mlp("weight", block.gate_up, block.down);
      add_mlp("bias", block.gate_up_bias, block.down_bias);
    }
    list.push_back({"model.norm.weight", &norm_});
    if (lm_head_.defined()) list.push_back({"lm_head.weight", &lm_head_});
    return list;
  }

  int64_t hidden_size() const override { return config_.hidden_size; }
  int64_t vocab_size() const override { return config_.vocab_size; }
  int64_t max_position_embeddings() const override { return config_.max_position_embeddings; }
  const char* id() const override { return "llama"; }
  void set_gradient_checkpointing(bool on) override { gradient_checkpointing_ = on; }
  double initializer_range() const { return config_.initializer_range; }

  Json config() const override {
    Json json = {{"architectures", {"LlamaForCausalLM"}},
                 {"model_type", "llama"},
                 {"vocab_size", config_.vocab_size},
                 {"hidden_size", config_.hidden_size},
                 {"intermediate_size", config_.intermediate_size},
                 {"num_hidden_layers", config_.num_hidden_layers},
                 {"num_attention_heads", config_.num_attention_heads},
                 {"num_key_value_heads", config_.num_key_value_heads},
                 {"head_dim", config_.head_dim},
                 {"max_position_embeddings", config_.max_position_embeddings},
                 {"hidden_act", "silu"},
                 {"rms_norm_eps", config_.rms_norm_eps},
                 {"initializer_range", config_.initializer_range},
                 {"attention_bias", config_.attention_bias},
                 {"mlp_bias", config_.mlp_bias},
                 {"attention_dropout", 0.0},
                 {"tie_word_embeddings", config_.tie_word_embeddings},
                 {"use_cache", true}};
    // Both spellings: transformers 4 reads the first two, transformers 5 the third.
    Json scaling = rope_.parameters;
    scaling.erase("rope_theta");
    json["rope_theta"] = rope_.parameters["rope_theta"];
    json["rope_scaling"] = scaling["rope_type"] == "default" ? Json() : scaling;
    json["rope_parameters"] = rope_.parameters;
    if (config_.others.is_object()) json.update(config_.others);
    return json;
  }

 private:
  static std::vector<at::Tensor> leaves(const Block& b) {
    std::vector<at::Tensor> list;
    for (const at::Tensor* tensor : {&b.input_norm, &b.qkv, &b.qkv_bias, &b.o, &b.o_bias, &b.post_norm,
                                     &b.gate_up, &b.gate_up_bias, &b.down, &b.down_bias}) {
      if (tensor->defined()) list.push_back(*tensor);
    }
    return list;
  }

  // x [T, D] -> [T, D], or [N, D] where only the rows `rows_N` are wanted: keys and values come from all
  // rows, what follows the attention runs on those alone.
  at::Tensor run_block(size_t layer, const at::Tensor& x_TD, const Row& row, const at::Tensor& rows_N) const {
    const Block& block = blocks_[layer];
    const at::Tensor normed = rms_norm(x_TD, block.input_norm, config_.rms_norm_eps);
    at::Tensor attended = attention(layer, at::linear(normed, block.qkv, block.qkv_bias), row);
    at::Tensor x = x_TD;
    if (rows_N.defined()) {
      attended = attended.index_select(0, rows_N);
      x = x.index_select(0, rows_N);
    }
    x = x + at::linear(attended, block.o, block.o_bias);
    const at::Tensor gate_up =
        at::linear(rms_norm(x, block.post_norm, config_.rms_norm_eps), block.gate_up, block.gate_up_bias);
    return x + at::linear(swiglu(gate_up), block.down, block.down_bias);
  }

  // qkv [T, (H + 2G) K] -> [T, H K].
  at::Tensor attention(size_t layer, const at::Tensor& qkv, const Row& row) const {
    const int64_t H = config_.num_attention_heads, G = config_.num_key_value_heads, K = config_.head_dim;
    // split, not narrow: its gradient is one concatenation.
    const std::vector<at::Tensor> parts = qkv.split_with_sizes({(H + G) * K, G * K}, 1);
    const at::Tensor qk = apply_rotary(parts[0].view({-1, H + G, K}), row.rotary);
    const std::vector<at::Tensor> q_and_k = qk.split_with_sizes({H, G}, 1);
    const at::Tensor v = parts[1].view({-1, G, K});
    const at::Tensor out = row.caches.empty()
                               ? packed_attention(q_and_k[0], q_and_k[1], v, row.cu_seqlens, /*causal=*/true)
                               : attention_with_caches(layer, q_and_k[0], q_and_k[1], v, row);
    return out.reshape({-1, H * K});
  }

  static at::Tensor attention_with_caches(size_t layer, const at::Tensor& q, const at::Tensor& k,
                                          const at::Tensor& v, const Row& row) {
    std::vector<at::Tensor> keys, values;
    for (size_t s = 0; s < row.caches.size(); ++s) {
      KvCache& cache = *row.caches[s];
      const int64_t begin = row.cu_seqlens[s], count = row.cu_seqlens[s + 1] - begin;
      CALDERA_ASSERT(cache.length + count <= cache.keys[layer].size(0));
      cache.keys[layer].narrow(0, cache.length, count).copy_(k.narrow(0, begin, count));
      cache.values[layer].narrow(0, cache.length, count).copy_(v.narrow(0, begin, count));
      keys.push_back(cache.keys[layer].narrow(0, 0, cache.length + count));
      values.push_back(cache.values[layer].narrow(0, 0, cache.length + count));
    }
    return cached_attention(q, keys, values, row.cu_seqlens);
  }

  LlamaConfig config_;
  Rope rope_;
  bool gradient_checkpointing_ = false;
  at::Tensor embed_tokens_, norm_, lm_head_;
  std::vector<Block> blocks_;
};

std::unique_ptr<LanguageModel> make(const Json& config) { return std::make_unique<Llama>(config); }

void init(LanguageModel& model, uint64_t seed) {
  const double std = dynamic_cast<Llama&>(model).initializer_range();
  for (const NamedTensor& tensor : model.tensors()) {
    at::Tensor value = tensor.value();
    if (tensor.name.ends_with(".bias"))
      value.zero_();
    else if (tensor.name.ends_with("norm.weight"))
      value.fill_(1);
    else
      init_normal_(value, std, seed, tensor.name);
  }
}

}  // namespace

const LanguageModelSpec kLlamaSpec = {
    .id = "llama", .model_types = {"llama"}, .gguf_architectures = {"llama"}, .make = make, .init = init};

}  // namespace caldera
