// LoRA adapters as PEFT keeps them: a folder with adapter_config.json and adapter_model.safetensors, target module
// q_proj alone. Turned into an adapter's file (AdapterFileHeader in proto/refocus/v1/context.proto) and back.
#pragma once

#include <string>

#include "base/status.h"
#include "refocus/v1/context.pb.h"

namespace refocus::cli {

// Takes an adapter's file apart whose checksum was verified by ReadAdapterFile.
struct AdapterFile {
  v1::AdapterFileHeader header;
  std::string numbers;  // fp32
};
// CONFIG_INVALID when it cannot be read or is none; DATA_LOSS CHECKSUM_MISMATCH.
StatusOr<AdapterFile> ParseAdapterFile(const std::string& bytes);
std::string FormatAdapterFile(const AdapterFile& file);

// Writes the folder (made when missing; its two files are replaced). FAILED_PRECONDITION ADAPTER_KIND for a full delta,
// which PEFT has no form for.
Status WritePeftFolder(const AdapterFile& file, const std::string& folder);

// CONFIG_INVALID or WEIGHTS_INVALID with file, found, allowed for what is no LoRA of q_proj alone. Sizes come from the
// tensors; the server compares them with its model.
StatusOr<AdapterFile> ReadPeftFolder(const std::string& folder);

}  // namespace refocus::cli
