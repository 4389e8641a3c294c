// From tokens to text: stop strings, and characters of which a token is only a part.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "coordinator/core/answer_text.h"
#include "coordinator/tokenizer_unicode.h"

namespace refocus {
namespace {

std::string Feed(AnswerText& text, const std::vector<std::string>& tokens) {
  std::string out;
  for (const std::string& token : tokens) out += text.Push(token);
  return out + text.Finish();
}

TEST(AnswerTextTest, EndsBeforeTheFirstStop) {
  AnswerText one({"END"});
  EXPECT_EQ(Feed(one, {"some ", "E", "N", "D", "more"}), "some ");
  EXPECT_EQ(one.stop(), "END");
  AnswerText earliest({"world", "lo"});
  EXPECT_EQ(Feed(earliest, {"hel", "lo world"}), "hel");
  EXPECT_EQ(earliest.stop(), "lo");
  AnswerText none({"xyz"});
  EXPECT_EQ(Feed(none, {"x", "xy", "xx"}), "xxyxx");
  EXPECT_FALSE(none.stopped());
}

TEST(AnswerTextTest, CutsDoNotMatter) {
  const std::string said = "xabcde";
  const std::vector<std::string> stops[] = {{"abcd", "c"}, {"c", "abcd"}, {"bcd", "abcd"}, {"abcd", "d"},
                                            {"cde", "xabc"}};
  for (const auto& set : stops) {
    AnswerText whole(set);
    const std::string expected = Feed(whole, {said});
    ASSERT_TRUE(whole.stopped());
    for (unsigned cuts = 0; cuts < 32; ++cuts) {
      std::vector<std::string> tokens(1);
      for (size_t i = 0; i < said.size(); ++i) {
        if (i > 0 && (cuts >> (i - 1) & 1u) != 0) tokens.emplace_back();
        tokens.back() += said[i];
      }
      AnswerText text(set);
      EXPECT_EQ(Feed(text, tokens), expected) << set[0] << cuts;
      EXPECT_EQ(text.stop(), whole.stop()) << set[0] << cuts;
    }
  }
  AnswerText first({"abcd", "c"});
  EXPECT_EQ(Feed(first, {said}), "xab");
  EXPECT_EQ(first.stop(), "c");
}

TEST(AnswerTextTest, HoldsBackOnlyWhatMayBeAStop) {
  AnswerText text({"aab"});
  EXPECT_EQ(text.Push("aa"), "");
  EXPECT_EQ(text.Push("a"), "a");
  EXPECT_EQ(text.Push("c"), "aac");
  EXPECT_EQ(text.Push("zaa"), "z");
  EXPECT_EQ(text.Push("b"), "");
  EXPECT_TRUE(text.stopped());
  EXPECT_EQ(text.Push("more"), "");
  EXPECT_EQ(text.Finish(), "");
}

TEST(AnswerTextTest, CharactersStayWhole) {
  AnswerText text({"\xc3\xa9t\xc3\xa9"});
  EXPECT_EQ(text.Push("a\xc3"), "a");
  EXPECT_EQ(text.Push("\xa9"), "");
  EXPECT_EQ(text.Push("t\xc3"), "");
  EXPECT_EQ(text.Push("\xa9"), "");
  EXPECT_TRUE(text.stopped());
}

// As far as its characters are whole.
std::string_view Whole(std::string_view bytes) {
  while (FindInvalidUtf8(bytes) >= 0) bytes.remove_suffix(1);
  return bytes;
}

class CharactersTest : public ::testing::TestWithParam<const char*> {
 protected:
  // The vocabularies are small: most of these characters are several tokens, down to one a byte.
  const std::string text_ =
      "na\u00efve caf\u00e9 \u4e2d\u6587\uff0c\ud55c\uad6d\uc5b4 \u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 "
      "\u05e2\u05d1\u05e8\u05d9\u05ea \u0939\u093f\u0928\u094d\u0926\u0940 "
      "\U0001f469\u200d\U0001f680\U0001f44d\U0001f3fd \U00020bb7\U0010fffd q\u0323\u0301 \u2028\ufeff\x01\x7f end";
};

// What is sent is always all whole characters so far, wherever tokens end; nothing is lost, whenever the answer ends.
TEST_P(CharactersTest, AreSentWholeAndAtOnce) {
  const auto tokenizer = Tokenizer::Load(std::string(REFOCUS_SOURCE_DIR) + "/tests/tokenizer/" + GetParam());
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  const auto ids = (*tokenizer)->Encode(text_, false, 1000);
  ASSERT_TRUE(ids.ok()) << ids.status();
  ChatFormat::Thinking thinking;
  thinking.begins_inside = true;
  int broken = 0;
  for (size_t count = 0; count <= ids->size(); ++count) {
    AnswerText answer({});
    Reasoning reasoning(&thinking);
    std::string bytes, text, thought;
    for (size_t i = 0; i < count; ++i) {
      const std::string token = (*tokenizer)->TokenBytes((*ids)[i], false);
      broken += FindInvalidUtf8(token) >= 0 ? 1 : 0;
      bytes += token;
      text += answer.Push(token);
      thought += reasoning.Push((*ids)[i], token).reasoning;
      ASSERT_EQ(text, Whole(bytes)) << GetParam() << " after token " << i;
      ASSERT_EQ(FindInvalidUtf8(thought), -1) << GetParam() << " after token " << i;
    }
    const std::string cut = Whole(bytes).size() == bytes.size() ? "" : "\ufffd";
    EXPECT_EQ(text + answer.Finish(), std::string(Whole(bytes)) + cut) << GetParam() << " ended after " << count;
    EXPECT_EQ(thought + reasoning.Finish(), std::string(Whole(bytes)) + cut) << GetParam() << " ended after " << count;
    if (count == ids->size()) {
      EXPECT_EQ(text, text_);
    }
  }
  EXPECT_GT(broken, 1000) << "this text does not try it";
}

INSTANTIATE_TEST_SUITE_P(Kinds, CharactersTest, ::testing::Values("gpt-2", "llama-bpe", "qwen2", "tekken"));

}  // namespace
}  // namespace refocus
