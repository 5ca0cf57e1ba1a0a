#include "eval/score.h"

namespace caldera {

std::vector<Score> score_records(LlavaModel& model, const std::vector<Record>& records,
                                 const std::filesystem::path& image_folder, const SampleFormat& format,
                                 int64_t max_tokens, const Progress& progress) {
  const at::NoGradGuard no_grad;
  std::vector<Score> scores(records.size());
  const auto record = [&](int64_t index) -> const Record& { return records[static_cast<size_t>(index)]; };
  const auto num_records = static_cast<int64_t>(records.size());
  if (progress) progress(0, num_records);
  // All of them before the first is scored: a record that the template refuses must not lose the others.
  std::vector<int64_t> lengths;
  for (const Record& each : records)
    lengths.push_back(for_record(each, [&] { return std::ssize(make_sample_text(each, format).input_ids); }));
  const SampleSource source = {
      .num_samples = num_records,
      .num_tokens = [&](int64_t index) { return lengths[static_cast<size_t>(index)]; },
      .make = [&](int64_t index) { return make_sample(record(index), image_folder, format); }};
  int64_t done = 0;
  visit_batches(source, max_tokens, [&](const std::vector<int64_t>& indices, const PackedBatch& batch) {
    at::Tensor nll_K;
    if (batch.supervised_K.numel() > 0) nll_K = model.nll(batch.to(model.device())).to(at::kCPU, at::kDouble);
    int64_t row = 0;
    for (size_t s = 0; s < indices.size(); ++s) {
      Score& score = scores[static_cast<size_t>(indices[s])];
      score.id = record(indices[s]).id;
      score.num_tokens = batch.cu_seqlens[s + 1] - batch.cu_seqlens[s];
      score.num_supervised = batch.num_supervised[s];
      if (score.num_supervised > 0)
        score.nll_sum = nll_K.narrow(0, row, score.num_supervised).sum().item<double>();
      row += score.num_supervised;
    }
    done += static_cast<int64_t>(indices.size());
    if (progress) progress(done, num_records);
  });
  return scores;
}

}  // namespace caldera
