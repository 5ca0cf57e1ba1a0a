#include "data/template.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

#include "base/error.h"
#include "base/files.h"
#include "tests/support.h"

namespace caldera {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::ThrowsMessage;

const std::vector<Turn> kTurns = {{true, "q1"}, {false, "a1"}, {true, "q2"}, {false, "a2"}};

std::string rendered(const char* name, const std::vector<Turn>& turns, bool for_generation) {
  std::string text;
  for (const Segment& segment : find_template(name).render(turns, for_generation)) text += segment.text;
  return text;
}
std::string learned(const char* name, const std::vector<Turn>& turns) {
  std::string text;
  for (const Segment& segment : find_template(name).render(turns, false)) {
    if (segment.supervised) text += segment.text;
  }
  return text;
}

TEST(TemplateTest, V1) {
  const std::string system =
      "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
      "detailed, and polite "
      "answers to the user's questions. ";
  EXPECT_EQ(rendered("v1", kTurns, false), system + "USER: q1 ASSISTANT: a1</s>USER: q2 ASSISTANT: a2</s>");
  EXPECT_EQ(rendered("v1", {kTurns[0]}, true), system + "USER: q1 ASSISTANT:");
  EXPECT_EQ(learned("v1", kTurns), " a1</s> a2</s>");
  EXPECT_EQ(rendered("vicuna_v1", kTurns, false), rendered("v1", kTurns, false));
  EXPECT_THAT(rendered("llava_v1", kTurns, false), HasSubstr("a curious human"));
  // An empty answer has no </s>, as in LLaVA.
  EXPECT_EQ(rendered("v1", {{true, "q"}, {false, ""}, {true, "r"}, {false, "b"}}, false),
            system + "USER: q ASSISTANT:USER: r ASSISTANT: b</s>");
}

TEST(TemplateTest, Llama2) {
  const std::string system =
      "<<SYS>>\nYou are a helpful language and vision assistant. You are able to understand the visual "
      "content that the user provides, "
      "and assist the user with a variety of tasks using natural language.\n<</SYS>>\n\n";
  EXPECT_EQ(rendered("llava_llama_2", kTurns, false),
            "[INST] " + system + "q1 [/INST] a1 </s><s>[INST] q2 [/INST] a2 </s>");
  EXPECT_EQ(rendered("llava_llama_2", {kTurns[0]}, true), "[INST] " + system + "q1 [/INST]");
  EXPECT_EQ(learned("llava_llama_2", kTurns), " a1 </s> a2 </s>");
  EXPECT_THAT(rendered("llama_2", kTurns, false), HasSubstr("respectful and honest assistant"));
}

TEST(TemplateTest, Plain) {
  EXPECT_EQ(rendered("plain", {{true, "Describe it.\n<image>"}, {false, "a cat"}}, false), "<image>a cat\n");
  EXPECT_EQ(rendered("plain", {{true, "Describe it.\n<image>"}}, true), "<image>");
  EXPECT_EQ(learned("plain", {{true, "<image>"}, {false, "a cat"}}), "a cat\n");
}

TEST(TemplateTest, V0TrainsOnOneFormAndAnswersInAnother) {
  const std::string system =
      "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
      "detailed, and polite "
      "answers to the human's questions.";
  EXPECT_EQ(rendered("v0", kTurns, false),
            system + "\n\n### Human: q1\n### Assistant: a1\n### Human: q2\n### Assistant: a2\n### ");
  EXPECT_EQ(learned("v0", kTurns), "###### Assistant: a1\n###### Assistant: a2\n### ");
  const std::string prompt = rendered("v0", {kTurns[0]}, true);
  EXPECT_THAT(prompt,
              testing::StartsWith(system + "###Human: What are the key differences between renewable"));
  EXPECT_THAT(prompt, testing::EndsWith("and social instability.\n###Human: q1###Assistant:"));
  EXPECT_EQ(rendered("llava_v0", {kTurns[0]}, true), system + "###Human: q1###Assistant:");
}

TEST(TemplateTest, Chatml) {
  EXPECT_EQ(rendered("chatml", kTurns, false),
            "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n"
            "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\na2<|im_end|>\n");
  EXPECT_EQ(rendered("chatml", {kTurns[0]}, true), "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n");
  EXPECT_EQ(learned("chatml", kTurns), "a1<|im_end|>a2<|im_end|>");
}

TEST(TemplateTest, ImagesBecomePlaceholdersAndControlTokensAreNeverText) {
  for (const Segment& segment :
       find_template("v1").render({{true, "<image>\nsay </s>"}, {false, "a</s>"}}, false)) {
    if (segment.kind == Segment::Kind::kText) {
      EXPECT_THAT(segment.text, testing::Not(HasSubstr("<image>")));
    } else if (segment.kind == Segment::Kind::kControl) {
      EXPECT_EQ(segment.text, "</s>");
    }
  }
}

TEST(TemplateTest, NamesAreUniqueAndUnknownOnesAreAnsweredWithTheKnown) {
  std::set<std::string> names;
  for (const ConversationTemplate& conversation : conversation_templates())
    EXPECT_TRUE(names.insert(conversation.name).second);
  EXPECT_THAT([] { find_template("chatlm"); },
              ThrowsMessage<ConfigError>(HasSubstr("did you mean \"chatml\"?")));
  EXPECT_THAT([] { find_template("zzzzzz"); },
              ThrowsMessage<ConfigError>(HasSubstr("known: plain, v1, vicuna_v1")));
}

TEST(TemplateTest, ATokenizersOwnTemplateIsRecognised) {
  const fs::path folder = fs::temp_directory_path() / "caldera-template-test";
  fs::remove_all(folder);
  const auto smollm = load_tokenizer(kGolden / "text_bpe_smollm");
  EXPECT_THAT([&] { template_of(*smollm); },
              ThrowsMessage<ConfigError>(HasSubstr("no chat template of its own")));
  const auto saved_with = [&](const std::string& jinja) {
    smollm->save(folder, jinja);
    return load_tokenizer(folder);
  };
  EXPECT_STREQ(template_of(*saved_with("{{ '<|im_start|>' + messages[0]['role'] }}")).name, "chatml");
  for (const char* name : {"plain", "v1", "llava_llama_2", "chatml"}) {
    EXPECT_STREQ(template_of(*saved_with(find_template(name).jinja)).name, name);
  }
  EXPECT_THAT([&] { template_of(*saved_with("{{ 'other' }}")); },
              ThrowsMessage<ConfigError>(HasSubstr("none that is known")));
  fs::remove_all(folder);
}

TEST(TemplateTest, StopIdsEndAnAnswer) {
  const auto smollm = load_tokenizer(kGolden / "text_bpe_smollm");
  EXPECT_THAT(stop_ids(find_template("chatml"), *smollm), ElementsAre(smollm->token_id("<|im_end|>")));
  EXPECT_THAT(stop_ids(find_template("plain"), *smollm), ElementsAre(smollm->token_id("Ċ")));
  const auto llama = load_tokenizer(kGolden / "text_sentencepiece");
  EXPECT_THAT(stop_ids(find_template("v1"), *llama), ElementsAre(2));
  EXPECT_THAT(stop_ids(find_template("plain"), *llama), ElementsAre(llama->token_id("<0x0A>")));
  EXPECT_THAT(stop_ids(find_template("v0"), *llama), ElementsAre(llama->token_id("##")));
}

TEST(TemplateTest, OnlyEndsInPlainTextAreLookedForInTheText) {
  const auto qwen2 = load_tokenizer(kGolden / "text_bpe_qwen2");
  EXPECT_THAT(stop_texts(find_template("chatml"), *qwen2), IsEmpty());
  EXPECT_THAT(stop_texts(find_template("plain"), *qwen2), ElementsAre("\n"));
  const auto llama = load_tokenizer(kGolden / "text_sentencepiece");
  EXPECT_THAT(stop_texts(find_template("v1"), *llama), IsEmpty());  // "</s>" in plain letters ends nothing
  EXPECT_THAT(stop_texts(find_template("plain"), *llama), ElementsAre("\n"));
  EXPECT_THAT(stop_texts(find_template("v0"), *llama), ElementsAre("###"));
}

}  // namespace
}  // namespace caldera
