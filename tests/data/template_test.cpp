#include "data/template.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

#include "base/chat_template.h"
#include "base/error.h"
#include "base/files.h"
#include "base/json.h"
#include "base/words.h"
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

TEST(TemplateTest, ASystemTurnTakesThePlaceOfTheTemplatesOwn) {
  std::vector<Turn> turns = kTurns;
  turns[0].system = "Speak French.";
  EXPECT_EQ(rendered("v1", turns, false),
            "Speak French. USER: q1 ASSISTANT: a1</s>USER: q2 ASSISTANT: a2</s>");
  EXPECT_EQ(rendered("v1", {turns[0]}, true), "Speak French. USER: q1 ASSISTANT:");
  EXPECT_EQ(rendered("llava_llama_2", {turns[0]}, true),
            "[INST] <<SYS>>\nSpeak French.\n<</SYS>>\n\nq1 [/INST]");
  EXPECT_EQ(rendered("v0", {turns[0], turns[1]}, false),
            "Speak French.\n\n### Human: q1\n### Assistant: a1\n### ");
  EXPECT_EQ(rendered("llava_v0", {turns[0]}, true), "Speak French.###Human: q1###Assistant:");
  EXPECT_EQ(
      rendered("chatml", {turns[0]}, true),
      "<|im_start|>system\nSpeak French.<|im_end|>\n<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n");
  for (const char* name : {"v1", "llava_llama_2", "chatml"})
    EXPECT_EQ(learned(name, turns), learned(name, kTurns));
  EXPECT_THAT(
      [&] {
        rendered("plain", {turns[0], turns[1]}, false);
      },
      ThrowsMessage<DataError>(HasSubstr("template plain has no place for a system message")));
}

TEST(TemplateTest, TemplatesOfTheChatmlFamily) {
  EXPECT_EQ(
      rendered("qwen", {kTurns[0]}, true),
      "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + rendered("chatml", {kTurns[0]}, true));
  EXPECT_EQ(
      rendered("mpt", kTurns, false),
      "<|im_start|>system\nA conversation between a user and an LLM-based AI assistant. The assistant gives "
      "helpful and honest answers.<|im_end|><|im_start|>user\nq1<|im_end|><|im_start|>assistant\na1<|im_end|>"
      "<|im_start|>user\nq2<|im_end|><|im_start|>assistant\na2<|im_end|>");
  EXPECT_THAT(rendered("chatml_direct", {kTurns[0]}, true),
              testing::StartsWith("<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n"));
  std::vector<Turn> turns = kTurns;
  turns[0].system = "Be brief.";
  for (const char* name : {"qwen", "mpt", "chatml_direct"}) {
    EXPECT_EQ(learned(name, kTurns), "a1<|im_end|>a2<|im_end|>") << name;
    EXPECT_THAT(rendered(name, turns, false), testing::StartsWith("<|im_start|>system\nBe brief.<|im_end|>"))
        << name;
  }
}

TEST(TemplateTest, Llama3) {
  const std::string answered =
      "<|start_header_id|>user<|end_header_id|>\n\nq1<|eot_id|><|start_header_id|>assistant<|end_header_id|>"
      "\n\n";
  EXPECT_EQ(rendered("llama_3", {{true, " q1\n"}, {false, "\ta1 "}}, false), answered + "a1<|eot_id|>");
  EXPECT_EQ(rendered("llama_3", {kTurns[0]}, true), answered);
  EXPECT_EQ(learned("llama_3", kTurns), "a1<|eot_id|>a2<|eot_id|>");
  std::vector<Turn> turns = {kTurns[0]};
  turns[0].system = "Be brief. ";
  EXPECT_EQ(rendered("llama_3", turns, true),
            "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>" + answered);
  EXPECT_THAT(rendered("llava_llama_3", {kTurns[0]}, true),
              testing::StartsWith(
                  "<|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision"));
}

TEST(TemplateTest, MistralInstruct) {
  EXPECT_EQ(rendered("mistral_instruct", kTurns, false),
            "[INST] q1 [/INST] a1 </s>[INST] q2 [/INST] a2 </s>");
  EXPECT_EQ(rendered("mistral_instruct", {kTurns[0]}, true), "[INST] q1 [/INST]");
  EXPECT_EQ(learned("mistral_instruct", kTurns), " a1 </s> a2 </s>");
  std::vector<Turn> turns = kTurns;
  turns[0].system = "Be brief.";
  EXPECT_THAT(rendered("mistral_instruct", turns, false),
              testing::StartsWith("[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nq1 [/INST]"));
}

TEST(TemplateTest, Phi3) {
  EXPECT_EQ(rendered("phi3", {kTurns[0], kTurns[1]}, false),
            "<|user|>\nq1<|end|>\n<|assistant|>\na1<|end|>\n");
  EXPECT_EQ(rendered("phi3", {kTurns[0]}, true), "<|user|>\nq1<|end|>\n<|assistant|>\n");
  EXPECT_EQ(learned("phi3", kTurns), "a1<|end|>a2<|end|>");
  std::vector<Turn> turns = {kTurns[0]};
  turns[0].system = "Be brief.";
  EXPECT_THAT(rendered("phi3", turns, true), testing::StartsWith("<|system|>\nBe brief.<|end|>\n<|user|>"));
}

// HF's rstrip: the line breaks behind Phi-3's tokens belong to them.
TEST(TemplateTest, ControlTokensTakeWhiteSpaceBehindThemAlong) {
  const TemporaryFolder folder;
  Json json = read_json(kGolden / "text_bpe_smollm/tokenizer.json");
  const auto plain = load_tokenizer(kGolden / "text_bpe_smollm");
  int64_t id = plain->vocab_size();
  for (const char* name : {"<|user|>", "<|assistant|>", "<|end|>"})
    json["added_tokens"].push_back({{"id", id++}, {"content", name}, {"special", true}, {"rstrip", true}});
  write_json(folder.path() / "tokenizer.json", json);
  const auto tokenizer = load_tokenizer(folder.path());
  const TokenizedSample sample =
      tokenize({"r", {}, {{true, "red"}, {false, " blue "}}, ""}, find_template("phi3"), *tokenizer);
  std::vector<int64_t> expected = {id - 3};
  const auto put = [&](const char* text) {
    for (const Token& token : plain->encode(text)) expected.push_back(token.id);
  };
  put("red");
  expected.insert(expected.end(), {id - 1, id - 2});
  const size_t answer = expected.size();
  put("blue ");
  expected.push_back(id - 1);
  EXPECT_EQ(sample.input_ids, expected);
  for (size_t i = 0; i < expected.size(); ++i)
    EXPECT_EQ(sample.labels[i], i < answer ? kIgnoreIndex : expected[i]);
}

TEST(TemplateTest, AFoldersOwnChatTemplateIsKeptWhereItIsTheSame) {
  const TemporaryFolder folder;
  const auto smollm = load_tokenizer(kGolden / "text_bpe_smollm");
  const auto exported = [&](const std::string& own, const char* name) {
    smollm->save(folder.path(), own);
    return exported_chat_template(find_template(name), *load_tokenizer(folder.path()));
  };
  const std::string llama_3 = "{{ bos_token }}<|start_header_id|>{{ message['role'] }}<|eot_id|>";
  EXPECT_THAT(exported(llama_3, "llama_3"),
              testing::EndsWith("{%- set messages = as_text.messages -%}" + llama_3));
  EXPECT_EQ(exported(llama_3 + "{# 'image' #}", "llama_3"), llama_3 + "{# 'image' #}");  // takes pictures
  EXPECT_EQ(exported(llama_3, "v0"), llama_3);                                           // which has none
  EXPECT_EQ(exported(llama_3, "chatml"), find_template("chatml").jinja);
  EXPECT_EQ(exported("<|im_start|> You are Qwen", "chatml"), find_template("chatml").jinja);
  EXPECT_EQ(exported("", "chatml"), find_template("chatml").jinja);
  const std::string again = exported(exported(llama_3, "llama_3"), "llama_3");
  EXPECT_EQ(again, exported(again, "llama_3"));  // it does not grow
}

TEST(TemplateTest, AChatTemplateIsReadWhereverTransformersLooksForIt) {
  const TemporaryFolder folder;
  EXPECT_EQ(read_chat_template(folder.path()), "");
  write_json(folder.path() / "tokenizer_config.json",
             {{"chat_template", Json::array({{{"name", "tool_use"}, {"template", "no"}},
                                             {{"name", "default"}, {"template", "listed"}}})}});
  EXPECT_EQ(read_chat_template(folder.path()), "listed");
  write_json(folder.path() / "tokenizer_config.json", {{"chat_template", "plain"}});
  EXPECT_EQ(read_chat_template(folder.path()), "plain");
  write_json(folder.path() / "chat_template.json", {{"chat_template", "older"}});
  EXPECT_EQ(read_chat_template(folder.path()), "older");
  folder.write("chat_template.jinja", "file");
  EXPECT_EQ(read_chat_template(folder.path()), "file");
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
  for (const char* name : {"plain", "v1", "llava_llama_2", "chatml", "qwen", "mpt", "chatml_direct",
                           "llama_3", "llava_llama_3", "mistral_instruct", "phi3"}) {
    EXPECT_STREQ(template_of(*saved_with(find_template(name).jinja)).name, name);
  }
  EXPECT_THAT([&] { template_of(*saved_with("{{ 'other' }}")); },
              ThrowsMessage<ConfigError>(HasSubstr("none that is known")));
  // Of the same family, but not the same text.
  for (const char* jinja :
       {"<|start_header_id|> <|eot_id|> Cutting Knowledge Date", "'<|im_start|>' + message['role'] + ' '"})
    EXPECT_THAT([&] { template_of(*saved_with(jinja)); },
                ThrowsMessage<ConfigError>(HasSubstr("none that is known")));
  EXPECT_STREQ(template_of(*saved_with("<|start_header_id|> <|eot_id|>")).name, "llama_3");
  EXPECT_STREQ(template_of(*saved_with("<|user|> <|end|> <|assistant|>")).name, "phi3");
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
