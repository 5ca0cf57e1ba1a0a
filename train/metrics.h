// What a run writes about itself while it runs: metrics.jsonl and TensorBoard event files.
#pragma once
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <string_view>

#include "base/json.h"

namespace caldera {

// One finished step. `loss` is in nats per supervised token, over all of the step's samples.
struct StepMetrics {
  int64_t step = 0;  // steps done, from 1
  double epoch = 0;
  double loss = 0, lr = 0, grad_norm = 0;
  int64_t num_tokens = 0, num_supervised = 0, num_images = 0;
  int64_t num_passed_over = 0;  // samples of which model_max_length leaves nothing to learn
  double tokens_per_second = 0, step_ms = 0, data_wait_ms = 0;
  int64_t peak_memory_bytes = 0;  // of the process on a CPU, of the allocator on a GPU
  // With several ranks: the first one's collectives in this step, and the bytes that they were about (World::num_bytes).
  int64_t comm_collectives = 0, comm_bytes = 0;
};
Json to_json(const StepMetrics& metrics);

// A file that grows by whole pieces. One that the disk does not take is left out, and a warning says so once.
class GrowingFile {
 public:
  explicit GrowingFile(std::filesystem::path path);  // throws Error where it cannot be opened
  void append(std::string_view bytes);

 private:
  std::filesystem::path path_;
  std::ofstream file_;
  uint64_t num_bytes_ = 0;
  bool has_warned_ = false;
};

// TensorBoard's event file: TFRecord frames of Event protocol buffers with simple_value scalars.
class TensorBoardWriter {
 public:
  // A new events.out.tfevents.* in the folder. `first_step`: what earlier files say of later steps is void.
  TensorBoardWriter(const std::filesystem::path& folder, int64_t first_step);
  void scalars(int64_t step, const std::map<std::string, double>& values);

 private:
  void event(const std::string& body);
  GrowingFile file_;
};

// metrics.jsonl and TensorBoard together. On opening, lines after step `resumed_step` and a half-written last line go.
class MetricsLog {
 public:
  MetricsLog(const std::filesystem::path& folder, int64_t resumed_step);
  void step(const StepMetrics& metrics);
  void evaluation(int64_t step, double eval_loss);

 private:
  void line(const Json& json);
  GrowingFile file_;
  TensorBoardWriter tensorboard_;
};

}  // namespace caldera
