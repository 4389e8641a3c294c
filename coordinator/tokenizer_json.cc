// tokenizer.json of a Hugging Face folder, and the begin and end tokens its neighbours name.
#include <sys/stat.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "absl/container/flat_hash_set.h"
#include "base/input_file.h"
#include "base/json_file.h"
#include "coordinator/tokenizer_spec.h"

namespace refocus {
namespace {

using Json = nlohmann::json;

constexpr int64_t kMaxChatTemplateBytes = int64_t{1} << 20;
constexpr int64_t kMaxSmallFileBytes = int64_t{16} << 20;
const Json kNull;

bool Exists(const std::string& path) {
  struct stat info;
  return ::stat(path.c_str(), &info) == 0;
}

StatusOr<Json> ReadJson(const std::string& path, int64_t max_bytes) {
  REFOCUS_ASSIGN_OR_RETURN(Json json, ReadJsonFile(path, "CONFIG_INVALID", max_bytes));
  if (!json.is_object()) return TokenizerError(path, "JSON", json.type_name(), "an object");
  return json;
}

// A member, or null when it is absent or `json` is no object.
const Json& Member(const Json& json, const char* name) {
  if (!json.is_object()) return kNull;
  const auto it = json.find(name);
  return it == json.end() ? kNull : *it;
}

std::string Found(const Json& json) {
  if (json.is_string()) return Quoted(json.get_ref<const std::string&>().substr(0, 200));
  if (json.is_object() || json.is_array()) return std::string("an ") + json.type_name();
  return json.dump();
}

class Reader {
 public:
  explicit Reader(const std::string& source) { spec_.source = source; }

  StatusOr<TokenizerSpec> Read(const Json& json) {
    REFOCUS_RETURN_IF_ERROR(ReadModel(Member(json, "model"), Member(json, "added_tokens")));
    REFOCUS_RETURN_IF_ERROR(ReadNormalizer(Member(json, "normalizer"), 0));
    REFOCUS_RETURN_IF_ERROR(ReadPreTokenizer(Member(json, "pre_tokenizer"), 0));
    if (!byte_level_) return Refuse("pre_tokenizer", "no ByteLevel", "a pre_tokenizer that ends with ByteLevel");
    REFOCUS_RETURN_IF_ERROR(ReadDecoder(Member(json, "decoder")));
    REFOCUS_RETURN_IF_ERROR(ReadPostProcessor(Member(json, "post_processor"), 0));
    return std::move(spec_);
  }

 private:
  Status Refuse(std::string_view field, std::string_view found, std::string_view allowed) const {
    return TokenizerError(spec_.source, field, found, allowed);
  }

  StatusOr<bool> Flag(const Json& json, const char* name, const std::string& field, bool otherwise) const {
    const Json& value = Member(json, name);
    if (value.is_null()) return otherwise;
    if (!value.is_boolean()) return Refuse(field + "." + name, Found(value), "true or false");
    return value.get<bool>();
  }

  // The steps of a Sequence under `list`; nesting is bounded because the readers call themselves.
  StatusOr<const Json*> Steps(const Json& json, const char* list, const std::string& field, int depth) const {
    const Json& steps = Member(json, list);
    if (!steps.is_array() || static_cast<int64_t>(steps.size()) > kMaxSplitRules || depth > 4) {
      return Refuse(field + "." + list, Found(steps),
                    "an array of at most " + std::to_string(kMaxSplitRules) + ", nested 4 deep");
    }
    return &steps;
  }

  static std::string Type(const Json& json) {
    const Json& type = Member(json, "type");
    return type.is_string() ? type.get<std::string>() : "";
  }

  Status ReadModel(const Json& model, const Json& added);
  Status ReadVocabulary(const Json& vocab);
  Status ReadMerges(const Json& merges);
  Status ReadAddedTokens(const Json& added);
  Status ReadAddedToken(const Json& token, const std::string& field);
  Status ReadNormalizer(const Json& json, int depth);
  Status ReadPreTokenizer(const Json& json, int depth);
  Status ReadSplit(const Json& json);
  Status ReadByteLevel(const Json& json);
  Status ReadDecoder(const Json& json) const;
  Status ReadPostProcessor(const Json& json, int depth);
  Status ReadTemplate(const Json& json);

  TokenizerSpec spec_;
  std::vector<std::string> texts_;               // the model's vocabulary by id
  absl::flat_hash_set<std::string> texts_seen_;  // of texts_ and of added tokens
  bool byte_level_ = false;                      // the pre-tokenizer has come to ByteLevel
};

Status Reader::ReadModel(const Json& model, const Json& added) {
  // Old files leave the type out.
  if (Type(model) != "BPE" && !(Type(model).empty() && !Member(model, "merges").is_null())) {
    return Refuse("model.type", Found(Member(model, "type")), "BPE");
  }
  for (const char* name : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    const Json& value = Member(model, name);
    if (!value.is_null() && value != "") return Refuse(std::string("model.") + name, Found(value), "null");
  }
  const Json& dropout = Member(model, "dropout");
  if (!dropout.is_null() && dropout != 0.0) return Refuse("model.dropout", Found(dropout), "null");
  REFOCUS_ASSIGN_OR_RETURN(const bool fallback, Flag(model, "byte_fallback", "model", false));
  if (fallback) return Refuse("model.byte_fallback", "true", "false");
  REFOCUS_ASSIGN_OR_RETURN(spec_.ignore_merges, Flag(model, "ignore_merges", "model", false));

  REFOCUS_RETURN_IF_ERROR(ReadVocabulary(Member(model, "vocab")));
  REFOCUS_RETURN_IF_ERROR(ReadMerges(Member(model, "merges")));
  REFOCUS_RETURN_IF_ERROR(ReadAddedTokens(added));

  const Json& unknown = Member(model, "unk_token");
  int64_t byte_tokens = 0;
  for (size_t id = 0; id < spec_.tokens.size(); ++id) byte_tokens += spec_.plain[id] && spec_.tokens[id].size() == 1;
  // With a token for every byte nothing is unknown, whatever stands here.
  if (!unknown.is_null() && byte_tokens < 256) return Refuse("model.unk_token", Found(unknown), "null");
  return absl::OkStatus();
}

Status Reader::ReadVocabulary(const Json& vocab) {
  if (!vocab.is_object() || vocab.empty() || static_cast<int64_t>(vocab.size()) > kMaxTokenizerTokens) {
    return Refuse("model.vocab", Found(vocab) + " of " + std::to_string(vocab.size()),
                  "an object of 1 to " + std::to_string(kMaxTokenizerTokens) + " tokens");
  }
  texts_.resize(vocab.size());
  for (const auto& [text, id] : vocab.items()) {
    const std::string field = "model.vocab[" + Quoted(text.substr(0, 40)) + "]";
    if (!id.is_number_integer() || id < 0 || id >= vocab.size()) {
      return Refuse(field, Found(id), "ids without holes: 0 to " + std::to_string(vocab.size() - 1));
    }
    std::string& place = texts_[id.get<size_t>()];
    if (!place.empty()) return Refuse(field, "id " + id.dump() + ", which is also " + Quoted(place), "each id once");
    place = text;
    texts_seen_.insert(text);
  }
  return SetVocabulary(texts_, std::vector<bool>(texts_.size(), false), "model.vocab", &spec_);
}

Status Reader::ReadMerges(const Json& merges) {
  if (!merges.is_array() || static_cast<int64_t>(merges.size()) > kMaxTokenizerMerges) {
    return Refuse("model.merges", Found(merges), "an array of at most " + std::to_string(kMaxTokenizerMerges));
  }
  std::vector<std::pair<std::string, std::string>> pairs(merges.size());
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    const Json& merge = merges[rank];
    bool good = false;
    if (merge.is_string()) {
      good = CutMerge(merge.get_ref<const std::string&>(), &pairs[rank]);
    } else if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
      pairs[rank] = {merge[0].get<std::string>(), merge[1].get<std::string>()};
      good = true;
    }
    if (!good) {
      return Refuse("model.merges[" + std::to_string(rank) + "]", Found(merge),
                    "\"left right\" or [\"left\", \"right\"]");
    }
  }
  return SetMerges(texts_, pairs, "model.merges", &spec_);
}

Status Reader::ReadAddedTokens(const Json& added) {
  if (added.is_null()) return absl::OkStatus();
  if (!added.is_array() || static_cast<int64_t>(added.size()) > kMaxAddedTokens) {
    return Refuse("added_tokens", Found(added) + " of " + std::to_string(added.size()),
                  "an array of at most " + std::to_string(kMaxAddedTokens));
  }
  std::vector<const Json*> tokens;
  for (const Json& token : added) {
    const Json& id = Member(token, "id");
    if (!id.is_number_integer() || id < 0 || id >= kMaxTokenizerTokens) {
      return Refuse("added_tokens.id", Found(id), "0 to " + std::to_string(kMaxTokenizerTokens - 1));
    }
    tokens.push_back(&token);
  }
  const auto id_of = [](const Json* token) { return (*token)["id"].get<int64_t>(); };
  std::stable_sort(tokens.begin(), tokens.end(), [&](const Json* a, const Json* b) { return id_of(a) < id_of(b); });
  int64_t last = -1;
  for (const Json* token : tokens) {
    const int64_t id = id_of(token);
    const std::string field = "added_tokens[id " + std::to_string(id) + "]";
    if (id == last) return Refuse(field, "the id twice", "each id once");
    last = id;
    if (id > static_cast<int64_t>(spec_.tokens.size())) {
      return Refuse(field, "a hole before it",
                    "id " + std::to_string(spec_.tokens.size()) + " or one of the vocabulary");
    }
    REFOCUS_RETURN_IF_ERROR(ReadAddedToken(*token, field));
  }
  return absl::OkStatus();
}

Status Reader::ReadAddedToken(const Json& token, const std::string& field) {
  const Json& content = Member(token, "content");
  const int64_t size = content.is_string() ? static_cast<int64_t>(content.get_ref<const std::string&>().size()) : 0;
  if (size < 1 || size > kMaxAddedTokenBytes) {
    return Refuse(field + ".content", Found(content) + " of " + std::to_string(size) + " bytes",
                  "a string of 1 to " + std::to_string(kMaxAddedTokenBytes) + " bytes");
  }
  AddedToken out;
  REFOCUS_ASSIGN_OR_RETURN(out.lstrip, Flag(token, "lstrip", field, false));
  REFOCUS_ASSIGN_OR_RETURN(out.rstrip, Flag(token, "rstrip", field, false));
  REFOCUS_ASSIGN_OR_RETURN(out.single_word, Flag(token, "single_word", field, false));
  out.id = static_cast<int32_t>(Member(token, "id").get<int64_t>());
  out.text = content.get<std::string>();
  REFOCUS_ASSIGN_OR_RETURN(out.special, Flag(token, "special", field, false));
  REFOCUS_ASSIGN_OR_RETURN(out.normalized, Flag(token, "normalized", field, !out.special));

  const auto id = static_cast<size_t>(out.id);
  if (id < texts_.size()) {
    if (texts_[id] != out.text) {
      return Refuse(field + ".content", Quoted(out.text), Quoted(texts_[id]) + ", the vocabulary's token with this id");
    }
    spec_.tokens[id] = out.text;
  } else {
    // The reference would give it the other id.
    if (!texts_seen_.insert(out.text).second) {
      return Refuse(field + ".content", Quoted(out.text) + ", which has another id too", "each token once");
    }
    spec_.tokens.push_back(out.text);
    spec_.plain.push_back(false);
  }
  spec_.added.push_back(std::move(out));
  return absl::OkStatus();
}

Status Reader::ReadNormalizer(const Json& json, int depth) {
  const std::string type = Type(json);
  if (json.is_null()) return absl::OkStatus();
  if (type == "NFC") {
    spec_.nfc = true;
    return absl::OkStatus();
  }
  if (type != "Sequence")
    return Refuse("normalizer.type", Found(Member(json, "type")), "NFC, Sequence, or no normalizer");
  REFOCUS_ASSIGN_OR_RETURN(const Json* steps, Steps(json, "normalizers", "normalizer", depth));
  for (const Json& step : *steps) REFOCUS_RETURN_IF_ERROR(ReadNormalizer(step, depth + 1));
  return absl::OkStatus();
}

Status Reader::ReadPreTokenizer(const Json& json, int depth) {
  const std::string type = Type(json);
  if (byte_level_) return Refuse("pre_tokenizer", Quoted(type) + " behind ByteLevel", "ByteLevel as the last step");
  if (static_cast<int64_t>(spec_.splits.size()) >= kMaxSplitRules) {
    return Refuse("pre_tokenizer", "more steps", "at most " + std::to_string(kMaxSplitRules));
  }
  if (type == "Sequence") {
    REFOCUS_ASSIGN_OR_RETURN(const Json* steps, Steps(json, "pretokenizers", "pre_tokenizer", depth));
    for (const Json& step : *steps) REFOCUS_RETURN_IF_ERROR(ReadPreTokenizer(step, depth + 1));
    return absl::OkStatus();
  }
  if (type == "Digits") {
    REFOCUS_ASSIGN_OR_RETURN(const bool single, Flag(json, "individual_digits", "pre_tokenizer", false));
    spec_.splits.push_back({single ? SplitRule::Kind::kSingleDigits : SplitRule::Kind::kDigitRuns, ""});
    return absl::OkStatus();
  }
  if (type == "Split") return ReadSplit(json);
  if (type == "ByteLevel") return ReadByteLevel(json);
  return Refuse("pre_tokenizer.type", Found(Member(json, "type")), "ByteLevel, Split, Digits, Sequence");
}

Status Reader::ReadSplit(const Json& json) {
  SplitRule rule;
  const Json& behavior = Member(json, "behavior");
  REFOCUS_ASSIGN_OR_RETURN(const bool invert, Flag(json, "invert", "pre_tokenizer", false));
  // Isolated keeps matches and gaps alike, so that inverting it changes nothing.
  if (behavior == "Removed" && invert) {
    rule.drop_gaps = true;
  } else if (behavior != "Isolated") {
    return Refuse("pre_tokenizer.behavior", Found(behavior) + (invert ? " inverted" : ""),
                  "Isolated, or Removed inverted");
  }
  const Json& pattern = Member(json, "pattern");
  const Json& regex = Member(pattern, "Regex");
  const Json& literal = Member(pattern, "String");
  if (!regex.is_string() && !literal.is_string()) {
    return Refuse("pre_tokenizer.pattern", Found(pattern), "an object with Regex or String");
  }
  rule.kind = regex.is_string() ? SplitRule::Kind::kRegex : SplitRule::Kind::kLiteral;
  rule.pattern = regex.is_string() ? regex.get<std::string>() : literal.get<std::string>();
  spec_.splits.push_back(std::move(rule));
  return absl::OkStatus();
}

Status Reader::ReadByteLevel(const Json& json) {
  byte_level_ = true;
  REFOCUS_ASSIGN_OR_RETURN(const bool prefix_space, Flag(json, "add_prefix_space", "pre_tokenizer", true));
  REFOCUS_ASSIGN_OR_RETURN(const bool use_regex, Flag(json, "use_regex", "pre_tokenizer", true));
  if (prefix_space) spec_.splits.push_back({SplitRule::Kind::kPrefixSpace, ""});
  if (use_regex) spec_.splits.push_back({SplitRule::Kind::kRegex, kGpt2Pattern});
  return absl::OkStatus();
}

Status Reader::ReadDecoder(const Json& json) const {
  if (Type(json) == "ByteLevel") return absl::OkStatus();
  if (Type(json) == "Sequence") {
    const Json& steps = Member(json, "decoders");
    if (steps.is_array() && steps.size() == 1 && Type(steps[0]) == "ByteLevel") return absl::OkStatus();
  }
  return Refuse("decoder", json.is_null() ? "nothing" : Found(Member(json, "type")), "ByteLevel");
}

Status Reader::ReadPostProcessor(const Json& json, int depth) {
  const std::string type = Type(json);
  if (json.is_null() || type == "ByteLevel") return absl::OkStatus();  // ByteLevel only trims offsets
  if (type == "TemplateProcessing") return ReadTemplate(json);
  if (type != "Sequence") {
    return Refuse("post_processor.type", Found(Member(json, "type")),
                  "TemplateProcessing, ByteLevel, Sequence, or none");
  }
  REFOCUS_ASSIGN_OR_RETURN(const Json* steps, Steps(json, "processors", "post_processor", depth));
  for (const Json& step : *steps) REFOCUS_RETURN_IF_ERROR(ReadPostProcessor(step, depth + 1));
  return absl::OkStatus();
}

Status Reader::ReadTemplate(const Json& json) {
  constexpr char kField[] = "post_processor.single";
  const Json& single = Member(json, "single");
  const auto is_text = [](const Json& item) { return !Member(item, "Sequence").is_null(); };
  const bool text_only = single.is_array() && single.size() == 1 && is_text(single[0]);
  if (text_only) return absl::OkStatus();
  if (!single.is_array() || single.size() != 2 || is_text(single[0]) || !is_text(single[1]) || spec_.adds_bos) {
    return Refuse(kField, single.dump().substr(0, 200), "the text, or one special token and then the text");
  }
  const Json& name = Member(Member(single[0], "SpecialToken"), "id");
  const Json& tokens = Member(json, "special_tokens");
  const Json& ids =
      name.is_string() ? Member(Member(tokens, name.get_ref<const std::string&>().c_str()), "ids") : kNull;
  if (!ids.is_array() || ids.size() != 1 || !ids[0].is_number_integer()) {
    return Refuse(kField, Found(name), "a special token with exactly one id in post_processor.special_tokens");
  }
  REFOCUS_ASSIGN_OR_RETURN(spec_.bos, CheckTokenId(spec_, spec_.source, kField, ids[0].get<int64_t>()));
  spec_.adds_bos = true;
  return absl::OkStatus();
}

// A token in tokenizer_config.json: a text, or an object with the text as `content`.
StatusOr<std::optional<int32_t>> NamedToken(const Json& config, const char* name, const std::string& file,
                                            const TokenizerSpec& spec) {
  const Json& value = Member(config, name);
  const Json& content = value.is_object() ? Member(value, "content") : value;
  if (content.is_null()) return std::optional<int32_t>();
  const auto is_it = [&](const AddedToken& token) { return content == token.text; };
  const auto it = std::find_if(spec.added.begin(), spec.added.end(), is_it);
  if (it == spec.added.end()) return TokenizerError(file, name, Found(content), "one of the added tokens");
  return std::optional<int32_t>(it->id);
}

// One template, or several with names, of which the one called "default" is for conversations.
StatusOr<std::string> ReadChatTemplate(const Json& config, const std::string& file) {
  constexpr char kField[] = "chat_template";
  const Json& value = Member(config, kField);
  if (value.is_null()) return std::string();
  if (value.is_string()) return value.get<std::string>();
  if (!value.is_array()) return TokenizerError(file, kField, Found(value), "a string, or an array of named ones");
  for (const Json& entry : value) {
    const Json& text = Member(entry, "template");
    if (Member(entry, "name") == "default" && text.is_string()) return text.get<std::string>();
  }
  return std::string();
}

Status ReadNeighbours(const std::string& folder, TokenizerSpec* spec) {
  const std::string config_file = folder + "/tokenizer_config.json";
  if (Exists(config_file)) {
    REFOCUS_ASSIGN_OR_RETURN(const Json config, ReadJson(config_file, kMaxSmallFileBytes));
    REFOCUS_ASSIGN_OR_RETURN(const std::optional<int32_t> bos, NamedToken(config, "bos_token", config_file, *spec));
    REFOCUS_ASSIGN_OR_RETURN(const std::optional<int32_t> eos, NamedToken(config, "eos_token", config_file, *spec));
    if (!spec->bos) spec->bos = bos;
    const Json& adds_bos = Member(config, "add_bos_token");
    if (!adds_bos.is_null() && !adds_bos.is_boolean()) {
      return TokenizerError(config_file, "add_bos_token", Found(adds_bos), "true or false");
    }
    // Some say true and name no token: nothing is put first then.
    if (adds_bos.is_boolean()) spec->adds_bos = adds_bos.get<bool>() && spec->bos;
    if (eos) AddUnique(*eos, &spec->eos);
    REFOCUS_ASSIGN_OR_RETURN(spec->chat_template, ReadChatTemplate(config, config_file));
  }
  const std::string template_file = folder + "/chat_template.jinja";  // counts before the configuration's
  if (Exists(template_file)) {
    REFOCUS_ASSIGN_OR_RETURN(spec->chat_template,
                             ReadSmallFile(template_file, "CONFIG_INVALID", kMaxChatTemplateBytes));
  }
  const std::string generation_file = folder + "/generation_config.json";
  if (!Exists(generation_file)) return absl::OkStatus();
  REFOCUS_ASSIGN_OR_RETURN(const Json generation, ReadJson(generation_file, kMaxSmallFileBytes));
  for (const char* name : {"bos_token_id", "eos_token_id"}) {
    const Json& value = Member(generation, name);
    if (value.is_null()) continue;
    const Json list = value.is_array() ? value : Json::array({value});
    for (const Json& id : list) {
      if (!id.is_number_integer()) return TokenizerError(generation_file, name, Found(id), "a token id");
      REFOCUS_ASSIGN_OR_RETURN(const int32_t checked, CheckTokenId(*spec, generation_file, name, id.get<int64_t>()));
      if (std::string_view(name) == "eos_token_id") AddUnique(checked, &spec->eos);
      if (std::string_view(name) == "bos_token_id" && !spec->bos) spec->bos = checked;
    }
  }
  return absl::OkStatus();
}

}  // namespace

StatusOr<std::optional<TokenizerSpec>> ReadTokenizerFolder(const std::string& path) {
  const std::string file = path + "/tokenizer.json";
  if (!Exists(file)) {
    for (const char* other : {"/tokenizer.model", "/vocab.json", "/merges.txt"}) {
      if (Exists(path + other))
        return TokenizerError(path, other + 1, "a tokenizer without tokenizer.json", "tokenizer.json");
    }
    return std::optional<TokenizerSpec>();
  }
  REFOCUS_ASSIGN_OR_RETURN(const Json json, ReadJson(file, kMaxTokenizerFileBytes));
  Reader reader(file);
  REFOCUS_ASSIGN_OR_RETURN(TokenizerSpec spec, reader.Read(json));
  REFOCUS_RETURN_IF_ERROR(ReadNeighbours(path, &spec));
  return std::optional<TokenizerSpec>(std::move(spec));
}

}  // namespace refocus
