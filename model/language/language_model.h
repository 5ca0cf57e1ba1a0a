// A decoder on packed rows. Each decoder is one file that exports a LanguageModelSpec, and one line in
// registry.cpp.
#pragma once

#include <algorithm>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/aten.h"
#include "base/json.h"
#include "model/lora.h"
#include "model/module.h"

namespace caldera {

// Keys and values of one sequence during generation: per layer [capacity, G, K], of which `length` rows are
// filled.
struct KvCache {
  std::vector<at::Tensor> keys, values;
  int64_t length = 0;
};

// What of a block keeps nothing but its input between forward and backward, and runs again there.
enum class Recomputed { kNothing, kMlp, kBlock };
// Where `num_halves` halves of blocks recompute. First the MLPs of all blocks, then the blocks with their attention:
// an MLP gives up more for its time, one product at full speed. The first blocks first, because by their turn in
// backward the later ones have let go of what they kept. At 2 * num_blocks each block keeps its input alone.
inline Recomputed recomputed_of(int64_t num_halves, int64_t layer, int64_t num_blocks) {
  if (num_halves - num_blocks > layer) return Recomputed::kBlock;
  return num_halves > layer ? Recomputed::kMlp : Recomputed::kNothing;
}
// Whether the block's input waits for backward in host memory: that of the first `num_offloaded` ones that recompute
// wholly. The last block's never does, because backward begins with it.
inline bool is_offloaded(Recomputed part, int64_t num_offloaded, int64_t layer, int64_t num_blocks) {
  return part == Recomputed::kBlock && layer < std::min(num_offloaded, num_blocks - 1);
}

class LanguageModel {
 public:
  virtual ~LanguageModel() = default;
  // int64 ids [T] -> [T, D]. Ids must lie in [0, vocab_size).
  virtual at::Tensor embed(const at::Tensor& ids_T) = 0;
  // Runs the blocks over the packed row x [T, D] and returns the rows `rows_N` (int64; undefined: all) of the
  // *final normed* hidden states, [N, D]. The last block computes only what those rows need. With caches (one
  // a sample) the new keys and values are appended to them, and queries see the cached rows as well;
  // `positions_T` then continues where the cache ends. Caches are for generation: no gradients.
  virtual at::Tensor forward(const at::Tensor& x_TD, const at::Tensor& positions_T,
                             const std::vector<int64_t>& cu_seqlens, const at::Tensor& rows_N,
                             std::span<KvCache*> caches = {}) = 0;
  // The output projection's weight [V, D] (the embedding where tied).
  virtual const at::Tensor& head_weight() const = 0;
  // Hidden states [N, D] times that weight: [N, V], without gradients.
  virtual at::Tensor logits(const at::Tensor& hidden_ND) const = 0;
  // The blocks' linear layers and the head in 8 bits, for generation alone; they are no longer among the tensors
  // (the head's weight stays beside, as the embedding may be it). Adapters must be merged before.
  virtual void quantize_int8() = 0;
  // Empty caches for one sequence of at most `capacity` tokens.
  virtual KvCache make_cache(int64_t capacity) const = 0;
  virtual NamedTensors
  tensors() = 0;  // as LlamaForCausalLM: "model.layers.0.self_attn.q_proj.weight", "lm_head.weight"
  virtual std::vector<Linear*> linears() = 0;  // those of the blocks; they may carry adapters
  virtual int64_t hidden_size() const = 0;
  virtual int64_t vocab_size() const = 0;
  virtual int64_t max_position_embeddings() const = 0;
  virtual Json config() const = 0;  // HF's config.json (LlamaConfig)
  virtual const char* id() const = 0;

  virtual int64_t num_blocks() const = 0;
  // See recomputed_of().
  virtual void set_recomputed_halves(int64_t num_halves) = 0;
  // See is_offloaded().
  virtual void set_offloaded_inputs(int64_t num_blocks) = 0;
  // `hold(layer)` is called before a block runs, and where it recomputes before it runs again. What it returns lives as long as
  // that pass needs the block's weights; without recomputing, backward needs them longer.
  virtual void set_block_hold(std::function<std::shared_ptr<void>(size_t layer)> hold) = 0;
  // The rows' keys (dropout_keys(), model/lora.h) by which adapters drop in the forward passes that follow; undefined
  // (evaluation, generation): nothing is dropped.
  virtual void set_dropout_keys(at::Tensor keys_T) = 0;
};

struct LanguageModelSpec {
  const char* id;
  std::vector<std::string> model_types;         // config.json "model_type" values it answers to
  std::vector<std::string> gguf_architectures;  // GGUF general.architecture values it answers to
  std::unique_ptr<LanguageModel> (*make)(const Json& config);  // float32 CPU storage, weights not yet set
  void (*init)(LanguageModel& model, uint64_t seed);
  Json class_defaults;  // sizes that transformers' configuration class has where none are given
};

std::span<const LanguageModelSpec> language_models();
const LanguageModelSpec& find_language_model(const std::string& model_type, const std::string& where);

}  // namespace caldera
