#include "model/generate.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "base/error.h"
#include "base/rng.h"
#include "model/ops/matmul.h"

namespace caldera {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

// Draws from softmax(logits / temperature) limited to its top_p nucleus: the most likely ids whose
// probabilities before them sum to less than top_p. `uniform` in [0, 1) decides.
int64_t sample(const at::Tensor& logits_V, const GenerateOptions& options, double uniform) {
  const auto [sorted, ids] =
      (logits_V.to(at::kDouble) / options.temperature).softmax(-1).sort(-1, /*descending=*/true);
  const double* p = sorted.const_data_ptr<double>();
  int64_t count = 0;
  double mass = 0;
  while (count < sorted.size(0) && p[count] > 0 && (count == 0 || mass < options.top_p)) mass += p[count++];
  double left = uniform * mass;
  int64_t choice = 0;
  while (choice + 1 < count && left >= p[choice]) left -= p[choice++];
  return ids.const_data_ptr<int64_t>()[choice];
}

// The next id of each row, the `position`th of its answer. logits float32 [S, V]; `sequence` tells the rows.
std::vector<int64_t> next_tokens(at::Tensor logits_SV, const GenerateOptions& options,
                                 const std::vector<size_t>& sequence, int64_t position) {
  const int64_t vocab = logits_SV.size(1);
  if (options.allowed_vocab > 0 && options.allowed_vocab < vocab)
    logits_SV.narrow(1, options.allowed_vocab, vocab - options.allowed_vocab).fill_(kNever);
  for (const int64_t id : options.banned_ids) {
    if (id >= 0 && id < vocab) logits_SV.select(1, id).fill_(kNever);
  }
  std::vector<int64_t> tokens;
  if (options.temperature <= 0) {
    const at::Tensor best = logits_SV.argmax(-1).cpu();
    tokens.assign(best.const_data_ptr<int64_t>(), best.const_data_ptr<int64_t>() + best.numel());
    return tokens;
  }
  const at::Tensor host = logits_SV.cpu();
  for (size_t i = 0; i < sequence.size(); ++i) {
    const size_t s = sequence[i];
    const int64_t number = options.numbers.empty() ? static_cast<int64_t>(s) : options.numbers.at(s);
    const double uniform = Rng(options.seed, number, position).uniform();
    tokens.push_back(sample(host[static_cast<int64_t>(i)], options, uniform));
  }
  return tokens;
}

}  // namespace

std::vector<std::vector<int64_t>> generate(LlavaModel& model, const PackedBatch& prompts,
                                           const GenerateOptions& options) {
  const at::NoGradGuard no_grad;
  const FewRowsGuard few_rows;
  const auto num_sequences = static_cast<size_t>(prompts.num_samples());
  std::vector<std::vector<int64_t>> answers(num_sequences);
  if (options.max_new_tokens <= 0 || num_sequences == 0) return answers;
  CALDERA_CHECK(options.top_p > 0 && options.top_p <= 1, ConfigError,
                "top_p: expected a number in (0, 1], got {}", options.top_p);

  LanguageModel& language = *model.language;
  std::vector<KvCache> caches;
  std::vector<int64_t> last_rows;
  for (size_t s = 0; s < num_sequences; ++s) {
    const int64_t length = prompts.cu_seqlens[s + 1] - prompts.cu_seqlens[s];
    CALDERA_CHECK(length > 0, DataError, "prompt {} is empty: nothing to continue", s);
    CALDERA_CHECK(options.max_length <= 0 || length < options.max_length, DataError,
                  "prompt {} takes {} of {} positions, which leaves none for an answer: shorten it", s,
                  length, options.max_length);
    int64_t longest = length + options.max_new_tokens;
    if (options.max_length > 0) longest = std::min(longest, options.max_length);
    caches.push_back(language.make_cache(longest));
    last_rows.push_back(prompts.cu_seqlens[s + 1] - 1);
  }
  const auto on_device = [&](const std::vector<int64_t>& values) {
    return at::tensor(values, at::kLong).to(model.device());
  };
  const auto head = [&](const at::Tensor& hidden) {
    return language.logits(hidden).to(at::kFloat);
  };

  std::vector<size_t> active(num_sequences);
  std::iota(active.begin(), active.end(), size_t{0});
  std::vector<KvCache*> active_caches;
  for (KvCache& cache : caches) active_caches.push_back(&cache);
  at::Tensor hidden_SD = language.forward(model.embed(prompts), prompts.position_ids_T, prompts.cu_seqlens,
                                          on_device(last_rows), active_caches);
  for (int64_t position = 0;; ++position) {
    const std::vector<int64_t> tokens = next_tokens(head(hidden_SD), options, active, position);
    std::vector<size_t> unfinished;
    std::vector<int64_t> ids, positions, cu_seqlens = {0};
    active_caches.clear();
    for (size_t i = 0; i < active.size(); ++i) {
      const size_t s = active[i];
      const bool stops =
          std::find(options.stop_ids.begin(), options.stop_ids.end(), tokens[i]) != options.stop_ids.end();
      if (stops) continue;
      answers[s].push_back(tokens[i]);
      if (options.on_token && !options.on_token(s, tokens[i])) continue;
      // With the new token, which is not in the cache yet.
      if (options.max_length > 0 && caches[s].length + 1 >= options.max_length) continue;
      unfinished.push_back(s);
      ids.push_back(tokens[i]);
      positions.push_back(caches[s].length);
      cu_seqlens.push_back(static_cast<int64_t>(ids.size()));
      active_caches.push_back(&caches[s]);
    }
    active = std::move(unfinished);
    if (active.empty() || position + 1 == options.max_new_tokens) return answers;
    hidden_SD = language.forward(language.embed(on_device(ids)), on_device(positions), cu_seqlens,
                                 at::Tensor(), active_caches);
  }
}

}  // namespace caldera
