// Bad and hostile texts: offsets of errors, early ends, and time that grows like the input.
#include <gtest/gtest.h>

#include <chrono>

#include "tests/tokenizer/tokenizer_files.h"

namespace refocus {
namespace {

constexpr int64_t kMany = int64_t{1} << 40;

std::unique_ptr<Tokenizer> Golden(const std::string& kind) {
  auto tokenizer = Tokenizer::Load(kGoldens + kind);
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
  return std::move(*tokenizer);
}

std::string Repeat(const std::string& unit, int64_t count) {
  std::string out;
  for (int64_t i = 0; i < count; ++i) out += unit;
  return out;
}

TEST(Text, InvalidUtf8IsNamedByOffset) {
  const auto tokenizer = Golden("gpt-2");
  const std::pair<std::string, std::string> cases[] = {{"\x80", "0"},
                                                       {"abc\xff", "3"},
                                                       {"0123456789abcdef\xc3", "16"},
                                                       {"\xc3\xa9\xe4\xb8", "2"},
                                                       {"a\xed\xa0\x80", "1"},
                                                       {"\xf4\x90\x80\x80", "0"},
                                                       {"ab\xc0\xaf", "2"},
                                                       {"\xe0\x80\x80", "0"}};
  for (const auto& [text, offset] : cases) {
    const auto ids = tokenizer->Encode(text, false, kMany);
    ASSERT_FALSE(ids.ok()) << testing::PrintToString(text);
    EXPECT_EQ(ids.status().code(), StatusCode::kInvalidArgument);
    const ErrorDetail detail = DetailOf(ids.status());
    EXPECT_EQ(detail.reason, "INVALID_UTF8");
    EXPECT_EQ(detail.metadata.back(), (std::pair<std::string, std::string>("offset", offset)));
  }
}

TEST(Text, SpecialTokensArePlainTextUnlessAllowed) {
  const auto tokenizer = Golden("gpt-2");
  const int32_t end = *tokenizer->FindToken("<|end|>");
  const auto allowed = tokenizer->Encode("<|end|>", true, kMany);
  const auto plain = tokenizer->Encode("<|end|>", false, kMany);
  ASSERT_TRUE(allowed.ok() && plain.ok());
  EXPECT_EQ(*allowed, std::vector<int32_t>{end});
  EXPECT_GT(plain->size(), 1u);
  EXPECT_EQ(std::count(plain->begin(), plain->end(), end), 0);
}

TEST(Text, StopsAtTheLimit) {
  const auto tokenizer = Golden("gpt-2");
  const std::string text = "one two three <|end|> four";
  const auto ids = tokenizer->Encode(text, true, kMany);
  ASSERT_TRUE(ids.ok());
  const auto count = static_cast<int64_t>(ids->size());
  EXPECT_TRUE(tokenizer->Encode(text, true, count).ok());
  for (const int64_t limit : {count - 1, int64_t{1}, int64_t{0}, int64_t{-5}}) {
    const auto cut = tokenizer->Encode(text, true, limit);
    ASSERT_FALSE(cut.ok()) << limit;
    EXPECT_EQ(DetailOf(cut.status()).reason, "CONTEXT_TOO_LONG");
  }
  EXPECT_TRUE(tokenizer->Encode("", true, 0).ok());
}

// 16 MB of one kind of character and a limit of a thousand tokens: refused at once, without memory for its merges.
TEST(Hostile, LongRunsEndEarly) {
  for (const char* kind : {"gpt-2", "llama-bpe", "smollm"}) {
    const auto tokenizer = Golden(kind);
    for (const char unit : {'a', ' ', '\n', '!'}) {
      const std::string text(16 << 20, unit);
      const auto start = std::chrono::steady_clock::now();
      const auto ids = tokenizer->Encode(text, false, 1000);
      ASSERT_FALSE(ids.ok());
      EXPECT_EQ(DetailOf(ids.status()).reason, "CONTEXT_TOO_LONG") << ids.status();
      EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(10)) << kind << " " << int{unit};
    }
  }
}

// Quadratic work would take hours for these.
TEST(Hostile, LongRunsAreWhollyEncoded) {
  for (const char* kind : {"gpt-2", "llama-bpe", "qwen2", "mixed"}) {
    const auto tokenizer = Golden(kind);
    for (const char* unit :
         {"a", " ", "\n", " \n", "ab", "0", "'", "\xcc\x81\xcc\x96", "e\xcc\x81", "\xed\x95\x9c", "<|"}) {
      const std::string text = Repeat(unit, 1'000'000);
      const auto ids = tokenizer->Encode(text + "x", false, kMany);
      ASSERT_TRUE(ids.ok()) << ids.status();
      // Far from the ends one period of tokens repeats itself, so that a short text predicts the count closely.
      const auto tenth = tokenizer->Encode(Repeat(unit, 100'000) + "x", false, kMany);
      ASSERT_TRUE(tenth.ok());
      EXPECT_NEAR(static_cast<double>(ids->size()), 10.0 * static_cast<double>(tenth->size()), 100)
          << kind << " " << unit;
    }
  }
}

TEST(Hostile, PatternThatPassedLoadingIsStillBounded) {
  Json tree = GoldenTree("gpt-2");
  // Exponential only behind a beginning that no probe has.
  tree["pre_tokenizer"] = {
      {"type", "Sequence"},
      {"pretokenizers",
       {{{"type", "Split"}, {"pattern", {{"Regex", "uvw(?:q|q)+r"}}}, {"behavior", "Isolated"}, {"invert", false}},
        {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}}}}};
  const auto tokenizer = LoadTree(tree);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_TRUE((*tokenizer)->Encode("uvwqqr and more", false, kMany).ok());
  const auto ids = (*tokenizer)->Encode("uvw" + std::string(60, 'q') + "! r", false, kMany);
  ASSERT_FALSE(ids.ok());
  EXPECT_EQ(DetailOf(ids.status()).reason, "REGEX_LIMIT");
}

}  // namespace
}  // namespace refocus
