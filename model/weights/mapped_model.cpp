#include "model/weights/mapped_model.h"

#include <map>

#include "base/error.h"
#include "base/strings.h"
#include "model/weights/adapters.h"
#include "model/weights/checks.h"
#include "model/weights/json_fields.h"
#include "model/weights/llava_config.h"
#include "model/weights/names.h"
#include "model/weights/vocabulary.h"

namespace caldera {
namespace {

// The file's names of a model's tensors. A tensor is known by its owner and first row: components list it
// under names of their own.
class Names {
 public:
  using Key = std::pair<const at::Tensor*, int64_t>;
  void add(const NamedTensor& named, std::string name) { names_[key(named)] = std::move(name); }
  // Null for what the file may lack (needed_of_tower), which the model holds itself.
  const std::string* find(const NamedTensor& named) const {
    const auto found = names_.find(key(named));
    return found == names_.end() ? nullptr : &found->second;
  }

 private:
  static Key key(const NamedTensor& named) { return {named.owner, named.row_begin}; }
  std::map<Key, std::string> names_;
};

// The file, its vocabulary without padding, and which tensor is which.
struct Weights {
  std::unique_ptr<TensorSource> file;
  std::unique_ptr<UnpaddedVocabulary> source;
  Names names;
};

}  // namespace

std::optional<MappedModel> map_llava(const fs::path& dir) {
  const fs::path folder = resolve_model_folder(dir);
  if (is_adapter_folder(folder) || !fs::exists(folder / "config.json")) return {};
  if (!is_hf_llava(read_config(folder / "config.json"))) return {};

  MappedModel mapped;
  mapped.loaded.folder = folder;
  mapped.loaded.card = read_model_card(folder);
  const auto weights = std::make_shared<Weights>();
  weights->file = open_weights_folder(folder);
  weights->source = std::make_unique<UnpaddedVocabulary>(*weights->file, mapped.loaded.card.vocab_size);
  const TensorSource& source = *weights->source;
  mapped.loaded.model = make_hf_llava(folder, mapped.loaded.card.vocab_size, source);
  LlavaModel& model = *mapped.loaded.model;
  const auto name_in_source = [&source](const std::string& name) { return find_llava_name(name, source); };
  std::set<std::string> used;
  for (const NamedTensor& named : needed_of_tower(model.tensors(), *model.vision, model.features, source,
                                                  name_in_source, /*fill=*/true)) {
    const std::string name = name_in_source(named.name);
    CALDERA_CHECK(source.has(name), CheckpointError, "{}: tensor {} is missing", source.where(name), name);
    const at::Tensor value = source.read(name);
    CALDERA_CHECK(value.sizes() == named.value().sizes(), CheckpointError,
                  "{}: {}: expected shape [{}], got [{}]", source.where(name), name,
                  fmt::join(named.value().sizes(), ", "), fmt::join(value.sizes(), ", "));
    CALDERA_CHECK(value.is_floating_point(), CheckpointError,
                  "{}: {}: expected floating-point weights, got {}", source.where(name), name,
                  c10::toString(value.scalar_type()));
    used.insert(name);
    weights->names.add(named, name);
  }
  std::vector<std::string> leftovers = source.names();
  std::erase_if(leftovers, [&used](const std::string& name) { return used.contains(name); });
  const bool tied = model.language->config().value("tie_word_embeddings", false);
  refuse_leftovers(leftovers, source,
                   [tied](const std::string& name) { return tied && name.ends_with("lm_head.weight"); });
  mapped.values = [weights](const NamedTensor& named) {
    const std::string* name = weights->names.find(named);
    if (name == nullptr) return named.value();
    at::Tensor value = weights->source->read(*name);
    check_finite(value, weights->source->where(*name), *name);
    return value;
  };
  return mapped;
}

}  // namespace caldera
