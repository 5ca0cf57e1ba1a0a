#include "train/trainer.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <sys/resource.h>

#include <chrono>
#include <cmath>

#include "base/error.h"
#include "base/log.h"
#include "base/rng.h"
#include "base/strings.h"
#include "model/weights/adapters.h"
#include "train/checkpoint.h"
#include "train/schedule.h"
#ifdef CALDERA_CUDA
#include <c10/cuda/CUDACachingAllocator.h>
#endif

namespace caldera {
namespace {

using Clock = std::chrono::steady_clock;
double milliseconds_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

int64_t peak_memory_bytes([[maybe_unused]] at::Device device) {
#ifdef CALDERA_CUDA
  if (device.is_cuda()) {
    const auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(std::max<c10::DeviceIndex>(device.index(), 0));
    return stats.reserved_bytes[0].peak;
  }
#endif
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  return static_cast<int64_t>(usage.ru_maxrss) * 1024;
}

std::vector<ParameterGroup> parameter_groups(LlavaModel& model, const StageConfig& stage) {
  std::vector<ParameterGroup> groups;
  for (const std::string& part : stage.trainable) {
    double learning_rate = stage.optimizer.learning_rate;
    if (part == "projector") learning_rate = stage.optimizer.mm_projector_lr.value_or(learning_rate);
    if (part == "vision_tower") learning_rate = stage.optimizer.vision_tower_lr.value_or(learning_rate);
    groups.push_back({part, learning_rate, model.component_tensors(part)});
    if (part == "language_model" && stage.uses_lora())
      std::erase_if(groups.back().tensors, [](const NamedTensor& tensor) { return !is_lora_name(tensor.name); });
  }
  return groups;
}

// Subnormal numbers slow a matrix product seventeenfold; each thread of the pool has its own switch.
void flush_denormals_everywhere() {
  at::parallel_for(0, at::get_num_threads(), 1, [](int64_t, int64_t) { at::globalContext().setFlushDenormal(true); });
}

}  // namespace

at::Device choose_device(const std::string& device) {
  const bool has_gpu = at::hasCUDA() && at::detail::getCUDAHooks().deviceCount() > 0;
  CALDERA_CHECK(device != "cuda" || has_gpu, ConfigError, "device: cuda asked for, but {}",
                at::hasCUDA() ? "no GPU is visible" : "this build has no CUDA");
  return has_gpu && device != "cpu" ? at::Device(at::kCUDA, 0) : at::Device(at::kCPU);
}

at::ScalarType parse_dtype(const std::string& dtype) {
  if (dtype == "float32") return at::kFloat;
  CALDERA_CHECK(dtype == "bfloat16", ConfigError, "dtype: expected float32 or bfloat16, got \"{}\"", dtype);
  return at::kBFloat16;
}

BuildSpec build_spec_of(const Recipe& recipe, size_t stage_index) {
  BuildSpec spec;
  spec.vision_tower = fs::absolute(recipe.model.vision_tower).string();
  spec.language_model = fs::absolute(recipe.model.language_model).string();
  spec.mm_projector_type = recipe.model.mm_projector_type;
  spec.features = {recipe.model.vision_feature_layer, recipe.model.vision_feature_select_strategy};
  spec.image_size = recipe.model.image_size;
  spec.seed = recipe.seed;
  if (const std::string& projector = recipe.model.pretrain_mm_mlp_adapter; !projector.empty())
    spec.overlays.push_back({fs::absolute(projector).string(), {"projector"}});
  for (size_t i = 0; i < stage_index; ++i) {
    const StageConfig& earlier = recipe.stages[i];
    spec.overlays.push_back({(fs::absolute(recipe.output) / earlier.name / "final").string(), earlier.trainable});
  }
  if (recipe.stages[stage_index].uses_lora()) spec.lora = *recipe.stages[stage_index].lora;
  return spec;
}

std::string recipe_part(const Recipe& recipe, const StageConfig& stage) {
  Recipe part;
  part.model = recipe.model;
  part.stages = {stage};
  part.seed = recipe.seed;
  return dump_recipe(part);
}

std::string tokenizer_of(const Recipe& recipe) {
  return fs::absolute(recipe.model.tokenizer.empty() ? recipe.model.language_model : recipe.model.tokenizer).string();
}

Trainer::Trainer(const Recipe& recipe, size_t stage_index, StageData data, std::optional<fs::path> checkpoint,
                 TrainingObserver& observer, std::function<bool()> stop_requested)
    : recipe_(recipe),
      stage_(recipe.stages[stage_index]),
      folder_(fs::path(recipe.output) / stage_.name),
      data_(std::move(data)),
      observer_(observer),
      stop_requested_(std::move(stop_requested)),
      build_(build_spec_of(recipe, stage_index)) {
  flush_denormals_everywhere();
  const at::Device device = choose_device(recipe.device);
  model_ = build_llava(build_);
  model_->to(device, parse_dtype(stage_.dtype));
  model_->language->set_gradient_checkpointing(stage_.gradient_checkpointing);
  data_.format.image_spec = model_->image_spec();

  set_trainable(model_->tensors(), false);
  std::vector<ParameterGroup> groups = parameter_groups(*model_, stage_);
  int64_t num_trainable = 0;
  for (const ParameterGroup& group : groups) {
    set_trainable(group.tensors, true);
    num_trainable += count_parameters(group.tensors);
  }
  optimizer_ = std::make_unique<AdamW>(std::move(groups), AdamWOptions{.beta1 = stage_.optimizer.adam_beta1,
                                                                       .beta2 = stage_.optimizer.adam_beta2,
                                                                       .epsilon = stage_.optimizer.adam_epsilon,
                                                                       .weight_decay = stage_.optimizer.weight_decay});
  if (checkpoint) {
    load_checkpoint(*checkpoint, *optimizer_);
    steps_done_ = read_checkpoint_state(*checkpoint).step;
  }

  const LoaderOptions options{.global_batch_size = stage_.global_batch_size,
                              .max_tokens_per_micro_batch = stage_.max_tokens_per_micro_batch,
                              .num_epochs = stage_.num_train_epochs,
                              .max_steps = stage_.max_steps,
                              .seed = recipe.seed,
                              .group_by_modality_length = stage_.data.group_by_modality_length,
                              .num_workers = static_cast<int>(stage_.data.dataloader_num_workers)};
  loader_ = std::make_unique<Loader>(data_.records, stage_.data.image_folder, data_.format, options, steps_done_);
  num_steps_ = loader_->num_steps();
  eval_batches_ = pack_all(data_.eval_records, stage_.data.image_folder, data_.format, stage_.max_tokens_per_micro_batch);
  metrics_ = std::make_unique<MetricsLog>(folder_, steps_done_);
  observer_.on_stage({.name = stage_.name,
                      .device = device.str(),
                      .folder = folder_,
                      .num_steps = num_steps_,
                      .first_step = steps_done_,
                      .num_samples = static_cast<int64_t>(data_.records->size()),
                      .num_parameters = count_parameters(model_->tensors()),
                      .num_trainable = num_trainable});
}

Outcome Trainer::run() {
  StepData data;
  while (steps_done_ < num_steps_) {
    const Clock::time_point start = Clock::now();
    CALDERA_ASSERT(loader_->next(data));
    const StepMetrics metrics = step(data, milliseconds_since(start));
    metrics_->step(metrics);
    observer_.on_step(metrics);

    const bool last = steps_done_ == num_steps_;
    if (!eval_batches_.empty() && (last || (stage_.eval_steps > 0 && steps_done_ % stage_.eval_steps == 0))) {
      const double eval_loss = evaluate();
      metrics_->evaluation(steps_done_, eval_loss);
      observer_.on_evaluation(steps_done_, eval_loss);
    }
    const bool stop = !last && stop_requested_();
    if (stop || (!last && stage_.save_steps > 0 && steps_done_ % stage_.save_steps == 0)) save_checkpoint();
    if (stop) return Outcome::kStopped;
  }
  save_final();
  return Outcome::kFinished;
}

StepMetrics Trainer::step(const StepData& data, double data_wait_ms) {
  const Clock::time_point start = Clock::now();
  CALDERA_CHECK(data.num_supervised > 0, DataError, "step {}: nothing to learn in its samples ({}): every label is masked",
                steps_done_ + 1, fmt::join(data.sample_ids, ", "));

  // 1. Forward and backward of each micro-batch. Each supervised token weighs the same in the step (token_mean), or the same
  //    within its micro-batch (micro_batch_mean, as LLaVA).
  const bool token_mean = stage_.loss == "token_mean";
  at::Tensor loss = at::zeros({}, at::TensorOptions(at::kDouble).device(model_->device()));
  for (size_t i = 0; i < data.micro_batches.size(); ++i) {
    const PackedBatch batch = data.micro_batches[i].to(model_->device());
    const int64_t num_supervised = batch.supervised_K.size(0);
    if (num_supervised == 0) continue;
    const double weight = token_mean ? 1.0 / static_cast<double>(data.num_supervised)
                                     : 1.0 / static_cast<double>(num_supervised * static_cast<int64_t>(data.micro_batches.size()));
    model_->language->set_dropout_seed(Rng(recipe_.seed, steps_done_, i).next());
    const at::Tensor micro_loss = model_->loss_sum(batch) * weight;
    loss += micro_loss.detach();
    if (micro_loss.requires_grad()) micro_loss.backward();
    optimizer_->take_gradients(/*more_to_come=*/i + 1 < data.micro_batches.size());
  }
  model_->language->set_dropout_seed({});

  // 2. Is everything finite? The weights are still those before the step.
  const double loss_value = loss.item<double>();
  const double grad_norm = optimizer_->grad_norm().item<double>();
  CALDERA_CHECK(std::isfinite(loss_value) && std::isfinite(grad_norm), Error,
                "step {}: loss {} and gradient norm {}: not finite. Weights are as before this step; its samples: {}. Look at "
                "them with `caldera data preview`, or lower the learning rate",
                steps_done_ + 1, loss_value, grad_norm, fmt::join(data.sample_ids, ", "));

  // 3. Clip and update.
  const double max_norm = stage_.optimizer.max_grad_norm;
  const double grad_scale = max_norm > 0 && grad_norm > max_norm ? max_norm / (grad_norm + 1e-6) : 1.0;
  const double factor = lr_factor(stage_.optimizer.lr_scheduler_type, stage_.optimizer.warmup_ratio, steps_done_, num_steps_);
  optimizer_->step(factor, grad_scale);
  ++steps_done_;

  // 4. Say what happened.
  const double step_ms = milliseconds_since(start) + data_wait_ms;
  return {.step = steps_done_,
          .epoch = data.epoch,
          .loss = loss_value,
          .lr = stage_.optimizer.learning_rate * factor,
          .grad_norm = grad_norm,
          .num_tokens = data.num_tokens,
          .num_supervised = data.num_supervised,
          .num_images = data.num_images,
          .tokens_per_second = static_cast<double>(data.num_tokens) * 1000 / step_ms,
          .step_ms = step_ms,
          .data_wait_ms = data_wait_ms,
          .peak_memory_bytes = peak_memory_bytes(model_->device())};
}

double Trainer::evaluate() {
  double nll = 0;
  int64_t num_supervised = 0;
  for (const PackedBatch& batch : eval_batches_) {
    nll += model_->nll(batch.to(model_->device())).sum(at::kDouble).item<double>();
    num_supervised += batch.supervised_K.size(0);
  }
  return num_supervised > 0 ? nll / static_cast<double>(num_supervised) : 0;
}

Json Trainer::describe() const {
  const ModelCard card{.conversation_template = stage_.data.conversation_template,
                       .image_aspect_ratio = stage_.data.image_aspect_ratio,
                       .vocab_size = model_->language->vocab_size(),
                       .provenance = {{"vision_tower", recipe_.model.vision_tower},
                                      {"language_model", recipe_.model.language_model},
                                      {"stage", stage_.name},
                                      {"step", steps_done_},
                                      {"num_steps", num_steps_},
                                      {"trained", stage_.trainable},
                                      {"data", stage_.data.data_path},
                                      {"recipe", dump_recipe(recipe_)}}};
  return {{"build", to_json(build_)}, {"card", to_json(card)}, {"tokenizer", tokenizer_of(recipe_)}};
}

void Trainer::save_checkpoint() {
  write_checkpoint(folder_,
                   {.step = steps_done_, .seed = recipe_.seed, .recipe = recipe_part(recipe_, stage_), .caldera = describe()},
                   *optimizer_, stage_.save_total_limit);
  observer_.on_checkpoint(folder_ / "checkpoints" / strip(read_file(folder_ / "latest")));
}

void Trainer::keep_adapter(const fs::path& folder) {
  fs::create_directories(folder);
  write_peft_adapter(adapter_of(*model_, build_, stage_.trainable), /*for_decoder=*/false, parse_dtype(stage_.dtype), folder);
  write_json(folder / "caldera.json", describe());
  for (Linear* linear : model_->language->linears()) linear->merge();
}

void Trainer::save_final() {
  const Tokenizer& tokenizer = *data_.format.tokenizer;
  write_folder_atomic(folder_ / "final", [&](const fs::path& folder) {
    const int64_t image_token_id = tokenizer.save(folder, data_.format.conversation->jinja);
    if (build_.lora) keep_adapter(folder / "adapter");
    save_hf_llava(*model_, model_card_from_json(describe().at("card"), "caldera.json"),
                  {.dtype = parse_dtype(stage_.dtype),
                   .image_token_id = image_token_id,
                   .bos_token_id = tokenizer.bos_id(),
                   .eos_token_id = tokenizer.eos_id(),
                   .pad_token_id = tokenizer.pad_id()},
                  folder);
  });
}

}  // namespace caldera
