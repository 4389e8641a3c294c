// What exists by name: contexts, and which request ids were used for what. Bounded in every direction.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <variant>
#include <vector>

#include "base/status.h"
#include "coordinator/core/adapt.h"
#include "coordinator/core/session.h"

namespace refocus {

// What a finished call answers when its request id comes again, as long as what it made is there.
struct CreateOutcome {
  std::weak_ptr<Session> session;
  api::Context context;
};
struct AdaptOutcome {
  api::AdaptEvent effective;
  api::AdaptEvent last;
};
using RequestOutcome = std::variant<CreateOutcome, std::shared_ptr<AdaptJob>, AdaptOutcome>;

// Request id -> hash of the body and what came of it. Only successes and running work are kept: a failed call may be
// repeated.
class RequestTable {
 public:
  // nullptr: not seen. INVALID_ARGUMENT REQUEST_ID_REUSED when it was used with another body. An empty id is never
  // seen.
  StatusOr<const RequestOutcome*> Find(const std::string& key, const std::string& body_hash);
  // The oldest finished entry goes when there are too many.
  void Put(const std::string& key, const std::string& body_hash, RequestOutcome outcome);
  void Erase(const std::string& key) { entries_.erase(key); }
  bool Contains(const std::string& key) const { return entries_.count(key) != 0; }
  size_t size() const { return entries_.size(); }

 private:
  struct Entry {
    std::string body_hash;
    RequestOutcome outcome;
  };
  std::map<std::string, Entry> entries_;
  std::deque<std::string> order_;
};

class Catalog {
 public:
  explicit Catalog(uint64_t token_key) : token_key_(token_key) {}

  // A name that is being uploaded: ABORTED CONTEXT_BUSY for a second upload, or while the old one is being
  // deleted, ALREADY_EXISTS CONTEXT_EXISTS when it is
  // there, RESOURCE_EXHAUSTED CONTEXT_COUNT when there are too many.
  Status Claim(const std::string& name);
  bool Claimed(const std::string& name) const { return claimed_.count(name) != 0; }
  void Unclaim(const std::string& name) { claimed_.erase(name); }

  void Put(std::shared_ptr<Session> session);
  std::shared_ptr<Session> Find(const std::string& name) const;  // nullptr: none
  // NOT_FOUND CONTEXT_NOT_FOUND; also while it is being deleted.
  StatusOr<std::shared_ptr<Session>> Get(const std::string& name) const;
  void Erase(const std::string& name) { sessions_.erase(name); }
  const std::map<std::string, std::shared_ptr<Session>>& sessions() const { return sessions_; }
  int64_t stored_tokens() const;

  // Names after the one in `page_token`, and the token of the next page (empty: no more).
  // INVALID_ARGUMENT FIELD_OUT_OF_RANGE for a token that this catalog did not make.
  StatusOr<std::vector<std::shared_ptr<Session>>> Page(const std::string& page_token) const;
  std::string PageToken(const std::string& last_name) const;

 private:
  const uint64_t token_key_;
  std::map<std::string, std::shared_ptr<Session>> sessions_;
  std::set<std::string> claimed_;
};

}  // namespace refocus
