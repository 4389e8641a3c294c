// Oniguruma's syntax (as Ruby has it) into PCRE2's, for the part that means the same.
#pragma once

#include <string>
#include <string_view>

#include "base/status.h"

namespace refocus {

// Accepted: literals, classes without nesting or intersection, groups (?: (?i: (?= (?! (?<= (?<! (?>, alternatives,
// quantifiers, \s \S \d \D \r \n \t \f \xHH \x{H} \uHHHH, \p and \P of L Lu Ll Lt Lm Lo M N P S, escaped punctuation. Plain groups
// capture nothing. INVALID_ARGUMENT naming the construct and its byte offset for everything else.
StatusOr<std::string> TranslatePattern(std::string_view pattern);

}  // namespace refocus
