#include "train/checkpoint.h"

#include <algorithm>

#include "base/error.h"
#include "base/files.h"
#include "base/hash.h"
#include "base/log.h"
#include "model/weights/safetensors.h"

namespace caldera {
namespace {

std::string step_name(int64_t step) { return fmt::format("step-{:08}", step); }

// Folders checkpoints/step-*, newest first.
std::vector<fs::path> step_folders(const fs::path& stage_folder) {
  std::vector<fs::path> folders;
  const fs::path parent = stage_folder / "checkpoints";
  if (!fs::is_directory(parent)) return folders;
  for (const auto& entry : fs::directory_iterator(parent)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with("step-") && name.find(".tmp-") == std::string::npos) folders.push_back(entry.path());
  }
  std::sort(folders.rbegin(), folders.rend());
  return folders;
}

Json make_manifest(const fs::path& folder) {
  std::vector<fs::path> files;
  for (const auto& entry : fs::directory_iterator(folder)) files.push_back(entry.path());
  std::sort(files.begin(), files.end());
  Json manifest;
  for (const fs::path& file : files)
    manifest["files"][file.filename().string()] = {{"bytes", fs::file_size(file)}, {"xxh3_128", hash_file(file)}};
  return manifest;
}

}  // namespace

void write_checkpoint(const fs::path& stage_folder, const CheckpointState& state, const AdamW& optimizer,
                      int64_t save_total_limit) {
  const fs::path parent = stage_folder / "checkpoints";
  fs::create_directories(parent);
  remove_leftovers(parent);
  const std::string name = step_name(state.step);
  write_folder_atomic(parent / name, [&](const fs::path& folder) {
    write_safetensors(folder / "model.safetensors", optimizer.masters());
    write_safetensors(folder / "optimizer.safetensors", optimizer.moments());
    write_json(folder / "trainer_state.json",
               {{"step", state.step}, {"seed", state.seed}, {"recipe", state.recipe}});
    write_json(folder / "caldera.json", state.caldera);
    write_json(folder / "manifest.json", make_manifest(folder));
  });
  write_file_atomic(stage_folder / "latest", name + "\n");
  const std::vector<fs::path> folders = step_folders(stage_folder);
  if (save_total_limit <= 0) return;
  for (size_t i = static_cast<size_t>(save_total_limit); i < folders.size(); ++i) fs::remove_all(folders[i]);
}

void verify_checkpoint(const fs::path& folder) {
  const fs::path manifest_file = folder / "manifest.json";
  CALDERA_CHECK(fs::is_regular_file(manifest_file), CheckpointError,
                "{}: not a finished checkpoint: no manifest.json", folder.string());
  try {
    const Json manifest = read_json(manifest_file);
    for (const auto& [name, expected] : manifest.at("files").items()) {
      const fs::path file = folder / name;
      CALDERA_CHECK(fs::is_regular_file(file), CheckpointError, "{}: missing, but named in manifest.json", file.string());
      const auto bytes = expected.at("bytes").get<uint64_t>();
      CALDERA_CHECK(fs::file_size(file) == bytes, CheckpointError, "{}: damaged: expected {} bytes, got {}", file.string(),
                    bytes, fs::file_size(file));
      CALDERA_CHECK(hash_file(file) == expected.at("xxh3_128").get<std::string>(), CheckpointError,
                    "{}: damaged: its checksum is not the manifest's", file.string());
    }
  } catch (const nlohmann::json::exception& error) {
    throw CheckpointError(fmt::format("{}: damaged: {}", manifest_file.string(), error.what()));
  } catch (const CheckpointError&) {
    throw;
  } catch (const Error& error) {
    throw CheckpointError(error.what());
  }
}

std::optional<fs::path> newest_checkpoint(const fs::path& stage_folder) {
  for (const fs::path& folder : step_folders(stage_folder)) {
    try {
      verify_checkpoint(folder);
      return folder;
    } catch (const CheckpointError& error) {
      log_warning("passing over a broken checkpoint: {}", error.what());
    }
  }
  return std::nullopt;
}

CheckpointState read_checkpoint_state(const fs::path& folder) {
  try {
    const Json state = read_json(folder / "trainer_state.json");
    return {.step = state.at("step").get<int64_t>(),
            .seed = state.at("seed").get<uint64_t>(),
            .recipe = state.at("recipe").get<std::string>(),
            .caldera = read_json(folder / "caldera.json")};
  } catch (const nlohmann::json::exception& error) {
    throw CheckpointError(fmt::format("{}/trainer_state.json: {}", folder.string(), error.what()));
  }
}

void load_checkpoint(const fs::path& folder, AdamW& optimizer) {
  const auto copy = [](const fs::path& file, const std::vector<std::pair<std::string, at::Tensor>>& wanted) {
    const auto source = open_safetensors(file);
    for (const auto& [name, tensor] : wanted) {
      CALDERA_CHECK(source->has(name), CheckpointError, "{}: tensor {} is missing: does the stage train other parts now?",
                    file.string(), name);
      CALDERA_CHECK(source->shape(name) == tensor.sizes().vec(), CheckpointError,
                    "{}: tensor {}: expected shape [{}], got [{}]", file.string(), name, fmt::join(tensor.sizes(), ", "),
                    fmt::join(source->shape(name), ", "));
      tensor.copy_(source->read(name));
    }
  };
  const at::NoGradGuard no_grad;
  copy(folder / "model.safetensors", optimizer.masters());
  copy(folder / "optimizer.safetensors", optimizer.moments());
  optimizer.restore(read_checkpoint_state(folder).step);
}

}  // namespace caldera
