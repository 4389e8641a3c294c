// The two places a ModelConfig comes from; LoadModelConfig chooses, names and validates. Internal to base/.
#pragma once

#include <string>

#include "base/model_config.h"

namespace refocus {

// config.json and generation_config.json of a Hugging Face folder.
StatusOr<ModelConfig> ReadHfConfig(const std::string& folder);

// The metadata of a GGUF file.
StatusOr<ModelConfig> ReadGgufConfig(const std::string& path);

// "<source>: <field>: got <got>, allowed <allowed>" with reason CONFIG_INVALID.
Status ConfigError(const std::string& source, const std::string& field, const std::string& got,
                   const std::string& allowed);

// max_positions becomes rope's original window times its factor, where that is known and more.
void WidenWindow(ModelConfig* config);

// A JSON or GGUF integer as a token id; allowed: [0, 2^31).
StatusOr<int32_t> ToTokenId(const std::string& source, const std::string& field, int64_t value);

}  // namespace refocus
