#include "eval/answer.h"

#include <algorithm>

#include "base/error.h"
#include "base/strings.h"

namespace caldera {
namespace {

GenerateOptions generate_options(const LlavaModel& model, const SampleFormat& format,
                                 const AnswerOptions& options) {
  const Tokenizer& tokenizer = *format.tokenizer;
  GenerateOptions generated;
  generated.max_new_tokens = options.max_new_tokens;
  generated.max_length = format.model_max_length;
  generated.temperature = options.temperature;
  generated.top_p = options.top_p;
  generated.seed = options.seed;
  generated.stop_ids = stop_ids(*format.conversation, tokenizer);
  if (tokenizer.eos_id() >= 0) generated.stop_ids.push_back(tokenizer.eos_id());
  // Llama 3 names several.
  if (const Json ends = model.language->config().value("eos_token_id", Json()); ends.is_array())
    for (const Json& id : ends)
      if (id.is_number_integer()) generated.stop_ids.push_back(id.get<int64_t>());
  // Rows that only pad the vocabulary stand for no token.
  generated.allowed_vocab = std::min(tokenizer.vocab_size(), model.language->vocab_size());
  const int64_t placeholder = tokenizer.token_id(kImagePlaceholder);
  if (placeholder >= 0) generated.banned_ids.push_back(placeholder);
  return generated;
}

// With its images expanded. Throws DataError where no room is left for an answer.
int64_t prompt_length(const std::vector<int64_t>& ids, const SampleFormat& format) {
  const auto num_images = std::count(ids.begin(), ids.end(), kImageTokenIndex);
  const int64_t length =
      static_cast<int64_t>(ids.size()) + num_images * (format.image_spec.num_image_tokens - 1);
  CALDERA_CHECK(length < format.model_max_length, DataError,
                "the prompt takes {} tokens and the model holds {}: shorten it", length,
                format.model_max_length);
  return length;
}

// Where the first of these texts begins in `text`; its end where none does.
size_t find_stop(const std::string& text, const std::vector<std::string>& stops) {
  size_t end = text.size();
  for (const std::string& stop : stops) end = std::min(end, text.find(stop));
  return end;
}

// Answers in words, cut at the template's stop, without white space around.
std::vector<std::string> generate_words(LlavaModel& model, const PackedBatch& prompts,
                                        const SampleFormat& format, GenerateOptions options) {
  const Tokenizer& tokenizer = *format.tokenizer;
  const std::vector<std::string> stops = stop_texts(*format.conversation, tokenizer);
  std::vector<std::vector<int64_t>> so_far(static_cast<size_t>(prompts.num_samples()));
  if (!stops.empty())
    options.on_token = [&](size_t s, int64_t token) {
      so_far[s].push_back(token);
      const std::string text = tokenizer.decode(so_far[s]);
      return find_stop(text, stops) == text.size();
    };
  std::vector<std::string> answers;
  for (const std::vector<int64_t>& ids : generate(model, prompts.to(model.device()), options)) {
    const std::string text = tokenizer.decode(ids);
    answers.push_back(strip(text.substr(0, find_stop(text, stops))));
  }
  return answers;
}

}  // namespace

std::vector<Turn> question_turns(const Record& record) {
  std::vector<Turn> turns = record.turns;
  if (!turns.empty() && !turns.back().from_human) turns.pop_back();
  CALDERA_CHECK(!turns.empty(), DataError, "no human turn to answer");
  return turns;
}

Sample make_prompt(const std::string& id, const std::vector<Turn>& turns, std::vector<at::Tensor> pixels,
                   const SampleFormat& format) {
  const std::vector<int64_t> ids = tokenize_prompt(turns, *format.conversation, *format.tokenizer);
  const auto num_images = std::count(ids.begin(), ids.end(), kImageTokenIndex);
  CALDERA_CHECK(num_images == static_cast<int64_t>(pixels.size()), DataError,
                "{} {} placeholders for {} pictures", num_images, kImagePlaceholder, pixels.size());
  prompt_length(ids, format);  // leaves room
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
  const PackedBatch prompt = pack({make_prompt("prompt", turns, pixels, format)});
  return generate_words(model, prompt, format, generate_options(model, format, options)).at(0);
}

std::vector<std::string> answer_records(LlavaModel& model, const std::vector<Record>& records,
                                        const std::filesystem::path& image_folder, const SampleFormat& format,
                                        const AnswerOptions& options, const Progress& progress) {
  const at::NoGradGuard no_grad;
  const auto num_records = static_cast<int64_t>(records.size());
  if (progress) progress(0, num_records);
  // All of them before the first answer: a prompt without an answer must not lose the others'.
  std::vector<int64_t> lengths;
  for (const Record& record : records)
    lengths.push_back(for_record(record, [&] {
      return prompt_length(tokenize_prompt(question_turns(record), *format.conversation, *format.tokenizer),
                           format);
    }));
  const SampleSource source = {
      .num_samples = num_records,
      .num_tokens =
          [&](int64_t index) {
            return std::min(lengths[static_cast<size_t>(index)] + options.max_new_tokens,
                            format.model_max_length);
          },
      .make =
          [&](int64_t index) {
            const Record& record = records[static_cast<size_t>(index)];
            return for_record(record, [&] {
              std::vector<at::Tensor> pixels;
              for (const std::string& image : record.images)
                pixels.push_back(load_pixels(image_folder, image, format));
              return make_prompt(record.id, question_turns(record), std::move(pixels), format);
            });
          }};
  GenerateOptions generated = generate_options(model, format, options);
  std::vector<std::string> answers(records.size());
  int64_t done = 0;
  visit_batches(source, options.max_tokens_per_batch,
                [&](const std::vector<int64_t>& indices, const PackedBatch& batch) {
                  generated.numbers = indices;
                  std::vector<std::string> words = generate_words(model, batch, format, generated);
                  for (size_t s = 0; s < indices.size(); ++s)
                    answers[static_cast<size_t>(indices[s])] = std::move(words[s]);
                  done += static_cast<int64_t>(indices.size());
                  if (progress) progress(done, num_records);
                });
  return answers;
}

}  // namespace caldera
