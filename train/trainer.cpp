#include "train/trainer.h"

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>

#include "base/cpu_allocator.h"
#include "base/error.h"
#include "base/fault.h"
#include "base/headway.h"
#include "base/log.h"
#include "base/rng.h"
#include "model/ops/float8.h"
#include "train/agreement.h"
#include "train/checkpoint.h"
#include "train/plan.h"
#include "train/schedule.h"
#ifdef CALDERA_CUDA
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
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
    const auto stats =
        c10::cuda::CUDACachingAllocator::getDeviceStats(std::max<c10::DeviceIndex>(device.index(), 0));
    return stats.reserved_bytes[0].peak;
  }
#endif
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  return static_cast<int64_t>(usage.ru_maxrss) * 1024;
}

// Subnormal numbers slow a matrix product seventeenfold; each thread of the pool has its own switch.
void flush_denormals_everywhere() {
  at::parallel_for(0, at::get_num_threads(), 1,
                   [](int64_t, int64_t) { at::globalContext().setFlushDenormal(true); });
}

}  // namespace

Trainer::Trainer(const Recipe& recipe, size_t stage_index, StageData data, std::optional<fs::path> checkpoint,
                 TrainingObserver& observer, std::function<int()> stop_requested, World& world)
    : recipe_(recipe),
      stage_(recipe.stages[stage_index]),
      folder_(fs::path(recipe.output) / stage_.name),
      data_(std::move(data)),
      observer_(observer),
      stop_requested_(std::move(stop_requested)),
      world_(world),
      build_(build_spec_of(recipe, stage_index)) {
  flush_denormals_everywhere();
  world_.at(0, "building the model");
  const at::Device device = choose_device(recipe.device, world_.spec().local_rank);
#ifdef CALDERA_CUDA
  if (device.is_cuda()) c10::cuda::set_device(device.index());
#endif
  const MemoryChoices memory = choose_memory(recipe, stage_index, world_);
  const std::string random = check_random_parts(build_, stage_.trainable, recipe.model.random_parts);
  if (!random.empty() && world_.is_first() && !checkpoint) log_info("{}", random);
  model_ = build_llava(build_);
  agree_on_weights(world_, *model_, checkpoint);  // while each rank has all of them, as they were read
  const int64_t num_parameters = count_parameters(model_->tensors());
  if (stage_.uses_4bit())
    for (Linear* linear : model_->language->linears()) {
      linear->quantize_nf4(stage_.lora->double_quant, device);
      note_headway();
    }
  model_->to(device, parse_dtype(stage_.dtype));
  if (stage_.float8) {
    check_float8(device);
    for (Linear* linear : model_->language->linears()) linear->use_float8();
  }
  model_->language->set_recomputed_halves(memory.recomputed_halves);
  model_->language->set_offloaded_inputs(memory.offloaded_inputs);
  data_.format.image_spec = model_->image_spec();

  set_trainable(model_->tensors(), false);
  std::vector<ParameterGroup> groups = parameter_groups(*model_, stage_);
  int64_t num_trainable = 0;
  for (const ParameterGroup& group : groups) {
    set_trainable(group.tensors, true);
    num_trainable += count_parameters(group.tensors);
  }
  if (world_.has_group())
    sharding_ = std::make_unique<Sharding>(world_, recipe.distributed, groups,
                                           model_->component_tensors("language_model"));
  if (sharding_ && !sharding_->is_replicated())
    model_->language->set_block_hold([this](size_t layer) { return sharding_->hold(layer); });
  optimizer_ = std::make_unique<AdamW>(std::move(groups),
                                       AdamWOptions{.beta1 = stage_.optimizer.adam_beta1,
                                                    .beta2 = stage_.optimizer.adam_beta2,
                                                    .epsilon = stage_.optimizer.adam_epsilon,
                                                    .weight_decay = stage_.optimizer.weight_decay,
                                                    .has_8bit_states = stage_.optimizer.optim == "adamw_8bit",
                                                    .has_masters = stage_.optimizer.master_weights == "float32",
                                                    .is_offloaded = stage_.memory.offload_optimizer,
                                                    .seed = recipe.seed},
                                       sharding_ ? sharding_->owned() : OwnedParts());
  if (memory.packs_frozen && device.is_cpu() && !(sharding_ && sharding_->frees_blocks())) {
    std::vector<at::Tensor> weights;
    for (const NamedTensor& tensor : model_->tensors())
      if (!tensor.owner->requires_grad() && tensor.owner->dim() == 2) weights.push_back(*tensor.owner);
    const int64_t bytes = frozen_copy_bytes(*model_, optimizer_->groups(), parse_dtype(stage_.dtype));
    if (bytes > 0 && copies_fit(bytes, world_.spec().local_size))
      frozen_ = std::make_unique<FrozenWeights>(weights);
  }
  if (checkpoint) {
    load_checkpoint(*checkpoint, *optimizer_);
    if (sharding_) sharding_->begin_gather_weights();
    steps_done_ = read_checkpoint_state(*checkpoint).step;
  }

  const LoaderOptions options{.global_batch_size = stage_.global_batch_size,
                              .max_tokens_per_micro_batch = stage_.max_tokens_per_micro_batch,
                              .num_epochs = stage_.num_train_epochs,
                              .max_steps = stage_.max_steps,
                              .seed = recipe.seed,
                              .group_by_modality_length = stage_.data.group_by_modality_length,
                              .num_workers = static_cast<int>(stage_.data.dataloader_num_workers),
                              .rank = world_.rank(),
                              .num_ranks = world_.size()};
  loader_ =
      std::make_unique<Loader>(data_.records, stage_.data.images(), data_.format, options, steps_done_);
  num_steps_ = loader_->num_steps();
  for (const std::string& warning : {schedule_warning(stage_.name, stage_.optimizer, num_steps_),
                                     trainable_warning(stage_, *data_.records)})
    if (!warning.empty() && world_.is_first()) log_warning("{}", warning);
  // What the loader will pass over is said before step 1; of long files each step tells of its own.
  if (constexpr size_t kMostRecords = 20'000; data_.records->size() <= kMostRecords) {
    const std::vector<size_t> places = cut_to_nothing(
        *data_.records, data_.format, [this](int64_t) { world_.at(0, "measuring the samples"); });
    if (!places.empty() && world_.is_first())
      log_warning("{}", cut_to_nothing_message(*data_.records, places, stage_.data.data_path, data_.format));
  }
  world_.at(0, "preparing the validation data");
  validation_ = pack_all(data_.eval_records, stage_.data.images(), data_.format,
                         stage_.max_tokens_per_micro_batch, world_.rank(), world_.size());
  CALDERA_CHECK(data_.eval_records.empty() || validation_.num_supervised > 0, DataError,
                "{}: its {} samples have no validation loss: every label is masked or lies behind "
                "model_max_length {}; name other samples, or none, in stages.{}.data.eval_data_path",
                stage_.data.eval_data_path, data_.eval_records.size(), stage_.data.model_max_length,
                stage_.name);
  if (world_.is_first()) metrics_ = std::make_unique<MetricsLog>(folder_, steps_done_);
  checkpoints_ = std::make_unique<CheckpointWriter>(
      folder_, KeptCheckpoints{stage_.save_total_limit, stage_.save_best}, stage_.async_save, world_);
  settle_cpu_memory();
  observer_.on_stage({.name = stage_.name,
                      .device = device.str(),
                      .world = world_.describe() + (sharding_ ? "; " + sharding_->describe() : ""),
                      .folder = folder_,
                      .num_steps = num_steps_,
                      .first_step = steps_done_,
                      .num_samples = static_cast<int64_t>(data_.records->size()),
                      .num_parameters = num_parameters,
                      .num_trainable = num_trainable});
}

bool Trainer::stops_between_steps() {
  world_.at(steps_done_, "asking for signals");
  for (const std::string& signal : world_.exchange("main", std::to_string(stop_requested_())))
    stop_signal_ = std::max(stop_signal_, std::stoi(signal));
  if (stop_signal_ != 0) observer_.on_stop(stop_signal_);
  return stop_signal_ != 0;
}

Outcome Trainer::run() {
  if (stops_between_steps()) return Outcome::kStopped;  // it came while the model was built: nothing is new
  StepData data;
  while (steps_done_ < num_steps_) {
    const Clock::time_point start = Clock::now();
    world_.at(steps_done_ + 1, "waiting for data");
    CALDERA_ASSERT(loader_->next(data));
    const StepMetrics metrics = step(data, milliseconds_since(start));
    if (metrics_) metrics_->step(metrics);
    observer_.on_step(metrics);

    const bool last = steps_done_ == num_steps_;
    if (validation_.num_batches > 0 &&
        (last || (stage_.eval_steps > 0 && steps_done_ % stage_.eval_steps == 0))) {
      eval_loss_ = evaluate();
      if (metrics_) metrics_->evaluation(steps_done_, *eval_loss_);
      observer_.on_evaluation(steps_done_, *eval_loss_);
    }
    announce_saved(checkpoints_->finished());
    // Several ranks agree on a signal within the step; a single one looks as late as it can.
    if (!sharding_ && !last) stop_signal_ = stop_requested_();
    const bool stop = !last && stop_signal_ != 0;
    if (stop || (!last && stage_.save_steps > 0 && steps_done_ % stage_.save_steps == 0)) save_checkpoint();
    if (!stop) continue;
    announce_saved(checkpoints_->finish());
    observer_.on_stop(stop_signal_);
    return Outcome::kStopped;
  }
  announce_saved(checkpoints_->finish());
  save_final();
  return stops_between_steps() ? Outcome::kStopped : Outcome::kFinished;
}

// Each supervised token weighs the same in the step (token_mean), or the same within its micro-batch
// (micro_batch_mean, as LLaVA).
double Trainer::forward_and_backward(const StepData& data) {
  const bool token_mean = stage_.loss == "token_mean";
  const int64_t total =
      std::accumulate(data.num_micro_batches.begin(), data.num_micro_batches.end(), int64_t{0});
  const int64_t num_rounds = *std::max_element(data.num_micro_batches.begin(), data.num_micro_batches.end());
  const auto mine = static_cast<int64_t>(data.micro_batches.size());
  at::Tensor loss = at::zeros({}, at::TensorOptions(at::kDouble).device(model_->device()));
  for (int64_t i = 0; i < num_rounds; ++i) {
    // Ranks with fewer micro-batches than others take part in the rounds that are left.
    if (sharding_) sharding_->begin_round(/*is_last=*/i + 1 == num_rounds);
    world_.at(steps_done_ + 1, "forward and backward");
    const Fault fault = i < mine ? pass_fault_point("micro_batch") : Fault::kNone;
    const PackedBatch batch =
        i < mine ? data.micro_batches[static_cast<size_t>(i)].to(model_->device()) : PackedBatch();
    const int64_t num_supervised = i < mine ? batch.supervised_K.size(0) : 0;
    at::Tensor micro_loss;
    if (num_supervised > 0) {
      const double weight =
          1.0 / static_cast<double>(token_mean ? data.num_supervised : num_supervised * total);
      if (stage_.uses_lora() && stage_.lora->lora_dropout > 0)
        model_->language->set_dropout_keys(dropout_keys(batch, Rng(recipe_.seed, steps_done_).next()));
      micro_loss = model_->loss_sum(batch, fault == Fault::kNan ? std::nan("") : weight);
      loss += micro_loss.detach();
    } else if (sharding_) {
      sharding_->idle_forward();
    }
    if (micro_loss.defined() && micro_loss.requires_grad())
      micro_loss.backward();
    else if (sharding_)
      sharding_->idle_backward();
    if (!sharding_ && num_supervised > 0) optimizer_->take_gradients(/*more_to_come=*/i + 1 < mine);
    if (sharding_) sharding_->end_round();
  }
  model_->language->set_dropout_keys({});
  return loss.item<double>();
}

StepReport Trainer::report_step(const StepData& data, double loss, double compute_ms) {
  StepReport report{.loss = loss, .compute_ms = compute_ms};
  world_.at(steps_done_ + 1, "sharing the step's loss");
  if (sharding_) {
    report.squared_norm = sharding_->hand_gradients_to(*optimizer_);
    report.stop_signal = stop_requested_();
    share(world_, model_->device(), report);
    stop_signal_ = report.stop_signal;
  } else {
    report.grad_norm = optimizer_->grad_norm().item<double>();
    if (!std::isfinite(loss)) report.bad_ranks = {0};
  }
  check_finite(steps_done_ + 1, report, data);
  return report;
}

StepMetrics Trainer::step(const StepData& data, double data_wait_ms) {
  const Clock::time_point start = Clock::now();
  const int64_t collectives_before = world_.num_collectives(), bytes_before = world_.num_bytes();
  pass_fault_point("step");
  if (!data.passed_over.empty() && world_.is_first())
    log_warning("step {}: passed over {} of its samples, of which model_max_length {} leaves nothing to learn: {}",
                steps_done_ + 1, data.passed_over.size(), stage_.data.model_max_length,
                fmt::join(data.passed_over, ", "));
  if (data.num_supervised == 0) return empty_step(data, data_wait_ms);

  // 1. Forward and backward of each micro-batch; where there are several ranks, their gradients are summed
  // meanwhile.
  world_.take_waited_ms();
  const double own_loss = forward_and_backward(data);

  // 2. Is everything finite, on every rank? The weights are still those before the step.
  const StepReport report = report_step(data, own_loss, milliseconds_since(start) - world_.take_waited_ms());

  // 3. Clip and update.
  const double max_norm = stage_.optimizer.max_grad_norm;
  const double grad_scale =
      max_norm > 0 && report.grad_norm > max_norm ? max_norm / (report.grad_norm + 1e-6) : 1.0;
  const double factor = lr_factor(stage_.optimizer, steps_done_, num_steps_);
  checkpoints_->before_update(steps_done_ + 1);
  optimizer_->step(factor, grad_scale);
  if (sharding_) sharding_->begin_gather_weights();
  ++steps_done_;
  eval_loss_.reset();

  // 4. Say what happened.
  if (const auto straggler = stragglers_.look_at(steps_done_, report.all_compute_ms, world_);
      straggler && world_.is_first())
    log_warning("{}", *straggler);
  const double step_ms = milliseconds_since(start) + data_wait_ms;
  return {.step = steps_done_,
          .epoch = data.epoch,
          .loss = report.loss,
          .lr = stage_.optimizer.learning_rate * factor,
          .grad_norm = report.grad_norm,
          .num_tokens = data.num_tokens,
          .num_supervised = data.num_supervised,
          .num_images = data.num_images,
          .num_passed_over = std::ssize(data.passed_over),
          .tokens_per_second = static_cast<double>(data.num_tokens) * 1000 / step_ms,
          .step_ms = step_ms,
          .data_wait_ms = data_wait_ms,
          .peak_memory_bytes = peak_memory_bytes(model_->device()),
          .comm_collectives = world_.num_collectives() - collectives_before,
          .comm_bytes = world_.num_bytes() - bytes_before};
}

StepMetrics Trainer::empty_step(const StepData& data, double data_wait_ms) {
  if (sharding_) {  // as report_step: a signal on one rank is every rank's
    world_.at(steps_done_ + 1, "sharing the step's loss");
    StepReport report{.stop_signal = stop_requested_()};
    share(world_, model_->device(), report);
    stop_signal_ = report.stop_signal;
  }
  ++steps_done_;
  return {.step = steps_done_,
          .epoch = data.epoch,
          .num_passed_over = std::ssize(data.passed_over),
          .step_ms = data_wait_ms,
          .data_wait_ms = data_wait_ms,
          .peak_memory_bytes = peak_memory_bytes(model_->device())};
}

// Each rank takes its share of the batches.
double Trainer::evaluate() {
  double nll = 0;
  int64_t num_supervised = 0;
  const int64_t num_rounds = (validation_.num_batches + world_.size() - 1) / world_.size();
  for (int64_t i = 0; i < num_rounds; ++i) {
    world_.at(steps_done_, "evaluating");
    if (sharding_) sharding_->begin_evaluation();
    if (i >= std::ssize(validation_.batches)) {
      if (sharding_) sharding_->idle_forward();
      continue;
    }
    const PackedBatch& batch = validation_.batches[static_cast<size_t>(i)];
    nll += model_->nll(batch.to(model_->device())).sum(at::kDouble).item<double>();
    num_supervised += batch.supervised_K.size(0);
  }
  const at::Tensor sums =
      at::tensor({nll, static_cast<double>(num_supervised)}, at::kDouble).to(model_->device());
  world_.sum(sums)();
  world_.wait_for_device();
  const at::Tensor all = sums.cpu();
  return all[0].item<double>() / all[1].item<double>();
}

}  // namespace caldera
