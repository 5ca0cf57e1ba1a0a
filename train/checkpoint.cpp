#include "train/checkpoint.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <map>

#include "base/error.h"
#include "base/fault.h"
#include "base/files.h"
#include "base/hash.h"
#include "base/log.h"
#include "base/threads.h"
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
    const bool is_step =
        name.starts_with("step-") && name.find_first_not_of("0123456789", 5) == std::string::npos;
    if (is_step) folders.push_back(entry.path());
  }
  std::sort(folders.rbegin(), folders.rend());
  return folders;
}

// Writes what this rank has of a checkpoint. -> {file's name: {"bytes", "xxh3_128"}}
Json write_share(const fs::path& folder, const CheckpointShare& share, Snapshot& masters, Snapshot& moments,
                 const World& world) {
  Json files = Json::object();
  const auto write = [&](const std::string& name, Snapshot& state) {
    const WrittenFile written = write_safetensors(folder / name, state.tensors());
    files[name] = {{"bytes", written.num_bytes}, {"xxh3_128", written.hash}};
  };
  if (world.is_first()) {
    write("model.safetensors", masters);
    write_json(folder / "trainer_state.json",
               {{"step", share.state.step},
                {"num_updates", share.state.num_updates.value_or(share.state.step)},
                {"seed", share.state.seed},
                {"num_samples", share.state.num_samples ? Json(*share.state.num_samples) : Json()},
                {"eval_loss", share.state.eval_loss ? Json(*share.state.eval_loss) : Json()},
                {"recipe", share.state.recipe}});
    write_json(folder / "caldera.json", share.state.caldera);
    for (const char* name : {"trainer_state.json", "caldera.json"})
      files[name] = {{"bytes", fs::file_size(folder / name)}, {"xxh3_128", hash_file(folder / name)}};
  }
  if (share.part >= 0)
    write(share.num_parts == 1
              ? "optimizer.safetensors"
              : fmt::format("optimizer-{:05}-of-{:05}.safetensors", share.part + 1, share.num_parts),
          moments);
  return files;
}

// Writes "latest" or "best"; where there is no such checkpoint, there is no such file.
void point_to(const fs::path& file, const std::optional<fs::path>& checkpoint) {
  if (checkpoint)
    write_file_atomic(file, checkpoint->filename().string() + "\n");
  else
    fs::remove(file);
}

// Every rank does its part and hears of the others': what `work` returns, by rank. Where it threw on a rank,
// the others throw PeerError with its message.
std::vector<std::string> together(World& world, const std::function<std::string()>& work) {
  std::string mine;
  try {
    mine = work();
  } catch (const std::exception&) {
    world.tell(std::current_exception());  // now: the training thread may be waiting for the others
    throw;
  }
  return world.exchange("save", mine);
}

// The share's lists are read from `masters` and `moments`.
void write(const fs::path& stage_folder, const CheckpointShare& share, Snapshot& masters, Snapshot& moments,
           const KeptCheckpoints& kept, World& world) {
  const SavingScope saving;
  const SavingLane lane(world, share.state.step);
  const fs::path parent = stage_folder / "checkpoints";
  const std::string name = step_name(share.state.step);
  // 1. The first rank makes the folder, beside its place; 2. each rank writes its files there; 3. the first
  // rank writes the manifest, when all are through, and puts the folder in its place.
  const auto fill = [&](const fs::path& folder) {
    const fs::path shared = together(world, [&] { return folder.string(); }).front();
    Json files = Json::object();
    for (const std::string& text :
         together(world, [&] { return json_line(write_share(shared, share, masters, moments, world)); }))
      files.update(parse_json(text, "what a rank wrote"));
    std::vector<std::string> names;
    for (const auto& [file, description] : files.items()) names.push_back(file);
    std::sort(names.begin(), names.end());
    Json manifest;
    for (const std::string& file : names) manifest["files"][file] = files[file];
    if (world.is_first()) write_json(folder / "manifest.json", manifest);
  };
  if (!world.is_first()) fill("");
  together(world, [&] {
    if (!world.is_first()) return "";
    fs::create_directories(parent);
    remove_leftovers(parent);
    write_folder_atomic(parent / name, fill);
    write_file_atomic(stage_folder / "latest", name + "\n");
    // All that were the best once it came are still there, so the best of these is the best of all.
    const std::optional<fs::path> best = kept.save_best ? best_checkpoint(stage_folder) : std::nullopt;
    point_to(stage_folder / "best", best);
    const std::vector<fs::path> folders = step_folders(stage_folder);
    for (auto i = static_cast<size_t>(kept.save_total_limit); kept.save_total_limit > 0 && i < folders.size();
         ++i)
      if (folders[i] != best) remove_folder(folders[i]);
    return "";
  });
}

}  // namespace

void write_checkpoint(const fs::path& stage_folder, const CheckpointShare& share, const KeptCheckpoints& kept,
                      World& world) {
  Snapshot masters(share.masters, /*may_change=*/false), moments(share.moments, /*may_change=*/false);
  write(stage_folder, share, masters, moments, kept, world);
}

CheckpointWriter::CheckpointWriter(fs::path stage_folder, const KeptCheckpoints& kept, bool in_background,
                                   World& world)
    : stage_folder_(std::move(stage_folder)), kept_(kept), in_background_(in_background), world_(world) {}

CheckpointWriter::~CheckpointWriter() {
  try {
    finish();
  } catch (const std::exception& error) {  // of a run that ends for another reason
    log_warning("the checkpoint that was being written is lost: {}", error.what());
  }
}

void CheckpointWriter::save(CheckpointShare share) {
  CALDERA_ASSERT(!writing_.valid());
  masters_ = std::make_unique<Snapshot>(std::exchange(share.masters, {}), in_background_ && !share.masters_are_copies);
  moments_ = std::make_unique<Snapshot>(std::exchange(share.moments, {}), in_background_);
  writing_ = std::async(in_background_ ? std::launch::async : std::launch::deferred,
                        [this, share = std::move(share)] {
                          if (in_background_) work_without_a_team();
                          write(stage_folder_, share, *masters_, *moments_, kept_, world_);
                          return stage_folder_ / "checkpoints" / step_name(share.state.step);
                        });
}

void CheckpointWriter::before_update(int64_t step) {
  if (!writing_.valid() || writing_.wait_for(std::chrono::seconds(0)) == std::future_status::ready) return;
  world_.at(step, "copying what is left of a checkpoint");
  masters_->copy_the_rest();
  moments_->copy_the_rest();
}

std::optional<fs::path> CheckpointWriter::finish() {
  return writing_.valid() ? std::optional(writing_.get()) : std::nullopt;
}

std::optional<fs::path> CheckpointWriter::finished() {
  const bool has_ended =
      writing_.valid() && writing_.wait_for(std::chrono::seconds(0)) == std::future_status::ready;
  return has_ended ? finish() : std::nullopt;
}

void verify_checkpoint(const fs::path& folder) {
  const fs::path manifest_file = folder / "manifest.json";
  CALDERA_CHECK(fs::is_regular_file(manifest_file), CheckpointError,
                "{}: not a finished checkpoint: no manifest.json", folder.string());
  try {
    const Json manifest = read_json(manifest_file);
    for (const auto& [name, expected] : manifest.at("files").items()) {
      const fs::path file = folder / name;
      CALDERA_CHECK(fs::is_regular_file(file), CheckpointError, "{}: missing, but named in manifest.json",
                    file.string());
      const auto bytes = expected.at("bytes").get<uint64_t>();
      CALDERA_CHECK(fs::file_size(file) == bytes, CheckpointError, "{}: damaged: expected {} bytes, got {}",
                    file.string(), bytes, fs::file_size(file));
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

std::optional<fs::path> best_checkpoint(const fs::path& stage_folder) {
  std::optional<fs::path> best;
  double lowest = std::numeric_limits<double>::infinity();
  for (const fs::path& folder : step_folders(stage_folder)) {
    try {
      const std::optional<double> loss = read_checkpoint_state(folder).eval_loss;
      if (!loss || *loss > lowest) continue;  // the newest come first
      lowest = *loss;
      best = folder;
    } catch (const Error& error) {
      log_warning("passing over a broken checkpoint: {}", error.what());
    }
  }
  return best;
}

void set_later_checkpoints_aside(const fs::path& stage_folder, const std::optional<fs::path>& checkpoint) {
  std::vector<fs::path> later = step_folders(stage_folder);  // the newest first
  const auto own = std::find_if(later.begin(), later.end(), [&](const fs::path& folder) {
    return checkpoint && fs::equivalent(folder, *checkpoint);
  });
  const std::optional<fs::path> newest = own == later.end() ? std::nullopt : std::optional(*own);
  later.erase(own, later.end());
  if (later.empty()) return;
  const bool has_best = fs::exists(stage_folder / "best");
  const fs::path aside = old_name(stage_folder / "checkpoints");
  fs::create_directory(aside);
  point_to(stage_folder / "latest", newest);
  for (const fs::path& folder : later) fs::rename(folder, aside / folder.filename());
  point_to(stage_folder / "best", has_best ? best_checkpoint(stage_folder) : std::nullopt);
  std::vector<std::string> names;
  for (const fs::path& folder : later) names.push_back(folder.filename().string());
  log_info("the stage goes on from {}: moved its {} to {}", checkpoint ? checkpoint->string() : "its start",
           fmt::join(names, ", "), aside.string());
}

CheckpointState read_checkpoint_state(const fs::path& folder) {
  try {
    const Json state = read_json(folder / "trainer_state.json");
    const Json eval_loss = state.value("eval_loss", Json()), num_samples = state.value("num_samples", Json());
    return {.step = state.at("step").get<int64_t>(),
            .num_updates = state.value("num_updates", state.at("step").get<int64_t>()),
            .seed = state.at("seed").get<uint64_t>(),
            .num_samples = num_samples.is_null() ? std::nullopt : std::optional(num_samples.get<int64_t>()),
            .eval_loss = eval_loss.is_number() ? std::optional(eval_loss.get<double>()) : std::nullopt,
            .recipe = state.at("recipe").get<std::string>(),
            .caldera = read_json(folder / "caldera.json")};
  } catch (const nlohmann::json::exception& error) {
    throw CheckpointError(fmt::format("{}/trainer_state.json: {}", folder.string(), error.what()));
  }
}

namespace {

// The tensors of some files, whole or in parts ("NAME@BEGIN").
class Parts {
 public:
  explicit Parts(const std::vector<fs::path>& files) {
    for (const fs::path& file : files) {
      files_.push_back(open_safetensors(file));
      where_ += (where_.empty() ? "" : ", ") + file.string();
      for (const std::string& name : files_.back()->names()) {
        const size_t at = name.rfind('@');
        const std::string number = at == std::string::npos ? "" : name.substr(at + 1);
        const bool is_part = !number.empty() && number.size() < 16 &&
                             number.find_first_not_of("0123456789") == std::string::npos;
        parts_[is_part ? name.substr(0, at) : name].push_back(
            {files_.back().get(), name, is_part ? std::stoll(number) : 0, is_part});
      }
    }
  }

  // Reads what is named NAME or, of the flattened tensor from element BEGIN on, NAME@BEGIN.
  void read_into(const Master& state, const std::string& named) const {
    const size_t at = named.rfind('@');
    const bool is_part = at != std::string::npos;
    const std::string name = named.substr(0, at);
    const int64_t begin = is_part ? std::stoll(named.substr(at + 1)) : 0;
    const auto found = parts_.find(name);
    CALDERA_CHECK(found != parts_.end(), CheckpointError,
                  "{}: tensor {} is missing: does the stage train other parts now?", where_, name);
    const at::Tensor values =
        state.remainder.defined() ? at::empty(state.weight.sizes(), at::kFloat) : state.weight.contiguous();
    const at::Tensor flat = values.view(-1);
    const int64_t end = begin + flat.numel();
    int64_t num_filled = 0;
    for (const Part& part : found->second) {
      const std::vector<int64_t> shape = part.file->shape(part.name);
      CALDERA_CHECK(part.is_part || is_part || shape == values.sizes().vec(), CheckpointError,
                    "{}: tensor {}: expected shape [{}], got [{}]", where_, name,
                    fmt::join(values.sizes(), ", "), fmt::join(shape, ", "));
      const at::Tensor source = part.file->read(part.name).contiguous().view(-1);
      const int64_t from = std::max(begin, part.begin), to = std::min(end, part.begin + source.numel());
      if (from >= to) continue;
      flat.narrow(0, from - begin, to - from).copy_(source.narrow(0, from - part.begin, to - from));
      num_filled += to - from;
    }
    CALDERA_CHECK(num_filled == flat.numel(), CheckpointError,
                  "{}: tensor {}: expected {} elements from {}, got {}", where_, name, flat.numel(), begin,
                  num_filled);
    if (!values.is_alias_of(state.weight)) state.assign(values);
  }

 private:
  struct Part {
    const TensorSource* file;
    std::string name;
    int64_t begin;
    bool is_part;
  };
  std::vector<std::unique_ptr<TensorSource>> files_;
  std::map<std::string, std::vector<Part>> parts_;
  std::string where_;
};

}  // namespace

void load_checkpoint(const fs::path& folder, AdamW& optimizer) {
  const at::NoGradGuard no_grad;
  std::vector<fs::path> files;
  for (const auto& entry : fs::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with("optimizer") && name.ends_with(".safetensors")) files.push_back(entry.path());
  }
  std::sort(files.begin(), files.end());
  const Parts model({folder / "model.safetensors"}), states(files);
  for (const auto& [name, master] : optimizer.masters()) model.read_into(master, name);
  for (const auto& [name, moment] : optimizer.moments()) states.read_into(moment, name);
  const CheckpointState state = read_checkpoint_state(folder);
  optimizer.restore(state.num_updates.value_or(state.step));
}

}  // namespace caldera
