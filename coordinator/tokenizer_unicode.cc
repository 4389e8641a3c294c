#include "coordinator/tokenizer_unicode.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <span>
#include <vector>

namespace refocus {
namespace {

struct Range {
  uint32_t first;
  uint32_t last;
};

// Assigned between the Unicode of PCRE2 10.42 (14.0) and of the reference's regular expressions (16.0).
constexpr Range kLetters[] = {
    {0x1c89, 0x1c8a},   {0xa7cb, 0xa7cd},   {0xa7da, 0xa7dc},   {0x105c0, 0x105f3}, {0x10d4a, 0x10d65},
    {0x10d6f, 0x10d85}, {0x10ec2, 0x10ec4}, {0x1123f, 0x11240}, {0x11380, 0x11389}, {0x1138b, 0x1138b},
    {0x1138e, 0x1138e}, {0x11390, 0x113b5}, {0x113b7, 0x113b7}, {0x113d1, 0x113d1}, {0x113d3, 0x113d3},
    {0x11bc0, 0x11be0}, {0x11f02, 0x11f02}, {0x11f04, 0x11f10}, {0x11f12, 0x11f33}, {0x1342f, 0x1342f},
    {0x13441, 0x13446}, {0x13460, 0x143fa}, {0x16100, 0x1611d}, {0x16d40, 0x16d6c}, {0x18cff, 0x18cff},
    {0x1b132, 0x1b132}, {0x1b155, 0x1b155}, {0x1df25, 0x1df2a}, {0x1e030, 0x1e06d}, {0x1e4d0, 0x1e4eb},
    {0x1e5d0, 0x1e5ed}, {0x1e5f0, 0x1e5f0}, {0x2b739, 0x2b739}, {0x2ebf0, 0x2ee5d}, {0x31350, 0x323af}};
constexpr Range kUpper[] = {
    {0x1c89, 0x1c89}, {0xa7cb, 0xa7cc}, {0xa7da, 0xa7da}, {0xa7dc, 0xa7dc}, {0x10d50, 0x10d65}};
constexpr Range kLower[] = {
    {0x1c8a, 0x1c8a}, {0xa7cd, 0xa7cd}, {0xa7db, 0xa7db}, {0x10d70, 0x10d85}, {0x1df25, 0x1df2a}};
constexpr Range kModifiers[] = {{0x10d4e, 0x10d4e}, {0x10d6f, 0x10d6f}, {0x16d40, 0x16d42},
                                {0x16d6b, 0x16d6c}, {0x1e030, 0x1e06d}, {0x1e4eb, 0x1e4eb}};
constexpr Range kOtherLetters[] = {
    {0x105c0, 0x105f3}, {0x10d4a, 0x10d4d}, {0x10d4f, 0x10d4f}, {0x10ec2, 0x10ec4}, {0x1123f, 0x11240},
    {0x11380, 0x11389}, {0x1138b, 0x1138b}, {0x1138e, 0x1138e}, {0x11390, 0x113b5}, {0x113b7, 0x113b7},
    {0x113d1, 0x113d1}, {0x113d3, 0x113d3}, {0x11bc0, 0x11be0}, {0x11f02, 0x11f02}, {0x11f04, 0x11f10},
    {0x11f12, 0x11f33}, {0x1342f, 0x1342f}, {0x13441, 0x13446}, {0x13460, 0x143fa}, {0x16100, 0x1611d},
    {0x16d43, 0x16d6a}, {0x18cff, 0x18cff}, {0x1b132, 0x1b132}, {0x1b155, 0x1b155}, {0x1e4d0, 0x1e4ea},
    {0x1e5d0, 0x1e5ed}, {0x1e5f0, 0x1e5f0}, {0x2b739, 0x2b739}, {0x2ebf0, 0x2ee5d}, {0x31350, 0x323af}};
constexpr Range kMarks[] = {{0x897, 0x897},     {0xcf3, 0xcf3},     {0xece, 0xece},     {0x10d69, 0x10d6d},
                            {0x10efc, 0x10eff}, {0x11241, 0x11241}, {0x113b8, 0x113c0}, {0x113c2, 0x113c2},
                            {0x113c5, 0x113c5}, {0x113c7, 0x113ca}, {0x113cc, 0x113d0}, {0x113d2, 0x113d2},
                            {0x113e1, 0x113e2}, {0x11f00, 0x11f01}, {0x11f03, 0x11f03}, {0x11f34, 0x11f3a},
                            {0x11f3e, 0x11f42}, {0x11f5a, 0x11f5a}, {0x13440, 0x13440}, {0x13447, 0x13455},
                            {0x1611e, 0x1612f}, {0x1e08f, 0x1e08f}, {0x1e4ec, 0x1e4ef}, {0x1e5ee, 0x1e5ef}};
constexpr Range kNumbers[] = {{0x10d40, 0x10d49}, {0x116d0, 0x116e3}, {0x11bf0, 0x11bf9}, {0x11f50, 0x11f59},
                              {0x16130, 0x16139}, {0x16d70, 0x16d79}, {0x1ccf0, 0x1ccf9}, {0x1d2c0, 0x1d2d3},
                              {0x1e4f0, 0x1e4f9}, {0x1e5f1, 0x1e5fa}};
constexpr Range kDecimals[] = {{0x10d40, 0x10d49}, {0x116d0, 0x116e3}, {0x11bf0, 0x11bf9},
                               {0x11f50, 0x11f59}, {0x16130, 0x16139}, {0x16d70, 0x16d79},
                               {0x1ccf0, 0x1ccf9}, {0x1e4f0, 0x1e4f9}, {0x1e5f1, 0x1e5fa}};
constexpr Range kPunctuation[] = {{0x1b4e, 0x1b4f},   {0x1b7f, 0x1b7f},   {0x10d6e, 0x10d6e}, {0x113d4, 0x113d5},
                                  {0x113d7, 0x113d8}, {0x11b00, 0x11b09}, {0x11be1, 0x11be1}, {0x11f43, 0x11f4f},
                                  {0x16d6d, 0x16d6f}, {0x1e5ff, 0x1e5ff}};
constexpr Range kSymbols[] = {
    {0x2427, 0x2429},   {0x2ffc, 0x2fff},   {0x31e4, 0x31e5},   {0x31ef, 0x31ef},   {0x10d8e, 0x10d8f},
    {0x1cc00, 0x1ccef}, {0x1cd00, 0x1ceb3}, {0x1f6dc, 0x1f6dc}, {0x1f774, 0x1f776}, {0x1f77b, 0x1f77f},
    {0x1f7d9, 0x1f7d9}, {0x1f8b2, 0x1f8bb}, {0x1f8c0, 0x1f8c1}, {0x1fa75, 0x1fa77}, {0x1fa87, 0x1fa89},
    {0x1fa8f, 0x1fa8f}, {0x1faad, 0x1faaf}, {0x1fabb, 0x1fabf}, {0x1fac6, 0x1fac6}, {0x1face, 0x1facf},
    {0x1fada, 0x1fadc}, {0x1fadf, 0x1fadf}, {0x1fae8, 0x1fae9}, {0x1faf7, 0x1faf8}, {0x1fbcb, 0x1fbef}};
// The Digits pre-tokenizer knows Unicode 17: these too.
constexpr Range kNewestNumbers[] = {{0x11de0, 0x11de9}, {0x16ff4, 0x16ff6}};
// The reference's normalizer stands at Unicode 9: to it these combining marks are ordinary characters, and U+11935 and
// U+11930 do not compose.
constexpr Range kUnknownToNfc[] = {
    {0x7fd, 0x7fd},     {0x898, 0x89f},     {0x8ca, 0x8d3},     {0x9fe, 0x9fe},     {0xc3c, 0xc3c},
    {0xd3b, 0xd3c},     {0xeba, 0xeba},     {0x1715, 0x1715},   {0x1abf, 0x1ace},   {0x1df6, 0x1dfa},
    {0xa82c, 0xa82c},   {0x10d24, 0x10d27}, {0x10eab, 0x10eac}, {0x10efd, 0x10eff}, {0x10f46, 0x10f50},
    {0x10f82, 0x10f85}, {0x11070, 0x11070}, {0x1133b, 0x1133b}, {0x1145e, 0x1145e}, {0x11839, 0x1183a},
    {0x11930, 0x11930}, {0x11935, 0x11935}, {0x1193d, 0x1193e}, {0x11943, 0x11943}, {0x119e0, 0x119e0},
    {0x11a34, 0x11a34}, {0x11a47, 0x11a47}, {0x11a99, 0x11a99}, {0x11d42, 0x11d42}, {0x11d44, 0x11d45},
    {0x11d97, 0x11d97}, {0x11f41, 0x11f42}, {0x16ff0, 0x16ff1}, {0x1e08f, 0x1e08f}, {0x1e130, 0x1e136},
    {0x1e2ae, 0x1e2ae}, {0x1e2ec, 0x1e2ef}, {0x1e4ec, 0x1e4ef}};

bool Contains(std::span<const Range> ranges, uint32_t code_point) {
  const auto it = std::lower_bound(ranges.begin(), ranges.end(), code_point,
                                   [](const Range& range, uint32_t value) { return range.last < value; });
  return it != ranges.end() && it->first <= code_point;
}

std::string Written(std::span<const Range> ranges) {
  std::string text;
  for (const Range& range : ranges) {
    char one[40];
    std::snprintf(one, sizeof one, "\\x{%x}-\\x{%x}", range.first, range.last);
    text += one;
  }
  return text;
}

constexpr auto kDecompose = static_cast<utf8proc_option_t>(UTF8PROC_DECOMPOSE | UTF8PROC_STABLE);
constexpr auto kCompose = static_cast<utf8proc_option_t>(UTF8PROC_COMPOSE | UTF8PROC_STABLE);

// Neither changes nor lets anything move or compose across it, so that the text can be cut before and behind it.
bool IsInert(uint32_t code_point) {
  if (code_point < 0x80) return code_point < 0x3c;  // above: letters that compose with marks, and < = > that do too
  if ((code_point >= 0x1100 && code_point <= 0x11ff) || (code_point >= 0xac00 && code_point <= 0xd7a3)) return false;
  const utf8proc_property_t* property = utf8proc_get_property(static_cast<utf8proc_int32_t>(code_point));
  const bool decomposes = property->decomp_seqindex != UINT16_MAX && property->decomp_type == 0;
  if (property->combining_class == 0 && property->comb_index == UINT16_MAX && !decomposes) return true;
  return Contains(kUnknownToNfc, code_point);
}

int CombiningClass(utf8proc_int32_t code_point) { return utf8proc_get_property(code_point)->combining_class; }

// utf8proc's own reordering takes quadratic time for long runs of marks, so only its tables and its composition are
// used.
void NormalizeRun(std::string_view run, std::vector<utf8proc_int32_t>* buffer, std::string* out) {
  buffer->clear();
  for (size_t at = 0; at < run.size();) {
    utf8proc_int32_t parts[16];
    const auto code_point = static_cast<utf8proc_int32_t>(DecodeUtf8(run, &at));
    const auto count = utf8proc_decompose_char(code_point, parts, 16, kDecompose, nullptr);
    buffer->insert(buffer->end(), parts, parts + count);
  }
  for (auto it = buffer->begin(); it != buffer->end();) {
    const auto starter = [](utf8proc_int32_t c) { return CombiningClass(c) == 0; };
    const auto first = std::find_if_not(it, buffer->end(), starter);
    it = std::find_if(first, buffer->end(), starter);
    if (it - first > 1) {
      std::stable_sort(first, it, [](auto a, auto b) { return CombiningClass(a) < CombiningClass(b); });
    }
  }
  const auto composed =
      utf8proc_normalize_utf32(buffer->data(), static_cast<utf8proc_ssize_t>(buffer->size()), kCompose);
  for (utf8proc_ssize_t i = 0; i < composed; ++i) {
    utf8proc_uint8_t bytes[4];
    const auto size = utf8proc_encode_char((*buffer)[i], bytes);
    out->append(reinterpret_cast<const char*>(bytes), static_cast<size_t>(size));
  }
}

}  // namespace

Utf8Step StepUtf8(std::string_view text, size_t at) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[at + i]); };
  const unsigned first = byte(0);
  if (first < 0x80) return {1, true, false};
  if (first < 0xc2 || first > 0xf4) return {1, false, false};
  const int size = first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
  // The second byte's range excludes overlong forms, surrogates and everything above U+10FFFF.
  const unsigned low = first == 0xe0 ? 0xa0 : first == 0xf0 ? 0x90 : 0x80;
  const unsigned high = first == 0xed ? 0x9f : first == 0xf4 ? 0x8f : 0xbf;
  for (int i = 1; i < size; ++i) {
    if (at + i >= text.size()) return {i, false, true};
    if (byte(i) < (i == 1 ? low : 0x80) || byte(i) > (i == 1 ? high : 0xbf)) return {i, false, false};
  }
  return {size, true, false};
}

int64_t FindInvalidUtf8(std::string_view text) {
  for (size_t at = 0; at < text.size();) {
    uint64_t word;
    if (at + sizeof word <= text.size()) {
      std::memcpy(&word, text.data() + at, sizeof word);
      if ((word & 0x8080808080808080u) == 0) {
        at += sizeof word;
        continue;
      }
    }
    const Utf8Step step = StepUtf8(text, at);
    if (!step.complete) return static_cast<int64_t>(at);
    at += static_cast<size_t>(step.size);
  }
  return -1;
}

uint32_t DecodeUtf8(std::string_view text, size_t* at) {
  const auto byte = [&](size_t i) { return static_cast<uint32_t>(static_cast<unsigned char>(text[*at + i])); };
  const uint32_t first = byte(0);
  uint32_t code_point = first;
  size_t size = 1;
  if (first >= 0xf0) {
    code_point = (first & 0x07) << 18 | (byte(1) & 0x3f) << 12 | (byte(2) & 0x3f) << 6 | (byte(3) & 0x3f);
    size = 4;
  } else if (first >= 0xe0) {
    code_point = (first & 0x0f) << 12 | (byte(1) & 0x3f) << 6 | (byte(2) & 0x3f);
    size = 3;
  } else if (first >= 0x80) {
    code_point = (first & 0x1f) << 6 | (byte(1) & 0x3f);
    size = 2;
  }
  *at += size;
  return code_point;
}

bool IsNumber(uint32_t code_point) {
  if (code_point < 0x80) return code_point >= '0' && code_point <= '9';
  const auto category = utf8proc_category(static_cast<utf8proc_int32_t>(code_point));
  if (category == UTF8PROC_CATEGORY_ND || category == UTF8PROC_CATEGORY_NL || category == UTF8PROC_CATEGORY_NO)
    return true;
  return Contains(kNumbers, code_point) || Contains(kNewestNumbers, code_point);
}

bool IsWhiteSpace(uint32_t c) {
  return (c >= 0x09 && c <= 0x0d) || c == 0x20 || c == 0x85 || c == 0xa0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

bool IsWordCharacter(uint32_t c) {
  switch (utf8proc_category(static_cast<utf8proc_int32_t>(c))) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC: return true;
    default: break;
  }
  // Joiners, and circled and squared letters, which are alphabetic symbols.
  if (c == 0x200c || c == 0x200d || (c >= 0x24b6 && c <= 0x24e9) || (c >= 0x1f130 && c <= 0x1f149) ||
      (c >= 0x1f150 && c <= 0x1f169) || (c >= 0x1f170 && c <= 0x1f189)) {
    return true;
  }
  return Contains(kLetters, c) || Contains(kMarks, c) || Contains(kDecimals, c);
}

const std::string* MissingRanges(std::string_view category) {
  static const std::map<std::string, std::string, std::less<>> ranges = {
      {"L", Written(kLetters)},   {"Lu", Written(kUpper)},      {"Ll", Written(kLower)},
      {"Lt", ""},                 {"Lm", Written(kModifiers)},  {"Lo", Written(kOtherLetters)},
      {"M", Written(kMarks)},       {"N", Written(kNumbers)},
      {"Nd", Written(kDecimals)}, {"P", Written(kPunctuation)}, {"S", Written(kSymbols)}};
  const auto it = ranges.find(category);
  return it == ranges.end() ? nullptr : &it->second;
}

bool IsPlainlyNfc(std::string_view text) {
  // Below U+0300 nothing decomposes that would not compose again, and nothing combines.
  return std::all_of(text.begin(), text.end(), [](char c) { return static_cast<unsigned char>(c) < 0xcc; });
}

std::string ToNfc(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  std::vector<utf8proc_int32_t> buffer;
  for (size_t at = 0; at < text.size();) {
    const size_t begin = at;
    size_t run = std::string_view::npos;  // where characters that may interact begin
    while (at < text.size()) {
      const size_t before = at;
      const bool inert = IsInert(DecodeUtf8(text, &at));
      if (inert && run != std::string_view::npos) {
        at = before;
        break;
      }
      if (!inert && run == std::string_view::npos) run = before;
    }
    const size_t plain_end = run == std::string_view::npos ? at : run;
    out.append(text.substr(begin, plain_end - begin));
    if (run == std::string_view::npos) continue;
    const std::string_view interacting = text.substr(run, at - run);
    if (IsPlainlyNfc(interacting)) {
      out.append(interacting);
    } else {
      NormalizeRun(interacting, &buffer, &out);
    }
  }
  return out;
}

}  // namespace refocus
