// caldera model info PATH [--tensors] [--json]
#include <cstdio>
#include <memory>

#include "base/json.h"
#include "base/strings.h"
#include "cli/command.h"
#include "model/weights/inspect.h"

namespace caldera {
namespace {

struct InfoCommand {
  std::string path;
  bool tensors = false, json = false;
};

int64_t elements(const TensorReport& tensor) {
  int64_t count = 1;
  for (const int64_t size : tensor.shape) count *= size;
  return count;
}

std::string count_text(int64_t count) {
  const auto value = static_cast<double>(count);
  if (count >= 1'000'000'000) return fmt::format("{:.2f} B", value / 1e9);
  if (count >= 1'000'000) return fmt::format("{:.1f} M", value / 1e6);
  return std::to_string(count);
}

void print_part(const PartReport& part, bool with_tensors) {
  int64_t parameters = 0, num_bytes = 0;
  std::map<std::string, int64_t> dtypes;
  for (const TensorReport& tensor : part.tensors) {
    parameters += elements(tensor);
    num_bytes += tensor.num_bytes;
    ++dtypes[tensor.dtype];
  }
  fmt::print("\n{}\n  {}\n", part.name, part.what);
  std::vector<std::string> types;
  for (const auto& [dtype, count] : dtypes) types.push_back(fmt::format("{} {}", count, dtype));
  fmt::print("  {} parameters in {} tensors, {} ({})\n", count_text(parameters), part.tensors.size(),
             human_bytes(static_cast<double>(num_bytes)), join(types, ", "));
  if (!with_tensors) return;
  for (const TensorReport& tensor : part.tensors)
    fmt::print("    {} [{}] {}\n", tensor.name, fmt::join(tensor.shape, ", "), tensor.dtype);
}

// The first few of a list that may be long.
void print_list(const char* title, const std::vector<std::string>& names, bool all) {
  if (names.empty()) return;
  constexpr size_t kShown = 10;
  fmt::print("\n{} ({}):\n", title, names.size());
  const size_t shown = all ? names.size() : std::min(kShown, names.size());
  for (size_t i = 0; i < shown; ++i) fmt::print("  {}\n", names[i]);
  if (shown < names.size()) fmt::print("  ... (--tensors shows all)\n");
}

void print_provenance(const Json& provenance) {
  if (!provenance.is_object() || provenance.empty()) return;
  fmt::print("\ntrained from and on\n");
  for (const auto& [key, value] : provenance.items())
    if (key != "recipe")
      fmt::print("  {}: {}\n", key, value.is_string() ? value.get<std::string>() : json_line(value));
}

void info(const InfoCommand& command) {
  const ModelReport report = inspect_model(command.path);
  if (command.json) {
    fmt::print("{}\n", json_line(to_json(report)));
    return;
  }
  fmt::print("{}: {}\n", report.path.string(), report.kind);
  for (const auto& [key, value] : report.facts) fmt::print("  {}: {}\n", key, value);
  for (const PartReport& part : report.parts) print_part(part, command.tensors);
  print_list("missing", report.missing, command.tensors);
  print_list("left over: nothing asks for it", report.leftover, command.tensors);
  print_provenance(report.provenance);
}

}  // namespace

void setup_model(CLI::App& command) {
  command.require_subcommand(1);
  auto options = std::make_shared<InfoCommand>();
  CLI::App* sub =
      command.add_subcommand("info", "what a folder or file holds: parts, sizes, dtypes, what is missing");
  sub->add_option("path", options->path,
                  "a folder that --model takes, one of its parts, or a .gguf, .safetensors or .bin file")
      ->required();
  sub->add_flag("--tensors", options->tensors, "every tensor with its shape");
  sub->add_flag("--json", options->json, "the whole report as one line of JSON");
  sub->callback([options] { info(*options); });
}

}  // namespace caldera
