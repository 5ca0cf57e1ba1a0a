#include "model/language/decoder.h"

#include "base/error.h"
#include "model/language/sliding_window.h"
#include "model/ops/host_copies.h"
#include "model/ops/ops.h"
#include "model/taps.h"

// Legend: T tokens of the packed row, N rows wanted, D width, H query heads, G key/value heads, K head width,
// F MLP width, V vocabulary.
namespace caldera {
namespace {

struct Block {
  at::Tensor input_norm, post_norm, q_norm, k_norm;
  Linear qkv, o, gate_up, down;
};

// What every block needs to know of the packed row.
struct Row {
  Rotary rotary;
  std::vector<int64_t> cu_seqlens;
  std::span<KvCache*> caches;
  at::Tensor dropout_keys_T;  // undefined: nothing is dropped
  std::shared_ptr<HostCopies> offloaded = std::make_shared<HostCopies>();  // inputs of blocks
};

class Decoder : public LanguageModel {
 public:
  explicit Decoder(DecoderConfig config) : config_(std::move(config)) {
    const int64_t D = config_.hidden_size, F = config_.intermediate_size, K = config_.head_dim;
    const int64_t HK = config_.num_attention_heads * K, GK = config_.num_key_value_heads * K;
    const auto weight = [](at::IntArrayRef shape) { return at::empty(shape, at::kFloat); };
    embed_tokens_ = weight({config_.vocab_size, D});
    if (!config_.tie_word_embeddings) lm_head_ = weight({config_.vocab_size, D});
    norm_ = weight({D});
    blocks_.resize(static_cast<size_t>(config_.num_hidden_layers));
    for (size_t layer = 0; layer < blocks_.size(); ++layer) {
      Block& block = blocks_[layer];
      const std::string attention = prefix(layer) + "self_attn.", mlp = prefix(layer) + "mlp.";
      block.input_norm = weight({D});
      block.post_norm = weight({D});
      if (config_.qk_norm) {
        block.q_norm = weight({K});
        block.k_norm = weight({K});
      }
      block.qkv =
          Linear(D, {{attention + "q_proj", HK}, {attention + "k_proj", GK}, {attention + "v_proj", GK}},
                 config_.qkv_bias);
      block.o = Linear(HK, {{attention + "o_proj", D}}, config_.o_bias);
      block.gate_up = Linear(D, {{mlp + "gate_proj", F}, {mlp + "up_proj", F}}, config_.mlp_bias);
      block.down = Linear(F, {{mlp + "down_proj", D}}, config_.mlp_bias);
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
    Rope& rope = config_.rope;
    // Held where the rows are: a copy from the host would make each step wait.
    if (rope.inv_freq.device() != x_TD.device()) rope.inv_freq = rope.inv_freq.to(x_TD.device());
    row->rotary = rotary_tables(rope.inv_freq, positions_T, rope.attention_scaling, at::kFloat);
    row->cu_seqlens = cu_seqlens;
    row->caches = caches;
    row->dropout_keys_T = dropout_keys_T_;
    at::Tensor x = x_TD;
    for (size_t layer = 0; layer < blocks_.size(); ++layer) {
      const at::Tensor rows = layer + 1 == blocks_.size() ? rows_N : at::Tensor();
      const auto run = [this, layer, row, rows](const at::Tensor& input, bool needs_value) {
        return run_block(layer, input, *row, rows, needs_value);
      };
      std::function<std::shared_ptr<void>()> hold;
      if (block_hold_) hold = [this, layer] { return block_hold_(layer); };
      if (recomputed(layer) == Recomputed::kBlock) {
        x = recompute(run, x, leaves(blocks_[layer]), hold, offloads_input(layer) ? row->offloaded : nullptr);
      } else {
        const std::shared_ptr<void> weights = hold ? hold() : nullptr;
        x = run(x, /*needs_value=*/true);
      }
      tap("language_model.layers", layer, x);
    }
    for (size_t s = 0; s < caches.size(); ++s) caches[s]->length += cu_seqlens[s + 1] - cu_seqlens[s];
    x = rms_norm(x, norm_, config_.rms_norm_eps);
    tap("language_model.norm", x);
    return x;
  }

  const at::Tensor& head_weight() const override { return lm_head_.defined() ? lm_head_ : embed_tokens_; }

  at::Tensor logits(const at::Tensor& hidden_ND) const override {
    return head_int8_ ? affine_int8(hidden_ND, *head_int8_) : affine(hidden_ND, head_weight());
  }

  void quantize_int8() override {
    for (Linear* linear : linears()) linear->quantize_int8();
    head_int8_ = caldera::quantize_int8(head_weight());
  }

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
    NamedTensors list = {{"model.embed_tokens.weight", &embed_tokens_}};
    for (size_t layer = 0; layer < blocks_.size(); ++layer) {
      Block& block = blocks_[layer];
      const auto add = [&](const char* name, at::Tensor& owner) {
        if (owner.defined()) list.push_back({prefix(layer) + name, &owner});
      };
      add("input_layernorm.weight", block.input_norm);
      block.qkv.append_tensors(list);
      add("self_attn.q_norm.weight", block.q_norm);
      add("self_attn.k_norm.weight", block.k_norm);
      block.o.append_tensors(list);
      add("post_attention_layernorm.weight", block.post_norm);
      block.gate_up.append_tensors(list);
      block.down.append_tensors(list);
    }
    list.push_back({"model.norm.weight", &norm_});
    if (lm_head_.defined()) list.push_back({"lm_head.weight", &lm_head_});
    return list;
  }

  std::vector<Linear*> linears() override {
    std::vector<Linear*> list;
    for (Block& block : blocks_) list.insert(list.end(), {&block.qkv, &block.o, &block.gate_up, &block.down});
    return list;
  }

  int64_t hidden_size() const override { return config_.hidden_size; }
  int64_t vocab_size() const override { return config_.vocab_size; }
  int64_t max_position_embeddings() const override { return config_.max_position_embeddings; }
  Json config() const override { return config_.json; }
  const char* id() const override { return config_.id; }
  int64_t num_blocks() const override { return std::ssize(blocks_); }
  void set_recomputed_halves(int64_t num_halves) override { recomputed_halves_ = num_halves; }
  void set_offloaded_inputs(int64_t num_blocks) override { offloaded_inputs_ = num_blocks; }
  void set_block_hold(std::function<std::shared_ptr<void>(size_t)> hold) override { block_hold_ = std::move(hold); }
  void set_dropout_keys(at::Tensor keys_T) override { dropout_keys_T_ = std::move(keys_T); }
  double initializer_range() const { return config_.initializer_range; }

 private:
  static std::string prefix(size_t layer) { return fmt::format("model.layers.{}.", layer); }

  Recomputed recomputed(size_t layer) const {
    return recomputed_of(recomputed_halves_, static_cast<int64_t>(layer), num_blocks());
  }
  bool offloads_input(size_t layer) const {
    return is_offloaded(recomputed(layer), offloaded_inputs_, static_cast<int64_t>(layer), num_blocks());
  }

  static std::vector<at::Tensor> mlp_leaves(const Block& b) {
    std::vector<at::Tensor> list = {b.post_norm};
    for (const Linear* linear : {&b.gate_up, &b.down}) linear->append_leaves(list);
    return list;
  }

  static std::vector<at::Tensor> leaves(const Block& b) {
    std::vector<at::Tensor> list = mlp_leaves(b);
    list.push_back(b.input_norm);
    if (b.q_norm.defined()) list.insert(list.end(), {b.q_norm, b.k_norm});
    for (const Linear* linear : {&b.qkv, &b.o}) linear->append_leaves(list);
    return list;
  }

  // x [T, D] -> [T, D], or [N, D] where only the rows `rows_N` are wanted: keys and values come from all
  // rows, what follows the attention runs on those alone. Without `needs_value` as in recompute().
  at::Tensor run_block(size_t layer, const at::Tensor& x_TD, const Row& row, const at::Tensor& rows_N,
                       bool needs_value) const {
    const Block& block = blocks_[layer];
    auto [qkv, residual] =
        block.qkv.forward_of_norm(x_TD, {}, block.input_norm, config_.rms_norm_eps, row.dropout_keys_T);
    at::Tensor attended = attention(layer, qkv, row);
    if (rows_N.defined()) {
      attended = attended.index_select(0, rows_N);
      residual = residual.index_select(0, rows_N);
    }
    const bool takes_some = rows_N.defined() && row.dropout_keys_T.defined();
    const at::Tensor keys = takes_some ? row.dropout_keys_T.index_select(0, rows_N) : row.dropout_keys_T;
    at::Tensor update = block.o.forward(attended, keys);
    if (recomputed(layer) != Recomputed::kMlp) return run_mlp(block, residual, std::move(update), keys, needs_value);
    const auto run = [this, &block, keys](const at::Tensor& input, bool needs) {
      return run_mlp(block, input, {}, keys, needs);
    };
    return recompute(run, update.add_(residual), mlp_leaves(block));  // the sum alone is kept
  }

  // The block's second half, of residual + update.
  at::Tensor run_mlp(const Block& block, const at::Tensor& residual_TD, at::Tensor update_TD,
                     const at::Tensor& dropout_keys_T, bool needs_value) const {
    const auto [gate_up, sum] =
        block.gate_up.forward_of_norm(residual_TD, update_TD, block.post_norm, config_.rms_norm_eps, dropout_keys_T);
    update_TD.reset();  // its memory is free for the rest
    return block.down.forward_of(swiglu, gate_up, dropout_keys_T, needs_value).add_(sum);
  }

  // qkv [T, (H + 2G) K] -> [T, H K].
  at::Tensor attention(size_t layer, const at::Tensor& qkv, const Row& row) const {
    const auto [q, k, v] = heads(blocks_[layer], qkv, row.rotary);
    const at::Tensor out = row.caches.empty()
                               ? windowed_attention(q, k, v, row.cu_seqlens, config_.windows[layer])
                               : attention_with_caches(layer, q, k, v, row);
    return out.flatten(1);
  }

  // -> q [T, H, K] and k [T, G, K], rotated, and v [T, G, K]; each head of q and k normed by itself where the family
  // does so.
  std::array<at::Tensor, 3> heads(const Block& block, const at::Tensor& qkv, const Rotary& rotary) const {
    const int64_t H = config_.num_attention_heads, G = config_.num_key_value_heads, K = config_.head_dim;
    if (!config_.qk_norm) return split_rotary(qkv, H, G, rotary);
    // split, not narrow: its gradient is one concatenation.
    const std::vector<at::Tensor> parts = qkv.split_with_sizes({H * K, G * K, G * K}, 1);
    const auto normed_heads = [&](const at::Tensor& x, const at::Tensor& weight) {
      return apply_rotary(rms_norm(x.unflatten(1, {-1, K}), weight, config_.rms_norm_eps), rotary);
    };
    // A copy where backward will want it: a view would keep the whole projection, of which nothing else is kept.
    const at::Tensor v = at::GradMode::is_enabled() ? parts[2].contiguous() : parts[2];
    return {normed_heads(parts[0], block.q_norm), normed_heads(parts[1], block.k_norm), v.unflatten(1, {-1, K})};
  }

  at::Tensor attention_with_caches(size_t layer, const at::Tensor& q, const at::Tensor& k,
                                   const at::Tensor& v, const Row& row) const {
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
    return cached_windowed_attention(q, keys, values, row.cu_seqlens, config_.windows[layer]);
  }

  DecoderConfig config_;
  int64_t recomputed_halves_ = 0, offloaded_inputs_ = 0;
  std::function<std::shared_ptr<void>(size_t)> block_hold_;
  at::Tensor dropout_keys_T_;
  at::Tensor embed_tokens_, norm_, lm_head_;
  std::optional<Int8Weight> head_int8_;
  std::vector<Block> blocks_;
};

}  // namespace

std::unique_ptr<LanguageModel> make_decoder(DecoderConfig config) {
  return std::make_unique<Decoder>(std::move(config));
}

void init_decoder(LanguageModel& model, uint64_t seed) {
  const double std = dynamic_cast<Decoder&>(model).initializer_range();
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

}  // namespace caldera
