// v0 (Vicuna 0 and the first LLaVA). Training and answering differ, as in LLaVA:
// training:  "SYSTEM\n\n### Human: q\n### Assistant: a\n### ". Learned: all but the system message and what
// follows a human
//            turn's "###": that sign is how an answer ends.
// answering: "SYSTEM###Human: example question###Assistant: example answer###Human: q###Assistant:"
// (llava_v0: no example).
#include "data/templates/segments.h"

namespace caldera {
namespace {

constexpr const char* kSystem =
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions.";
constexpr const char* kExample =
    "Human: What are the key differences between renewable and non-renewable energy sources?###"
    "Assistant: Renewable energy sources are those that can be replenished naturally in a relatively "
    "short amount of time, such as solar, wind, hydro, geothermal, and biomass. "
    "Non-renewable energy sources, on the other hand, are finite and will eventually be "
    "depleted, such as coal, oil, and natural gas. Here are some key differences between "
    "renewable and non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable "
    "energy sources are finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact "
    "than non-renewable sources, which can lead to air and water pollution, greenhouse gas emissions, "
    "and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically "
    "have lower operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote "
    "locations than non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different "
    "situations and needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while "
    "non-renewable sources are not, and their depletion can lead to economic and social instability.\n###";

std::vector<Segment> render_training(const std::vector<Turn>& turns) {
  SegmentBuilder out;
  out.text(system_of(turns, kSystem)).text("\n\n");
  for (const Turn& turn : turns) {
    const bool learned = !turn.from_human;
    out.text("###", true).text(turn.from_human ? " Human: " : " Assistant: ", learned);
    out.value(turn.value, learned).text("\n", learned);
  }
  return out.text("### ", true).take();
}

std::vector<Segment> render_answering(const char* example, const std::vector<Turn>& turns) {
  SegmentBuilder out;
  out.text(system_of(turns, kSystem)).text("###").text(example);
  for (const Turn& turn : turns) {
    out.text(turn.from_human ? "Human:" : "Assistant:");
    if (!turn.value.empty()) out.text(" ").value(turn.value).text("###");
  }
  return out.text("Assistant:").take();
}

}  // namespace

const ConversationTemplate kV0 = {"v0",
                                  [](const std::vector<Turn>& turns, bool for_generation) {
                                    return for_generation ? render_answering(kExample, turns)
                                                          : render_training(turns);
                                  },
                                  {"###"},
                                  ""};

const ConversationTemplate kLlavaV0 = {"llava_v0",
                                       [](const std::vector<Turn>& turns, bool for_generation) {
                                         return for_generation ? render_answering("", turns)
                                                               : render_training(turns);
                                       },
                                       {"###"},
                                       ""};

}  // namespace caldera
