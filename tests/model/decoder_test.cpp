#include <ATen/record_function.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <set>

#include "base/cpu_allocator.h"
#include "base/error.h"
#include "model/language/language_model.h"
#include "model/language/rope.h"
#include "model/ops/ops.h"
#include "model/weights/safetensors.h"
#include "tests/support.h"

namespace caldera {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;


// Largest difference, relative to the largest value of what is expected.
double relative_error(const at::Tensor& got, const at::Tensor& expected) {
  EXPECT_EQ(got.sizes(), expected.sizes());
  return ((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item<double>();
}

struct Golden {
  explicit Golden(const std::string& variant)
      : file(open_safetensors(kGolden / (variant + ".safetensors"))),
        config(parse_json(safetensors_metadata(kGolden / (variant + ".safetensors")).at("config"), variant)) {
    model = find_language_model(config["model_type"].get<std::string>(), "test").make(config);
    for (const NamedTensor& tensor : model->tensors()) tensor.value().copy_(file->read(tensor.name));
  }
  at::Tensor get(const std::string& name) const { return file->read("golden." + name).clone(); }
  at::Tensor forward(const at::Tensor& rows = {}) const {
    return model->forward(model->embed(get("ids")), positions, cu_seqlens, rows);
  }
  at::Tensor loss() const {
    return linear_cross_entropy(forward(get("supervised")), model->head_weight(), get("targets"));
  }

  std::unique_ptr<TensorSource> file;
  Json config;
  std::unique_ptr<LanguageModel> model;
  const std::vector<int64_t> cu_seqlens = {0, 9, 23};
  const at::Tensor positions = at::cat({at::arange(9), at::arange(14)});
};

class DecoderGolden : public testing::TestWithParam<const char*> {};

TEST_P(DecoderGolden, PackedRowGivesTheLogitsOfTransformers) {
  const Golden golden(GetParam());
  const at::Tensor logits = at::linear(golden.forward(), golden.model->head_weight());
  EXPECT_LT(relative_error(logits, golden.get("logits")), 1e-5);
}

TEST_P(DecoderGolden, LossAndGradientsAreThoseOfTransformers) {
  Golden golden(GetParam());
  const NamedTensors tensors = golden.model->tensors();
  set_trainable(tensors, true);
  const at::Tensor loss = golden.loss();
  EXPECT_LT(relative_error(loss, golden.get("loss")), 1e-5);
  loss.backward();
  int compared = 0;
  for (const NamedTensor& tensor : tensors) {
    if (!golden.file->has("golden.grad." + tensor.name)) continue;
    EXPECT_LT(relative_error(tensor.grad(), golden.get("grad." + tensor.name)), 1e-4) << tensor.name;
    ++compared;
  }
  const bool whole = !std::string(GetParam()).starts_with("llama");  // those files hold a choice of gradients
  EXPECT_GE(compared, whole ? static_cast<int>(tensors.size()) : 10);
}

// As many halves as there are, then with the blocks' inputs in host memory.
TEST_P(DecoderGolden, RecomputingHalvesOfBlocksChangesNoBit) {
  std::vector<at::Tensor> expected;
  for (int64_t halves = 0;; ++halves) {
    Golden golden(GetParam());
    const int64_t all = 2 * golden.model->num_blocks();
    if (halves > all + 1) break;
    golden.model->set_recomputed_halves(std::min(halves, all));
    golden.model->set_offloaded_inputs(halves > all ? all : 0);
    const NamedTensors tensors = golden.model->tensors();
    set_trainable(tensors, true);
    golden.loss().backward();
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (halves == 0)
        expected.push_back(tensors[i].grad());
      else
        EXPECT_TRUE(at::equal(tensors[i].grad(), expected[i])) << halves << " " << tensors[i].name;
    }
  }
}

TEST_P(DecoderGolden, WantedRowsAreRowsOfTheWhole) {
  const Golden golden(GetParam());
  const at::Tensor rows = at::tensor({0, 4, 8, 9, 22}, at::kLong);
  EXPECT_LT(relative_error(golden.forward(rows), golden.forward().index_select(0, rows)), 1e-6);
  EXPECT_EQ(golden.forward(at::empty({0}, at::kLong)).sizes(),
            (std::vector<int64_t>{0, golden.model->hidden_size()}));
}

TEST_P(DecoderGolden, CachedStepsGiveTheWholeSequence) {
  const Golden golden(GetParam());
  const at::NoGradGuard no_grad;
  const at::Tensor whole = golden.forward(), x = golden.model->embed(golden.get("ids"));
  std::vector<KvCache> caches = {golden.model->make_cache(9), golden.model->make_cache(14)};
  std::vector<KvCache*> both = {&caches[0], &caches[1]};
  const auto piece = [&](int64_t from_a, int64_t to_a, int64_t from_b, int64_t to_b) {
    const at::Tensor rows = at::cat({at::arange(from_a, to_a), at::arange(from_b, to_b) + 9});
    const at::Tensor got =
        golden.model->forward(x.index_select(0, rows), golden.positions.index_select(0, rows),
                              {0, to_a - from_a, to_a - from_a + to_b - from_b}, {}, both);
    EXPECT_LT(relative_error(got, whole.index_select(0, rows)), 1e-5);
  };
  piece(0, 4, 0, 9);    // prompts
  piece(4, 5, 9, 10);   // one token each
  piece(5, 9, 10, 14);  // several at once onto a filled cache
  EXPECT_EQ(caches[0].length, 9);
  EXPECT_EQ(caches[1].length, 14);
}

TEST_P(DecoderGolden, FrozenModelPassesGradientsOnToItsInput) {
  const Golden golden(GetParam());
  for (const bool recomputes : {false, true}) {
    golden.model->set_recomputed_halves(recomputes ? 2 * golden.model->num_blocks() : 0);
    const at::Tensor x = golden.model->embed(golden.get("ids")).detach().set_requires_grad(true);
    const at::Tensor hidden =
        golden.model->forward(x, golden.positions, golden.cu_seqlens, golden.get("supervised"));
    linear_cross_entropy(hidden, golden.model->head_weight(), golden.get("targets")).backward();
    EXPECT_GT(x.grad().abs().max().item<float>(), 0);
    for (const NamedTensor& tensor : golden.model->tensors())
      EXPECT_FALSE(tensor.grad().defined()) << tensor.name;
  }
}

TEST_P(DecoderGolden, ItsConfigIsReadBack) {
  const Golden golden(GetParam());
  const Json written = golden.model->config();
  EXPECT_EQ(written["model_type"], golden.config["model_type"]);
  EXPECT_EQ(written["architectures"].size(), 1u);
  const auto again = find_language_model(golden.model->id(), "test").make(written);
  EXPECT_EQ(again->config(), written);
  const NamedTensors from = golden.model->tensors(), to = again->tensors();
  ASSERT_EQ(from.size(), to.size());
  for (size_t i = 0; i < from.size(); ++i) to[i].value().copy_(from[i].value());
  const at::Tensor x = golden.model->embed(golden.get("ids"));
  EXPECT_TRUE(at::equal(again->forward(x, golden.positions, golden.cu_seqlens, {}), golden.forward()));
}

INSTANTIATE_TEST_SUITE_P(Variants, DecoderGolden,
                         testing::Values("llama_tied", "llama_llama3", "llama_linear", "mistral_window",
                                         "qwen2_tied", "qwen2_window", "qwen3_bias", "qwen3_tied"),
                         [](const auto& variant) { return std::string(variant.param); });

Json small_config() {
  return {{"vocab_size", 50},       {"hidden_size", 32},        {"intermediate_size", 40},
          {"num_hidden_layers", 2}, {"num_attention_heads", 4}, {"num_key_value_heads", 2}};
}

// What lives after a forward pass, beyond what lived before it.
TEST(Llama, EachHalfThatRecomputesKeepsWhatItIsSaidTo) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  GTEST_SKIP() << "the arena, which counts, is off under sanitizers";
#endif
  use_caching_cpu_allocator();
  constexpr int64_t kTokens = 1024, kWidth = 256, kMlpWidth = 512;
  Json config = small_config();
  config["hidden_size"] = kWidth;
  config["intermediate_size"] = kMlpWidth;
  const LanguageModelSpec& spec = find_language_model("llama", "test");
  const auto model = spec.make(config);
  spec.init(*model, 0);
  set_trainable(model->tensors(), true);
  const at::Tensor ids = at::zeros({kTokens}, at::kLong), positions = at::arange(kTokens);
  std::vector<int64_t> kept;
  for (int64_t halves = 0; halves <= 4; ++halves) {
    model->set_recomputed_halves(halves);
    const int64_t before = cpu_memory().live_bytes;
    const at::Tensor hidden = model->forward(model->embed(ids), positions, {0, kTokens}, {});
    kept.push_back(cpu_memory().live_bytes - before);
  }
  constexpr int64_t kRow = kTokens * kWidth * 4;
  const int64_t mlp = kTokens * 2 * kMlpWidth * 4;  // gate and up
  // q, k and v (two key/value heads for four queries), the attention's output, the sum behind it.
  const int64_t rest = 2 * kRow + kRow + kRow;
  EXPECT_EQ(kept[0] - kept[1], mlp);
  EXPECT_EQ(kept[1] - kept[2], mlp);
  EXPECT_EQ(kept[2] - kept[3], rest);
  EXPECT_EQ(kept[3] - kept[4], rest);
}

// Calls by name of the operations, LibTorch's and ours, that make new numbers: on a GPU each is a launch. Those that only
// look at a tensor in another way, or find its storage, are none; nor is the library's product within one of ours.
std::map<std::string, int64_t> operations_of_a_step(int64_t num_blocks) {
  static thread_local std::map<std::string, int64_t>* counts = nullptr;
  Json config = small_config();
  config["num_hidden_layers"] = num_blocks;
  const LanguageModelSpec& spec = find_language_model("llama", "test");
  const auto model = spec.make(config);
  spec.init(*model, 0);
  set_trainable(model->tensors(), true);
  const at::Tensor ids = at::arange(20), positions = at::arange(20);
  std::map<std::string, int64_t> counted;
  counts = &counted;
  const auto handle = at::addThreadLocalCallback(
      at::RecordFunctionCallback([](const at::RecordFunction& call) -> std::unique_ptr<at::ObserverContext> {
        static const std::set<std::string> kViews = {
            "aten::empty",     "aten::empty_like", "aten::empty_strided", "aten::view",      "aten::reshape",
            "aten::slice",     "aten::narrow",     "aten::transpose",     "aten::t",         "aten::permute",
            "aten::unflatten", "aten::as_strided", "aten::detach",        "aten::unsqueeze", "aten::expand",
            "aten::alias",     "detach",           "aten::split",         "aten::clone",     "aten::contiguous",
            "aten::to",        "aten::_to_copy",   "aten::result_type",   "aten::zeros",     "aten::zeros_like",
            "aten::ones_like", "aten::split_with_sizes", "aten::_unsafe_view", "aten::is_nonzero",
            "aten::resolve_conj", "aten::mm"};
        const std::string name = call.name();
        if (!kViews.contains(name) && !name.starts_with("autograd::engine")) ++(*counts)[name];
        return nullptr;
      }).scopes({at::RecordScope::FUNCTION}));
  model->forward(model->embed(ids), positions, {0, 20}, {}).sum().backward();
  at::removeCallback(handle);
  return counted;
}

TEST(Llama, ABlockIsABoundedNumberOfOperations) {
  const std::map<std::string, int64_t> two = operations_of_a_step(2), three = operations_of_a_step(3);
  int64_t of_a_block = 0;
  std::string list;
  for (const auto& [name, count] : three) {
    const int64_t more = count - (two.contains(name) ? two.at(name) : 0);
    of_a_block += more;
    if (more != 0) list += fmt::format("{} {}\n", more, name);
  }
  EXPECT_GT(of_a_block, 10);
  EXPECT_LE(of_a_block, 51) << list;
}

TEST(Llama, ConfigRoundTripsAndKeepsBothSpellingsOfRope) {
  Json config = small_config();
  config["rope_theta"] = 12345.0;  // transformers 4's spelling
  config["rope_scaling"] = {{"type", "linear"}, {"factor", 3.0}};
  config["eos_token_id"] = 7;
  const LanguageModelSpec& spec = find_language_model("llama", "test");
  const Json written = spec.make(config)->config();
  EXPECT_EQ(written["rope_theta"], 12345.0);
  EXPECT_EQ(written["rope_scaling"], (Json{{"rope_type", "linear"}, {"factor", 3.0}}));
  EXPECT_EQ(written["rope_parameters"]["rope_theta"], 12345.0);
  EXPECT_EQ(written["rope_parameters"]["rope_type"], "linear");
  EXPECT_EQ(written["head_dim"], 8);
  EXPECT_EQ(written["eos_token_id"], 7);
  EXPECT_EQ(spec.make(written)->config(), written);
  EXPECT_TRUE(spec.make(small_config())->config()["rope_scaling"].is_null());
}

TEST(Llama, TensorsHaveHfNamesAndShareFusedOwners) {
  Json config = small_config();
  config["tie_word_embeddings"] = true;
  const auto model = find_language_model("llama", "test").make(config);
  NamedTensors tensors = model->tensors();
  EXPECT_EQ(tensors.front().name, "model.embed_tokens.weight");
  EXPECT_EQ(tensors.back().name, "model.norm.weight");  // no lm_head: it is the embedding
  EXPECT_EQ(tensors[3].name, "model.layers.0.self_attn.k_proj.weight");
  EXPECT_EQ(tensors[3].owner, tensors[2].owner);
  EXPECT_EQ(tensors[3].value().sizes(), (std::vector<int64_t>{16, 32}));
  EXPECT_EQ(count_parameters(tensors), 50 * 32 + 2 * (64 * 32 + 32 * 32 + 3 * 40 * 32 + 2 * 32) + 32);
}

TEST(Llama, FreshWeightsDependOnSeedAndNameAlone) {
  const LanguageModelSpec& spec = find_language_model("llama", "test");
  const auto a = spec.make(small_config()), b = spec.make(small_config()), c = spec.make(small_config());
  spec.init(*a, 1);
  spec.init(*b, 1);
  spec.init(*c, 2);
  const NamedTensors of_a = a->tensors(), of_b = b->tensors(), of_c = c->tensors();
  for (size_t i = 0; i < of_a.size(); ++i)
    EXPECT_TRUE(at::equal(of_a[i].value(), of_b[i].value())) << of_a[i].name;
  EXPECT_FALSE(at::equal(of_a[0].value(), of_c[0].value()));
  EXPECT_NEAR(of_a[0].value().std().item<double>(), 0.02, 0.002);
  EXPECT_FALSE(at::equal(of_a[3].value(), of_a[4].value()));  // k and v of one layer
}

TEST(Llama, TrainsInBfloat16CloseToFloat32) {
  Golden golden("llama_tied");
  const double exact = golden.get("loss").item<double>();
  convert(golden.model->tensors(), at::kCPU, at::kBFloat16);
  set_trainable(golden.model->tensors(), true);
  const at::Tensor loss = golden.loss();
  EXPECT_EQ(loss.scalar_type(), at::kFloat);
  EXPECT_NEAR(loss.item<double>(), exact, 0.05 * exact);
  loss.backward();
  for (const NamedTensor& tensor : golden.model->tensors()) {
    ASSERT_EQ(tensor.grad().scalar_type(), at::kBFloat16) << tensor.name;
    if (!golden.file->has("golden.grad." + tensor.name)) continue;
    const at::Tensor expected = golden.get("grad." + tensor.name), got = tensor.grad().to(at::kFloat);
    EXPECT_LT(((got - expected).norm() / expected.norm()).item<double>(), 0.1) << tensor.name;
  }
}

TEST(Llama, RefusesConfigsItCannotObey) {
  const auto made_with = [](const char* key, Json value) {
    return [key, value] {
      Json config = small_config();
      if (value.is_null())
        config.erase(key);
      else
        config[key] = value;
      find_language_model("llama", "test").make(config);
    };
  };
  EXPECT_THAT(made_with("vocab_size", {}),
              ThrowsMessage<CheckpointError>(HasSubstr("\"vocab_size\" is missing")));
  EXPECT_THAT(made_with("hidden_size", -1),
              ThrowsMessage<CheckpointError>(HasSubstr("hidden_size: expected a positive integer, got -1")));
  EXPECT_THAT(made_with("rms_norm_eps", "x"),
              ThrowsMessage<CheckpointError>(HasSubstr("rms_norm_eps: expected a number")));
  EXPECT_THAT(made_with("num_key_value_heads", 3),
              ThrowsMessage<CheckpointError>(HasSubstr("must be a multiple")));
  EXPECT_THAT(made_with("head_dim", 7),
              ThrowsMessage<CheckpointError>(HasSubstr("expected an even number, got 7")));
  EXPECT_THAT(made_with("hidden_act", "gelu"), ThrowsMessage<CheckpointError>(HasSubstr("only \"silu\"")));
  EXPECT_THAT(made_with("rope_scaling", {{"rope_type", "longrope"}}),
              ThrowsMessage<CheckpointError>(HasSubstr("rope_type \"longrope\" is not supported")));
  EXPECT_THAT(made_with("rope_scaling", {{"rope_type", "linear"}}),
              ThrowsMessage<CheckpointError>(HasSubstr("needs the number \"factor\"")));
  EXPECT_THAT(made_with("rope_scaling", {{"rope_type", 3}}),
              ThrowsMessage<CheckpointError>(HasSubstr("expected text")));
  EXPECT_THAT(made_with("rope_theta", 0),
              ThrowsMessage<CheckpointError>(HasSubstr("rope_theta: expected a number above 1")));
  EXPECT_THAT(made_with("partial_rotary_factor", 0.5),
              ThrowsMessage<CheckpointError>(HasSubstr("partial_rotary_factor")));
  EXPECT_THAT(made_with("rope_scaling", {{"rope_type", "llama3"},
                                         {"factor", 8},
                                         {"low_freq_factor", 4},
                                         {"high_freq_factor", 1},
                                         {"original_max_position_embeddings", 8192}}),
              ThrowsMessage<CheckpointError>(HasSubstr("low_freq_factor < high_freq_factor")));
  EXPECT_THAT([] { find_language_model("lama", "some/config.json"); },
              ThrowsMessage<CheckpointError>(HasSubstr(
                  "some/config.json: language model type \"lama\" is not known; did you mean \"llama\"?")));
}

TEST(Decoder, FamiliesRefuseWhatTheyCannotObey) {
  const auto made = [](const char* family, const char* key, const Json& value) {
    return [=] {
      Json config = small_config();
      config["sliding_window"] = 4;
      config["use_sliding_window"] = true;
      config[key] = value;
      find_language_model(family, "test").make(config);
    };
  };
  EXPECT_THAT(made("qwen2", "layer_types", {"full_attention"}),
              ThrowsMessage<CheckpointError>(
                  HasSubstr("config.json of a qwen2 model: layer_types: expected a list of 2 texts")));
  EXPECT_THAT(made("qwen3", "layer_types", {"full_attention", "linear_attention"}),
              ThrowsMessage<CheckpointError>(
                  HasSubstr("expected full_attention or sliding_attention, got \"linear_attention\"")));
  EXPECT_THAT(made("mistral", "sliding_window", -1),
              ThrowsMessage<CheckpointError>(
                  HasSubstr("config.json of a mistral model: sliding_window: expected a positive integer")));
  EXPECT_THAT(made("qwen2", "use_sliding_window", 1),
              ThrowsMessage<CheckpointError>(HasSubstr("use_sliding_window: expected a boolean, got 1")));
}

TEST(Rope, FrequenciesAreThoseOfTransformers) {
  for (const Json& one : read_json(kGolden / "rope.json")) {
    const Rope rope = make_rope(one, one["head_dim"], one["max_position_embeddings"]);
    EXPECT_NEAR(rope.attention_scaling, one["attention_scaling"].get<double>(), 1e-7);
    const auto expected = one["inv_freq"].get<std::vector<float>>();
    EXPECT_TRUE(at::allclose(rope.inv_freq, at::tensor(expected), 1e-5, 0)) << one["rope_parameters"].dump();
  }
}

}  // namespace
}  // namespace caldera
