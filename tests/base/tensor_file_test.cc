#include "base/tensor_file.h"

#include <cmath>
#include <thread>

#include "base/gguf.h"
#include "tests/base/model_files.h"

namespace refocus {
namespace {

// From the definition of the format, in double; shares nothing with the decoder.
double HalfValue(uint16_t bits) {
  const int exponent = (bits >> 10) & 0x1f, fraction = bits & 0x3ff;
  const double sign = (bits & 0x8000) != 0 ? -1.0 : 1.0;
  if (exponent == 0) return sign * std::ldexp(fraction, -24);
  if (exponent == 31) return fraction == 0 ? sign * INFINITY : NAN;
  return sign * std::ldexp(1024 + fraction, exponent - 25);
}

bool SameBits(float a, float b) { return std::memcmp(&a, &b, sizeof(a)) == 0; }

TEST(TensorFileTest, EveryHalfDecodesExactly) {
  std::string bytes;
  for (int i = 0; i < 65536; ++i) bytes += Bytes(static_cast<uint16_t>(i));
  std::vector<float> out(65536);
  DecodeToFloat(TensorType::kF16, bytes.data(), 65536, out.data());
  for (int i = 0; i < 65536; ++i) {
    const double expected = HalfValue(static_cast<uint16_t>(i));
    if (std::isnan(expected)) {
      EXPECT_TRUE(std::isnan(out[i])) << i;
    } else {
      ASSERT_TRUE(SameBits(out[i], static_cast<float>(expected))) << i << " " << out[i] << " " << expected;
    }
  }
}

TEST(TensorFileTest, Bf16IsTheUpperHalfOfAFloat) {
  for (const int64_t count : {0, 1, 3, 7, 63, 129}) {
    std::string bytes = "x";  // odd address
    for (int64_t i = 0; i < count; ++i) bytes += Bytes(static_cast<uint16_t>(i * 509 + 3));
    std::vector<float> out(static_cast<size_t>(count) + 1, 12345.0f);
    DecodeToFloat(TensorType::kBf16, bytes.data() + 1, count, out.data());
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t wide = static_cast<uint32_t>(static_cast<uint16_t>(i * 509 + 3)) << 16;
      EXPECT_EQ(std::memcmp(&out[static_cast<size_t>(i)], &wide, 4), 0) << i;
    }
    EXPECT_EQ(out.back(), 12345.0f) << "wrote past the end";
  }
}

TEST(TensorFileTest, F32IsCopied) {
  const std::vector<float> in = {1.5f, -0.0f, INFINITY, 1e-45f};
  std::vector<float> out(4);
  DecodeToFloat(TensorType::kF32, FloatBytes(in).data(), 4, out.data());
  for (int i = 0; i < 4; ++i) EXPECT_TRUE(SameBits(in[i], out[i]));
}

TEST(TensorFileTest, Q8BlocksByHand) {
  std::string bytes;
  for (const uint16_t scale : {uint16_t{0x3800}, uint16_t{0xc000}, uint16_t{0x0001}}) {  // 0.5, -2, 2^-24
    bytes += Bytes(scale);
    for (int i = 0; i < 32; ++i) bytes += Bytes(static_cast<int8_t>(i * 8 - 128));
  }
  std::vector<float> out(96);
  DecodeToFloat(TensorType::kQ8_0, bytes.data(), 96, out.data());
  for (int i = 0; i < 32; ++i) {
    EXPECT_EQ(out[i], 0.5f * (i * 8 - 128));
    EXPECT_EQ(out[32 + i], -2.0f * (i * 8 - 128));
    EXPECT_EQ(out[64 + i], std::ldexp(static_cast<float>(i * 8 - 128), -24));
  }
}

TEST(TensorFileTest, Q4BlocksByHand) {
  std::string bytes;
  for (int block = 0; block < 2; ++block) {
    bytes += Bytes<uint16_t>(block == 0 ? 0x3400 : 0xbc00);  // 0.25, -1
    bytes += Bytes<uint16_t>(0xc500);                        // -5
    for (int i = 0; i < 16; ++i) bytes += static_cast<char>(i | (15 - i) << 4);
  }
  std::vector<float> out(64);
  DecodeToFloat(TensorType::kQ4_1, bytes.data(), 64, out.data());
  for (int i = 0; i < 16; ++i) {
    EXPECT_EQ(out[i], 0.25f * i - 5);  // low nibbles first
    EXPECT_EQ(out[16 + i], 0.25f * (15 - i) - 5);
    EXPECT_EQ(out[32 + i], -1.0f * i - 5);
    EXPECT_EQ(out[48 + i], -1.0f * (15 - i) - 5);
  }
}

// tests/base/make_golden.py wrote blocks of random bytes and what gguf-py decodes them to.
TEST(TensorFileTest, EveryTypeDecodesToTheBitsOfTheReference) {
  const auto file = ReadGguf(std::string(REFOCUS_SOURCE_DIR) + "/tests/base/golden/dequantize.gguf");
  ASSERT_TRUE(file.ok()) << file.status();
  int types = 0;
  for (const auto& [name, expected] : file->tensors) {
    const size_t suffix = name.find(".expected");
    if (suffix == std::string::npos) continue;
    const TensorInfo& info = file->tensors.at(name.substr(0, suffix));
    EXPECT_EQ(TensorTypeName(info.type), name.substr(0, suffix));
    std::string encoded(static_cast<size_t>(info.bytes), 0);
    std::vector<float> want(static_cast<size_t>(expected.elements())), got(want.size());
    ASSERT_TRUE(ReadTensorBytes(info, encoded.data()).ok());
    ASSERT_TRUE(ReadTensorBytes(expected, want.data()).ok());
    DecodeToFloat(info.type, encoded.data(), info.elements(), got.data());
    for (size_t i = 0; i < want.size(); ++i) {
      ASSERT_TRUE(SameBits(got[i], want[i])) << name << " " << i << ": " << got[i] << " " << want[i];
    }
    ++types;
  }
  EXPECT_EQ(types, 7);
}

TEST(TensorFileTest, BytesOfElements) {
  EXPECT_EQ(*TensorBytes(TensorType::kF32, 0), 0);
  EXPECT_EQ(*TensorBytes(TensorType::kF32, 3), 12);
  EXPECT_EQ(*TensorBytes(TensorType::kBf16, int64_t{1} << 32), int64_t{1} << 33);
  EXPECT_EQ(*TensorBytes(TensorType::kQ8_0, 64), 68);
  EXPECT_EQ(*TensorBytes(TensorType::kQ4_0, 64), 36);
  EXPECT_EQ(*TensorBytes(TensorType::kQ4_1, 64), 40);
  EXPECT_EQ(*TensorBytes(TensorType::kQ4_K, 512), 288);
  EXPECT_EQ(*TensorBytes(TensorType::kQ6_K, 512), 420);
  EXPECT_TRUE(FailsWith(TensorBytes(TensorType::kQ6_K, 128).status(), "WEIGHTS_INVALID", "multiple of 256"));
  EXPECT_TRUE(FailsWith(TensorBytes(TensorType::kQ4_1, 33).status(), "WEIGHTS_INVALID", "multiple of 32"));
  EXPECT_TRUE(FailsWith(TensorBytes(TensorType::kF32, -1).status(), "WEIGHTS_INVALID", "-1"));
  EXPECT_TRUE(FailsWith(TensorBytes(TensorType::kF32, INT64_MAX / 4 + 1).status(), "WEIGHTS_INVALID", "2^63"));
}

TEST(TensorFileTest, ElementsOfShapes) {
  TensorInfo info;
  EXPECT_EQ(info.elements(), 1);
  info.shape = {3, 0, 5};
  EXPECT_EQ(info.elements(), 0);
  info.shape = {int64_t{1} << 31, 8};
  EXPECT_EQ(info.elements(), int64_t{1} << 34);
}

TEST(TensorFileTest, ReadsTheRangeAndNoMore) {
  const TempDir dir;
  TensorInfo info;
  info.file = dir.Write("t", "0123456789");
  info.offset = 3;
  info.bytes = 4;
  char out[6] = "-----";
  ASSERT_TRUE(ReadTensorBytes(info, out).ok());
  EXPECT_STREQ(out, "3456-");
}

TEST(TensorFileTest, AFileThatBecameShorterIsAnError) {
  const TempDir dir;
  TensorInfo info;
  info.file = dir.Write("t", "0123456789");
  info.offset = 3;
  info.bytes = 7;
  char out[8] = {};
  ASSERT_TRUE(ReadTensorBytes(info, out).ok());
  std::filesystem::resize_file(info.file, 9);
  EXPECT_TRUE(FailsWith(ReadTensorBytes(info, out), "WEIGHTS_INVALID", "ends at byte 9"));
  std::filesystem::remove(info.file);
  EXPECT_TRUE(FailsWith(ReadTensorBytes(info, out), "WEIGHTS_INVALID", "cannot be opened"));
}

}  // namespace
}  // namespace refocus
