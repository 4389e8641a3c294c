#include "cli/peft.h"

#include <nlohmann/json.hpp>
#include <openssl/evp.h>

#include <cerrno>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <set>

#include "base/json_file.h"
#include "base/limits.h"
#include "base/safetensors.h"

namespace refocus::cli {
namespace {

using nlohmann::json;

constexpr char kMagic[] = "RFKADPT1";
constexpr size_t kMagicBytes = 8;
constexpr size_t kDigestBytes = 32;
constexpr char kConfigName[] = "adapter_config.json";
constexpr char kTensorsName[] = "adapter_model.safetensors";
constexpr char kPrefix[] = "base_model.model.model.layers.";

std::string TensorName(int64_t layer, char matrix) {
  return kPrefix + std::to_string(layer) + ".self_attn.q_proj.lora_" + matrix + ".weight";
}

std::string Sha256(const char* data, size_t bytes) {
  std::string digest(kDigestBytes, '\0');
  EVP_Digest(data, bytes, reinterpret_cast<unsigned char*>(digest.data()), nullptr, EVP_sha256(), nullptr);
  return digest;
}

void AppendLittleEndian(uint64_t value, int bytes, std::string* out) {
  for (int i = 0; i < bytes; ++i) out->push_back(static_cast<char>(value >> (8 * i) & 0xff));
}

Status ConfigError(const std::string& path, const std::string& what) {
  return Error(StatusCode::kInvalidArgument, "CONFIG_INVALID", path + ": " + what);
}

Status WriteFile(const std::filesystem::path& path, const std::string& bytes) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  file.close();
  if (file) return absl::OkStatus();
  return ConfigError(path.string(), std::string("cannot be written: ") + std::strerror(errno));
}

// What PEFT would do with another value is not what an adapter here does.
Status CheckPeftConfig(const std::string& path, const json& config) {
  const auto is = [&](const char* key, const json& allowed) -> Status {
    const json found = config.contains(key) ? config.at(key) : json();
    if (found == allowed || (found.is_null() && (allowed == false || allowed == "none"))) return absl::OkStatus();
    return ConfigError(path, std::string(key) + ": got " + found.dump(-1, ' ', true).substr(0, 80) + ", allowed " +
                                 allowed.dump());
  };
  REFOCUS_RETURN_IF_ERROR(is("peft_type", "LORA"));
  REFOCUS_RETURN_IF_ERROR(is("bias", "none"));
  for (const char* flag : {"use_dora", "use_rslora", "fan_in_fan_out", "lora_bias"}) {
    REFOCUS_RETURN_IF_ERROR(is(flag, false));
  }
  for (const char* key : {"rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "modules_to_save",
                          "exclude_modules", "layer_replication", "target_parameters"}) {
    if (!config.contains(key) || config.at(key).is_null() || config.at(key).empty()) continue;
    return ConfigError(path, std::string(key) + ": got a value, allowed none: all layers have one rank and alpha");
  }
  const json targets = config.contains("target_modules") ? config.at("target_modules") : json();
  if (targets == "q_proj" || targets == json::array({"q_proj"})) return absl::OkStatus();
  return ConfigError(path,
                     "target_modules: got " + targets.dump(-1, ' ', true).substr(0, 80) + ", allowed [\"q_proj\"]");
}

// One layer's tensor as fp32, appended to `out`.
Status AppendTensor(const std::string& path, const TensorTable& table, const std::string& name, int64_t rows,
                    int64_t columns, std::string* out) {
  const auto found = table.find(name);
  const auto fault = [&](const std::string& what) {
    return Error(StatusCode::kInvalidArgument, "WEIGHTS_INVALID", path + ": tensor " + name + ": " + what);
  };
  if (found == table.end()) return fault("missing");
  const TensorInfo& info = found->second;
  if (info.shape != std::vector<int64_t>{rows, columns}) {
    return fault("got another shape than [" + std::to_string(rows) + ", " + std::to_string(columns) + "]");
  }
  std::string raw(static_cast<size_t>(info.bytes), '\0');
  REFOCUS_RETURN_IF_ERROR(ReadTensorBytes(info, raw.data()));
  const size_t at = out->size();
  out->resize(at + static_cast<size_t>(4 * rows * columns));
  DecodeToFloat(info.type, raw.data(), rows * columns, reinterpret_cast<float*>(out->data() + at));
  return absl::OkStatus();
}

}  // namespace

std::string FormatAdapterFile(const AdapterFile& file) {
  const std::string header = file.header.SerializeAsString();
  std::string bytes(kMagic, kMagicBytes);
  AppendLittleEndian(header.size(), 4, &bytes);
  bytes += header;
  bytes += file.numbers;
  return bytes + Sha256(bytes.data(), bytes.size());
}

StatusOr<AdapterFile> ParseAdapterFile(const std::string& bytes) {
  const auto invalid = [](const std::string& what) {
    return Error(StatusCode::kInvalidArgument, "ADAPTER_FILE_INVALID", "adapter file: " + what);
  };
  constexpr size_t kFixed = kMagicBytes + 4, kEnd = kDigestBytes;
  if (bytes.size() < kFixed + kEnd || bytes.compare(0, kMagicBytes, kMagic) != 0) return invalid("it is none");
  size_t size = 0;
  for (size_t i = 0; i < 4; ++i) size |= size_t{static_cast<uint8_t>(bytes[kMagicBytes + i])} << (8 * i);
  AdapterFile file;
  if (size > bytes.size() - kFixed - kEnd ||
      !file.header.ParseFromArray(bytes.data() + kFixed, static_cast<int>(size))) {
    return invalid("its header cannot be read");
  }
  file.numbers = bytes.substr(kFixed + size, bytes.size() - kFixed - size - kEnd);
  if (static_cast<int64_t>(file.numbers.size()) != file.header.data_bytes()) return invalid("it is cut short");
  if (Sha256(bytes.data(), bytes.size() - kEnd) == bytes.substr(bytes.size() - kEnd)) return file;
  return Error(StatusCode::kDataLoss, "CHECKSUM_MISMATCH", "adapter file: its checksum is wrong; export it again");
}

Status WritePeftFolder(const AdapterFile& file, const std::string& folder) {
  const v1::AdapterFileHeader& header = file.header;
  const int64_t rank = header.adapter().lora_rank();
  if (header.adapter().kind() != v1::LORA) {
    return Error(StatusCode::kFailedPrecondition, "ADAPTER_KIND",
                 "adapter " + header.adapter().id() + ": got a full delta, allowed a LoRA; export it without --peft");
  }
  const json config = {{"peft_type", "LORA"},
                       {"task_type", "CAUSAL_LM"},
                       {"base_model_name_or_path", header.model_name()},
                       {"r", rank},
                       {"lora_alpha", header.adapter().lora_alpha()},
                       {"lora_dropout", 0.0},
                       {"target_modules", json::array({"q_proj"})},
                       {"bias", "none"},
                       {"fan_in_fan_out", false},
                       {"inference_mode", true},
                       {"init_lora_weights", true},
                       {"use_rslora", false},
                       {"use_dora", false}};
  // The safetensors header lists byte ranges in the order of our file: A and B of each layer.
  json tensors = {{"__metadata__",
                   {{"format", "pt"},
                    {"refocus_model_fingerprint", header.model_fingerprint()},
                    {"refocus_weights_hash", header.weights_hash()}}}};
  int64_t offset = 0;
  const auto add = [&](const std::string& name, int64_t rows, int64_t columns) {
    tensors[name] = {
        {"dtype", "F32"}, {"shape", {rows, columns}}, {"data_offsets", {offset, offset + 4 * rows * columns}}};
    offset += 4 * rows * columns;
  };
  for (int64_t layer = 0; layer < header.layers(); ++layer) {
    add(TensorName(layer, 'A'), rank, header.hidden_size());
    add(TensorName(layer, 'B'), header.query_size(), rank);
  }
  std::string table = tensors.dump();
  table.append((8 - table.size() % 8) % 8, ' ');
  std::string bytes;
  AppendLittleEndian(table.size(), 8, &bytes);
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) return ConfigError(folder, "cannot be made: " + error.message());
  const std::filesystem::path path(folder);
  REFOCUS_RETURN_IF_ERROR(WriteFile(path / kTensorsName, bytes + table + file.numbers));
  return WriteFile(path / kConfigName, config.dump(2) + "\n");
}

StatusOr<AdapterFile> ReadPeftFolder(const std::string& folder) {
  const std::string config_path = folder + "/" + kConfigName, path = folder + "/" + kTensorsName;
  REFOCUS_ASSIGN_OR_RETURN(const json config, ReadJsonFile(config_path, "CONFIG_INVALID", 1 << 20));
  REFOCUS_RETURN_IF_ERROR(CheckPeftConfig(config_path, config));
  const json rank_value = config.contains("r") ? config.at("r") : json();
  const json alpha = config.contains("lora_alpha") ? config.at("lora_alpha") : json();
  if (!rank_value.is_number_integer() || rank_value.get<double>() < 1 || rank_value.get<double>() > kMaxLoraRank)
    return ConfigError(config_path, "r: got " + rank_value.dump() + ", allowed 1 to " + std::to_string(kMaxLoraRank));
  if (!alpha.is_number() || !(alpha.get<double>() > 0) || !std::isfinite(alpha.get<double>()))
    return ConfigError(config_path, "lora_alpha: got " + alpha.dump() + ", allowed a number above 0");
  const auto rank = rank_value.get<int64_t>();
  REFOCUS_ASSIGN_OR_RETURN(const TensorTable table, ReadSafetensorsHeader(path));
  const auto first_a = table.find(TensorName(0, 'A')), first_b = table.find(TensorName(0, 'B'));
  if (first_a == table.end() || first_b == table.end() || first_a->second.shape.size() != 2 ||
      first_b->second.shape.size() != 2) {
    return Error(StatusCode::kInvalidArgument, "WEIGHTS_INVALID",
                 path + ": got no matrices " + TensorName(0, 'A') + " and lora_B, allowed one pair for every layer");
  }
  AdapterFile file;
  v1::AdapterFileHeader& header = file.header;
  header.set_layers(static_cast<int64_t>(table.size() / 2));
  header.set_hidden_size(first_a->second.shape[1]);
  header.set_query_size(first_b->second.shape[0]);
  for (int64_t layer = 0; layer < header.layers(); ++layer) {
    REFOCUS_RETURN_IF_ERROR(
        AppendTensor(path, table, TensorName(layer, 'A'), rank, header.hidden_size(), &file.numbers));
    REFOCUS_RETURN_IF_ERROR(
        AppendTensor(path, table, TensorName(layer, 'B'), header.query_size(), rank, &file.numbers));
  }
  if (table.size() % 2 != 0) {
    return Error(StatusCode::kInvalidArgument, "WEIGHTS_INVALID",
                 path + ": got " + std::to_string(table.size()) + " tensors, allowed A and B of q_proj in every layer");
  }
  header.set_dtype("F32");
  header.set_data_bytes(static_cast<int64_t>(file.numbers.size()));
  header.mutable_adapter()->set_id("peft");
  header.mutable_adapter()->set_kind(v1::LORA);
  header.mutable_adapter()->set_lora_rank(rank);
  header.mutable_adapter()->set_lora_alpha(alpha.get<double>());
  return file;
}

}  // namespace refocus::cli
