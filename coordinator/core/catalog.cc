#include "coordinator/core/catalog.h"

#include <utility>

#include "base/check.h"
#include "base/limits.h"
#include "coordinator/core/digest.h"

namespace refocus {
namespace {

constexpr size_t kMaxRequests = 8192;

}  // namespace

StatusOr<const RequestOutcome*> RequestTable::Find(const std::string& key, const std::string& body_hash) {
  const auto found = entries_.find(key);
  if (found == entries_.end()) return nullptr;
  if (found->second.body_hash != body_hash) {
    return Error(StatusCode::kInvalidArgument, "REQUEST_ID_REUSED",
                 "request_id: got one that was used with another body, allowed a new one", {{"field", "request_id"}});
  }
  return &found->second.outcome;
}

void RequestTable::Put(const std::string& key, const std::string& body_hash, RequestOutcome outcome) {
  if (entries_.insert_or_assign(key, Entry{body_hash, std::move(outcome)}).second) order_.push_back(key);
  for (size_t tries = order_.size(); entries_.size() > kMaxRequests && tries > 0; --tries) {
    const std::string oldest = std::move(order_.front());
    order_.pop_front();
    const auto found = entries_.find(oldest);
    if (found == entries_.end()) continue;
    if (std::holds_alternative<std::shared_ptr<AdaptJob>>(found->second.outcome)) {
      order_.push_back(oldest);  // still running
    } else {
      entries_.erase(found);
    }
  }
  if (order_.size() > 2 * kMaxRequests) {  // keys of erased entries
    std::erase_if(order_, [&](const std::string& name) { return entries_.count(name) == 0; });
  }
}

Status Catalog::Claim(const std::string& name) {
  const std::shared_ptr<Session> there = Find(name);
  if (there != nullptr && there->deleting) {
    return Error(StatusCode::kAborted, "CONTEXT_BUSY", name + " is being deleted; retry", {{"name", name}});
  }
  if (there != nullptr) {
    return Error(StatusCode::kAlreadyExists, "CONTEXT_EXISTS", name + " exists; choose another context_id or delete it",
                 {{"name", name}});
  }
  if (claimed_.count(name) != 0) {
    return Error(StatusCode::kAborted, "CONTEXT_BUSY", name + " is being uploaded by another call", {{"name", name}});
  }
  if (static_cast<int64_t>(sessions_.size() + claimed_.size()) >= kMaxContexts) {
    return Error(StatusCode::kResourceExhausted, "CONTEXT_COUNT",
                 "contexts: got one more than " + std::to_string(kMaxContexts) + "; delete one",
                 {{"limit", std::to_string(kMaxContexts)}});
  }
  claimed_.insert(name);
  return absl::OkStatus();
}

void Catalog::Put(std::shared_ptr<Session> session) {
  claimed_.erase(session->name());
  const bool fresh = sessions_.emplace(session->name(), session).second;
  REFOCUS_CHECK(fresh);
}

std::shared_ptr<Session> Catalog::Find(const std::string& name) const {
  const auto found = sessions_.find(name);
  return found == sessions_.end() ? nullptr : found->second;
}

StatusOr<std::shared_ptr<Session>> Catalog::Get(const std::string& name) const {
  std::shared_ptr<Session> session = Find(name);
  if (session == nullptr || session->deleting) {
    return Error(StatusCode::kNotFound, "CONTEXT_NOT_FOUND", name + " does not exist", {{"name", name}});
  }
  return session;
}

int64_t Catalog::stored_tokens() const {
  int64_t tokens = 0;
  for (const auto& [name, session] : sessions_) tokens += session->token_count();
  return tokens;
}

StatusOr<std::vector<std::shared_ptr<Session>>> Catalog::Page(const std::string& page_token) const {
  auto next = sessions_.begin();
  if (!page_token.empty()) {
    const size_t dot = page_token.find('.');
    const std::string name = dot == std::string::npos ? "" : page_token.substr(dot + 1);
    if (name.empty() || page_token != PageToken(name)) {
      return FieldError("page_token", "one that this server did not make",
                        "next_page_token of an earlier answer, or empty");
    }
    next = sessions_.upper_bound(name);
  }
  std::vector<std::shared_ptr<Session>> page;
  for (; next != sessions_.end(); ++next) {
    if (!next->second->deleting) page.push_back(next->second);
  }
  return page;
}

std::string Catalog::PageToken(const std::string& last_name) const {
  return Digest(std::to_string(token_key_) + "/" + last_name).substr(0, 32) + "." + last_name;
}

}  // namespace refocus
