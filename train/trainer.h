// One stage of a recipe: the loop. It reads on one screen; see Trainer::run and Trainer::step.
#pragma once
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "data/dataset.h"
#include "data/loader.h"
#include "model/ops/frozen_weights.h"
#include "model/weights/load.h"
#include "train/checkpoint.h"
#include "train/distributed/sharding.h"
#include "train/distributed/step_report.h"
#include "train/distributed/world.h"
#include "train/metrics.h"
#include "train/optimizer.h"
#include "train/recipe.h"
#include "train/stage.h"

namespace caldera {

// What one stage trains on, read and checked before anything heavy starts.
struct StageData {
  std::shared_ptr<const std::vector<Record>> records;
  std::vector<Record> eval_records;  // may be empty
  SampleFormat format;               // image_spec is filled in once the tower is known
};

// What is known of a stage when its training begins.
struct StageStart {
  std::string name;
  std::string device;
  std::string world;  // "1 process", "4 ranks on 1 machine, gloo, started by torchrun; zero2"
  std::filesystem::path folder;
  int64_t num_steps = 0, first_step = 0;  // first_step > 0: resumed
  int64_t num_samples = 0;
  int64_t num_parameters = 0, num_trainable = 0;
};

// Hears of a run's progress; nothing below cli/ prints.
class TrainingObserver {
 public:
  virtual ~TrainingObserver() = default;
  virtual void on_stage(const StageStart&) {}
  virtual void on_step(const StepMetrics&) {}
  virtual void on_evaluation(int64_t /*step*/, double /*eval_loss*/) {}
  virtual void on_checkpoint(const std::filesystem::path&) {}
  virtual void on_stop(int /*signal*/) {}  // the run ends early: some rank received this signal
};

enum class Outcome { kFinished, kStopped };

class Trainer {
 public:
  // Builds the model, optimizer and loader, and resumes from the checkpoint folder if there is one.
  // `stop_requested` is asked in each step, before the first and after the last one's final/; a signal's
  // number on any rank saves a checkpoint of what is not saved yet and ends the run, 0 goes on. The observer
  // hears the same on every rank; the first one alone writes metrics. Throws the same CheckpointError on all
  // ranks where their weights differ.
  Trainer(const Recipe& recipe, size_t stage_index, StageData data,
          std::optional<std::filesystem::path> checkpoint, TrainingObserver& observer,
          std::function<int()> stop_requested, World& world);

  // Trains to the end, then writes final/. kStopped: a signal ended it, maybe behind final/. Throws Error
  // naming the samples where a loss or gradient is not finite, on all ranks in the same step; the weights are
  // then those before the step.
  Outcome run();

 private:
  // Whether any rank was told to stop; the observer then hears of it. All ranks ask together.
  bool stops_between_steps();
  StepMetrics step(const StepData& data, double data_wait_ms);
  // A step of which no sample is left: the weights stay as they are. On every rank alike.
  StepMetrics empty_step(const StepData& data, double data_wait_ms);
  double forward_and_backward(const StepData& data);  // returns this rank's share of the loss
  StepReport report_step(const StepData& data, double loss, double compute_ms);
  double evaluate();
  void save_checkpoint();
  void announce_saved(const std::optional<std::filesystem::path>& folder);
  void save_final();
  // Writes the adapter as PEFT's folder, then merges it into the weights. Weights in 4 bits take none in: then returns
  // the model as it was read, in full precision, with the adapter merged.
  std::unique_ptr<LlavaModel> keep_adapter(const std::filesystem::path& folder);
  Json describe() const;                     // caldera.json of checkpoints

  Recipe recipe_;
  StageConfig stage_;
  std::filesystem::path folder_;
  StageData data_;
  TrainingObserver& observer_;
  std::function<int()> stop_requested_;
  World& world_;

  BuildSpec build_;
  std::unique_ptr<LlavaModel> model_;
  std::unique_ptr<Sharding> sharding_;  // none for a single process
  std::unique_ptr<AdamW> optimizer_;
  std::unique_ptr<FrozenWeights> frozen_;  // where a CPU computes with weights that do not train
  std::unique_ptr<Loader> loader_;
  std::unique_ptr<MetricsLog> metrics_;  // the first rank's
  std::unique_ptr<CheckpointWriter> checkpoints_;
  Stragglers stragglers_;
  PackedRecords validation_;
  int64_t steps_done_ = 0, num_steps_ = 0;
  std::optional<double> eval_loss_;  // of the weights as they are now
  int stop_signal_ = 0;
};

}  // namespace caldera
