// A stage that trains a low-rank adapter: what changes, what stays, and that it goes on bit for bit.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>

#include "base/error.h"
#include "data/loader.h"
#include "data/template.h"
#include "model/weights/adapters.h"
#include "tests/train/tiny_run.h"
#include "train/stage.h"

namespace caldera {
namespace {

class LoraStageTest : public TinyRunTest {
 protected:
  Recipe recipe(const std::string& output, const std::string& dtype = "float32") const {
    Recipe recipe = tiny_recipe(folder_.path(), output);
    StageConfig& stage = recipe.stages[0];
    stage.lora.emplace();
    stage.lora->lora_r = 4;
    stage.lora->lora_alpha = 16;
    stage.lora->lora_dropout = 0.1;
    stage.optimizer.learning_rate = 3e-3;
    stage.optimizer.mm_projector_lr = 2e-3;
    stage.global_batch_size = 3;  // steps of 3 and 1 samples
    stage.max_tokens_per_micro_batch = 600;
    stage.max_steps = 5;
    stage.dtype = dtype;
    return recipe;
  }

  static std::string final_bytes(const Recipe& recipe) {
    return read_file(final_of(recipe) / "model.safetensors") +
           read_file(final_of(recipe) / "adapter" / "adapter_model.safetensors");
  }
};

TEST_F(LoraStageTest, TrainsAdapterAndProjectorAndMergesThem) {
  for (const char* dtype : {"float32", "bfloat16"}) {
    Recipe lora = recipe(std::string("a_") + dtype, dtype);
    lora.stages[0].global_batch_size = 4;  // the same samples in each step
    lora.stages[0].max_steps = 10;
    lora.stages[0].optimizer.learning_rate = 1e-2;
    const std::vector<double> losses = train(lora);
    EXPECT_LT(losses.back(), losses.front() - 0.2);
    EXPECT_EQ(num_trainable_, (16 * 32 + 32) + (32 * 32 + 32) +  // projector
                                  2 * 4 *
                                      ((32 + 32) + 2 * (32 + 16) + (32 + 32) +  // q, k and v, o
                                       2 * (32 + 64) + (64 + 32)));             // gate and up, down

    // final/ is the base with the adapter merged: what does not carry one is as it was.
    BuildSpec base_spec = build_spec_of(lora, 0);
    EXPECT_EQ(base_spec.lora->lora_r, 4);
    base_spec.lora.reset();
    const auto base = build_llava(base_spec);
    base->to(at::kCPU, parse_dtype(dtype));
    const auto merged = load_llava(final_of(lora)).model;
    for (size_t i = 0; i < base->tensors().size(); ++i) {
      const NamedTensor before = base->tensors()[i], after = merged->tensors()[i];
      const bool changes = before.name.starts_with("multi_modal_projector") ||
                           before.name.find("_proj.weight") != std::string::npos;
      const bool is_tower = before.name.starts_with("vision_tower");
      EXPECT_EQ(at::equal(before.value().to(at::kFloat), after.value()), is_tower || !changes) << before.name;
    }

    // The adapter kept beside it gives the same, onto the parts that the stage began with.
    const LoadedModel from_adapter = load_llava(final_of(lora) / "adapter");
    EXPECT_EQ(from_adapter.card.conversation_template, "v1");
    const double bound =
        std::string(dtype) == "float32" ? 1e-6 : 1e-2;  // the base in final/ was rounded to the stage's dtype
    for (size_t i = 0; i < merged->tensors().size(); ++i)
      EXPECT_TRUE(
          at::allclose(from_adapter.model->tensors()[i].value(), merged->tensors()[i].value(), bound, bound))
          << merged->tensors()[i].name;
  }
}

TEST_F(LoraStageTest, StoppedAfterAnyStepItGoesOnBitForBit) {
  for (const char* dtype : {"float32", "bfloat16"}) {
    const Recipe straight = recipe(std::string("straight_") + dtype, dtype);
    const std::vector<double> expected = train(straight);
    for (int at = 1; at < 5; ++at) {
      Recipe stopped = straight;
      stopped.output = recipe(fmt::format("stopped_{}_{}", dtype, at)).output;
      int steps = 0;
      std::vector<double> losses = train(stopped, [&] { return ++steps == at; });
      const std::vector<double> rest = train(stopped);
      losses.insert(losses.end(), rest.begin(), rest.end());
      EXPECT_EQ(losses, expected) << at;
      EXPECT_EQ(final_bytes(stopped), final_bytes(straight)) << at;
    }
  }
}

TEST_F(LoraStageTest, RecomputingBlocksDropsTheSame) {
  Recipe recomputed = recipe("b");
  recomputed.stages[0].gradient_checkpointing = true;
  EXPECT_EQ(train(recipe("a")), train(recomputed));
  EXPECT_EQ(final_bytes(recipe("a")), final_bytes(recomputed));
}

// Packed in any way, and dealt to any number of ranks, a token drops the same: the curve of 12 steps is that
// of one rank but for rounding, where a mask of its own for each micro-batch lay 1.2e-3 away.
TEST_F(LoraStageTest, AnyPackingDropsTheSame) {
  std::vector<std::vector<double>> losses;
  for (const int64_t tokens : {100, 250, 5000}) {
    Recipe packed = recipe(fmt::format("packed_{}", tokens));
    packed.stages[0].max_tokens_per_micro_batch = tokens;
    packed.stages[0].max_steps = 12;
    losses.push_back(train(packed));
  }
  for (size_t i = 1; i < losses.size(); ++i)
    for (size_t step = 0; step < 12; ++step)
      EXPECT_NEAR(losses[i][step], losses[0][step], 2e-6 * losses[0][step]) << i << ", step " << step;
}

TEST_F(LoraStageTest, AnyNumberOfRanksHasTheSameKeys) {
  const Recipe run = recipe("ranks");
  SampleFormat format;
  format.tokenizer = load_tokenizer(tokenizer_of(run));
  format.conversation = &find_template("v1");
  format.model_max_length = 400;
  format.image_spec = build_llava(build_spec_of(run, 0))->image_spec();
  const auto records =
      std::make_shared<const std::vector<Record>>(read_records(run.stages[0].data.data_path));
  // The keys of each sample in a step of all four.
  const auto keys_of = [&](int num_ranks, int64_t max_tokens) {
    std::map<std::string, std::vector<int64_t>> keys;
    for (int rank = 0; rank < num_ranks; ++rank) {
      Loader loader(records, fs::path(run.stages[0].data.image_folder), format,
                    {.global_batch_size = 4,
                     .max_tokens_per_micro_batch = max_tokens,
                     .num_workers = 1,
                     .rank = rank,
                     .num_ranks = num_ranks});
      StepData data;
      EXPECT_TRUE(loader.next(data));
      for (const PackedBatch& batch : data.micro_batches) {
        const at::Tensor of_batch = dropout_keys(batch, 3);
        for (size_t s = 0; s + 1 < batch.cu_seqlens.size(); ++s)
          keys[batch.sample_ids[s]].assign(of_batch.const_data_ptr<int64_t>() + batch.cu_seqlens[s],
                                           of_batch.const_data_ptr<int64_t>() + batch.cu_seqlens[s + 1]);
      }
    }
    return keys;
  };
  const auto alone = keys_of(1, 5000);
  EXPECT_EQ(alone.size(), 4u);
  for (const auto& [ranks, tokens] : {std::pair{1, 100}, {2, 5000}, {3, 250}, {5, 100}})
    EXPECT_EQ(keys_of(ranks, tokens), alone) << ranks << " ranks, " << tokens << " tokens";
}

TEST_F(LoraStageTest, DropoutActsAndFollowsTheSeed) {
  Recipe without = recipe("b");
  without.stages[0].lora->lora_dropout = 0;
  const std::vector<double> with = train(recipe("a")), plain = train(without);
  EXPECT_EQ(with[0], plain[0]);  // B is zero
  EXPECT_NE(with[2], plain[2]);
}

TEST_F(LoraStageTest, ACheckpointHoldsTheAdapterAloneAndIsAModel) {
  Recipe stopped = recipe("a");
  int steps = 0;
  train(stopped, [&] { return ++steps == 3; });
  const fs::path step = fs::path(stopped.output) / "finetune" / "checkpoints" / "step-00000003";
  const auto file = open_safetensors(step / "model.safetensors");
  for (const std::string& name : file->names())
    EXPECT_TRUE(is_lora_name(name) || name.starts_with("multi_modal_projector.")) << name;
  const LoadedModel loaded = load_llava(stopped.output);
  EXPECT_EQ(loaded.folder, step);

  // The same as merging what it holds by hand.
  BuildSpec spec = build_spec_of(stopped, 0);
  spec.lora.reset();
  const auto base = build_llava(spec);
  const std::string name = "language_model.model.layers.1.mlp.down_proj";
  int compared = 0;
  for (const NamedTensor& tensor : base->tensors()) {
    if (tensor.name != name + ".weight") continue;
    tensor.value().add_(at::mm(file->read(name + ".lora_B.weight"), file->read(name + ".lora_A.weight")),
                        16.0 / 4);
    for (const NamedTensor& got : loaded.model->tensors()) {
      if (got.name != tensor.name) continue;
      EXPECT_TRUE(at::allclose(got.value(), tensor.value(), 1e-6, 1e-7));
      ++compared;
    }
  }
  EXPECT_EQ(compared, 1);
}

TEST_F(LoraStageTest, ALaterStageStartsFromTheMergedWeights) {
  Recipe two = recipe("a");
  two.stages.push_back(two.stages[0]);
  two.stages[1].name = "more";
  two.stages[1].lora->lora_r = 2;
  const std::vector<double> losses = train(two);
  EXPECT_EQ(losses.size(), 10u);
  const Adapter adapter = read_adapter(fs::path(two.output) / "more" / "final");
  EXPECT_EQ(adapter.lora.lora_r, 2);
  EXPECT_EQ(fs::path(adapter.base_model), fs::path(two.output) / "finetune" / "final");
  // By its base's name alone, as PEFT finds it.
  const fs::path folder = fs::path(two.output) / "more" / "final" / "adapter";
  fs::remove(folder / "caldera.json");
  const auto got = load_llava(folder).model, expected = load_llava(two.output).model;
  for (size_t i = 0; i < got->tensors().size(); ++i)
    EXPECT_TRUE(at::allclose(got->tensors()[i].value(), expected->tensors()[i].value(), 1e-6, 1e-6))
        << got->tensors()[i].name;
}

}  // namespace
}  // namespace caldera
