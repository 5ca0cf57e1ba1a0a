#include "model/weights/names.h"

#include <string_view>

#include "base/error.h"

namespace caldera {
namespace {

// "multi_modal_projector.linear_2.weight" as the original LLaVA names it: layer k is child 2(k - 1) of a
// Sequential, or, where it is the only one, the projector itself. PEFT puts its prefix before what trained
// beside an adapter.
std::string find_original_projector(const std::string& classic, const TensorSource& source) {
  constexpr std::string_view kLinear = "multi_modal_projector.linear_";
  if (!classic.starts_with(kLinear) || classic.size() < kLinear.size() + 2 ||
      classic[kLinear.size() + 1] != '.')
    return "";
  const int index = 2 * (classic[kLinear.size()] - '1');
  const std::string field = classic.substr(kLinear.size() + 2);
  for (const char* root : {"model.mm_projector.", "mm_projector.", "base_model.model.model.mm_projector."}) {
    const std::string name = fmt::format("{}{}.{}", root, index, field);
    if (source.has(name)) return name;
    if (index == 0 && source.has(root + field)) return root + field;
  }
  return "";
}

}  // namespace

std::string find_llava_name(const std::string& classic, const TensorSource& source) {
  struct Rule {
    std::string_view classic, other;
  };
  static constexpr Rule kRules[] = {
      {"language_model.model.", "model.language_model."},
      {"language_model.lm_head.", "lm_head."},
      {"multi_modal_projector.", "model.multi_modal_projector."},
      {"vision_tower.vision_model.", "model.vision_tower.vision_model."},
      {"vision_tower.vision_model.", "model.vision_tower."},
      {"vision_tower.vision_model.", "vision_tower."},
      // The original LLaVA's: a decoder that holds the other parts.
      {"language_model.model.", "model."},
      {"vision_tower.vision_model.", "model.vision_tower.vision_tower.vision_model."},
      {"vision_tower.vision_model.", "model.vision_tower.vision_tower."}};
  if (source.has(classic)) return classic;
  for (const Rule& rule : kRules) {
    if (!classic.starts_with(rule.classic)) continue;
    std::string name = std::string(rule.other) + classic.substr(rule.classic.size());
    if (source.has(name)) return name;
  }
  const std::string projector = find_original_projector(classic, source);
  return projector.empty() ? classic : projector;
}

void refuse_leftovers(const std::vector<std::string>& leftovers, const TensorSource& source,
                      const std::function<bool(const std::string&)>& is_harmless) {
  for (const std::string& name : leftovers) {
    const bool is_old_buffer = name.ends_with(".position_ids") || name.ends_with(".rotary_emb.inv_freq");
    CALDERA_CHECK(is_old_buffer || is_harmless(name), CheckpointError,
                  "{}: tensor {} has no place in the model that config.json describes", source.where(name),
                  name);
  }
}

}  // namespace caldera
