// Hugging Face safetensors folders: model.safetensors, or model.safetensors.index.json with its shards.
#pragma once

#include <string>

#include "base/tensor_file.h"

namespace refocus {

// Parses one file's header: every rule of the format is checked (header size and cap of 100 MB, UTF-8, JSON depth 64, no
// duplicate names, offsets in order and inside the file, no hole, no overlap, span = shape x dtype). WEIGHTS_INVALID with
// file, tensor, found, allowed. A Git LFS pointer is recognised and said so. FIFOs and directories are refused, never waited on.
StatusOr<TensorTable> ReadSafetensorsHeader(const std::string& file);

// The folder's table over all shards. Index entries with a path separator, missing shards, and a tensor in two shards are
// WEIGHTS_INVALID.
StatusOr<TensorTable> ReadSafetensorsFolder(const std::string& folder);

}  // namespace refocus
