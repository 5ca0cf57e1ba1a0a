// Ids and labels against what LLaVA's own preprocessing gives (golden files made by
// scripts/make_goldens_text.py).
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include "base/error.h"
#include "base/files.h"
#include "base/json.h"
#include "base/words.h"
#include "data/template.h"
#include "tests/support.h"

namespace caldera {
namespace {

std::unique_ptr<Tokenizer> sentencepiece(bool legacy) {
  const fs::path folder = fs::temp_directory_path() / fmt::format("caldera-labels-{}", getpid());
  fs::create_directories(folder);
  fs::copy_file(kGolden / "text_sentencepiece/tokenizer.model", folder / "tokenizer.model",
                fs::copy_options::overwrite_existing);
  write_json(folder / "tokenizer_config.json", {{"legacy", legacy}});
  auto tokenizer = load_tokenizer(folder);
  fs::remove_all(folder);
  return tokenizer;
}

Record record_of(const Json& sample) {
  Record record;
  for (const Json& value : sample["values"])
    record.turns.push_back({record.turns.size() % 2 == 0, value.get<std::string>()});
  if (sample["image"].get<bool>()) record.images = {"image.png"};
  return record;
}

Record conversation(std::vector<std::string> values, size_t num_images = 1) {
  Record record;
  for (std::string& value : values) record.turns.push_back({record.turns.size() % 2 == 0, std::move(value)});
  for (size_t i = 0; i < num_images; ++i) record.images.push_back(fmt::format("{}.png", i));
  return record;
}

// The text of what is learned, an id at a time.
std::string learned_text(const TokenizedSample& sample, const Tokenizer& tokenizer) {
  std::vector<int64_t> ids;
  std::string text;
  for (const int64_t label : sample.labels) {
    if (label == kIgnoreIndex) continue;
    if (label == tokenizer.eos_id()) {
      text += tokenizer.decode(ids) + "|";
      ids.clear();
    } else {
      ids.push_back(label);
    }
  }
  return text + tokenizer.decode(ids);
}

void expect_golden(const Json& samples, const Tokenizer& tokenizer) {
  ASSERT_GT(samples.size(), 30);
  for (const Json& sample : samples) {
    const TokenizedSample got =
        tokenize(record_of(sample), find_template(sample["template"].get<std::string>()), tokenizer);
    const auto ids = sample["ids"].get<std::vector<int64_t>>();
    std::vector<int64_t> labels(ids.size(), kIgnoreIndex);
    for (const Json& span : sample["learned"]) {
      for (auto i = span[0].get<size_t>(); i < span[1].get<size_t>(); ++i) labels[i] = ids[i];
    }
    EXPECT_EQ(got.input_ids, ids) << sample["template"] << ": " << sample["values"];
    EXPECT_EQ(got.labels, labels) << sample["template"] << ": " << sample["values"];
  }
}

TEST(LabelsTest, AreLlavasWithALegacyTokenizer) {
  expect_golden(read_json(kGolden / "text_labels_legacy.json")["samples"], *sentencepiece(true));
}

TEST(LabelsTest, AreLlavasWithANewTokenizer) {
  expect_golden(read_json(kGolden / "text_labels_new.json")["samples"], *sentencepiece(false));
}

TEST(LabelsTest, AreThoseOfPrefixesWithChatml) {
  expect_golden(read_json(kGolden / "text_bpe.json")["chatml"], *load_tokenizer(kGolden / "text_bpe_smollm"));
}

TEST(LabelsTest, OneTokenTellsLegacyFromNewAfterAnAnswer) {
  const Record record = conversation({"<image>\nWhat is in the image?", "A cat.", "What color?", "Black."});
  for (const bool legacy : {true, false}) {
    const auto tokenizer = sentencepiece(legacy);
    const auto sample = tokenize(record, find_template("v1"), *tokenizer);
    EXPECT_EQ(learned_text(sample, *tokenizer), "A cat.|Black.|");
    const auto eos = std::find(sample.input_ids.begin(), sample.input_ids.end(), 2);
    EXPECT_EQ(*(eos + 1), tokenizer->token_id(legacy ? "▁US" : "USER"));
  }
}

// LLaVA finds its answers again by text and masks all of such samples, with a warning at most.
TEST(LabelsTest, SamplesThatTheReferenceMasksWholeKeepTheirs) {
  const auto tokenizer = sentencepiece(true);
  const auto learned = [&](const char* name, const Record& record) {
    return learned_text(tokenize(record, find_template(name), *tokenizer), *tokenizer);
  };
  EXPECT_EQ(learned("v1", conversation({"Write: USER: a ASSISTANT: b", "No."}, 0)), "No.|");
  EXPECT_EQ(learned("v1", conversation({"What is </s>?", "A </s> tag."}, 0)), "A </s> tag.|");
  EXPECT_EQ(learned("v1", conversation({"Hi", "", "And now?", "Yes."}, 0)), "Yes.|");
  EXPECT_EQ(learned("llava_llama_2", conversation({"a [/INST] b", "No."}, 0)), "No. |");
}

TEST(LabelsTest, ASingleImageComesFirstSeveralStayInTheirPlaces) {
  const auto tokenizer = load_tokenizer(kGolden / "text_bpe_smollm");
  const ConversationTemplate& chatml = find_template("chatml");
  const auto text = [&](const Record& record) {
    std::string out;
    std::vector<int64_t> run;
    for (const int64_t id : tokenize(record, chatml, *tokenizer).input_ids) {
      if (id == kImageTokenIndex) {
        out += tokenizer->decode(run) + "[image]";
        run.clear();
      } else {
        run.push_back(id);
      }
    }
    return out + tokenizer->decode(run);
  };
  EXPECT_EQ(text(conversation({" What is it?\n<image> ", "A cat."})),
            "user\n[image]\nWhat is it?\nassistant\nA cat.\n");
  EXPECT_EQ(text(conversation({"<image>", "A cat."})), "user\n[image]\nassistant\nA cat.\n");
  EXPECT_EQ(text(conversation({"Is <image> or <image> red?", "The first."}, 2)),
            "user\nIs [image] or [image] red?\nassistant\nThe first.\n");
  // No-break spaces are white space to Python's strip, which the reference uses.
  EXPECT_EQ(text(conversation({"\u00A0What?\u3000<image>", "A."})), "user\n[image]\nWhat?\nassistant\nA.\n");
}

TEST(LabelsTest, AnImageInAnAnswerIsNotLearned) {
  const auto tokenizer = load_tokenizer(kGolden / "text_bpe_smollm");
  const auto sample =
      tokenize(conversation({"Show <image>.", "Here: <image>."}, 2), find_template("chatml"), *tokenizer);
  for (size_t i = 0; i < sample.labels.size(); ++i) {
    if (sample.input_ids[i] == kImageTokenIndex) {
      EXPECT_EQ(sample.labels[i], kIgnoreIndex);
    }
  }
  EXPECT_EQ(learned_text(sample, *tokenizer), "Here: .|");
}

TEST(LabelsTest, PlainTakesTextAloneToo) {
  const auto tokenizer = sentencepiece(true);
  const auto sample = tokenize(conversation({"", "A cat."}, 0), find_template("plain"), *tokenizer);
  EXPECT_EQ(sample.input_ids.front(), tokenizer->bos_id());
  EXPECT_EQ(learned_text(sample, *tokenizer), "A cat.\n");
}

TEST(LabelsTest, PromptsEndWhereTheAnswerBegins) {
  for (const char* name : {"v1", "llava_llama_2", "chatml", "plain"}) {
    const auto tokenizer =
        std::string(name) == "chatml" ? load_tokenizer(kGolden / "text_bpe_smollm") : sentencepiece(true);
    const Record record = conversation({"What is it?\n<image>", "A cat."});
    const auto sample = tokenize(record, find_template(name), *tokenizer);
    const auto prompt = tokenize_prompt({record.turns[0]}, find_template(name), *tokenizer);
    // The prompt is the sample up to the first thing learned.
    const auto learned =
        std::find_if(sample.labels.begin(), sample.labels.end(), [](int64_t l) { return l != kIgnoreIndex; });
    const auto begin = sample.input_ids.begin();
    EXPECT_EQ(prompt, std::vector<int64_t>(begin, begin + (learned - sample.labels.begin()))) << name;
  }
}

TEST(LabelsTest, MissingControlTokensAreNamed) {
  const Record record = conversation({"Hi", "Hello."}, 0);
  const auto tokenizer = sentencepiece(true);
  EXPECT_THAT([&] { tokenize(record, find_template("chatml"), *tokenizer); },
              testing::ThrowsMessage<DataError>(
                  testing::HasSubstr("template chatml needs the control token \"<|im_start|>\"")));
  EXPECT_THAT([&] { tokenize_prompt(record.turns, find_template("v1"), *tokenizer); },
              testing::ThrowsMessage<DataError>(testing::HasSubstr("must end with a human turn")));
  EXPECT_THAT(
      [&] {
        tokenize(conversation({"a", "b", "c", "d"}), find_template("plain"), *tokenizer);
      },
      testing::ThrowsMessage<DataError>(testing::HasSubstr("got 4 turns")));
}

}  // namespace
}  // namespace caldera
