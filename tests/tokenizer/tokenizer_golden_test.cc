// Ids of the reference library for every kind of tokenizer, decoding, and streams of bytes.
#include <gtest/gtest.h>

#include <thread>
#include <tuple>

#include "tests/tokenizer/tokenizer_files.h"

namespace refocus {
namespace {

std::string Decode(const Tokenizer& tokenizer, const std::vector<int32_t>& ids) {
  std::string out;
  for (const int32_t id : ids) out += tokenizer.TokenBytes(id, true);
  return out;
}

void ExpectGolden(const Tokenizer& tokenizer, const std::string& file, bool skip_normalized_added = false) {
  const Json cases = ReadJsonOf(file);
  ASSERT_GT(cases.size(), 50u);
  for (const Json& one : cases) {
    const auto text = one["text"].get<std::string>();
    // GGUF cannot say that a token is sought in normalized text.
    if (skip_normalized_added && text.find("ngstr") != std::string::npos) continue;
    const auto ids = tokenizer.Encode(text, one["special"].get<bool>(), 1'000'000);
    ASSERT_TRUE(ids.ok()) << ids.status();
    EXPECT_EQ(*ids, one["ids"].get<std::vector<int32_t>>())
        << file << " special=" << one["special"] << " " << one["text"];
  }
}

class Golden : public testing::TestWithParam<const char*> {};

TEST_P(Golden, FolderGivesTheReferencesIds) {
  const auto tokenizer = Tokenizer::Load(kGoldens + GetParam());
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  ExpectGolden(**tokenizer, kGoldens + GetParam() + "/golden.json");
}

TEST_P(Golden, GgufGivesTheReferencesIds) {
  if (std::string(GetParam()) == "mixed") GTEST_SKIP() << "no name for it in GGUF";
  const TempDir folder;
  GgufWriter gguf = ToGguf(GoldenTree(GetParam()), GetParam());
  gguf.Bool("tokenizer.ggml.add_bos_token", false);
  const auto tokenizer = Tokenizer::Load(folder.Write("model.gguf", gguf.Bytes()));
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  ExpectGolden(**tokenizer, kGoldens + GetParam() + "/golden.json", true);
}

TEST_P(Golden, DecodesToTheText) {
  // These lose text by design: smollm has no token for some bytes, qwen2 and mixed normalize, mixed adds and drops
  // characters.
  const std::string kind = GetParam();
  if (kind != "gpt-2" && kind != "llama-bpe" && kind != "tekken") GTEST_SKIP() << "not lossless";
  const auto tokenizer = Tokenizer::Load(kGoldens + kind);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  for (const Json& one : ReadJsonOf(kGoldens + kind + "/golden.json")) {
    EXPECT_EQ(Decode(**tokenizer, one["ids"].get<std::vector<int32_t>>()), one["text"].get<std::string>());
  }
}

INSTANTIATE_TEST_SUITE_P(Kinds, Golden, testing::Values("gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "mixed"));

TEST(RealModel, GivesTheReferencesIds) {
  const std::string path = std::string(REFOCUS_SOURCE_DIR) + "/.deps/data/SmolLM2-135M-Instruct.Q4_1.gguf";
  if (!std::filesystem::exists(path)) GTEST_SKIP() << path << " is not there";
  const auto tokenizer = Tokenizer::Load(path);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  ExpectGolden(**tokenizer, kGoldens + "smollm2_golden.json");
  EXPECT_EQ((*tokenizer)->vocab_size(), 49152);
  EXPECT_EQ((*tokenizer)->bos_token(), 1);
  EXPECT_FALSE((*tokenizer)->adds_bos());
  EXPECT_EQ((*tokenizer)->eos_tokens(), std::vector<int32_t>{2});
  EXPECT_EQ((*tokenizer)->FindToken("<|im_end|>"), 2);
}

TEST(Golden, GgufNamesOfTheSameRules) {
  const TempDir folder;
  const std::pair<const char*, const char*> names[] = {
      {"llama3", "llama-bpe"}, {"llama-v3", "llama-bpe"}, {"deepseek-r1-qwen", "qwen2"}, {"default", "gpt-2"}};
  for (const auto& [name, kind] : names) {
    GgufWriter gguf = ToGguf(GoldenTree(kind), name);
    gguf.Bool("tokenizer.ggml.add_bos_token", false);
    const auto tokenizer = Tokenizer::Load(folder.Write("model.gguf", gguf.Bytes()));
    ASSERT_TRUE(tokenizer.ok()) << name << tokenizer.status();
    ExpectGolden(**tokenizer, kGoldens + kind + "/golden.json", true);
  }
  const auto unknown = Tokenizer::Load(folder.Write("model.gguf", ToGguf(GoldenTree("gpt-2"), "qwen35").Bytes()));
  EXPECT_EQ(DetailOf(unknown.status()).reason, "CONFIG_INVALID");
  for (const char* word : {"tokenizer.ggml.pre", "'qwen35'", "tekken", "Hugging Face folder"}) {
    EXPECT_NE(unknown.status().message().find(word), std::string::npos) << word << unknown.status();
  }
}

TEST(Golden, ThreadsShareOneTokenizer) {
  const auto tokenizer = Tokenizer::Load(kGoldens + "qwen2");
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) threads.emplace_back([&] { ExpectGolden(**tokenizer, kGoldens + "qwen2/golden.json"); });
  for (std::thread& thread : threads) thread.join();
}

// What a pattern keeps of a text, with everything else dropped: shows a class as it is. Expected values are the
// reference's.
TEST(Tokens, CharacterClassesAreTheReferences) {
  const std::tuple<const char*, const char*, const char*> cases[] = {
      {"\\p{L}+", "a1\u00e9\U00031350 \U00013460-\U0001e5f0\u0301", "a\u00e9\U00031350\U00013460\U0001e5f0"},
      {"[^\\p{L}]+", "a1\u00e9\U00031350 \U00013460-\u0301", "1 -\u0301"},
      {"\\P{L}", "a1\u00e9\U000323af-", "1-"},
      {"[\\p{N}x]", "xy1\u00bd\u2167\U00010d40\U000116e3\U00011de0", "x1\u00bd\u2167\U00010d40\U000116e3"},
      {"\\d", "1\u00bd\u0663\U00010d49", "1\u0663\U00010d49"},
      {"\\s", "a \u180e\u00a0\u200b\u2028\x0b\x1c\u0085", " \u00a0\u2028\x0b\u0085"},
      {"[^\\S ]", "a \u180e\u00a0\n", "\u00a0\n"},
      {"\\p{M}", "a\u0301\u0897\U000113ce", "\u0301\u0897\U000113ce"},
      {"(?i:s|k)", "sSkK\u017f\u212a\u00df", "sSkK\u017f\u212a"},
  };
  for (const auto& [pattern, text, kept] : cases) {
    Json tree = GoldenTree("gpt-2");
    const Json split = {
        {"type", "Split"}, {"pattern", {{"Regex", pattern}}}, {"behavior", "Removed"}, {"invert", true}};
    const Json bytes = {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}};
    tree["pre_tokenizer"] = {{"type", "Sequence"}, {"pretokenizers", Json::array({split, bytes})}};
    const auto tokenizer = LoadTree(tree);
    ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
    const auto ids = (*tokenizer)->Encode(text, false, 1000);
    ASSERT_TRUE(ids.ok()) << ids.status();
    EXPECT_EQ(Decode(**tokenizer, *ids), kept) << pattern;
  }
}

TEST(Tokens, MarksAndNames) {
  const auto loaded = Tokenizer::Load(kGoldens + "llama-bpe");
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  const Tokenizer& tokenizer = **loaded;
  const Json tree = GoldenTree("llama-bpe");
  const int32_t bos = tree["added_tokens"][0]["id"].get<int32_t>();
  EXPECT_EQ(tokenizer.bos_token(), bos);
  EXPECT_TRUE(tokenizer.adds_bos());
  EXPECT_EQ(tokenizer.FindToken("<|begin|>"), bos);
  EXPECT_EQ(tokenizer.FindToken("the"), std::nullopt);
  EXPECT_EQ(tokenizer.TokenBytes(bos, true), "<|begin|>");
  EXPECT_EQ(tokenizer.TokenBytes(bos, false), "");
  EXPECT_EQ(tokenizer.TokenBytes(*tokenizer.FindToken("<|t\xc3\xa9l\xc3\xa9|>"), true), "<|t\xc3\xa9l\xc3\xa9|>");
  EXPECT_EQ(tokenizer.TokenBytes(-1, true), "");
  EXPECT_EQ(tokenizer.TokenBytes(static_cast<int32_t>(tokenizer.vocab_size()), true), "");
  EXPECT_EQ(tokenizer.TokenBytes(INT32_MAX, true), "");
  std::string bytes;
  for (int32_t id = 0; id < 256; ++id) bytes += tokenizer.TokenBytes(id, true);
  EXPECT_EQ(bytes.size(), 256u);  // the trained vocabulary begins with the alphabet
  for (int byte = 0; byte < 256; ++byte) EXPECT_NE(bytes.find(static_cast<char>(byte)), std::string::npos) << byte;
}

TEST(Tokens, NeighbouringFilesNameBeginAndEnd) {
  const TempDir folder;
  folder.Write("tokenizer.json", GoldenTree("qwen2").dump());
  folder.Write("tokenizer_config.json",
               R"({"bos_token": null, "eos_token": {"content": "<|end|>"}, "add_bos_token": true})");
  folder.Write("generation_config.json", R"({"bos_token_id": 5, "eos_token_id": [7, 6, 7]})");
  const auto tokenizer = Tokenizer::Load(folder.path());
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_EQ((*tokenizer)->bos_token(), 5);
  EXPECT_FALSE((*tokenizer)->adds_bos());
  const int32_t end = *(*tokenizer)->FindToken("<|end|>");
  EXPECT_EQ((*tokenizer)->eos_tokens(), (std::vector<int32_t>{end, 7, 6}));
  for (const bool adds : {true, false}) {  // what the configuration says counts before the post-processor
    folder.Write("tokenizer.json", GoldenTree(adds ? "qwen2" : "llama-bpe").dump());
    folder.Write("tokenizer_config.json", Json{{"bos_token", "<|begin|>"}, {"add_bos_token", adds}}.dump());
    const auto told = Tokenizer::Load(folder.path());
    ASSERT_TRUE(told.ok()) << told.status();
    EXPECT_EQ((*told)->adds_bos(), adds);
    EXPECT_EQ((*told)->bos_token(), (*told)->FindToken("<|begin|>"));
  }
}

TEST(Tokens, FingerprintFollowsContent) {
  const auto first = Tokenizer::Load(kGoldens + "gpt-2");
  const auto again = Tokenizer::Load(kGoldens + "gpt-2");
  ASSERT_TRUE(first.ok() && again.ok());
  EXPECT_EQ((*first)->Fingerprint(), (*again)->Fingerprint());
  EXPECT_EQ((*first)->Fingerprint().size(), 16u);
  std::vector<Json> changed(4, GoldenTree("gpt-2"));
  std::swap(changed[0]["model"]["merges"][3], changed[0]["model"]["merges"][4]);
  changed[1]["model"]["ignore_merges"] = true;
  changed[2]["added_tokens"][0]["normalized"] = true;
  changed[3]["normalizer"] = {{"type", "NFC"}};
  for (const Json& tree : changed) {
    const auto other = LoadTree(tree);
    ASSERT_TRUE(other.ok()) << other.status();
    EXPECT_NE((*other)->Fingerprint(), (*first)->Fingerprint());
  }
}

// Well-formed and broken pieces, and what a lossy reader makes of them (the longest beginning of a character is one
// U+FFFD).
const std::pair<std::string, std::string> kStreams[] = {
    {"", ""},
    {"abc", "abc"},
    {"a\xc3\xa9\xe4\xb8\xad\xf0\x9f\x91\x8dz", "a\xc3\xa9\xe4\xb8\xad\xf0\x9f\x91\x8dz"},
    {"\xff"
     "a",
     "\xef\xbf\xbd"
     "a"},
    {"\xc0\x80", "\xef\xbf\xbd\xef\xbf\xbd"},
    {"\xe4\xb8"
     "a",
     "\xef\xbf\xbd"
     "a"},
    {"\xf0\x9f\x91", "\xef\xbf\xbd"},
    {"\xf0\x9f\x91\xf0\x9f\x91\x8d", "\xef\xbf\xbd\xf0\x9f\x91\x8d"},
    {"\xed\xa0\x80", "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"},
    {"\xf4\x90\x80\x80", "\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd"},
    {"\x80\xe2\x82\xac\xe2\x82", "\xef\xbf\xbd\xe2\x82\xac\xef\xbf\xbd"},
};

TEST(Utf8Stream, EveryCutGivesTheSame) {
  for (const auto& [bytes, want] : kStreams) {
    for (size_t first = 0; first <= bytes.size(); ++first) {
      for (size_t second = first; second <= bytes.size(); ++second) {
        Utf8Stream stream;
        std::string got = stream.Push(std::string_view(bytes).substr(0, first));
        got += stream.Push(std::string_view(bytes).substr(first, second - first));
        got += stream.Push(std::string_view(bytes).substr(second));
        got += stream.Finish();
        EXPECT_EQ(got, want) << testing::PrintToString(bytes) << " cut at " << first << ", " << second;
        EXPECT_EQ(stream.Finish(), "");
      }
    }
  }
}

TEST(Utf8Stream, GivesCharactersAsSoonAsTheyAreWhole) {
  Utf8Stream stream;
  EXPECT_EQ(stream.Push("x\xe4"), "x");
  EXPECT_EQ(stream.Push("\xb8"), "");
  EXPECT_EQ(stream.Push("\xad"), "\xe4\xb8\xad");
}

}  // namespace
}  // namespace refocus
