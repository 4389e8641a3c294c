#include "base/json_file.h"

#include <algorithm>
#include <set>
#include <vector>

#include "base/input_file.h"

namespace refocus {
namespace {

using nlohmann::json;

// Thrown by the parser's callback below and caught in ReadJsonFile: nothing else can stop the parser.
struct Refused {
  std::string what;
};

class StructureCheck {
 public:
  bool operator()(int /*depth*/, json::parse_event_t event, json& parsed) {
    using Event = json::parse_event_t;
    if (event == Event::object_start || event == Event::array_start) {
      keys_.emplace_back();
      if (keys_.size() > kMaxJsonDepth) throw Refused{"nested deeper than " + std::to_string(kMaxJsonDepth)};
    } else if (event == Event::object_end || event == Event::array_end) {
      keys_.pop_back();
    } else if (event == Event::key) {
      const auto& key = parsed.get_ref<const std::string&>();
      if (!keys_.back().insert(key).second) throw Refused{"key " + Quoted(key) + " appears twice in one object"};
    }
    return true;
  }

 private:
  std::vector<std::set<std::string>> keys_;
};

}  // namespace

std::string JsonErrorText(std::string_view text, const json::exception& error) {
  std::string what = error.what();
  // nlohmann writes "[json.exception....] parse error at line 1, column 2: syntax error ..."; the place is ours.
  const size_t column = what.find("column ");
  const size_t colon = what.find(": ", column == std::string::npos ? 0 : column);
  if (colon != std::string::npos) what = what.substr(colon + 2);
  what.resize(std::min<size_t>(what.size(), 200));
  for (char& c : what) {
    if (static_cast<unsigned char>(c) < 0x20 || static_cast<unsigned char>(c) >= 0x7f) c = '?';
  }
  const auto* parse = dynamic_cast<const json::parse_error*>(&error);
  if (parse == nullptr) return what;
  const size_t at = std::min(text.size(), parse->byte == 0 ? 0 : parse->byte - 1);  // byte counts from 1
  const std::string_view before = text.substr(0, at);
  const auto line = 1 + std::count(before.begin(), before.end(), '\n');
  const size_t newline = before.rfind('\n');
  const size_t in_line = newline == std::string_view::npos ? at : at - newline - 1;
  return "line " + std::to_string(line) + ", column " + std::to_string(in_line + 1) + ": " + what;
}

StatusOr<json> ReadJsonFile(const std::string& path, std::string_view reason, int64_t max_bytes) {
  REFOCUS_ASSIGN_OR_RETURN(const std::string text, ReadSmallFile(path, reason, max_bytes));
  const auto fail = [&](const std::string& what) {
    return Error(StatusCode::kInvalidArgument, reason, path + ": " + what, {{"file", path}});
  };
  if (text.empty()) return fail("line 1, column 1: the file is empty, expected JSON");
  if (text.rfind("\xef\xbb\xbf", 0) == 0)
    return fail("line 1, column 1: got a byte order mark, expected JSON without one");
  try {
    return json::parse(text, StructureCheck());
  } catch (const Refused& refused) {
    return fail(refused.what);
  } catch (const json::exception& error) {
    return fail(JsonErrorText(text, error));
  }
}

}  // namespace refocus
