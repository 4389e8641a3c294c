#include "base/safetensors.h"

#include <sys/stat.h>
#include <unistd.h>

#include "tests/base/largest_allocation.h"
#include "tests/base/model_files.h"

namespace refocus {
namespace {

constexpr char kTwoTensors[] =
    R"({"__metadata__":{"format":"pt"},)"
    R"("b":{"dtype":"BF16","shape":[3],"data_offsets":[8,14]},)"
    R"("a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]}} )";
const std::string kFourteen(14, 'x');

class SafetensorsTest : public ::testing::Test {
 protected:
  Status Read(std::string_view bytes) { return ReadSafetensorsHeader(dir_.Write("model.safetensors", bytes)).status(); }
  // One F32 tensor "t" described by `entry`, with `bytes` of data.
  Status ReadEntry(const std::string& entry, size_t bytes) {
    return Read(Safetensors(R"({"t":)" + entry + "}", std::string(bytes, 'x')));
  }
  ::testing::AssertionResult Invalid(const Status& status, const std::string& part) {
    return FailsWith(status, "WEIGHTS_INVALID", part);
  }

  TempDir dir_;
};

TEST_F(SafetensorsTest, ReadsNamesTypesShapesAndPlaces) {
  const auto table = ReadSafetensorsHeader(dir_.Write("m.safetensors", Safetensors(kTwoTensors, kFourteen)));
  ASSERT_TRUE(table.ok()) << table.status();
  ASSERT_EQ(table->size(), 2u);
  const TensorInfo& a = table->at("a");
  const TensorInfo& b = table->at("b");
  const int64_t data = 8 + static_cast<int64_t>(sizeof(kTwoTensors)) - 1;
  EXPECT_EQ(a.type, TensorType::kF32);
  EXPECT_EQ(a.shape, (std::vector<int64_t>{2, 1}));
  EXPECT_EQ(a.offset, data);
  EXPECT_EQ(a.bytes, 8);
  EXPECT_EQ(b.type, TensorType::kBf16);
  EXPECT_EQ(b.offset, data + 8);
  EXPECT_EQ(b.bytes, 6);
}

TEST_F(SafetensorsTest, EmptyAndScalarTensorsAndNoTensorAreLegal) {
  EXPECT_TRUE(Read(Safetensors("{}", "")).ok());
  EXPECT_TRUE(ReadEntry(R"({"dtype":"F32","shape":[],"data_offsets":[0,4]})", 4).ok());
  EXPECT_TRUE(ReadEntry(R"({"dtype":"F16","shape":[5,0],"data_offsets":[0,0]})", 0).ok());
}

TEST_F(SafetensorsTest, ShorterThanTheLengthField) {
  EXPECT_TRUE(Invalid(Read(""), "got 0 bytes"));
  EXPECT_TRUE(Invalid(Read("1234567"), "got 7 bytes"));
}

TEST_F(SafetensorsTest, HeaderLengthZero) { EXPECT_TRUE(Invalid(Read(Bytes<uint64_t>(0)), "header length: got 0")); }

TEST_F(SafetensorsTest, HeaderLengthAboveTheFile) {
  EXPECT_TRUE(Invalid(Read(Bytes<uint64_t>(3) + "{}"), "header length: got 3, allowed 2 to 2"));
}

TEST_F(SafetensorsTest, HugeHeaderLengthsAllocateNothing) {
  for (const uint64_t length : {uint64_t{1} << 32, uint64_t{1} << 63, ~uint64_t{0}, ~uint64_t{7}}) {
    TakeLargestAllocation();
    EXPECT_TRUE(Invalid(Read(Bytes(length) + "{}"), "header length: got " + std::to_string(length)));
    EXPECT_LT(TakeLargestAllocation(), 1u << 16);
  }
}

TEST_F(SafetensorsTest, HeaderAboveTheFormatsCap) {
  const std::string file = dir_.Write("m.safetensors", Bytes<uint64_t>(100'000'001) + "{}");
  std::filesystem::resize_file(file, 200'000'000);  // sparse
  TakeLargestAllocation();
  EXPECT_TRUE(Invalid(ReadSafetensorsHeader(file).status(), "allowed 2 to 100000000"));
  EXPECT_LT(TakeLargestAllocation(), 1u << 16);
}

TEST_F(SafetensorsTest, HeaderThatIsNotUtf8OrNoObject) {
  EXPECT_TRUE(Invalid(Read(Safetensors("{\"\xff\":{}}", "")), "UTF-8"));
  EXPECT_TRUE(Invalid(Read(Safetensors(" {}", "")), "expected '{'"));
  EXPECT_TRUE(Invalid(Read(Safetensors("[]", "")), "expected '{'"));
  EXPECT_TRUE(Invalid(Read(Safetensors("\xef\xbb\xbf{}", "")), "expected '{'"));
  EXPECT_TRUE(Invalid(Read(Safetensors("{}{}", "")), "column 3"));
  EXPECT_TRUE(Invalid(Read(Safetensors("{\"a\":", "")), "column"));
}

TEST_F(SafetensorsTest, DeepNesting) {
  const std::string deep(10'000, '[');
  EXPECT_TRUE(Invalid(Read(Safetensors("{\"t\":" + deep, "")), "got an array"));
  EXPECT_TRUE(Invalid(Read(Safetensors("{\"__metadata__\":{\"a\":" + deep, "")), "got an array"));
  EXPECT_TRUE(Invalid(Read(Safetensors(R"({"t":{"shape":)" + deep, "")), "got an array"));
  std::string objects;
  for (int i = 0; i < 10'000; ++i) objects += "{\"t\":";
  EXPECT_TRUE(Invalid(Read(Safetensors(objects, "")), "field: got 't'"));
}

TEST_F(SafetensorsTest, DuplicateNames) {
  const std::string entry = R"({"dtype":"F32","shape":[1],"data_offsets":[0,4]})";
  EXPECT_TRUE(
      Invalid(Read(Safetensors(R"({"t":)" + entry + R"(,"t":)" + entry + "}", "1234")), "'t': name: got it twice"));
  EXPECT_TRUE(Invalid(Read(Safetensors(R"({"__metadata__":{},"__metadata__":{}})", "")), "twice"));
  EXPECT_TRUE(Invalid(ReadEntry(R"({"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]})", 4),
                      "dtype: got it twice"));
}

TEST_F(SafetensorsTest, OffsetsReversedOrNegative) {
  EXPECT_TRUE(Invalid(ReadEntry(R"({"dtype":"F32","shape":[1],"data_offsets":[4,0]})", 4), "begin 4 after end 0"));
  EXPECT_TRUE(Invalid(ReadEntry(R"({"dtype":"F32","shape":[1],"data_offsets":[-4,0]})", 4), "the number -4"));
  EXPECT_TRUE(Invalid(ReadEntry(R"({"dtype":"F32","shape":[1],"data_offsets":[0,4,8]})", 4), "3 numbers"));
  EXPECT_TRUE(Invalid(ReadEntry(R"({"dtype":"F32","shape":[1],"data_offsets":[0,4.0]})", 4), "the number '4.0'"));
}

TEST_F(SafetensorsTest, OffsetsBeyondTheFile) {
  EXPECT_TRUE(Invalid(ReadEntry(R"({"dtype":"F32","shape":[2],"data_offsets":[0,8]})", 7), "has 7 bytes"));
  EXPECT_TRUE(
      Invalid(ReadEntry(R"({"dtype":"F32","shape":[1],"data_offsets":[9223372036854775800,9223372036854775804]})", 4),
              "has 4 bytes"));
  EXPECT_TRUE(
      Invalid(ReadEntry(R"({"dtype":"F32","shape":[1],"data_offsets":[18446744073709551612,18446744073709551615]})", 4),
              "numbers below 2^63"));
}

TEST_F(SafetensorsTest, Overlap) {
  EXPECT_TRUE(Invalid(Read(Safetensors(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
                                       R"("b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}})",
                                       "123456789012")),
                      "'b': data_offsets: got begin 4, expected 8 (overlap)"));
}

TEST_F(SafetensorsTest, HoleOrTrailingBytes) {
  EXPECT_TRUE(
      Invalid(ReadEntry(R"({"dtype":"F32","shape":[1],"data_offsets":[4,8]})", 8), "got begin 4, expected 0 (hole)"));
  EXPECT_TRUE(Invalid(ReadEntry(R"({"dtype":"F32","shape":[1],"data_offsets":[0,4]})", 5), "the tensors cover 4"));
  EXPECT_TRUE(Invalid(Read(Safetensors("{}", "x")), "the tensors cover 0"));
}

TEST_F(SafetensorsTest, ShapeProductOverflows) {
  EXPECT_TRUE(Invalid(ReadEntry(R"({"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]})", 0), "2^63"));
  EXPECT_TRUE(Invalid(ReadEntry(R"({"dtype":"F32","shape":[2305843009213693952],"data_offsets":[0,0]})", 0), "2^63"));
  EXPECT_TRUE(Invalid(ReadEntry(R"({"dtype":"F32","shape":[1e999],"data_offsets":[0,4]})", 4), ""));
}

TEST_F(SafetensorsTest, SizeUnlikeSpan) {
  EXPECT_TRUE(Invalid(ReadEntry(R"({"dtype":"BF16","shape":[3],"data_offsets":[0,8]})", 8), "got 8 bytes, allowed 6"));
}

TEST_F(SafetensorsTest, DimensionsAbove32BitsDoNotWrap) {
  for (const int shift : {31, 32}) {
    const std::string size = std::to_string(int64_t{1} << shift);
    const std::string bytes = std::to_string(int64_t{2} << shift);
    const std::string header = R"({"t":{"dtype":"F16","shape":[)" + size + R"(],"data_offsets":[0,)" + bytes + "]}}";
    const std::string file = dir_.Write("big.safetensors", Safetensors(header, ""));
    EXPECT_TRUE(Invalid(ReadSafetensorsHeader(file).status(), "cut short"));
    std::filesystem::resize_file(file, 8 + header.size() + (uint64_t{2} << shift));  // sparse
    const auto table = ReadSafetensorsHeader(file);
    ASSERT_TRUE(table.ok()) << table.status();
    EXPECT_EQ(table->at("t").elements(), int64_t{1} << shift);
    EXPECT_EQ(table->at("t").bytes, int64_t{2} << shift);
  }
}

TEST_F(SafetensorsTest, UnknownType) {
  EXPECT_TRUE(Invalid(ReadEntry(R"({"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]})", 4),
                      "dtype: got 'F8_E4M3', allowed F32, F16, BF16"));
  EXPECT_TRUE(Invalid(ReadEntry(R"({"dtype":7,"shape":[4],"data_offsets":[0,4]})", 4), "dtype: got the number 7"));
}

TEST_F(SafetensorsTest, MissingOrUnknownField) {
  EXPECT_TRUE(Invalid(ReadEntry(R"({"shape":[1],"data_offsets":[0,4]})", 4), "dtype: got nothing"));
  EXPECT_TRUE(Invalid(ReadEntry(R"({"dtype":"F32","data_offsets":[0,4]})", 4), "shape: got nothing"));
  EXPECT_TRUE(Invalid(ReadEntry(R"({"dtype":"F32","shape":[1]})", 4), "data_offsets: got nothing"));
  EXPECT_TRUE(Invalid(ReadEntry(R"({"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1})", 4), "field: got 'x'"));
  EXPECT_TRUE(Invalid(ReadEntry("null", 0), "got null"));
  EXPECT_TRUE(
      Invalid(ReadEntry(R"({"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,4]})", 4), "at most 8"));
}

TEST_F(SafetensorsTest, MetadataMustHoldStrings) {
  EXPECT_TRUE(Invalid(Read(Safetensors(R"({"__metadata__":{"a":1}})", "")), "'__metadata__': value: got the number 1"));
  EXPECT_TRUE(Invalid(Read(Safetensors(R"({"__metadata__":"a"})", "")), "got the string 'a'"));
}

TEST_F(SafetensorsTest, LfsPointer) {
  EXPECT_TRUE(Invalid(Read("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n"),
                      "looks like an LFS pointer; fetch the file"));
}

TEST_F(SafetensorsTest, OneByteShort) {
  std::string bytes = Safetensors(kTwoTensors, kFourteen);
  bytes.pop_back();
  EXPECT_TRUE(Invalid(Read(bytes), "cut short"));
}

TEST_F(SafetensorsTest, SymlinkLoopFifoFolderAndAbsence) {
  const std::string path = dir_.path() + "/model.safetensors";
  EXPECT_TRUE(Invalid(ReadSafetensorsHeader(path).status(), "cannot be opened"));
  ASSERT_EQ(symlink(path.c_str(), path.c_str()), 0);
  EXPECT_TRUE(Invalid(ReadSafetensorsFolder(dir_.path()).status(), "cannot be opened"));
  unlink(path.c_str());
  ASSERT_EQ(mkfifo(path.c_str(), 0600), 0);
  EXPECT_TRUE(Invalid(ReadSafetensorsFolder(dir_.path()).status(), "got a FIFO"));
  unlink(path.c_str());
  ASSERT_EQ(mkdir(path.c_str(), 0700), 0);
  EXPECT_TRUE(Invalid(ReadSafetensorsFolder(dir_.path()).status(), "got a folder"));
}

class SafetensorsIndexTest : public SafetensorsTest {
 protected:
  SafetensorsIndexTest() {
    WriteShard("one.safetensors", "a");
    WriteShard("two.safetensors", "b");
  }
  void WriteShard(const std::string& file, const std::string& tensor) {
    dir_.Write(file, Safetensors("{\"" + tensor + R"(":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", "1234"));
  }
  StatusOr<TensorTable> ReadIndex(const std::string& weight_map) {
    dir_.Write("model.safetensors.index.json", "{\"metadata\":{},\"weight_map\":" + weight_map + "}");
    return ReadSafetensorsFolder(dir_.path());
  }
};

TEST_F(SafetensorsIndexTest, JoinsShards) {
  const auto table = ReadIndex(R"({"a":"one.safetensors","b":"two.safetensors"})");
  ASSERT_TRUE(table.ok()) << table.status();
  EXPECT_EQ(table->size(), 2u);
  EXPECT_EQ(table->at("b").file, dir_.path() + "/two.safetensors");
}

TEST_F(SafetensorsIndexTest, PathsAreNeverOpened) {
  const TempDir outside;
  outside.Write("x.safetensors", Safetensors(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})", "1234"));
  const std::string name = std::filesystem::path(outside.path()).filename();
  for (const std::string& shard :
       {outside.path() + "/x.safetensors", "../" + name + "/x.safetensors", std::string("..\\\\x.safetensors"),
        std::string("../../x"), std::string(".."), std::string(""), std::string("sub/x.safetensors"),
        std::string("x.bin"), std::string("x\\u0000.safetensors")}) {
    EXPECT_TRUE(Invalid(ReadIndex("{\"a\":\"" + shard + "\"}").status(), "allowed names of .safetensors files"))
        << shard;
  }
  EXPECT_TRUE(Invalid(ReadIndex(R"({"a":7})").status(), "got number"));
}

TEST_F(SafetensorsIndexTest, MissingShard) {
  EXPECT_TRUE(Invalid(ReadIndex(R"({"a":"one.safetensors","c":"three.safetensors"})").status(),
                      "three.safetensors: cannot be"));
}

TEST_F(SafetensorsIndexTest, TensorInTwoShards) {
  WriteShard("two.safetensors", "a");
  EXPECT_TRUE(Invalid(ReadIndex(R"({"a":"one.safetensors","b":"two.safetensors"})").status(), "'a': is also in"));
  EXPECT_TRUE(Invalid(ReadIndex(R"({"a":"one.safetensors","a":"two.safetensors"})").status(), "'a' appears twice"));
}

TEST_F(SafetensorsIndexTest, TensorThatItsShardLacks) {
  EXPECT_TRUE(Invalid(ReadIndex(R"({"a":"one.safetensors","c":"two.safetensors"})").status(),
                      "'c': is not in two.safetensors"));
  EXPECT_TRUE(Invalid(ReadIndex(R"({"a":"two.safetensors","b":"one.safetensors"})").status(), "is not in"));
}

TEST_F(SafetensorsIndexTest, BrokenIndex) {
  EXPECT_TRUE(Invalid(ReadIndex("[]").status(), "weight_map"));
  EXPECT_TRUE(Invalid(ReadIndex("{\"a\":}").status(), "line 1, column 34"));
  dir_.Write("model.safetensors.index.json", "");
  EXPECT_TRUE(Invalid(ReadSafetensorsFolder(dir_.path()).status(), "the file is empty"));
  std::filesystem::remove(dir_.path() + "/model.safetensors.index.json");
  EXPECT_TRUE(Invalid(ReadSafetensorsFolder(dir_.path()).status(), "only safetensors and GGUF are read"));
}

}  // namespace
}  // namespace refocus
