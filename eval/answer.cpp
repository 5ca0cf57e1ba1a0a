#include "eval/answer.h"

#include <algorithm>

#include "base/error.h"
#include "base/rng.h"
#include "base/strings.h"
#include "data/image.h"

namespace caldera {
namespace {

GenerateOptions generate_options(const LlavaModel& model, const SampleFormat& format,
                                 const AnswerOptions& options) {
  const Tokenizer& tokenizer = *format.tokenizer;
  GenerateOptions generated;
  generated.max_new_tokens = options.max_new_tokens;
  generated.temperature = options.temperature;
  generated.top_p = options.top_p;
  generated.seed = options.seed;
  generated.stop_ids = stop_ids(*format.conversation, tokenizer);
  if (tokenizer.eos_id() >= 0) generated.stop_ids.push_back(tokenizer.eos_id());
  // Rows that only pad the vocabulary stand for no token.
  generated.allowed_vocab = std::min(tokenizer.vocab_size(), model.language->vocab_size());
  const int64_t placeholder = tokenizer.token_id(kImagePlaceholder);
  if (placeholder >= 0) generated.banned_ids.push_back(placeholder);
  return generated;
}

int64_t prompt_length(const std::vector<int64_t>& ids, const SampleFormat& format) {
  const auto num_images = std::count(ids.begin(), ids.end(), kImageTokenIndex);
  return static_cast<int64_t>(ids.size()) + num_images * (format.image_spec.num_image_tokens - 1);
}

}  // namespace

std::vector<Turn> question_turns(const Record& record) {
  std::vector<Turn> turns = record.turns;
  if (!turns.empty() && !turns.back().from_human) turns.pop_back();
  CALDERA_CHECK(!turns.empty(), DataError, "record \"{}\": no human turn to answer", record.id);
  return turns;
}

Sample make_prompt(const std::string& id, const std::vector<Turn>& turns, std::vector<at::Tensor> pixels,
                   const SampleFormat& format) {
  const std::vector<int64_t> ids = tokenize_prompt(turns, *format.conversation, *format.tokenizer);
  const auto num_images = std::count(ids.begin(), ids.end(), kImageTokenIndex);
  CALDERA_CHECK(num_images == static_cast<int64_t>(pixels.size()), DataError,
                "\"{}\": {} {} placeholders for {} pictures", id, num_images, kImagePlaceholder,
                pixels.size());
  const int64_t length = prompt_length(ids, format);
  CALDERA_CHECK(length < format.model_max_length, DataError,
                "\"{}\": the prompt takes {} tokens and the model holds {}: shorten it", id, length,
                format.model_max_length);
  Sample sample;
  sample.id = id;
  for (const int64_t token : ids)
    sample.input_ids.insert(
        sample.input_ids.end(),
        token == kImageTokenIndex ? static_cast<size_t>(format.image_spec.num_image_tokens) : 1, token);
  sample.labels.assign(sample.input_ids.size(), kIgnoreIndex);
  sample.pixels = std::move(pixels);
  return sample;
}

std::string answer(LlavaModel& model, const std::vector<Turn>& turns, const std::vector<at::Tensor>& pixels,
                   const SampleFormat& format, const AnswerOptions& options) {
  const at::NoGradGuard no_grad;
  const Sample prompt = make_prompt("prompt", turns, pixels, format);
  GenerateOptions generated = generate_options(model, format, options);
  generated.max_new_tokens = std::min(
      generated.max_new_tokens, format.model_max_length - static_cast<int64_t>(prompt.input_ids.size()));
  return strip(format.tokenizer->decode(generate(model, pack({prompt}).to(model.device()), generated).at(0)));
}

std::vector<std::string> answer_records(LlavaModel& model, const std::vector<Record>& records,
                                        const std::filesystem::path& image_folder, const SampleFormat& format,
                                        const AnswerOptions& options, const Progress& progress) {
  const at::NoGradGuard no_grad;
  std::vector<std::string> answers(records.size());
  const auto record = [&](int64_t index) -> const Record& { return records[static_cast<size_t>(index)]; };
  const SampleSource source = {
      .num_samples = static_cast<int64_t>(records.size()),
      .num_tokens =
          [&](int64_t index) {
            const auto ids =
                tokenize_prompt(question_turns(record(index)), *format.conversation, *format.tokenizer);
            return prompt_length(ids, format) + options.max_new_tokens;
          },
      .make =
          [&](int64_t index) {
            std::vector<at::Tensor> pixels;
            for (const std::string& image : record(index).images)
              pixels.push_back(preprocess_image(load_image(image_path(image_folder, image)),
                                                format.image_spec, format.image_aspect_ratio));
            return make_prompt(record(index).id, question_turns(record(index)), std::move(pixels), format);
          }};
  GenerateOptions generated = generate_options(model, format, options);
  int64_t done = 0;
  visit_batches(
      source, options.max_tokens_per_batch,
      [&](const std::vector<int64_t>& indices, const PackedBatch& batch) {
        int64_t longest = 0;
        for (size_t s = 0; s < indices.size(); ++s)
          longest = std::max(longest, batch.cu_seqlens[s + 1] - batch.cu_seqlens[s]);
        generated.max_new_tokens = std::min(options.max_new_tokens, format.model_max_length - longest);
        generated.seed = Rng(options.seed, indices.front()).next();  // batches draw apart from each other
        const auto ids = generate(model, batch.to(model.device()), generated);
        for (size_t s = 0; s < indices.size(); ++s)
          answers[static_cast<size_t>(indices[s])] = strip(format.tokenizer->decode(ids.at(s)));
        done += static_cast<int64_t>(indices.size());
        if (progress) progress(done, source.num_samples);
      });
  return answers;
}

}  // namespace caldera
