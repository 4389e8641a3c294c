#include "base/gguf.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/input_file.h"

namespace refocus {
namespace {

// Far above every real file, low enough that a hostile one cannot make the reader hold much more than its own size.
constexpr int64_t kMaxEntries = 1 << 20;  // metadata keys; tensors
constexpr int64_t kMaxKeyBytes = 65'535;  // the format's own limit
constexpr int64_t kMaxTensorNameBytes = 256;
constexpr int64_t kMaxStringBytes = 64 << 20;
constexpr int64_t kMaxArrayElements = 1 << 24;  // in all arrays together
constexpr int64_t kMaxDimensions = 4;
constexpr int64_t kMaxAlignment = 1 << 20;
constexpr int64_t kDefaultAlignment = 32;
constexpr int64_t kBufferBytes = 1 << 18;

enum ValueType : uint32_t {
  kU8 = 0,
  kI8,
  kU16,
  kI16,
  kU32,
  kI32,
  kF32,
  kBool,
  kString,
  kArray,
  kU64,
  kI64,
  kF64,
  kValueTypes,
};
constexpr int64_t kValueBytes[kValueTypes] = {1, 1, 2,  2, 4, 4, 4,
                                              1, 8, 12, 8, 8, 8};  // a string's or array's: the least

struct FileType {
  uint32_t id;
  const char* name;
};
// Names of types that exist elsewhere, so that a refusal can say what the file holds.
constexpr FileType kOtherTypes[] = {
    {6, "Q5_0"},     {7, "Q5_1"},    {9, "Q8_1"},     {10, "Q2_K"},  {11, "Q3_K"},   {13, "Q5_K"},  {15, "Q8_K"},
    {16, "IQ2_XXS"}, {17, "IQ2_XS"}, {18, "IQ3_XXS"}, {19, "IQ1_S"}, {20, "IQ4_NL"}, {21, "IQ3_S"}, {22, "IQ2_S"},
    {23, "IQ4_XS"},  {24, "I8"},     {25, "I16"},     {26, "I32"},   {27, "I64"},    {28, "F64"},   {29, "IQ1_M"},
    {34, "TQ1_0"},   {35, "TQ2_0"},  {39, "MXFP4"},
};

bool ToTensorType(uint32_t id, TensorType* type) {
  switch (id) {
    case 0: *type = TensorType::kF32; return true;
    case 1: *type = TensorType::kF16; return true;
    case 2: *type = TensorType::kQ4_0; return true;
    case 3: *type = TensorType::kQ4_1; return true;
    case 8: *type = TensorType::kQ8_0; return true;
    case 12: *type = TensorType::kQ4_K; return true;
    case 14: *type = TensorType::kQ6_K; return true;
    case 30: *type = TensorType::kBf16; return true;
    default: return false;
  }
}

std::string FileTypeName(uint32_t id) {
  for (const FileType& type : kOtherTypes) {
    if (type.id == id) return std::string(type.name) + " (" + std::to_string(id) + ")";
  }
  return "unknown type " + std::to_string(id);
}

Status Invalid(const std::string& path, const std::string& what, ErrorMetadata metadata = {}) {
  metadata.insert(metadata.begin(), {"file", path});
  return Error(StatusCode::kInvalidArgument, "WEIGHTS_INVALID", path + ": " + what, metadata);
}

// Reads forward through a buffer. Every length is compared with what is left of the file before anything is allocated.
class Reader {
 public:
  explicit Reader(const InputFile& file) : file_(file) {}

  int64_t position() const { return position_; }
  int64_t left() const { return file_.size() - position_; }

  Status Fail(const std::string& what) const {
    return Invalid(file_.path(), "at byte " + std::to_string(position_) + ": " + what,
                   {{"offset", std::to_string(position_)}});
  }

  Status Bytes(void* out, int64_t bytes, const char* what) {
    if (bytes > left()) {
      return Fail(std::string(what) + ": needs " + std::to_string(bytes) + " bytes, the file has " +
                  std::to_string(left()) + " left");
    }
    auto* to = static_cast<char*>(out);
    while (bytes > 0) {
      if (position_ < start_ || position_ >= start_ + filled_) {
        start_ = position_;
        filled_ = std::min<int64_t>(kBufferBytes, left());
        buffer_.resize(static_cast<size_t>(filled_));
        REFOCUS_RETURN_IF_ERROR(file_.ReadAt(start_, buffer_.data(), filled_));
      }
      const int64_t step = std::min(bytes, start_ + filled_ - position_);
      std::memcpy(to, buffer_.data() + (position_ - start_), static_cast<size_t>(step));
      to += step;
      position_ += step;
      bytes -= step;
    }
    return absl::OkStatus();
  }

  template <typename T>
  Status Number(T* out, const char* what) {
    return Bytes(out, sizeof(T), what);
  }

  // A length or count: at most `limit`, and `unit` bytes each must still fit the file.
  Status Count(int64_t* out, int64_t limit, int64_t unit, const char* what) {
    uint64_t count = 0;
    REFOCUS_RETURN_IF_ERROR(Number(&count, what));
    const int64_t most = std::min(limit, left() / unit);
    if (count > static_cast<uint64_t>(most)) {
      position_ -= 8;  // point at the count itself
      return Fail(std::string(what) + ": got " + std::to_string(count) + ", allowed at most " + std::to_string(most) +
                  (most < limit ? " (what is left of the file)" : ""));
    }
    *out = static_cast<int64_t>(count);
    return absl::OkStatus();
  }

  Status String(std::string* out, int64_t limit, const char* what) {
    int64_t length = 0;
    REFOCUS_RETURN_IF_ERROR(Count(&length, limit, 1, what));
    out->resize(static_cast<size_t>(length));
    return Bytes(out->data(), length, what);
  }

 private:
  const InputFile& file_;
  std::vector<char> buffer_;
  int64_t start_ = 0, filled_ = 0;  // the buffer's place in the file
  int64_t position_ = 0;
};

template <typename T>
Status ReadAsInt(Reader& reader, int64_t* out) {
  T value = 0;
  REFOCUS_RETURN_IF_ERROR(reader.Number(&value, "value"));
  if constexpr (std::is_same_v<T, uint64_t>) {
    if (value > static_cast<uint64_t>(INT64_MAX)) {
      return reader.Fail("u64 value: got " + std::to_string(value) + ", allowed up to 2^63 - 1");
    }
  }
  *out = static_cast<int64_t>(value);
  return absl::OkStatus();
}

Status ReadInt(Reader& reader, uint32_t type, int64_t* out) {
  switch (type) {
    case kU8: return ReadAsInt<uint8_t>(reader, out);
    case kI8: return ReadAsInt<int8_t>(reader, out);
    case kU16: return ReadAsInt<uint16_t>(reader, out);
    case kI16: return ReadAsInt<int16_t>(reader, out);
    case kU32: return ReadAsInt<uint32_t>(reader, out);
    case kI32: return ReadAsInt<int32_t>(reader, out);
    case kU64: return ReadAsInt<uint64_t>(reader, out);
    case kI64: return ReadAsInt<int64_t>(reader, out);
    default: break;
  }
  REFOCUS_RETURN_IF_ERROR(ReadAsInt<uint8_t>(reader, out));
  if (*out > 1) return reader.Fail("bool value: got " + std::to_string(*out) + ", allowed 0 or 1");
  return absl::OkStatus();
}

Status ReadFloat(Reader& reader, uint32_t type, double* out) {
  if (type == kF64) return reader.Number(out, "value");
  float value = 0;
  REFOCUS_RETURN_IF_ERROR(reader.Number(&value, "value"));
  *out = value;
  return absl::OkStatus();
}

bool IsFloat(uint32_t type) { return type == kF32 || type == kF64; }

Status ReadType(Reader& reader, uint32_t* type) {
  REFOCUS_RETURN_IF_ERROR(reader.Number(type, "value type"));
  if (*type >= kValueTypes) return reader.Fail("value type: got " + std::to_string(*type) + ", allowed 0 to 12");
  return absl::OkStatus();
}

Status ReadArray(Reader& reader, int64_t* budget, GgufValue* out) {
  uint32_t type = 0;
  REFOCUS_RETURN_IF_ERROR(ReadType(reader, &type));
  if (type == kArray) return reader.Fail("array of arrays: not supported");
  int64_t count = 0;
  REFOCUS_RETURN_IF_ERROR(reader.Count(&count, *budget, kValueBytes[type], "array elements"));
  *budget -= count;
  if (type == kString) {
    std::vector<std::string> texts(static_cast<size_t>(count));
    for (std::string& text : texts) REFOCUS_RETURN_IF_ERROR(reader.String(&text, kMaxStringBytes, "string length"));
    *out = std::move(texts);
  } else if (IsFloat(type)) {
    std::vector<double> values(static_cast<size_t>(count));
    for (double& value : values) REFOCUS_RETURN_IF_ERROR(ReadFloat(reader, type, &value));
    *out = std::move(values);
  } else {
    std::vector<int64_t> values(static_cast<size_t>(count));
    for (int64_t& value : values) REFOCUS_RETURN_IF_ERROR(ReadInt(reader, type, &value));
    *out = std::move(values);
  }
  return absl::OkStatus();
}

Status ReadValue(Reader& reader, int64_t* budget, GgufValue* out) {
  uint32_t type = 0;
  REFOCUS_RETURN_IF_ERROR(ReadType(reader, &type));
  if (type == kArray) return ReadArray(reader, budget, out);
  if (type == kString) return reader.String(&out->emplace<std::string>(), kMaxStringBytes, "string length");
  if (IsFloat(type)) return ReadFloat(reader, type, &out->emplace<double>());
  int64_t value = 0;
  REFOCUS_RETURN_IF_ERROR(ReadInt(reader, type, &value));
  if (type == kBool) {
    *out = value != 0;
  } else {
    *out = value;
  }
  return absl::OkStatus();
}

Status ReadMetadata(Reader& reader, int64_t count, GgufFile* file) {
  int64_t budget = kMaxArrayElements;
  for (int64_t i = 0; i < count; ++i) {
    std::string key;
    REFOCUS_RETURN_IF_ERROR(reader.String(&key, kMaxKeyBytes, "key length"));
    if (file->Has(key)) return reader.Fail("key " + Quoted(key) + ": appears twice");
    GgufValue value;
    if (Status status = ReadValue(reader, &budget, &value); !status.ok()) {
      return Error(status.code(), "WEIGHTS_INVALID", std::string(status.message()) + ", in key " + Quoted(key),
                   DetailOf(status).metadata);
    }
    file->metadata.emplace(std::move(key), std::move(value));
  }
  return absl::OkStatus();
}

// Name, shape, type and offset relative to the data section.
Status ReadTensorEntry(Reader& reader, const std::string& path, std::string* name, TensorInfo* info) {
  REFOCUS_RETURN_IF_ERROR(reader.String(name, kMaxTensorNameBytes, "tensor name length"));
  const auto fail = [&](const std::string& what) { return reader.Fail("tensor " + Quoted(*name) + ": " + what); };
  uint32_t dimensions = 0;
  REFOCUS_RETURN_IF_ERROR(reader.Number(&dimensions, "dimension count"));
  if (dimensions < 1 || dimensions > kMaxDimensions) {
    return fail("dimensions: got " + std::to_string(dimensions) + ", allowed 1 to " + std::to_string(kMaxDimensions));
  }
  int64_t elements = 1;
  info->shape.resize(dimensions);
  for (uint32_t i = 0; i < dimensions; ++i) {
    uint64_t size = 0;
    REFOCUS_RETURN_IF_ERROR(reader.Number(&size, "dimension"));
    if (size < 1 || size > static_cast<uint64_t>(INT64_MAX) ||
        __builtin_mul_overflow(elements, static_cast<int64_t>(size), &elements)) {
      return fail("dimension " + std::to_string(i) + ": got " + std::to_string(size) +
                  ", allowed at least 1 and a product below 2^63");
    }
    info->shape[dimensions - 1 - i] = static_cast<int64_t>(size);
  }
  uint32_t type = 0;
  REFOCUS_RETURN_IF_ERROR(reader.Number(&type, "tensor type"));
  if (!ToTensorType(type, &info->type)) {
    return fail("type: got " + FileTypeName(type) + ", allowed F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q4_K, Q6_K");
  }
  // Blocks never cross rows, so the fastest dimension alone must fill them.
  if (!TensorBytes(info->type, info->shape.back()).ok()) {
    return fail("row length: got " + std::to_string(info->shape.back()) + ", allowed multiples of " +
                std::to_string(BlockElements(info->type)) + " for " + TensorTypeName(info->type));
  }
  const StatusOr<int64_t> bytes = TensorBytes(info->type, elements);
  if (!bytes.ok()) return fail("size: got " + std::to_string(elements) + " elements, allowed less than 2^63 bytes");
  info->bytes = *bytes;
  uint64_t offset = 0;
  REFOCUS_RETURN_IF_ERROR(reader.Number(&offset, "tensor offset"));
  if (offset > static_cast<uint64_t>(INT64_MAX))
    return fail("offset: got " + std::to_string(offset) + ", out of the file");
  info->offset = static_cast<int64_t>(offset);
  info->file = path;
  return absl::OkStatus();
}

StatusOr<int64_t> AlignmentOf(const GgufFile& file) {
  if (!file.Has("general.alignment")) return kDefaultAlignment;
  REFOCUS_ASSIGN_OR_RETURN(const int64_t alignment, file.Int("general.alignment"));
  if (alignment < 8 || alignment > kMaxAlignment || (alignment & (alignment - 1)) != 0) {
    return Invalid(file.path, "general.alignment: got " + std::to_string(alignment) +
                                  ", allowed a power of two from 8 to " + std::to_string(kMaxAlignment));
  }
  return alignment;
}

// Makes offsets absolute; every range inside the file, aligned, none overlapping another.
Status PlaceTensors(const std::string& path, int64_t data_start, int64_t alignment, int64_t file_bytes,
                    TensorTable* tensors) {
  std::vector<std::pair<int64_t, const std::string*>> order;
  order.reserve(tensors->size());
  for (auto& [name, info] : *tensors) {
    if (info.offset % alignment != 0) {
      return Invalid(path,
                     "tensor " + Quoted(name) + ": offset: got " + std::to_string(info.offset) +
                         ", allowed multiples of " + std::to_string(alignment),
                     {{"tensor", name}});
    }
    const int64_t room = file_bytes - data_start;  // may be negative: an empty data section without its padding
    if (room < info.bytes || info.offset > room - info.bytes) {
      return Invalid(path,
                     "tensor " + Quoted(name) + ": data: " + std::to_string(info.bytes) + " bytes at offset " +
                         std::to_string(info.offset) + " of a data section of " +
                         std::to_string(std::max<int64_t>(room, 0)) + " bytes; the file is cut short or damaged",
                     {{"tensor", name}});
    }
    info.offset += data_start;
    order.emplace_back(info.offset, &name);
  }
  std::sort(order.begin(), order.end());
  for (size_t i = 1; i < order.size(); ++i) {
    const TensorInfo& before = tensors->at(*order[i - 1].second);
    if (before.offset + before.bytes > order[i].first) {
      return Invalid(path,
                     "tensors " + Quoted(*order[i - 1].second) + " and " + Quoted(*order[i].second) +
                         ": overlap at byte " + std::to_string(order[i].first),
                     {{"tensor", *order[i].second}});
    }
  }
  return absl::OkStatus();
}

Status ReadPreamble(Reader& reader, int64_t* tensors, int64_t* keys) {
  char magic[4] = {};
  REFOCUS_RETURN_IF_ERROR(reader.Bytes(magic, sizeof(magic), "magic"));
  if (std::memcmp(magic, "GGUF", 4) != 0) {
    const bool pointer = std::memcmp(magic, "vers", 4) == 0;
    return reader.Fail("magic: got " + Quoted(std::string_view(magic, 4)) + ", allowed 'GGUF'" +
                       (pointer ? "; looks like an LFS pointer, fetch the file" : ""));
  }
  uint32_t version = 0;
  REFOCUS_RETURN_IF_ERROR(reader.Number(&version, "version"));
  if (version != 2 && version != 3) {
    const bool swapped = version == 0x02000000u || version == 0x03000000u;
    return reader.Fail("version: got " + std::to_string(version) + ", allowed 2 or 3" +
                       (swapped ? "; the file is big-endian" : ""));
  }
  constexpr int64_t kLeastTensorEntry = 8 + 4 + 8 + 4 + 8;
  constexpr int64_t kLeastKeyEntry = 8 + 4 + 1;
  REFOCUS_RETURN_IF_ERROR(reader.Count(tensors, kMaxEntries, kLeastTensorEntry, "tensor count"));
  return reader.Count(keys, kMaxEntries, kLeastKeyEntry, "metadata count");
}

}  // namespace

StatusOr<GgufFile> ReadGguf(const std::string& path) {
  REFOCUS_ASSIGN_OR_RETURN(const InputFile input, InputFile::Open(path, "WEIGHTS_INVALID"));
  Reader reader(input);
  GgufFile file;
  file.path = path;
  int64_t tensors = 0, keys = 0;
  REFOCUS_RETURN_IF_ERROR(ReadPreamble(reader, &tensors, &keys));
  REFOCUS_RETURN_IF_ERROR(ReadMetadata(reader, keys, &file));
  REFOCUS_ASSIGN_OR_RETURN(const int64_t alignment, AlignmentOf(file));
  for (int64_t i = 0; i < tensors; ++i) {
    std::string name;
    TensorInfo info;
    REFOCUS_RETURN_IF_ERROR(ReadTensorEntry(reader, path, &name, &info));
    if (!file.tensors.emplace(name, std::move(info)).second) {
      return reader.Fail("tensor " + Quoted(name) + ": appears twice");
    }
  }
  const int64_t data_start = (reader.position() + alignment - 1) / alignment * alignment;
  REFOCUS_RETURN_IF_ERROR(PlaceTensors(path, data_start, alignment, input.size(), &file.tensors));
  return file;
}

namespace {

template <typename T>
StatusOr<T> Get(const GgufFile& file, const std::string& key, const char* expected) {
  const auto found = file.metadata.find(key);
  if (found != file.metadata.end()) {
    if (const T* value = std::get_if<T>(&found->second)) return *value;
  }
  return Invalid(
      file.path,
      key + ": got " + (found == file.metadata.end() ? "nothing" : "another type") + ", expected " + expected,
      {{"field", key}});
}

template <typename T>
const T* Find(const GgufFile& file, const std::string& key) {
  const auto found = file.metadata.find(key);
  return found == file.metadata.end() ? nullptr : std::get_if<T>(&found->second);
}

}  // namespace

StatusOr<int64_t> GgufFile::Int(const std::string& key) const { return Get<int64_t>(*this, key, "an integer"); }

StatusOr<double> GgufFile::Float(const std::string& key) const {
  if (const auto* integer = Find<int64_t>(*this, key)) return static_cast<double>(*integer);
  return Get<double>(*this, key, "a number");
}

StatusOr<std::string> GgufFile::String(const std::string& key) const {
  return Get<std::string>(*this, key, "a string");
}

const std::vector<std::string>* GgufFile::Strings(const std::string& key) const {
  return Find<std::vector<std::string>>(*this, key);
}

const std::vector<int64_t>* GgufFile::Ints(const std::string& key) const {
  return Find<std::vector<int64_t>>(*this, key);
}

}  // namespace refocus
