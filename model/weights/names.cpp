#include "model/weights/names.h"

#include <string_view>

#include "base/error.h"

namespace caldera {

std::string find_llava_name(const std::string& classic, const TensorSource& source) {
  struct Rule {
    std::string_view classic, other;
  };
  static constexpr Rule kRules[] = {{"language_model.model.", "model.language_model."},
                                    {"language_model.lm_head.", "lm_head."},
                                    {"multi_modal_projector.", "model.multi_modal_projector."},
                                    {"vision_tower.vision_model.", "model.vision_tower.vision_model."},
                                    {"vision_tower.vision_model.", "model.vision_tower."},
                                    {"vision_tower.vision_model.", "vision_tower."}};
  if (source.has(classic)) return classic;
  for (const Rule& rule : kRules) {
    if (!classic.starts_with(rule.classic)) continue;
    std::string name = std::string(rule.other) + classic.substr(rule.classic.size());
    if (source.has(name)) return name;
  }
  return classic;
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
