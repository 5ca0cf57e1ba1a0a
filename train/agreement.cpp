#include "train/agreement.h"

#include <algorithm>
#include <array>

#include "base/error.h"
#include "base/hash.h"
#include "base/headway.h"
#include "train/run.h"
#include "train/yaml_fields.h"

namespace caldera {
namespace {

constexpr size_t kMostDifferences = 5;
constexpr size_t kNumTokenized = 100;

// The ranks whose text is not the first's: the first of them, and how many there are.
std::string difference(World& world, const std::string& verb, const std::string& key,
                       const std::vector<Json>& all) {
  const auto text_of_rank = [&](size_t rank) { return all[rank].value(key, std::string("nothing")); };
  const std::string expected = text_of_rank(0);
  size_t other = 0, num_others = 0;
  for (size_t rank = all.size() - 1; rank > 0; --rank) {
    if (text_of_rank(rank) == expected) continue;
    other = rank;
    ++num_others;
  }
  if (num_others == 0) return "";
  return fmt::format("{} {} {} on {} and {} on {}{}", key, verb, expected, world.who(0), text_of_rank(other),
                     world.who(static_cast<int>(other)),
                     num_others > 1 ? fmt::format(" (and differs on {} more)", num_others - 1) : "");
}

bool is_place(const std::string& path) {
  constexpr std::array kPlaces = {"vision_tower",  "language_model", "pretrain_mm_mlp_adapter",
                                  "tokenizer",     "data_path",      "eval_data_path",
                                  "captions_path", "image_folder",   "image_roots"};
  const std::string key = path.substr(path.rfind('.') + 1);
  return std::find(kPlaces.begin(), kPlaces.end(), key) != kPlaces.end();
}

std::string shown(const YamlNode& node) {
  if (node.kind == YamlNode::Kind::kNull) return "null";
  return node.quoted ? "\"" + node.text + "\"" : node.text;
}

// Adds each value of the recipe by its path, as overrides name it.
void flatten(const YamlNode& node, const std::string& path, Json& flat) {
  const auto is_block = [](const YamlNode& item) { return item.kind == YamlNode::Kind::kMap; };
  if (is_block(node)) {
    for (size_t i = 0; i < node.items.size(); ++i)
      flatten(node.items[i], path.empty() ? node.keys[i] : path + "." + node.keys[i], flat);
  } else if (node.kind != YamlNode::Kind::kList) {
    flat[path] = is_place(path) && !node.text.empty() ? "a path" : shown(node);
  } else if (std::any_of(node.items.begin(), node.items.end(), is_block)) {
    for (size_t i = 0; i < node.items.size(); ++i)
      flatten(node.items[i], FieldReader::element_path(path, node, i), flat);
  } else {
    std::vector<std::string> texts;
    for (const YamlNode& item : node.items) texts.push_back(shown(item));
    flat[path] = is_place(path) ? fmt::format("{} paths", texts.size()) : fmt::format("[{}]", fmt::join(texts, ", "));
  }
}

// With its length, so that no other texts together look the same.
void add_text(Hasher& hasher, const std::string& text) {
  const uint64_t length = text.size();
  hasher.add(&length, sizeof length);
  hasher.add(text.data(), text.size());
}

std::string describe_records(const std::vector<Record>& records) {
  Hasher hasher;
  for (const Record& record : records) {
    add_text(hasher, record.id);
    for (const std::string& image : record.images) add_text(hasher, image);
    for (const Turn& turn : record.turns) {
      if (!turn.system.empty()) add_text(hasher, turn.system);
      add_text(hasher, turn.value);
    }
  }
  return fmt::format("{} records (XXH3 {})", records.size(), hasher.hex());
}

std::string describe_tokenizer(const StageData& data) {
  Hasher hasher;
  const size_t count = std::min(kNumTokenized, data.records->size());
  for (size_t i = 0; i < count; ++i) {
    const std::vector<int64_t> ids =
        tokenize((*data.records)[i], *data.format.conversation, *data.format.tokenizer).input_ids;
    hasher.add(ids.data(), ids.size() * sizeof(int64_t));
  }
  return fmt::format("{} tokens (XXH3 of the first samples' ids {})", data.format.tokenizer->vocab_size(),
                     hasher.hex());
}

std::string describe_weights(const NamedTensors& tensors) {
  Hasher hasher;
  for (const NamedTensor& tensor : tensors) {
    const at::Tensor value = tensor.value().contiguous();
    add_text(hasher, tensor.name);
    hasher.add(value.const_data_ptr(), value.nbytes());
    note_headway();
  }
  return "XXH3 " + hasher.hex();
}

}  // namespace

std::string differences(World& world, const std::string& verb, const Json& mine) {
  if (!world.has_group()) return "";
  // Mostly all is alike, and a checksum is enough to tell: the texts of a thousand ranks are megabytes.
  const std::string text = json_line(mine);
  Hasher hasher;
  hasher.add(text.data(), text.size());
  const std::vector<std::string> hashes = world.exchange("main", hasher.hex());
  if (std::all_of(hashes.begin(), hashes.end(), [&](const std::string& hash) { return hash == hashes[0]; }))
    return "";

  std::vector<Json> all;
  for (const std::string& other : world.exchange("main", text))
    all.push_back(parse_json(other, "what a rank told"));
  try {
    world.barrier();  // the first rank may host the store: it must not go before all have read
  } catch (const std::exception&) {
    // Another one has gone with the same error.
  }
  std::vector<std::string> keys, found;
  for (const Json& one : all)
    for (const auto& [key, value] : one.items())
      if (std::find(keys.begin(), keys.end(), key) == keys.end()) keys.push_back(key);
  for (const std::string& key : keys)
    if (std::string line = difference(world, verb, key, all); !line.empty()) found.push_back(std::move(line));
  const size_t num_more = found.size() - std::min(found.size(), kMostDifferences);
  found.resize(found.size() - num_more);
  return fmt::format("{}{}", fmt::join(found, "; "),
                     num_more > 0 ? fmt::format("; and {} more", num_more) : "");
}

void agree_on_recipe(World& world, const Recipe& recipe, const RunOptions& options) {
  if (!world.has_group()) return;
  world.at(0, "comparing the recipe with other ranks");
  Json mine = {{"the program", options.version},
               {"--stage", "\"" + options.only_stage + "\""},
               {"--resume", "\"" + options.resume + "\""}};
  Faults faults;
  flatten(parse_yaml(dump_recipe(recipe), "the recipe", faults), "", mine);
  faults.throw_if_any();
  const std::string found = differences(world, "is", mine);
  if (!found.empty())
    throw Disagreement<ConfigError>(fmt::format(
        "the ranks have different recipes: {}; start all with the same recipe and program", found));
}

void agree_on_data(World& world, const StageConfig& stage, const StageData& data) {
  if (!world.has_group()) return;
  world.at(0, "comparing the data with other ranks");
  const std::string block = fmt::format("stages.{}.data.", stage.name);
  Json mine = {{block + "data_path", describe_records(*data.records)}};
  if (!data.eval_records.empty()) mine[block + "eval_data_path"] = describe_records(data.eval_records);
  std::string found = differences(world, "has", mine);
  if (!found.empty())
    throw Disagreement<DataError>(
        fmt::format("the ranks have different data: {}; copy the same files to all machines", found));
  found = differences(world, "has", {{"the tokenizer", describe_tokenizer(data)}});
  if (!found.empty())
    throw Disagreement<CheckpointError>(
        fmt::format("the ranks have different tokenizers: {}; copy the same files of model.tokenizer, or "
                    "where there is none of "
                    "model.language_model, to all machines",
                    found));
}

void agree_on_weights(World& world, LlavaModel& model,
                      const std::optional<std::filesystem::path>& checkpoint) {
  if (!world.has_group()) return;
  world.at(0, "comparing the weights with other ranks");
  Json mine = Json::object();
  for (const char* component : {"vision_tower", "projector", "language_model"})
    mine[component] = describe_weights(model.component_tensors(component));
  // The manifest has the checksums of all the other files.
  if (checkpoint) mine["the checkpoint's manifest.json"] = "XXH3 " + hash_file(*checkpoint / "manifest.json");
  const std::string found = differences(world, "has", mine);
  if (!found.empty())
    throw Disagreement<CheckpointError>(fmt::format(
        "the ranks have different weights: {}; the files that `model` names in the recipe, and the run's "
        "folder, must be the same on all machines",
        found));
}

}  // namespace caldera
