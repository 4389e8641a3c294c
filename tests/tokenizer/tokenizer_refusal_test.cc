// Files that must be refused, each with file, field, found and allowed.
#include <gtest/gtest.h>

#include <functional>

#include "tests/tokenizer/tokenizer_files.h"

namespace refocus {
namespace {

void ExpectRefused(const Status& status, const std::string& words) {
  ASSERT_FALSE(status.ok()) << "expected a refusal with: " << words;
  EXPECT_EQ(DetailOf(status).reason, "CONFIG_INVALID") << status;
  EXPECT_NE(std::string(status.message()).find(words), std::string::npos) << words << " is not in: " << status;
}

struct Change {
  const char* name;
  const char* words;  // in the message
  std::function<void(Json&)> apply;
};

Json Regex(const std::string& pattern) {
  return {{"type", "Sequence"},
          {"pretokenizers",
           {{{"type", "Split"}, {"pattern", {{"Regex", pattern}}}, {"behavior", "Isolated"}, {"invert", false}},
            {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}}}}};
}

Json Added(int64_t id, const std::string& text) {
  return {{"id", id},        {"content", text},     {"single_word", false}, {"lstrip", false},
          {"rstrip", false}, {"normalized", false}, {"special", true}};
}

const std::vector<Change>& Changes() {
  static const std::vector<Change> changes = {
      {"duplicate id", "model.vocab", [](Json& t) { t["model"]["vocab"]["a"] = t["model"]["vocab"]["b"]; }},
      {"hole", "without holes", [](Json& t) { t["model"]["vocab"]["brandnew"] = t["model"]["vocab"].size() + 9; }},
      {"negative id", "without holes", [](Json& t) { t["model"]["vocab"]["a"] = -1; }},
      {"id as text", "without holes", [](Json& t) { t["model"]["vocab"]["a"] = "7"; }},
      {"empty vocabulary", "model.vocab", [](Json& t) { t["model"]["vocab"] = Json::object(); }},
      {"merge of unknown token", "unknown token 'QQQ'",
       [](Json& t) {
         t["model"]["merges"].push_back({"QQQ", "a"});
       }},
      {"merge without result", "unknown token 'Za'",
       [](Json& t) {
         t["model"]["merges"].push_back({"Z", "a"});
       }},
      {"cyclic merge", "unknown token ''",
       [](Json& t) {
         t["model"]["merges"].push_back({"", "a"});
       }},
      {"merge of three", "model.merges[600]", [](Json& t) { t["model"]["merges"].push_back("a b c"); }},
      {"merge of one", "model.merges[600]", [](Json& t) { t["model"]["merges"].push_back("a "); }},
      {"merge as number", "model.merges[600]", [](Json& t) { t["model"]["merges"].push_back(7); }},
      {"other model", "model.type", [](Json& t) { t["model"]["type"] = "Unigram"; }},
      {"byte fallback", "model.byte_fallback", [](Json& t) { t["model"]["byte_fallback"] = true; }},
      {"dropout", "model.dropout", [](Json& t) { t["model"]["dropout"] = 0.1; }},
      {"prefix", "continuing_subword_prefix", [](Json& t) { t["model"]["continuing_subword_prefix"] = "##"; }},
      {"added id twice", "twice",
       [](Json& t) { t["added_tokens"].push_back(Added(t["added_tokens"][0]["id"], "<x>")); }},
      {"added text twice", "another id", [](Json& t) { t["added_tokens"].push_back(Added(860, "<|begin|>")); }},
      {"added behind a hole", "a hole", [](Json& t) { t["added_tokens"].push_back(Added(9999, "<x>")); }},
      {"added against vocabulary", "the vocabulary's token",
       [](Json& t) { t["added_tokens"].push_back(Added(3, "<x>")); }},
      {"added id out of range", "added_tokens.id",
       [](Json& t) { t["added_tokens"].push_back(Added(int64_t{1} << 40, "<x>")); }},
      {"added empty", "content", [](Json& t) { t["added_tokens"].push_back(Added(860, "")); }},
      {"added huge", "1 to 512 bytes",
       [](Json& t) { t["added_tokens"].push_back(Added(860, std::string(1 << 20, 'x'))); }},
      {"added very many", "at most 16384",
       [](Json& t) {
         for (int i = 0; i < 20'000; ++i) t["added_tokens"].push_back(Added(860 + i, std::to_string(i)));
       }},
      {"lstrip", "lstrip", [](Json& t) { t["added_tokens"][0]["lstrip"] = 1; }},
      {"single_word", "single_word", [](Json& t) { t["added_tokens"][0]["single_word"] = "yes"; }},
      {"normalizer", "NFKC",
       [](Json& t) {
         t["normalizer"] = {{"type", "NFKC"}};
       }},
      {"pre-tokenizer", "Metaspace",
       [](Json& t) {
         t["pre_tokenizer"] = {{"type", "Metaspace"}};
       }},
      {"no byte level", "ByteLevel",
       [](Json& t) {
         t["pre_tokenizer"] = {{"type", "Digits"}, {"individual_digits", true}};
       }},
      {"no pre-tokenizer", "pre_tokenizer.type", [](Json& t) { t["pre_tokenizer"] = nullptr; }},
      {"split behavior", "MergedWithNext",
       [](Json& t) {
         t["pre_tokenizer"] = Regex("a");
         t["pre_tokenizer"]["pretokenizers"][0]["behavior"] = "MergedWithNext";
       }},
      {"step behind byte level", "behind ByteLevel",
       [](Json& t) {
         t["pre_tokenizer"] = Regex("a");
         t["pre_tokenizer"]["pretokenizers"].push_back({{"type", "Digits"}});
       }},
      {"decoder", "decoder",
       [](Json& t) {
         t["decoder"] = {{"type", "WordPiece"}};
       }},
      {"post-processor", "BertProcessing",
       [](Json& t) {
         t["post_processor"] = {{"type", "BertProcessing"}};
       }},
      {"template with end", "post_processor.single",
       [](Json& t) {
         t["post_processor"] = {{"type", "TemplateProcessing"},
                                {"single", {{{"Sequence", {{"id", "A"}}}}, {{"SpecialToken", {{"id", "<|end|>"}}}}}},
                                {"special_tokens", Json::object()}};
       }},
      {"exponential", "backtracks", [](Json& t) { t["pre_tokenizer"] = Regex(R"((a+)+b)"); }},
      {"exponential by class", "backtracks", [](Json& t) { t["pre_tokenizer"] = Regex(R"((?:\p{L}+)+!|.)"); }},
      {"exponential by two letters", "backtracks",
       [](Json& t) { t["pre_tokenizer"] = Regex(R"((?:xy|yx|x|y)+(?:xy|y)+z)"); }},
      {"nothing", "can match nothing", [](Json& t) { t["pre_tokenizer"] = Regex("a*"); }},
      {"broken pattern", "not valid", [](Json& t) { t["pre_tokenizer"] = Regex("(a"); }},
      {"word class", "\\w at", [](Json& t) { t["pre_tokenizer"] = Regex("\\w+"); }},
      {"anchor", "anchor", [](Json& t) { t["pre_tokenizer"] = Regex("^a"); }},
      {"back reference", "\\1 at", [](Json& t) { t["pre_tokenizer"] = Regex("(a)\\1"); }},
      {"callout", "(?C1", [](Json& t) { t["pre_tokenizer"] = Regex("a(?C1)"); }},
      {"verb", "(*AC", [](Json& t) { t["pre_tokenizer"] = Regex("(*ACCEPT)a"); }},
      {"intersection", "intersection", [](Json& t) { t["pre_tokenizer"] = Regex("[a-z&&b]"); }},
      {"script", "p{Han}", [](Json& t) { t["pre_tokenizer"] = Regex("\\p{Han}+"); }},
      {"huge pattern", "5000 bytes", [](Json& t) { t["pre_tokenizer"] = Regex(std::string(5000, 'a')); }},
  };
  return changes;
}

TEST(Refusals, UnchangedTreeLoads) {
  const auto tokenizer = LoadTree(GoldenTree("gpt-2"));
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
}

TEST(Refusals, EveryChangeIsNamed) {
  for (const Change& change : Changes()) {
    SCOPED_TRACE(change.name);
    Json tree = GoldenTree("gpt-2");
    change.apply(tree);
    ExpectRefused(LoadTree(tree).status(), change.words);
  }
}

TEST(Refusals, MissingBytesNeedNoUnknownToken) {
  Json tree = GoldenTree("smollm");
  tree["model"]["unk_token"] = "<|endoftext|>";
  ExpectRefused(LoadTree(tree).status(), "model.unk_token");
  tree = GoldenTree("gpt-2");
  tree["model"]["unk_token"] = "<|begin|>";
  EXPECT_TRUE(LoadTree(tree).ok());
}

TEST(Refusals, BrokenFiles) {
  for (const std::string text : {"", "{", "\xef\xbb\xbf{}", "[]", "{} // x", "{\"a\":1,}", "7"}) {
    const TempDir folder;
    folder.Write("tokenizer.json", text);
    ExpectRefused(Tokenizer::Load(folder.path()).status(), "tokenizer.json");
  }
}

TEST(Refusals, NeighboursNameKnownTokens) {
  const std::pair<const char*, const char*> files[] = {{"tokenizer_config.json", R"({"eos_token": "<nobody>"})"},
                                                       {"generation_config.json", R"({"eos_token_id": 1000000})"},
                                                       {"generation_config.json", R"({"eos_token_id": [1, "2"]})"},
                                                       {"generation_config.json", R"({"bos_token_id": -1})"}};
  for (const auto& [name, text] : files) {
    const TempDir folder;
    folder.Write("tokenizer.json", GoldenTree("gpt-2").dump());
    folder.Write(name, text);
    ExpectRefused(Tokenizer::Load(folder.path()).status(), name);
  }
}

TEST(Refusals, FolderWithoutTokenizer) {
  const TempDir folder;
  const auto none = Tokenizer::Load(folder.path());
  ASSERT_TRUE(none.ok()) << none.status();
  EXPECT_EQ(*none, nullptr);
  folder.Write("tokenizer.model", "x");
  ExpectRefused(Tokenizer::Load(folder.path()).status(), "tokenizer.model");
}

TEST(Refusals, Gguf) {
  const Json tree = GoldenTree("gpt-2");
  const auto load = [](const GgufWriter& writer) {
    const TempDir folder;
    return Tokenizer::Load(folder.Write("model.gguf", writer.Bytes()));
  };
  const auto none = load(GgufWriter());
  ASSERT_TRUE(none.ok()) << none.status();
  EXPECT_EQ(*none, nullptr);
  ExpectRefused(load(ToGguf(tree, "deepseek-llm")).status(), "tokenizer.ggml.pre: got 'deepseek-llm'");

  GgufWriter other_model;
  other_model.String("tokenizer.ggml.model", "llama");
  ExpectRefused(load(other_model).status(), "tokenizer.ggml.model: got 'llama'");

  GgufWriter duplicate;
  duplicate.String("tokenizer.ggml.model", "gpt2");
  duplicate.String("tokenizer.ggml.pre", "gpt-2");
  duplicate.Strings("tokenizer.ggml.tokens", {"a", "b", "a"});
  ExpectRefused(load(duplicate).status(), "ids 0 and 2");

  GgufWriter far_bos = ToGguf(tree, "gpt-2");
  far_bos.Int("tokenizer.ggml.bos_token_id", 1'000'000);
  ExpectRefused(load(far_bos).status(), "bos_token_id");
  ExpectRefused(load(ToGguf(tree, "llama-bpe")).status(), "bos_token_id");  // it adds bos and names none

  GgufWriter adds_eos = ToGguf(tree, "gpt-2");
  adds_eos.Bool("tokenizer.ggml.add_eos_token", true);
  ExpectRefused(load(adds_eos).status(), "add_eos_token");
}

}  // namespace
}  // namespace refocus
