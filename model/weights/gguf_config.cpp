#include "model/weights/gguf_config.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/error.h"
#include "model/language/rope.h"
#include "model/weights/gguf_weights.h"

namespace caldera {
namespace {

class Reader {
 public:
  Reader(const GgufFile& file, const GgufArchitecture& architecture)
      : file_(file), architecture_(architecture), where_(file.path().string()) {
    for (const GgufTensor& tensor : file.tensors()) tensors_[tensor.name] = &tensor;
  }

  Json config() const {
    const int64_t width = size("embedding_length"), layers = size("block_count");
    const GgufTensor* embedding = find("token_embd.weight");
    CALDERA_CHECK(embedding != nullptr && embedding->shape.size() == 2, CheckpointError,
                  "{}: token_embd.weight is missing or no matrix", where_);
    const int64_t vocab = embedding->shape[0];
    expect_shape("token_embd.weight", {vocab, width});
    const int64_t heads = size("attention.head_count"), kv_heads = size("attention.head_count_kv", heads);
    const int64_t head_dim = size("attention.key_length", width / heads);
    const int64_t rotated = size("rope.dimension_count", head_dim);
    CALDERA_CHECK(head_dim == rotated && head_dim % 2 == 0, CheckpointError,
                  "{}: {}: expected the heads' width {} (even), got {}", where_, key("rope.dimension_count"),
                  head_dim, rotated);
    CALDERA_CHECK(!file_.has(key("expert_count")) || file_.get<int64_t>(key("expert_count")) == 0,
                  CheckpointError, "{}: mixtures of experts are not supported", where_);
    const int64_t mlp_width = size("feed_forward_length");
    expect_shape("blk.0.ffn_gate.weight", {mlp_width, width});
    expect_shape("blk.0.attn_q.weight", {heads * head_dim, width});
    expect_shape("blk.0.attn_k.weight", {kv_heads * head_dim, width});
    expect_shape(fmt::format("blk.{}.ffn_gate.weight", layers - 1), {mlp_width, width});

    Json config = {{"model_type", architecture_.model_types.front()},
                   {"hidden_size", width},
                   {"intermediate_size", mlp_width},
                   {"num_hidden_layers", layers},
                   {"num_attention_heads", heads},
                   {"num_key_value_heads", kv_heads},
                   {"head_dim", head_dim},
                   {"hidden_act", "silu"},
                   {"rms_norm_eps", number("attention.layer_norm_rms_epsilon", 1e-6)},
                   {"rope_theta", number("rope.freq_base", 10000.0)},
                   {"max_position_embeddings", size("context_length")},
                   {"vocab_size", vocab},
                   {"attention_bias", find("blk.0.attn_q.bias") != nullptr},
                   {"mlp_bias", find("blk.0.ffn_gate.bias") != nullptr},
                   {"tie_word_embeddings", find("output.weight") == nullptr}};
    add_rope(config, head_dim);
    for (const char* token : {"bos", "eos"}) {
      const std::string id = fmt::format("tokenizer.ggml.{}_token_id", token);
      if (file_.has(id)) config[fmt::format("{}_token_id", token)] = file_.get<int64_t>(id);
    }
    return config;
  }

 private:
  std::string key(const char* name) const { return fmt::format("{}.{}", architecture_.name, name); }
  int64_t size(const char* name, std::optional<int64_t> fallback = {}) const {
    const int64_t value = fallback && !file_.has(key(name)) ? *fallback : number_of<int64_t>(key(name));
    CALDERA_CHECK(value > 0 && value <= (1 << 30), CheckpointError,
                  "{}: {}: expected a positive size, got {}", where_, key(name), value);
    return value;
  }
  double number(const char* name, double fallback) const {
    return file_.has(key(name)) ? number_of<double>(key(name)) : fallback;
  }
  // A number, or (as llama.cpp reads them) a list of one a layer, which must then be the same for all.
  template <class T>
  T number_of(const std::string& name) const {
    const auto found = file_.metadata().find(name);
    const auto* list =
        found == file_.metadata().end() ? nullptr : std::get_if<std::vector<T>>(&found->second);
    if (list == nullptr) return file_.get<T>(name);  // or it says what is wrong
    CALDERA_CHECK(!list->empty() &&
                      std::all_of(list->begin(), list->end(), [&](T value) { return value == (*list)[0]; }),
                  CheckpointError, "{}: {}: expected one number, or the same for each layer, got [{}]",
                  where_, name, fmt::join(*list, ", "));
    return (*list)[0];
  }
  const GgufTensor* find(const std::string& name) const {
    const auto found = tensors_.find(name);
    return found == tensors_.end() ? nullptr : found->second;
  }
  void expect_shape(const std::string& name, const std::vector<int64_t>& expected) const {
    const GgufTensor* tensor = find(name);
    CALDERA_CHECK(tensor != nullptr, CheckpointError, "{}: tensor {} is missing", where_, name);
    CALDERA_CHECK(tensor->shape == expected, CheckpointError, "{}: {}: expected shape [{}], got [{}]", where_,
                  name, fmt::join(expected, ", "), fmt::join(tensor->shape, ", "));
  }

  void add_rope(Json& config, int64_t head_dim) const {
    // As llama.cpp reads it: a factor without a type is linear, the factor's older key is scale_linear, and 0
    // is none.
    const std::string type = file_.get_or<std::string>(key("rope.scaling.type"), "linear");
    double factor = number("rope.scaling.factor", number("rope.scale_linear", 1.0));
    if (factor == 0) factor = 1.0;
    const bool stretched = find(kGgufRopeDivisors) != nullptr,
               scales = type != "none" && !(type == "linear" && factor == 1);
    if (!scales && !stretched) return;
    CALDERA_CHECK(
        !scales || !stretched, CheckpointError,
        "{}: {} beside {} with {} {}: two scalings of the rotary frequencies at once are not supported",
        where_, kGgufRopeDivisors, key("rope.scaling.type"), type, factor);
    Json scaling = {{"rope_type", type}, {"factor", factor}};
    if (type == "yarn") {
      const std::string length = "rope.scaling.original_context_length";
      if (file_.has(key(length.c_str()))) scaling["original_max_position_embeddings"] = size(length.c_str());
      scaling["beta_fast"] = number("rope.scaling.yarn_beta_fast", 32);
      scaling["beta_slow"] = number("rope.scaling.yarn_beta_slow", 1);
      // llama.cpp multiplies its own magnitude by attn_factor; HF's attention_factor replaces it.
      if (file_.has(key("rope.scaling.attn_factor")) && factor > 1)
        scaling["attention_factor"] = number("rope.scaling.attn_factor", 1) * (0.1 * std::log(factor) + 1);
    }
    if (stretched) scaling = llama3_scaling(head_dim, config);
    config["rope_scaling"] = scaling;
  }

  // The parameters behind the divisors: those that an export of ours left, else Llama 3.1's and 3.2's own
  // (they differ in the factor, which is the largest divisor). Taken only where they give the divisors that
  // the file has.
  Json llama3_scaling(int64_t head_dim, const Json& config) const {
    expect_shape(kGgufRopeDivisors, {head_dim / 2});
    const at::Tensor divisors = dequantize(*find(kGgufRopeDivisors), where_).to(at::kFloat);
    Json scaling = {{"rope_type", "llama3"},
                    {"factor", divisors.max().item<double>()},
                    {"low_freq_factor", 1.0},
                    {"high_freq_factor", 4.0},
                    {"original_max_position_embeddings", 8192}};
    if (file_.has("caldera.rope_parameters")) {
      scaling =
          parse_json(file_.get<std::string>("caldera.rope_parameters"), where_ + ": caldera.rope_parameters");
      CALDERA_CHECK(scaling.is_object(), CheckpointError, "{}: caldera.rope_parameters: expected an object",
                    where_);
    }
    Json with = config, without = config;
    with["rope_scaling"] = scaling;
    const int64_t positions = config["max_position_embeddings"];
    const at::Tensor expected =
        make_rope(without, head_dim, positions).inv_freq / make_rope(with, head_dim, positions).inv_freq;
    CALDERA_CHECK(at::allclose(divisors, expected, 1e-4, 1e-6), CheckpointError,
                  "{}: {}: its rotary frequencies are not stretched by the rule of Llama 3.1 (factor {}), "
                  "and no other is known",
                  where_, kGgufRopeDivisors, scaling.value("factor", 0.0));
    return scaling;
  }

  const GgufFile& file_;
  const GgufArchitecture& architecture_;
  std::string where_;
  std::map<std::string, const GgufTensor*> tensors_;
};

}  // namespace

void refuse_gguf_part(const GgufFile& file) {
  const auto count = file.get_or<int64_t>("split.count", 1);
  CALDERA_CHECK(count <= 1, CheckpointError,
                "{}: part {} of a model cut into {} files, which are not read; join them first: "
                "llama-gguf-split --merge "
                "{} OUT.gguf",
                file.path().string(), file.get_or<int64_t>("split.no", 0) + 1, count,
                file.path().filename().string());
}

Json gguf_decoder_config(const GgufFile& file, const GgufArchitecture& architecture) {
  return Reader(file, architecture).config();
}

}  // namespace caldera
