// Pieces of model/weights/inspect.h's report.
#pragma once
#include <functional>

#include "model/weights/inspect.h"
#include "model/weights/load.h"

namespace caldera {

std::string describe(const VisionTower& tower, const VisionFeatures& features);
std::string describe(const LanguageModel& language);

TensorReport report_of_tensor(const std::string& name, const at::Tensor& tensor);
// Every tensor of the source, sorted by name.
std::vector<TensorReport> tensor_reports(const TensorSource& source);

// Deals the source's tensors to parts: each part takes those of its list that are there, under the names they
// have in the source. What a part lacks, or has in another shape, goes to report.missing; what nobody wants
// to report.leftover.
struct WantedPart {
  std::string name, what;
  NamedTensors tensors;  // names as `name_in_source` takes them
};
void deal_tensors(const std::vector<WantedPart>& parts, const TensorSource& source,
                  const std::function<std::string(const std::string&)>& name_in_source,
                  const std::function<bool(const std::string&)>& is_harmless, ModelReport& report);

// A .gguf file of any architecture.
ModelReport inspect_gguf(const std::filesystem::path& file);

}  // namespace caldera
