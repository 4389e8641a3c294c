#include "base/gguf.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>

#include "tests/base/largest_allocation.h"
#include "tests/base/model_files.h"

namespace refocus {
namespace {

class GgufTest : public ::testing::Test {
 protected:
  StatusOr<GgufFile> Open(std::string_view bytes) { return ReadGguf(dir_.Write("m.gguf", bytes)); }
  Status Read(std::string_view bytes) { return Open(bytes).status(); }
  Status Read(const GgufBuilder& builder) { return Read(builder.File()); }
  ::testing::AssertionResult Invalid(const Status& status, const std::string& part) {
    return FailsWith(status, "WEIGHTS_INVALID", part);
  }

  TempDir dir_;
};

const std::string kSixteen(16, 'x');

TEST_F(GgufTest, WidensEveryValueType) {
  GgufBuilder builder;
  builder.Raw("u8", 0, Bytes<uint8_t>(200)).Raw("i8", 1, Bytes<int8_t>(-7)).Raw("u16", 2, Bytes<uint16_t>(65535));
  builder.Raw("i16", 3, Bytes<int16_t>(-300)).U32("u32", 4'000'000'000u).Raw("i32", 5, Bytes<int32_t>(-5));
  builder.F32("f32", 0.5f).Raw("bool", 7, Bytes<uint8_t>(1)).Text("text", "caf\xc3\xa9");
  builder.Raw("u64", 10, Bytes<uint64_t>(INT64_MAX)).Raw("i64", 11, Bytes<int64_t>(INT64_MIN));
  builder.Raw("f64", 12, Bytes<double>(1e300)).Texts("texts", {"a", "", "ccc"});
  builder.Raw("ints", 9, Bytes<uint32_t>(5) + Bytes<uint64_t>(2) + Bytes<int32_t>(-1) + Bytes<int32_t>(8));
  builder.Raw("floats", 9, Bytes<uint32_t>(6) + Bytes<uint64_t>(1) + Bytes<float>(2.5f));
  builder.Raw("bools", 9, Bytes<uint32_t>(7) + Bytes<uint64_t>(2) + std::string("\x00\x01", 2));
  builder.Raw("none", 9, Bytes<uint32_t>(8) + Bytes<uint64_t>(0));
  const auto file = Open(builder.File());
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(*file->Int("u8"), 200);
  EXPECT_EQ(*file->Int("i8"), -7);
  EXPECT_EQ(*file->Int("u16"), 65535);
  EXPECT_EQ(*file->Int("i16"), -300);
  EXPECT_EQ(*file->Int("u32"), 4'000'000'000);
  EXPECT_EQ(*file->Int("i32"), -5);
  EXPECT_EQ(*file->Int("u64"), INT64_MAX);
  EXPECT_EQ(*file->Int("i64"), INT64_MIN);
  EXPECT_EQ(*file->Float("f32"), 0.5);
  EXPECT_EQ(*file->Float("f64"), 1e300);
  EXPECT_EQ(*file->Float("i32"), -5.0);
  EXPECT_EQ(*file->String("text"), "caf\xc3\xa9");
  EXPECT_EQ(std::get<bool>(file->metadata.at("bool")), true);
  EXPECT_EQ(*file->Strings("texts"), (std::vector<std::string>{"a", "", "ccc"}));
  EXPECT_EQ(*file->Ints("ints"), (std::vector<int64_t>{-1, 8}));
  EXPECT_EQ(*file->Ints("bools"), (std::vector<int64_t>{0, 1}));
  EXPECT_TRUE(file->Strings("none")->empty());
  EXPECT_EQ(file->Strings("ints"), nullptr);
  EXPECT_EQ(file->Ints("absent"), nullptr);
  EXPECT_FALSE(file->Has("absent"));
  EXPECT_TRUE(Invalid(file->Int("absent").status(), "absent: got nothing"));
  EXPECT_TRUE(Invalid(file->Int("text").status(), "text: got another type"));
  EXPECT_TRUE(Invalid(file->Float("text").status(), "a number"));
  EXPECT_TRUE(Invalid(file->String("u8").status(), "a string"));
}

TEST_F(GgufTest, PlacesTensors) {
  for (const uint32_t alignment : {32u, 8u, 128u}) {
    GgufBuilder builder;
    builder.Alignment(alignment)
        .Tensor("a", {3, 2}, 0, std::string(24, 'a'))
        .Tensor("b", {32}, 8, std::string(34, 'b'));
    const auto file = Open(builder.File());
    ASSERT_TRUE(file.ok()) << file.status();
    const TensorInfo& a = file->tensors.at("a");
    const TensorInfo& b = file->tensors.at("b");
    EXPECT_EQ(a.shape, (std::vector<int64_t>{2, 3}));  // slowest first
    EXPECT_EQ(a.type, TensorType::kF32);
    EXPECT_EQ(b.type, TensorType::kQ8_0);
    EXPECT_EQ(a.offset % alignment, 0);
    std::string bytes(static_cast<size_t>(b.bytes), '\0');
    ASSERT_TRUE(ReadTensorBytes(b, bytes.data()).ok());
    EXPECT_EQ(bytes, std::string(34, 'b'));
  }
}

TEST_F(GgufTest, EmptyFileOfBothVersions) {
  EXPECT_TRUE(Read(GgufBuilder().Head(0, 0, 2)).ok());
  EXPECT_TRUE(Read(GgufBuilder().Head(0, 0, 3)).ok());
}

TEST_F(GgufTest, MagicAndVersion) {
  EXPECT_TRUE(Invalid(Read(""), "magic: needs 4 bytes, the file has 0 left"));
  EXPECT_TRUE(Invalid(Read("GGML" + std::string(40, '\0')), "magic: got 'GGML'"));
  EXPECT_TRUE(Invalid(Read("version https://git-lfs.github.com/spec/v1\n"), "LFS pointer"));
  EXPECT_TRUE(Invalid(Read(GgufBuilder().Head(0, 0, 1)), "version: got 1"));
  EXPECT_TRUE(Invalid(Read(GgufBuilder().Head(0, 0, 0x03000000)), "big-endian"));
}

TEST_F(GgufTest, CountsAboveTheFileAllocateNothing) {
  for (const uint64_t count : {uint64_t{1}, uint64_t{1} << 20, uint64_t{1} << 32, uint64_t{1} << 63, ~uint64_t{0}}) {
    TakeLargestAllocation();
    EXPECT_TRUE(Invalid(Read(GgufBuilder().Head(count, 0)), "tensor count: got " + std::to_string(count)));
    EXPECT_TRUE(Invalid(Read(GgufBuilder().Head(0, count)), "metadata count: got " + std::to_string(count)));
    const uint64_t length = std::max<uint64_t>(count, 21);
    GgufBuilder text, array;
    EXPECT_TRUE(Invalid(Read(GgufBuilder().Head(0, 1) + Bytes(length) + std::string(20, 'k')), "key length: got"));
    EXPECT_TRUE(Invalid(Read(text.Raw("k", 8, Bytes(length) + "abcd").Head()), "string length: got"));
    EXPECT_TRUE(Invalid(Read(array.Raw("k", 9, Bytes<uint32_t>(4) + Bytes(count)).Head()), "array elements: got"));
    EXPECT_LT(TakeLargestAllocation(), 1u << 16) << count;
  }
}

TEST_F(GgufTest, ArrayOfShortStringsCannotClaimMoreThanItsBytes) {
  GgufBuilder builder;  // 3 strings claimed, room for 2 lengths
  builder.Raw("k", 9, Bytes<uint32_t>(8) + Bytes<uint64_t>(3) + Bytes<uint64_t>(0) + Bytes<uint64_t>(0));
  EXPECT_TRUE(Invalid(Read(builder.Head()), "array elements: got 3, allowed at most 2"));
}

TEST_F(GgufTest, MessagesNameKeyAndPlace) {
  GgufBuilder builder;
  builder.U32("first", 1).Raw("second", 8, Bytes<uint64_t>(99));
  const int64_t place = 24 + (8 + 5 + 4 + 4) + (8 + 6 + 4);
  const Status status = Read(builder.Head());
  EXPECT_TRUE(Invalid(status, "at byte " + std::to_string(place)));
  EXPECT_TRUE(Invalid(status, "in key 'second'"));
}

TEST_F(GgufTest, ValueTypesAndValues) {
  EXPECT_TRUE(Invalid(Read(GgufBuilder().Raw("k", 13, "x")), "value type: got 13"));
  EXPECT_TRUE(Invalid(Read(GgufBuilder().Raw("k", 9, Bytes<uint32_t>(99) + Bytes<uint64_t>(0))), "value type: got 99"));
  EXPECT_TRUE(
      Invalid(Read(GgufBuilder().Raw("k", 9, Bytes<uint32_t>(9) + Bytes<uint64_t>(1) + kSixteen)), "array of arrays"));
  EXPECT_TRUE(Invalid(Read(GgufBuilder().Raw("k", 7, "\x02")), "bool value: got 2"));
  EXPECT_TRUE(Invalid(Read(GgufBuilder().Raw("k", 10, Bytes(~uint64_t{0}))), "2^63 - 1"));
}

TEST_F(GgufTest, DuplicateKeysAndTensors) {
  EXPECT_TRUE(Invalid(Read(GgufBuilder().U32("k", 1).U32("k", 1)), "key 'k': appears twice"));
  GgufBuilder builder;
  builder.Tensor("t", {4}, 0, kSixteen).Tensor("t", {4}, 0, kSixteen);
  EXPECT_TRUE(Invalid(Read(builder), "tensor 't': appears twice"));
}

TEST_F(GgufTest, Alignment) {
  for (const uint32_t alignment : {0u, 1u, 4u, 12u, 33u, 1u << 21, 1u << 31}) {
    EXPECT_TRUE(Invalid(Read(GgufBuilder().U32("general.alignment", alignment)), "general.alignment: got"))
        << alignment;
  }
  EXPECT_TRUE(Invalid(Read(GgufBuilder().Text("general.alignment", "32")), "general.alignment: got another type"));
}

TEST_F(GgufTest, TensorTypes) {
  EXPECT_TRUE(
      Invalid(Read(GgufBuilder().Tensor("t", {256}, 13, kSixteen)), "tensor 't': type: got Q5_K (13), allowed F32"));
  EXPECT_TRUE(Invalid(Read(GgufBuilder().Tensor("t", {128}, 12, kSixteen)),
                      "row length: got 128, allowed multiples of 256 for Q4_K"));
  EXPECT_TRUE(Invalid(Read(GgufBuilder().Tensor("t", {224, 8}, 14, kSixteen)),
                      "row length: got 224, allowed multiples of 256 for Q6_K"));
  EXPECT_TRUE(Invalid(Read(GgufBuilder().Tensor("t", {256}, 4000, kSixteen)), "unknown type 4000"));
  EXPECT_TRUE(Invalid(Read(GgufBuilder().Tensor("t", {33}, 3, kSixteen)), "row length: got 33"));
  EXPECT_TRUE(Invalid(Read(GgufBuilder().Tensor("t", {16, 2}, 8, kSixteen)), "row length: got 16"));
}

TEST_F(GgufTest, Dimensions) {
  EXPECT_TRUE(Invalid(Read(GgufBuilder().Tensor("t", {}, 0, kSixteen)), "dimensions: got 0"));
  EXPECT_TRUE(Invalid(Read(GgufBuilder().Tensor("t", {1, 1, 1, 1, 1}, 0, kSixteen)), "dimensions: got 5"));
  EXPECT_TRUE(Invalid(Read(GgufBuilder().Tensor("t", {4, 0}, 0, kSixteen)), "dimension 1: got 0"));
  EXPECT_TRUE(Invalid(Read(GgufBuilder().Tensor("t", {uint64_t{1} << 63}, 0, kSixteen)),
                      "dimension 0: got 9223372036854775808"));
  const uint64_t wide = uint64_t{1} << 32;
  EXPECT_TRUE(Invalid(Read(GgufBuilder().Tensor("t", {wide, wide}, 0, kSixteen)), "product below 2^63"));
  EXPECT_TRUE(Invalid(Read(GgufBuilder().Tensor("t", {wide, wide / 4}, 0, kSixteen)), "2^63 bytes"));  // 2^62 x 4 bytes
  EXPECT_TRUE(Invalid(Read(GgufBuilder().Tensor("t", {wide}, 0, kSixteen)), "17179869184 bytes at offset 0"));
}

TEST_F(GgufTest, Offsets) {
  const auto at = [&](uint64_t offset) { return Read(GgufBuilder().TensorAt("t", {4}, 0, offset, kSixteen)); };
  EXPECT_TRUE(at(0).ok());
  EXPECT_TRUE(Invalid(at(8), "offset: got 8, allowed multiples of 32"));
  EXPECT_TRUE(Invalid(at(32), "16 bytes at offset 32 of a data section of 32 bytes"));
  EXPECT_TRUE(Invalid(at(uint64_t{1} << 63), "out of the file"));
  EXPECT_TRUE(Invalid(at(INT64_MAX - 31), "data section of 32 bytes"));
  GgufBuilder overlap;
  overlap.Tensor("a", {12}, 0, std::string(48, 'x')).TensorAt("b", {4}, 0, 32, kSixteen);
  EXPECT_TRUE(Invalid(Read(overlap), "tensors 'a' and 'b': overlap"));
}

TEST_F(GgufTest, EveryTruncationIsRefused) {
  GgufBuilder builder;
  builder.U32("k", 1).Texts("t", {"abc", "d"}).Tensor("a", {8}, 0, std::string(32, 'x'));
  const std::string bytes = builder.File();
  ASSERT_TRUE(Read(bytes).ok());
  for (size_t length = 0; length < bytes.size(); ++length) {
    EXPECT_TRUE(Invalid(Read(std::string_view(bytes).substr(0, length)), "")) << length;
  }
}

TEST_F(GgufTest, LongNamesAreCutInMessagesAndControlCharactersEscaped) {
  const Status status = Read(GgufBuilder().U32("a\n\x1b", 1).U32("a\n\x1b", 1));
  EXPECT_TRUE(Invalid(status, "'a\\x0a\\x1b'"));
  const std::string name(256, 'n');
  EXPECT_LT(Read(GgufBuilder().Tensor(name, {0}, 0, "")).message().size(), 400u);
  EXPECT_TRUE(Invalid(Read(GgufBuilder().Tensor(name + "n", {4}, 0, kSixteen)), "tensor name length: got 257"));
}

TEST_F(GgufTest, FifoAndFolder) {
  const std::string path = dir_.path() + "/f.gguf";
  ASSERT_EQ(mkfifo(path.c_str(), 0600), 0);
  EXPECT_TRUE(Invalid(ReadGguf(path).status(), "got a FIFO"));
  EXPECT_TRUE(Invalid(ReadGguf(dir_.path()).status(), "got a folder"));
  EXPECT_TRUE(Invalid(ReadGguf("").status(), "empty path"));
}

}  // namespace
}  // namespace refocus
