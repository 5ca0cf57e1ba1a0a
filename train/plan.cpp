#include "train/plan.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>
#include <set>

#include "base/cpu_allocator.h"
#include "base/error.h"
#include "base/log.h"
#include "data/dataset.h"
#include "train/plan_memory.h"
#include "train/stage.h"

namespace caldera {
namespace {

constexpr int64_t kCodeBytes = 96 << 20;  // of the products' code, made when they first run, and LibTorch's
constexpr int64_t kPixelCacheBytes = 1 << 30;  // the loader's

// What this process holds now besides tensors: its code and libraries, which training needs as well.
int64_t program_bytes() {
  int64_t pages = 0, resident = 0;
  std::ifstream("/proc/self/statm") >> pages >> resident;
  const CpuMemory tensors = cpu_memory();
  return resident * ::sysconf(_SC_PAGE_SIZE) - tensors.live_bytes - tensors.cached_bytes + kCodeBytes;
}

void count_tokens(const Recipe& recipe, const StageConfig& stage, const ImageSpec& spec, int64_t max_samples,
                  StagePlan& plan, int64_t& picture_bytes) {
  SampleFormat format;
  format.tokenizer = load_tokenizer(tokenizer_of(recipe));
  format.conversation = &find_template(stage.data.conversation_template);
  format.image_spec = spec;
  format.image_aspect_ratio = stage.data.image_aspect_ratio;
  format.model_max_length = stage.data.model_max_length;
  const std::vector<Record> records = read_records(stage.data.data_path);
  plan.num_samples = std::ssize(records);
  std::set<std::string> pictures;
  for (const Record& record : records) pictures.insert(record.images.begin(), record.images.end());
  picture_bytes = std::min(kPixelCacheBytes, std::ssize(pictures) * 3 * spec.image_size * spec.image_size);

  // Whole steps of the first epoch's order, as many as `max_samples` allow.
  std::vector<int64_t> lengths_for_order;
  if (stage.data.group_by_modality_length) lengths_for_order = modality_lengths(records);
  const std::vector<int64_t> order =
      Sampler(plan.num_samples, recipe.seed, lengths_for_order, stage.global_batch_size).epoch_order(0);
  const int64_t batch = std::min(stage.global_batch_size, plan.num_samples);
  const int64_t looked_at = std::min(plan.num_samples, std::max(max_samples / batch, int64_t{1}) * batch);
  std::vector<int64_t> lengths;
  int64_t num_steps = 0, num_micro_batches = 0;
  for (int64_t begin = 0; begin < looked_at; begin += batch) {
    std::vector<int64_t> step;
    for (int64_t i = begin; i < std::min(begin + batch, looked_at); ++i) {
      const Record& record = records[static_cast<size_t>(order[static_cast<size_t>(i)])];
      const Sample sample = make_sample_text(record, format);
      step.push_back(std::ssize(sample.input_ids));
      plan.num_supervised += sample.num_supervised();
      plan.num_images += std::ssize(record.images);
      plan.num_tokens += step.back();
      plan.num_cut += step.back() >= format.model_max_length ? 1 : 0;
    }
    for (const std::vector<int64_t>& row : plan_micro_batches(step, stage.max_tokens_per_micro_batch)) {
      int64_t tokens = 0;
      for (const int64_t i : row) tokens += step[static_cast<size_t>(i)];
      plan.largest_micro_batch = std::max(plan.largest_micro_batch, tokens);
      ++num_micro_batches;
    }
    lengths.insert(lengths.end(), step.begin(), step.end());
    plan.step_lengths.push_back(std::move(step));
    ++num_steps;
  }
  plan.micro_batches_per_step = static_cast<double>(num_micro_batches) / static_cast<double>(num_steps);
  plan.fill = static_cast<double>(plan.num_tokens) /
              static_cast<double>(num_micro_batches * stage.max_tokens_per_micro_batch);
  std::sort(lengths.begin(), lengths.end());
  const auto at = [&](double share) {
    return lengths[static_cast<size_t>(share * static_cast<double>(lengths.size() - 1))];
  };
  plan.shortest = lengths.front();
  plan.median_length = at(0.5);
  plan.percentile_95 = at(0.95);
  plan.longest = lengths.back();
  plan.steps_per_epoch = (plan.num_samples + stage.global_batch_size - 1) / stage.global_batch_size;
  plan.num_steps = stage.max_steps > 0
                       ? stage.max_steps
                       : static_cast<int64_t>(
                             std::ceil(static_cast<double>(plan.steps_per_epoch) * stage.num_train_epochs));
  // To the whole epoch from the part that was looked at.
  const double scale = static_cast<double>(plan.num_samples) / static_cast<double>(looked_at);
  for (int64_t* count : {&plan.num_tokens, &plan.num_supervised, &plan.num_images, &plan.num_cut})
    *count = std::llround(static_cast<double>(*count) * scale);
}

// Twice the products' multiplications forward, and as much for each gradient that is wanted.
double flops_of_step(const PlannedModel& p, const StagePlan& plan) {
  const double tokens = static_cast<double>(plan.num_tokens) / static_cast<double>(plan.steps_per_epoch);
  const double supervised =
      static_cast<double>(plan.num_supervised) / static_cast<double>(plan.steps_per_epoch);
  const auto block = static_cast<double>(p.D * (p.H + 2 * p.G) * p.K + p.H * p.K * p.D + 3 * p.D * p.F);
  const auto head = static_cast<double>(p.D * p.V);
  const double passes =
      2.0 + (p.language_trains && !p.lora ? 1.0 : 0.0);  // forward, to the inputs, to the weights
  // What is not run again is the last product of an MLP.
  const auto mlp = static_cast<double>(2 * p.D * p.F), rest = block - 1.5 * mlp;
  return 2 * tokens *
             (static_cast<double>(p.L) * passes * block + static_cast<double>(plan.num_recomputed_mlps()) * mlp +
              static_cast<double>(plan.num_recomputed_blocks()) * rest) +
         2 * supervised * head * (2.0 + (p.head_trains ? 1.0 : 0.0));
}

std::string gigabytes(int64_t bytes) { return fmt::format("{:.2f} GB", static_cast<double>(bytes) / 1e9); }

}  // namespace

StagePlan plan_stage(const Recipe& recipe, const StageConfig& stage, int64_t max_samples, int64_t num_ranks,
                     int64_t ranks_per_node) {
  const bool on_gpu = trains_on_gpu(recipe);
  int64_t program = on_gpu ? 0 : program_bytes(), picture_bytes = 0;
  StagePlan plan;
  plan.name = stage.name;
  plan.on_gpu = on_gpu;
  PlannedModel model = plan_model(recipe, stage);
  count_tokens(recipe, stage, model.model.vision->image_spec(), max_samples, plan, picture_bytes);
  if (!on_gpu) program += picture_bytes;
  plan.num_parameters = model.num_parameters;
  plan.num_trainable = model.num_trainable;
  plan.num_blocks = model.L;
  plan.units =
      lay_out_units(parameter_groups(model.model, stage), model.model.component_tensors("language_model"),
                    recipe.distributed.strategy == "zero3");
  for (FlatUnit& unit : plan.units) unit.leaves.clear();
  const RankSplit split = split_ranks(recipe.distributed, num_ranks, ranks_per_node);
  const auto memory_with = [&](const MemoryChoices& choices) {
    return plan_memory(model, recipe, stage, plan, on_gpu, program, choices, split);
  };
  // Where all blocks recompute, what is left of them may wait in host memory; on the CPU it would be the same memory.
  const int64_t movable = on_gpu ? model.L - 1 : 0;
  plan.least_memory = memory_with({.recomputed_halves = 2 * model.L, .offloaded_inputs = movable});
  // The copies go first, then as few halves recompute as keep it below the budget, then as few inputs move.
  const double budget = stage.memory.budget_gb * 1e9;
  plan.choices = {.packs_frozen = !on_gpu && recipe.distributed.strategy != "zero3" &&
                                  model.packed_bytes > 0 && copies_fit(model.packed_bytes, ranks_per_node),
                  .recomputed_halves = stage.gradient_checkpointing ? 2 * model.L : 0,
                  .offloaded_inputs = stage.memory.offload_activations ? movable : 0};
  plan.memory = memory_with(plan.choices);
  const auto is_too_much = [&] { return budget > 0 && static_cast<double>(plan.memory.total()) > budget; };
  if (is_too_much()) {
    plan.choices.packs_frozen = false;
    plan.memory = memory_with(plan.choices);
  }
  const auto raise = [&](int64_t& choice, int64_t most) {
    while (is_too_much() && choice < most) {
      ++choice;
      plan.memory = memory_with(plan.choices);
    }
  };
  raise(plan.choices.recomputed_halves, 2 * model.L);
  raise(plan.choices.offloaded_inputs, movable);
  plan.flops_per_step = flops_of_step(model, plan);
  return plan;
}

std::vector<StagePlan> plan_recipe(const Recipe& recipe, int64_t max_samples) {
  std::vector<StagePlan> plans;
  for (const StageConfig& stage : recipe.stages) plans.push_back(plan_stage(recipe, stage, max_samples));
  return plans;
}

std::string what_recomputes(const StagePlan& plan) {
  const int64_t offloaded = plan.num_offloaded_inputs();
  return fmt::format("{} of {} blocks recompute their MLP, {} of them the rest as well{}", plan.num_recomputed_mlps(),
                     plan.num_blocks, plan.num_recomputed_blocks(),
                     offloaded > 0 ? fmt::format(", the inputs of {} wait in host memory", offloaded) : "");
}

std::vector<std::string> ways_to_take_less(const StageConfig& stage, const StagePlan& plan) {
  std::vector<std::string> ways;
  const MemoryPlan& memory = plan.least_memory;
  if (plan.largest_micro_batch > plan.longest)
    ways.push_back(fmt::format("max_tokens_per_micro_batch: {}   the longest sample; same numbers; now {}",
                               plan.longest, plan.largest_micro_batch));
  if (stage.dtype == "float32") ways.emplace_back("dtype: bfloat16   halves weights, activations and gradients");
  if (stage.optimizer.optim != "adamw_8bit" && memory.states > 0)
    ways.push_back(fmt::format("optimizer.optim: adamw_8bit   a quarter of the optimizer's {}",
                               gigabytes(memory.states)));
  if (memory.masters > 0)
    ways.push_back(
        fmt::format("optimizer.master_weights: none   drops the masters' {}", gigabytes(memory.masters)));
  if (stage.async_save && stage.save_steps > 0 && stage.save_steps < plan.num_steps && !plan.on_gpu)
    ways.emplace_back("async_save: false   no copy of masters and states while a checkpoint is written");
  if (memory.moment == "saving a checkpoint")
    ways.emplace_back("save_steps: 0   no checkpoint before the end; saving is the peak");
  if (!stage.uses_lora() && memory.states + memory.masters + memory.gradients > memory.total() / 2)
    ways.emplace_back("lora: {}   gradients and states of the adapters alone");
  if (stage.uses_lora() && !stage.uses_4bit() && memory.weights > memory.total() / 4)
    ways.push_back(fmt::format("lora.load_in_4bit: true   the decoder's part of {} in 4 bits a weight",
                               gigabytes(memory.weights)));
  return ways;
}

bool copies_fit(int64_t bytes, int64_t ranks_per_node) {
  const int64_t memory = int64_t{::sysconf(_SC_PHYS_PAGES)} * ::sysconf(_SC_PAGE_SIZE);
  return bytes <= memory / (4 * ranks_per_node);
}

MemoryChoices choose_memory(const Recipe& recipe, size_t stage_index, World& world) {
  const StageConfig& stage = recipe.stages[stage_index];
  constexpr int64_t kAll = std::numeric_limits<int64_t>::max();
  if (stage.memory.budget_gb == 0)
    return {.packs_frozen = true,
            .recomputed_halves = stage.gradient_checkpointing ? kAll : 0,
            .offloaded_inputs = stage.memory.offload_activations && trains_on_gpu(recipe) ? kAll : 0};
  // The ranks' programs differ in size; the first one decides for all.
  const std::string chosen = world.from_first([&]() -> std::string {
    if (!world.is_first()) return "";
    constexpr int64_t kSamples = 20000;
    const StagePlan plan = plan_stage(recipe, stage, kSamples, world.size(), world.spec().local_size);
    const int64_t total = plan.memory.total();
    CALDERA_CHECK(static_cast<double>(total) <= stage.memory.budget_gb * 1e9, ConfigError,
                  "stage {}: memory.budget_gb is {}, but with all {} blocks recomputing{} it still takes {} at "
                  "{} ({} of it "
                  "program and pictures). What helps:\n  {}",
                  stage.name, stage.memory.budget_gb, plan.num_blocks,
                  plan.num_offloaded_inputs() > 0 ? " and their inputs in host memory" : "", gigabytes(total),
                  plan.memory.moment, gigabytes(plan.memory.program),
                  fmt::join(ways_to_take_less(stage, plan), "\n  "));
    log_info("stage {}: {}, so that it takes {} of the {} GB of memory.budget_gb", stage.name, what_recomputes(plan),
             gigabytes(total), stage.memory.budget_gb);
    return Json{{"packs_frozen", plan.choices.packs_frozen},
                {"recomputed_halves", plan.choices.recomputed_halves},
                {"offloaded_inputs", plan.choices.offloaded_inputs}}
        .dump();
  }());
  const Json choices = Json::parse(chosen);
  return {.packs_frozen = choices.at("packs_frozen").get<bool>(),
          .recomputed_halves = choices.at("recomputed_halves").get<int64_t>(),
          .offloaded_inputs = choices.at("offloaded_inputs").get<int64_t>()};
}

}  // namespace caldera
