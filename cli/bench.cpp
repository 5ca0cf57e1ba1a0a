// caldera bench products: a table (bench_products.cpp). bench train|generate|load|tokenize|save|open: work in portions, one for each line on stdin, so that
// another program can time several contenders in turn (scripts/bench). Says READY when it is set up; answers
// each line with one of JSON: {"s": seconds, "hwm": peak resident MiB since READY or, where it trains on a GPU, of
// the GPU's since the start, ...}. Ends with the input.
#include <chrono>
#include <cstdio>
#include <fstream>
#include <iostream>
#include <memory>
#include <sstream>

#include "base/error.h"
#include "base/files.h"
#include "cli/bench.h"
#include "cli/command.h"
#include "data/image.h"
#include "data/loader.h"
#include "eval/answer.h"
#include "eval/batches.h"
#include "model/vision/towers.h"
#include "train/checkpoint.h"
#include "train/run.h"
#include "train/stage.h"

namespace caldera {
namespace {

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Peak resident memory since the counter was last set back.
int64_t peak_mib() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);)
    if (line.starts_with("VmHWM:")) return std::stoll(line.substr(6)) / 1024;
  return 0;
}

struct EndOfInput {};

void wait_for_line() {
  std::string line;
  if (!std::getline(std::cin, line) || line.starts_with("q")) throw EndOfInput();
}

void say_ready() {
  fmt::print("READY\n");
  std::fflush(stdout);
  std::ofstream("/proc/self/clear_refs") << "5";  // sets VmHWM back
}

void answer_line(double seconds, Json more = Json::object()) {
  Json line = {{"s", seconds}, {"hwm", peak_mib()}};
  line.update(more);
  fmt::print("{}\n", json_line(line));
  std::fflush(stdout);
}

// Calls work() for each line; it returns what else the answer says.
template <class Work>
void serve(Work work) {
  say_ready();
  for (;;) {
    wait_for_line();
    const Clock::time_point start = Clock::now();
    const Json more = work();
    answer_line(seconds_since(start), more);
  }
}

// The trainer itself, held up between its steps.
class StepByStep : public TrainingObserver {
 public:
  void on_stage(const StageStart& stage) override {
    device_ = at::Device(stage.device);
    say_ready();
    wait_for_line();
    start_ = Clock::now();
  }
  void on_step(const StepMetrics& metrics) override {
    synchronize(device_);
    const double seconds = seconds_since(start_);
    Json more = {{"loss", metrics.loss},
                 {"grad_norm", metrics.grad_norm},
                 {"tokens", metrics.num_tokens},
                 {"supervised", metrics.num_supervised},
                 {"data_wait_ms", metrics.data_wait_ms}};
    if (device_.is_cuda()) more["hwm"] = metrics.peak_memory_bytes >> 20;
    answer_line(seconds, more);
    wait_for_line();
    start_ = Clock::now();
  }

 private:
  at::Device device_ = at::kCPU;
  Clock::time_point start_;
};

struct BenchCommand {
  std::string recipe, data, image_folder = ".", image, prompt, aspect = "square", out;
  std::vector<std::string> overrides;
  RunOptions run;
  SessionOptions session;
  int64_t num_tokens = 128, workers = 2, rounds = 5;
};

void train(const BenchCommand& command) {
  Recipe recipe = choose_dtypes(read_recipe(command.recipe, command.overrides), command.run);
  recipe.evaluation.reset();  // none of its steps
  tune_allocator();
  StepByStep steps;
  run_recipe(recipe, command.run, steps, [] { return 0; });
}

void generate_tokens(const BenchCommand& command) {
  tune_allocator();
  ModelSession session = open_model(command.session);
  std::vector<at::Tensor> pixels;
  if (!command.image.empty())
    pixels.push_back(preprocess_image(load_image(command.image), session.format.image_spec,
                                      session.format.image_aspect_ratio));
  const std::string prompt = (pixels.empty() ? "" : std::string(kImagePlaceholder) + "\n") + command.prompt;
  const PackedBatch batch =
      pack({make_prompt("bench", {{.from_human = true, .value = prompt}}, pixels, session.format)});
  const GenerateOptions options{.max_new_tokens = command.num_tokens,
                                .allowed_vocab = session.card.vocab_size};
  serve([&]() -> Json {
    return {{"prompt_tokens", batch.num_tokens()}, {"ids", generate(*session.model, batch, options).front()}};
  });
}

// One pass over the data: decoded, resized and normalised pictures in batches of 16.
void load(const BenchCommand& command) {
  tune_allocator();
  const auto records = std::make_shared<const std::vector<Record>>(read_records(command.data));
  TextSession session = open_text(command.session.model, command.session.conversation_template);
  session.format.image_aspect_ratio = command.aspect;
  const LoaderOptions options{.global_batch_size = 16,
                              .max_tokens_per_micro_batch = 1 << 20,
                              .num_workers = static_cast<int>(command.workers)};
  serve([&]() -> Json {
    Loader loader(records, command.image_folder, session.format, options);
    StepData step;
    int64_t num_images = 0;
    while (loader.next(step)) {
      for (const PackedBatch& batch : step.micro_batches)
        num_images += normalize_pixels(batch.pixels_ICYX, session.format.image_spec, at::kFloat).size(0);
    }
    return {{"images", num_images}};
  });
}

// One pass over the data: ids and labels, in one thread.
void tokenise(const BenchCommand& command) {
  const std::vector<Record> records = read_records(command.data);
  const TextSession session = open_text(command.session.model, command.session.conversation_template);
  serve([&]() -> Json {
    size_t num_tokens = 0;
    for (const Record& record : records)
      num_tokens +=
          tokenize(record, *session.format.conversation, *session.format.tokenizer).input_ids.size();
    return {{"samples", records.size()}, {"tokens", num_tokens}};
  });
}

// A training state, the model's weights and two moments of each, written as training writes it beside the products
// of one step. -> the seconds that training waits, those by which the products take longer, and those until the
// checkpoint stands.
void save_state(const BenchCommand& command) {
  tune_allocator();
  const LoadedModel loaded = load_llava(command.session.model);
  CheckpointShare share;
  for (const NamedTensor& named : loaded.model->tensors()) {
    const at::Tensor value = named.value().contiguous();
    share.masters.emplace_back(named.name, Master{value, {}});
    for (const char* moment : {"exp_avg.", "exp_avg_sq."})
      share.moments.emplace_back(moment + named.name, Master{at::rand_like(value), {}});
  }
  share.state.caldera = Json::object();
  const at::Tensor matrix = at::rand({512, 512});
  at::Tensor product = at::empty_like(matrix);
  const auto multiply = [&](int count) {
    const Clock::time_point start = Clock::now();
    for (int i = 0; i < count; ++i) at::mm_out(product, matrix, matrix);
    return seconds_since(start);
  };
  constexpr double kStepSeconds = 0.5;
  multiply(10);
  const int count = static_cast<int>(kStepSeconds / multiply(10) * 10);
  serve([&]() -> Json {
    const Clock::time_point start = Clock::now();
    CheckpointWriter writer(command.out, {.save_total_limit = 1}, /*in_background=*/true, World::alone());
    ++share.state.step;
    writer.save(share);
    double waited = seconds_since(start);
    const double beside = multiply(count);
    const Clock::time_point update = Clock::now();
    writer.before_update(share.state.step + 1);
    waited += seconds_since(update);
    writer.finish();
    const double written = seconds_since(start);
    return {{"s", waited}, {"slowed_s", beside - multiply(count)}, {"written_s", written}};
  });
}

// The model read from its files and made ready.
void read_model(const BenchCommand& command) {
  tune_allocator();
  serve([&]() -> Json {
    open_model(command.session);
    return Json::object();
  });
}

using Run = void (*)(const BenchCommand&);
CLI::App& add(CLI::App& parent, const char* name, const char* help,
              const std::shared_ptr<BenchCommand>& options, Run run) {
  CLI::App& command = *parent.add_subcommand(name, help);
  command.callback([options, run] {
    try {
      run(*options);
    } catch (const EndOfInput&) {
    }
  });
  return command;
}

}  // namespace

void setup_bench(CLI::App& command) {
  command.require_subcommand(1);
  auto options = std::make_shared<BenchCommand>();

  CLI::App& training = add(command, "train", "a training step a line", options, train);
  training.add_option("recipe", options->recipe, "the recipe")->required();
  training.add_option("overrides", options->overrides, "settings that replace the recipe's");
  training.add_option("--stage", options->run.only_stage, "this stage only");
  training.add_option("--resume", options->run.resume, "as of caldera train")->capture_default_str();

  CLI::App& products = add(command, "products", "matrix products beside the processor's peak", options,
                           [](const BenchCommand& given) { bench_products(given.rounds); });
  products.add_option("--rounds", options->rounds, "of which each number is the median")->check(CLI::Range(1, 100));

  CLI::App& generation = add(command, "generate", "a greedy answer a line", options, generate_tokens);
  add_session_options(generation, options->session);
  generation.add_option("--prompt", options->prompt, "the question")->required();
  generation.add_option("--image", options->image, "a picture file");
  generation.add_option("--num-tokens", options->num_tokens, "length of the answer")->capture_default_str();

  CLI::App& loading = add(command, "load", "a pass over the pictures of a data file a line", options, load);
  CLI::App& tokenising =
      add(command, "tokenize", "a pass over the texts of a data file a line", options, tokenise);
  for (CLI::App* each : {&loading, &tokenising}) {
    each->add_option("--data", options->data, "LLaVA's JSON or JSONL")->required();
    each->add_option("--model", options->session.model, "a model or tokenizer folder")->required();
    each->add_option("--template", options->session.conversation_template, "conversation template");
  }
  CLI::App& saving = add(command, "save", "a training state written a line", options, save_state);
  saving.add_option("--model", options->session.model, "a model folder")->required();
  saving.add_option("--out", options->out, "a folder for its checkpoints")->required();

  add_session_options(add(command, "open", "a model read a line", options, read_model), options->session);

  loading.add_option("--images", options->image_folder, "the folder of its pictures");
  loading.add_option("--workers", options->workers, "threads")->capture_default_str();
  loading.add_option("--image-aspect-ratio", options->aspect, "square or pad")->capture_default_str();
}

}  // namespace caldera
