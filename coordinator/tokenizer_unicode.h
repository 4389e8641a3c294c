// UTF-8, NFC and character classes as the reference tokenizer sees them.
//
// The reference's libraries stand at other versions of Unicode than ours: its regular expressions and its notion of a
// number are newer, its normalizer older. The differences are listed in the source file, so that every code point gives
// the same tokens.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace refocus {

// Byte offset of the first byte that does not belong to a well-formed character, or -1.
int64_t FindInvalidUtf8(std::string_view text);

// Bytes of the longest well-formed beginning of a character at text[at], and whether it is the whole character.
struct Utf8Step {
  int size;       // at least 1; for a bad first byte 1
  bool complete;  // a whole character
  bool open;      // a beginning that ends with the text: more bytes could complete it
};
Utf8Step StepUtf8(std::string_view text, size_t at);

// The character at *at in well-formed text; moves *at behind it.
uint32_t DecodeUtf8(std::string_view text, size_t* at);

// General category N.
bool IsNumber(uint32_t code_point);
// White_Space, and what \w matches to the reference.
bool IsWhiteSpace(uint32_t code_point);
bool IsWordCharacter(uint32_t code_point);

// Extra ranges for a class of a regular expression, as PCRE2 writes them ("\x{105c0}-\x{105f3}..."), for general
// categories L, Lu, Ll, Lt, Lm, Lo, M, N, P, S and Nd; nullptr for any other name.
const std::string* MissingRanges(std::string_view category);

// True when NFC would leave every text of such characters alone without looking; most text.
bool IsPlainlyNfc(std::string_view text);
// NFC of well-formed text; takes linear time (n log n for runs of combining marks).
std::string ToNfc(std::string_view text);

}  // namespace refocus
