#include "train/plan.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <set>

#include "base/error.h"
#include "data/dataset.h"
#include "model/weights/gguf_weights.h"
#include "model/weights/json_fields.h"
#include "model/weights/load.h"
#include "train/trainer.h"

// Legend: T tokens of a micro-batch, N of them supervised, D width, F MLP width, H query heads, G key/value
// heads, K head width, V vocabulary, L blocks.
namespace caldera {
namespace {

constexpr int64_t kCodeBytes = 32 << 20;       // of the products' code, made when they first run
constexpr int64_t kLogitsBytes = 96 << 20;     // linear_cross_entropy's chunk
constexpr int64_t kPixelCacheBytes = 1 << 30;  // the loader's
constexpr int64_t kAttentionRows = 256;        // queries whose scores exist at once
constexpr int64_t kThreads = 2;

// What this process holds now: its code and libraries, which a training process holds as well.
int64_t resident_bytes() {
  int64_t pages = 0, resident = 0;
  std::ifstream("/proc/self/statm") >> pages >> resident;
  return resident * ::sysconf(_SC_PAGE_SIZE);
}

Json decoder_config(const fs::path& path) {
  if (fs::is_regular_file(path)) return open_gguf_decoder(path).config;
  Json config = read_config(path / "config.json");
  if (config.contains("text_config") && config["text_config"].is_object()) {
    config = Json(config["text_config"]);
    if (!config.contains("model_type")) config["model_type"] = "llama";
  }
  return config;
}

// A stage's model with storage that nobody touches.
struct Parts {
  LlavaModel model;
  int64_t D = 0, F = 0, H = 0, G = 0, K = 0, V = 0, L = 0;
  int64_t num_parameters = 0, num_trainable = 0;
  int64_t block_trainable = 0;  // of one block
  bool head_trains = false, language_trains = false, lora = false;
};

Parts make_parts(const Recipe& recipe, const StageConfig& stage) {
  Parts parts;
  const VisionFeatures features{recipe.model.vision_feature_layer,
                                recipe.model.vision_feature_select_strategy};
  LlavaModel& model = parts.model;
  model.vision =
      make_vision_tower(fs::absolute(recipe.model.vision_tower), features, recipe.model.image_size);
  const Json config = decoder_config(recipe.model.language_model);
  const std::string type = config.value("model_type", "");
  model.language = find_language_model(type, recipe.model.language_model).make(config);
  model.projector = make_projector(recipe.model.mm_projector_type, model.vision->hidden_size(),
                                   model.language->hidden_size());
  if (stage.uses_lora())
    for (Linear* linear : model.language->linears()) linear->attach(*stage.lora, recipe.seed);

  const Json text = model.language->config();
  parts.D = model.language->hidden_size();
  parts.V = model.language->vocab_size();
  parts.L = text.at("num_hidden_layers").get<int64_t>();
  parts.H = text.at("num_attention_heads").get<int64_t>();
  parts.G = text.value("num_key_value_heads", parts.H);
  parts.F = text.at("intermediate_size").get<int64_t>();
  parts.K = text.contains("head_dim") && text["head_dim"].is_number() ? text["head_dim"].get<int64_t>()
                                                                      : parts.D / parts.H;
  parts.num_parameters = count_parameters(model.tensors());
  parts.lora = stage.uses_lora();
  for (const std::string& part : stage.trainable) {
    NamedTensors tensors = model.component_tensors(part);
    if (part == "language_model") {
      parts.language_trains = true;
      if (parts.lora)
        std::erase_if(tensors, [](const NamedTensor& tensor) { return !is_lora_name(tensor.name); });
      else
        parts.head_trains = true;
      NamedTensors block = tensors;
      std::erase_if(block, [](const NamedTensor& tensor) {
        return tensor.name.find("model.layers.0.") == std::string::npos;
      });
      parts.block_trainable = count_parameters(block);
    }
    parts.num_trainable += count_parameters(tensors);
  }
  return parts;
}

// Elements that a block keeps for backward, a token.
int64_t kept_per_token(const Parts& p) {
  const bool weights = p.language_trains;  // their gradients want the inputs of each product
  int64_t kept =
      (p.H + 2 * p.G) * p.K + (p.H + p.G) * p.K;   // the fused projection; q and k after the rotary embedding
  kept += 2 * p.D;                                 // both sums that the norms read
  kept += 2 * p.F;                                 // gate and up
  if (weights) kept += 2 * p.D + p.H * p.K + p.F;  // norms' outputs, attention's, the gated product
  return kept;
}

MemoryPlan plan_memory(const Parts& p, const StageConfig& stage, const StagePlan& numbers, int64_t program,
                       bool recompute) {
  const int64_t e = stage.dtype == "float32" ? 4 : 2;
  const int64_t T = numbers.largest_micro_batch;
  const int64_t N = numbers.num_tokens == 0 ? 0 : T * numbers.num_supervised / numbers.num_tokens;
  const bool accumulates = numbers.micro_batches_per_step > 1;
  MemoryPlan fixed;
  fixed.program = program;
  fixed.weights = p.num_parameters * e;
  fixed.masters = e == 4 ? 0 : 4 * p.num_trainable;
  fixed.states = 8 * p.num_trainable;
  // Sums of earlier micro-batches are whole; the newest gradients come as backward goes.
  const int64_t sums = accumulates ? 4 * p.num_trainable : 0;
  const bool fresh = e == 2 || !accumulates;  // gradients beside the sums (float32 ones are added in place)

  const int64_t block = T * kept_per_token(p) * e, input = T * p.D * e;
  const int64_t kept_block = recompute ? input : block;
  const int64_t block_gradient = fresh ? p.block_trainable * e : 0;
  const int64_t head_gradient = p.head_trains ? p.V * p.D * e : 0;
  const int64_t head_rows = std::min<int64_t>(N, std::max<int64_t>(64, kLogitsBytes / (p.V * e)));
  const int64_t longest = std::min(numbers.longest, T), rows = std::min(kAttentionRows, longest);
  const int64_t attention = kThreads * (2 * p.H * rows * longest + 6 * p.H * longest * p.K) * e;
  const int64_t products = T * (3 * p.F + 2 * p.D) * e;  // gradients of a block's inner values, while it runs

  MemoryPlan most;
  const auto consider = [&](const std::string& moment, int64_t gradients, int64_t activations,
                            int64_t workspace) {
    MemoryPlan at = fixed;
    at.moment = moment;
    at.gradients = gradients;
    at.activations = activations;
    at.workspace = workspace;
    if (at.total() > most.total()) most = at;
  };
  // The whole model is read as float32 beside its file, then rounded.
  MemoryPlan loading;
  loading.moment = "loading the weights";
  loading.program = program;
  loading.weights = 4 * p.num_parameters;
  loading.workspace = 4 * p.num_parameters;
  most = loading;

  const int64_t all_kept = p.L * kept_block + 2 * input;
  const bool backward = p.num_trainable > 0;
  consider("the head", sums + (fresh ? head_gradient : 0), all_kept + 2 * N * p.D * e, head_rows * p.V * e);
  if (backward) {
    for (int64_t l = p.L; l-- > 0;)
      consider(fmt::format("backward of block {} of {}", l + 1, p.L),
               sums + (fresh ? head_gradient : 0) + (p.L - 1 - l) * block_gradient,
               (l + 1) * kept_block + 2 * input + (recompute ? block : 0), attention + products);
    consider("the update", sums + (fresh ? p.num_trainable * e : 0), 0, 0);
  }
  return most;
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
  CALDERA_CHECK(!records.empty(), DataError, "{}: holds no sample", stage.data.data_path);
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
double flops_of_step(const Parts& p, const StagePlan& plan, bool recompute) {
  const double tokens = static_cast<double>(plan.num_tokens) / static_cast<double>(plan.steps_per_epoch);
  const double supervised =
      static_cast<double>(plan.num_supervised) / static_cast<double>(plan.steps_per_epoch);
  const auto block = static_cast<double>(p.D * (p.H + 2 * p.G) * p.K + p.H * p.K * p.D + 3 * p.D * p.F);
  const auto head = static_cast<double>(p.D * p.V);
  const double passes =
      2.0 + (p.language_trains && !p.lora ? 1.0 : 0.0);  // forward, to the inputs, to the weights
  return 2 * tokens * static_cast<double>(p.L) * block * (passes + (recompute ? 1.0 : 0.0)) +
         2 * supervised * head * (2.0 + (p.head_trains ? 1.0 : 0.0));
}

}  // namespace

std::vector<StagePlan> plan_recipe(const Recipe& recipe, int64_t max_samples) {
  const int64_t program_bytes = resident_bytes() + kCodeBytes;
  std::vector<StagePlan> plans;
  for (const StageConfig& stage : recipe.stages) {
    StagePlan plan;
    plan.name = stage.name;
    const Parts parts = make_parts(recipe, stage);
    int64_t picture_bytes = 0;
    count_tokens(recipe, stage, parts.model.vision->image_spec(), max_samples, plan, picture_bytes);
    plan.num_parameters = parts.num_parameters;
    plan.num_trainable = parts.num_trainable;
    plan.flops_per_step = flops_of_step(parts, plan, stage.gradient_checkpointing);
    const int64_t program = program_bytes + picture_bytes;
    plan.memory = plan_memory(parts, stage, plan, program, stage.gradient_checkpointing);
    plan.memory_recomputed = plan_memory(parts, stage, plan, program, true);
    plans.push_back(std::move(plan));
  }
  return plans;
}

}  // namespace caldera
