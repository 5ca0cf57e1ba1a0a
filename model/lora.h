// Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685) on the linear layers of a decoder. Names and numbers
// are those of PEFT: y = W x + b + B A dropout(x) * scaling, tensors MODULE.lora_A.weight [r, in] and
// MODULE.lora_B.weight [out, r].
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "base/aten.h"
#include "base/batch.h"
#include "base/json.h"
#include "model/module.h"
#include "model/ops/matmul.h"
#include "model/ops/nf4.h"
#include "model/ops/ops.h"

namespace caldera {

struct LoraConfig {
  int64_t lora_r = 64;  // LLaVA's defaults
  double lora_alpha = 16;
  double lora_dropout = 0.05;
  bool use_rslora = false;  // scaling alpha / sqrt(r) (arXiv 2312.03732) in place of alpha / r
  // The last parts of the modules' names ("q_proj"); empty: every linear layer of the blocks, as LLaVA's
  // find_all_linear_names.
  std::vector<std::string> target_modules;

  double scaling() const;
};
Json to_json(const LoraConfig& config);
LoraConfig lora_config_from_json(const Json& json, const std::string& where);

// y = x W^T + b. Its output rows are those of one or several modules of HF's names (q, k and v in one
// matrix): each may carry an adapter of its own, which adds to its rows alone. Legend: T rows of x, I inputs,
// O outputs of all modules, R rank.
class Linear {
 public:
  struct Module {
    std::string name;  // "model.layers.0.self_attn.q_proj"
    int64_t num_rows = 0;
  };
  Linear() = default;
  // Float32 storage on the CPU, not yet set.
  Linear(int64_t num_inputs, std::vector<Module> modules, bool has_bias);

  // x [T, I] -> [T, O]. With keys of the rows (dropout_keys()) the adapters' inputs are dropped out; a
  // module's mask is a function of the row's key, its name and the column alone, so running a block again
  // drops the same. `needs_value` as affine's.
  at::Tensor forward(const at::Tensor& x_TI, const at::Tensor& dropout_keys_T, bool needs_value = true) const;
  // forward(make(source)), of whose input nothing but `source` is kept for backward where no adapter needs it
  // (affine_of, model/ops/ops.h).
  at::Tensor forward_of(const std::function<at::Tensor(const at::Tensor&)>& make, const at::Tensor& source,
                        const at::Tensor& dropout_keys_T, bool needs_value = true) const;
  // The same of add_rms_norm(residual, update, norm, eps).value, beside its residual.
  WithResidual forward_of_norm(const at::Tensor& residual, const at::Tensor& update, const at::Tensor& norm,
                               double eps, const at::Tensor& dropout_keys_T) const;
  // Appends weights, biases and adapters under HF's names.
  void append_tensors(NamedTensors& list);
  // Appends the leaves that forward() uses.
  void append_leaves(std::vector<at::Tensor>& list) const;

  // Fresh adapters on the target modules: A uniform in +-1/sqrt(I) (kaiming_uniform with a = sqrt(5), as
  // PEFT) drawn from (seed, name), B zero.
  void attach(const LoraConfig& config, uint64_t seed);
  // Adds B A * scaling to the weight, computed in float32, and forgets the adapters.
  void merge();
  // The weight in 8 bits from now on, for generation alone: it is no longer among the tensors. Adapters must
  // be merged before.
  void quantize_int8();
  // The weight in 4 bits on `device` from now on, each module's by itself: it is no longer among the tensors, learns
  // through adapters alone, and takes none of them in (merge()). On the meta device: to count bytes.
  void quantize_nf4(bool double_quant, at::Device device);
  const std::optional<Nf4Weight>& nf4() const { return nf4_; }
  // From now on the weight's product and those of its gradients are computed in 8-bit floats (model/ops/float8.h), of
  // bfloat16 values; those of adapters are not. Throws ConfigError for sizes that are no multiples of 16.
  void use_float8();

 private:
  struct Adapter {
    at::Tensor a_RI, b_OR;  // undefined where the module has none
  };
  std::vector<Module> modules_;
  std::vector<Adapter> adapters_;  // empty, or one a module
  std::vector<Adapter> merged_;    // what merge() took out
  double scaling_ = 0, dropout_ = 0;
  at::Tensor weight_OI_, bias_O_;
  std::optional<Int8Weight> int8_;
  std::optional<Nf4Weight> nf4_;
  bool in_float8_ = false;

  // Whether forward() is a plain affine(), which need not keep its input.
  bool is_plain() const { return !int8_ && !nf4_ && adapters_.empty(); }
};

// What adapters' dropout goes by: a hash of `seed` (the step's), the sample's place in the step and the
// token's in the sample, int64 [T] on the batch's device. So any number of ranks and any packing drops the
// same. The batch must say its samples' places (PackedBatch::sample_numbers).
at::Tensor dropout_keys(const PackedBatch& batch, uint64_t seed);

// Whether a tensor of this name belongs to an adapter.
bool is_lora_name(const std::string& name);

}  // namespace caldera
