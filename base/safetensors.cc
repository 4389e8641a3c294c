#include "base/safetensors.h"

#include <sys/stat.h>

#include <algorithm>
#include <cstring>
#include <set>
#include <utility>
#include <vector>

#include "base/input_file.h"
#include "base/json_file.h"

namespace refocus {
namespace {

using nlohmann::json;

constexpr int64_t kMaxHeaderBytes = 100'000'000;  // the format's own cap
constexpr int64_t kMaxIndexBytes = 32 << 20;
constexpr size_t kMaxTensors = 1 << 17;
constexpr size_t kMaxDimensions = 8;
constexpr char kLfsPointer[] = "version https://git-lfs";

Status Invalid(const std::string& path, const std::string& what, ErrorMetadata metadata = {}) {
  metadata.insert(metadata.begin(), {"file", path});
  return Error(StatusCode::kInvalidArgument, "WEIGHTS_INVALID", path + ": " + what, metadata);
}

bool ToTensorType(const std::string& name, TensorType* type) {
  if (name == "F32") return *type = TensorType::kF32, true;
  if (name == "F16") return *type = TensorType::kF16, true;
  if (name == "BF16") return *type = TensorType::kBf16, true;
  return false;
}

// The header has a fixed form of at most three levels, so it is read as a stream of events: nothing is built that the
// form does not allow, however deep or wide the text. A handler that returns false stops the parser; error() then says
// why.
class HeaderReader : public nlohmann::json_sax<json> {
 public:
  HeaderReader(const std::string& file, std::string_view text) : file_(file), text_(text) {}

  TensorTable& tensors() { return tensors_; }
  const std::string& error() const { return error_; }

  bool null() override { return Unexpected("null"); }
  bool boolean(bool) override { return Unexpected("a boolean"); }
  bool number_integer(number_integer_t value) override { return Unexpected("the number " + std::to_string(value)); }
  bool number_float(number_float_t, const string_t& text) override { return Unexpected("the number " + Quoted(text)); }
  bool binary(binary_t&) override { return Unexpected("binary data"); }

  bool number_unsigned(number_unsigned_t value) override {
    if (place_ != Place::kNumbers) return Unexpected("the number " + std::to_string(value));
    if (value > static_cast<uint64_t>(INT64_MAX)) return Refuse(field_, std::to_string(value), "numbers below 2^63");
    std::vector<int64_t>& numbers = field_ == "shape" ? info_.shape : offsets_;
    if (numbers.size() == kMaxDimensions) return Refuse(field_, "more numbers", "at most 8");
    numbers.push_back(static_cast<int64_t>(value));
    return true;
  }

  bool string(string_t& value) override {
    if (place_ == Place::kMetadata) return true;
    if (place_ != Place::kTensor || field_ != "dtype") return Unexpected("the string " + Quoted(value));
    return ToTensorType(value, &info_.type) || Refuse("dtype", Quoted(value), "F32, F16, BF16");
  }

  bool start_object(std::size_t) override {
    if (place_ == Place::kStart) {
      place_ = Place::kTop;
      return true;
    }
    if (place_ != Place::kTop) return Unexpected("an object");
    place_ = tensor_ == "__metadata__" ? Place::kMetadata : Place::kTensor;
    return true;
  }

  bool key(string_t& name) override {
    if (place_ == Place::kTop) {
      tensor_ = name;
      fields_.clear();
      offsets_.clear();
      info_ = TensorInfo();
      if (tensors_.count(name) != 0 || (name == "__metadata__" && metadata_seen_))
        return Refuse("name", "it twice", "it once");
      if (tensors_.size() == kMaxTensors) return Refuse("tensors", "more", "at most " + std::to_string(kMaxTensors));
      metadata_seen_ = metadata_seen_ || name == "__metadata__";
      return true;
    }
    if (place_ == Place::kMetadata) return true;
    field_ = name;
    const bool known = name == "dtype" || name == "shape" || name == "data_offsets";
    if (!known) return Refuse("field", Quoted(name), "dtype, shape, data_offsets");
    return fields_.insert(name).second || Refuse(name, "it twice", "it once");
  }

  bool end_object() override {
    if (place_ == Place::kTensor && !FinishTensor()) return false;
    place_ = place_ == Place::kTop ? Place::kStart : Place::kTop;
    return true;
  }

  bool start_array(std::size_t) override {
    if (place_ != Place::kTensor || field_ == "dtype") return Unexpected("an array");
    place_ = Place::kNumbers;
    return true;
  }

  bool end_array() override {
    place_ = Place::kTensor;
    return true;
  }

  bool parse_error(std::size_t, const std::string&, const nlohmann::detail::exception& error) override {
    error_ = "header, " + JsonErrorText(text_, error);
    return false;
  }

 private:
  enum class Place { kStart, kTop, kMetadata, kTensor, kNumbers };

  bool Refuse(const std::string& field, const std::string& got, const std::string& allowed) {
    error_ = "tensor " + Quoted(tensor_) + ": " + field + ": got " + got + ", allowed " + allowed;
    return false;
  }

  bool Unexpected(const std::string& got) {
    switch (place_) {
      case Place::kStart: error_ = "header: got " + got + ", expected an object"; return false;
      case Place::kTop: return Refuse("entry", got, "an object");
      case Place::kMetadata: return Refuse("value", got, "strings");
      case Place::kTensor: return Refuse(field_, got, field_ == "dtype" ? "a string" : "an array of integers");
      case Place::kNumbers: return Refuse(field_, got, "integers from 0");
    }
    return false;
  }

  bool FinishTensor() {
    for (const char* field : {"dtype", "shape", "data_offsets"}) {
      if (fields_.count(field) == 0) return Refuse(field, "nothing", "it once");
    }
    if (offsets_.size() != 2) return Refuse("data_offsets", std::to_string(offsets_.size()) + " numbers", "2");
    const int64_t begin = offsets_[0], end = offsets_[1];
    if (begin > end) {
      return Refuse("data_offsets", "begin " + std::to_string(begin) + " after end " + std::to_string(end),
                    "begin <= end");
    }
    int64_t elements = 1;
    for (const int64_t size : info_.shape) {
      if (__builtin_mul_overflow(elements, size, &elements)) return Refuse("shape", "a product above 2^63", "less");
    }
    const StatusOr<int64_t> bytes = TensorBytes(info_.type, elements);
    if (!bytes.ok()) return Refuse("shape", "a size above 2^63 bytes", "less");
    if (*bytes != end - begin) {
      return Refuse("data_offsets", std::to_string(end - begin) + " bytes",
                    std::to_string(*bytes) + " (shape x " + TensorTypeName(info_.type) + ")");
    }
    info_.file = file_;
    info_.offset = begin;
    info_.bytes = end - begin;
    tensors_.emplace(tensor_, info_);
    return true;
  }

  const std::string& file_;
  std::string_view text_;
  std::string error_;
  TensorTable tensors_;
  Place place_ = Place::kStart;
  bool metadata_seen_ = false;
  // The entry being read.
  std::string tensor_, field_;
  std::set<std::string> fields_;
  std::vector<int64_t> offsets_;
  TensorInfo info_;
};

// Offsets become absolute; the ranges must cover the data part exactly, each byte once.
Status PlaceTensors(const std::string& path, int64_t data_start, int64_t file_bytes, TensorTable* tensors) {
  struct Range {
    int64_t begin, end;
    const std::string* name;
  };
  std::vector<Range> order;
  order.reserve(tensors->size());
  for (const auto& [name, info] : *tensors) order.push_back({info.offset, info.offset + info.bytes, &name});
  std::sort(order.begin(), order.end(),
            [](const Range& a, const Range& b) { return std::pair(a.begin, a.end) < std::pair(b.begin, b.end); });
  const int64_t data_bytes = file_bytes - data_start;
  int64_t covered = 0;
  for (const Range& range : order) {
    if (range.end > data_bytes) {
      return Invalid(path,
                     "tensor " + Quoted(*range.name) + ": data_offsets: got end " + std::to_string(range.end) +
                         ", the data part has " + std::to_string(data_bytes) +
                         " bytes; the file is cut short or damaged",
                     {{"tensor", *range.name}});
    }
    if (range.begin != covered) {
      return Invalid(path,
                     "tensor " + Quoted(*range.name) + ": data_offsets: got begin " + std::to_string(range.begin) +
                         ", expected " + std::to_string(covered) + (range.begin < covered ? " (overlap)" : " (hole)"),
                     {{"tensor", *range.name}});
    }
    covered = range.end;
  }
  if (covered != data_bytes) {
    return Invalid(
        path, "data part: got " + std::to_string(data_bytes) + " bytes, the tensors cover " + std::to_string(covered));
  }
  for (auto& [name, info] : *tensors) info.offset += data_start;
  return absl::OkStatus();
}

// The length of the header, after every check that needs no JSON.
StatusOr<int64_t> HeaderBytes(const InputFile& file) {
  char start[sizeof(kLfsPointer) - 1] = {};
  const int64_t start_bytes = std::min<int64_t>(file.size(), sizeof(start));
  REFOCUS_RETURN_IF_ERROR(file.ReadAt(0, start, start_bytes));
  if (std::memcmp(start, kLfsPointer, sizeof(start)) == 0) {
    return Invalid(file.path(), "looks like an LFS pointer; fetch the file itself (git lfs pull)");
  }
  if (file.size() < 8) {
    return Invalid(file.path(),
                   "got " + std::to_string(file.size()) + " bytes, expected at least 8 (the header's length)");
  }
  uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | static_cast<uint8_t>(start[i]);
  const int64_t most = std::min(kMaxHeaderBytes, file.size() - 8);
  if (length < 2 || length > static_cast<uint64_t>(most)) {
    return Invalid(file.path(), "header length: got " + std::to_string(length) + ", allowed 2 to " +
                                    std::to_string(most) + (most == kMaxHeaderBytes ? "" : " (the file's size)"));
  }
  return static_cast<int64_t>(length);
}

bool IsPlainFileName(const std::string& name) {
  constexpr std::string_view kSuffix = ".safetensors";
  return name.size() > kSuffix.size() && name.size() <= 255 && name[0] != '.' &&
         name.find_first_of(std::string_view("/\\\0", 3)) == std::string::npos &&
         std::string_view(name).substr(name.size() - kSuffix.size()) == kSuffix;
}

StatusOr<TensorTable> ReadShards(const std::string& folder, const std::string& index_path) {
  REFOCUS_ASSIGN_OR_RETURN(const json index, ReadJsonFile(index_path, "WEIGHTS_INVALID", kMaxIndexBytes));
  if (!index.is_object() || !index.contains("weight_map") || !index["weight_map"].is_object()) {
    return Invalid(index_path, "weight_map: got nothing or another type, expected an object");
  }
  std::set<std::string> shards;
  for (const auto& [name, shard] : index["weight_map"].items()) {
    if (!shard.is_string() || !IsPlainFileName(shard.get_ref<const std::string&>())) {
      return Invalid(index_path,
                     "weight_map: " + Quoted(name) + ": got " +
                         (shard.is_string() ? Quoted(shard.get_ref<const std::string&>()) : shard.type_name()) +
                         ", allowed names of .safetensors files in the same folder",
                     {{"tensor", name}});
    }
    shards.insert(shard.get<std::string>());
  }
  TensorTable all;
  for (const std::string& shard : shards) {
    REFOCUS_ASSIGN_OR_RETURN(TensorTable table, ReadSafetensorsHeader(folder + "/" + shard));
    for (auto& [name, info] : table) {
      const auto [found, added] = all.emplace(name, std::move(info));
      if (!added)
        return Invalid(info.file, "tensor " + Quoted(name) + ": is also in " + found->second.file, {{"tensor", name}});
    }
  }
  for (const auto& [name, shard] : index["weight_map"].items()) {
    const std::string expected = folder + "/" + shard.get<std::string>();
    const auto found = all.find(name);
    if (found == all.end() || found->second.file != expected) {
      return Invalid(index_path, "tensor " + Quoted(name) + ": is not in " + shard.get<std::string>(),
                     {{"tensor", name}});
    }
  }
  return all;
}

bool Exists(const std::string& path) {
  struct stat info {};
  return lstat(path.c_str(), &info) == 0;
}

}  // namespace

StatusOr<TensorTable> ReadSafetensorsHeader(const std::string& path) {
  REFOCUS_ASSIGN_OR_RETURN(const InputFile file, InputFile::Open(path, "WEIGHTS_INVALID"));
  REFOCUS_ASSIGN_OR_RETURN(const int64_t header_bytes, HeaderBytes(file));
  std::string header(static_cast<size_t>(header_bytes), '\0');
  REFOCUS_RETURN_IF_ERROR(file.ReadAt(8, header.data(), header_bytes));
  if (header[0] != '{') return Invalid(path, "header: got " + Quoted(header.substr(0, 1)) + " first, expected '{'");
  HeaderReader reader(path, header);
  if (!json::sax_parse(header, &reader)) return Invalid(path, reader.error());
  REFOCUS_RETURN_IF_ERROR(PlaceTensors(path, 8 + header_bytes, file.size(), &reader.tensors()));
  return std::move(reader.tensors());
}

StatusOr<TensorTable> ReadSafetensorsFolder(const std::string& folder) {
  const std::string single = folder + "/model.safetensors";
  const std::string index = folder + "/model.safetensors.index.json";
  if (Exists(single)) return ReadSafetensorsHeader(single);
  if (Exists(index)) return ReadShards(folder, index);
  return Invalid(folder,
                 "got neither model.safetensors nor model.safetensors.index.json; only safetensors and GGUF are read");
}

}  // namespace refocus
