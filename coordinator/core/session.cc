#include "coordinator/core/session.h"

#include <cmath>
#include <utility>

#include "base/check.h"

namespace refocus {

void SetTimestamp(double unix_seconds, google::protobuf::Timestamp* out) {
  const double whole = std::floor(unix_seconds);
  out->set_seconds(static_cast<int64_t>(whole));
  out->set_nanos(static_cast<int32_t>((unix_seconds - whole) * 1e9));
}

Session::Session(Setup setup, double now, double unix_now)
    : setup_(std::move(setup)), created_unix_(unix_now), last_used_(now) {
  REFOCUS_CHECK_GE(token_count(), 1);
}

void Session::StartPrefill(uint64_t cache_uid, std::vector<ContextExtent> extents) {
  REFOCUS_CHECK_EQ(state_, api::Context::CREATED);
  state_ = api::Context::PREFILLING;
  state_reason_.clear();
  cache_uid_ = cache_uid;
  extents_ = std::move(extents);
  shareable_ = false;
  prefilled_ = shared_tokens();
}

void Session::DropPrefix(std::shared_ptr<KvReservation> memory) {
  REFOCUS_CHECK_EQ(state_, api::Context::PREFILLING);
  extents_.clear();
  if (memory != nullptr) extents_.push_back({0, std::move(memory)});
  prefilled_ = 0;
}

void Session::FinishPrefill(const api::PrefillEvent& last) {
  REFOCUS_CHECK_EQ(state_, api::Context::PREFILLING);
  REFOCUS_CHECK_EQ(prefilled_, token_count());
  state_ = api::Context::READY;
  last_prefill_ = last;
}

void Session::DropCache(const std::string& why) {
  if (state_ == api::Context::CREATED) return;
  REFOCUS_CHECK_EQ(answers_, 0);
  state_ = api::Context::CREATED;
  state_reason_ = why;
  cache_uid_ = 0;
  extents_.clear();
  prefilled_ = 0;
  adapters_.clear();
  committing_.clear();
}

void Session::StartAdapt() {
  REFOCUS_CHECK_EQ(state_, api::Context::READY);
  state_ = api::Context::ADAPTING;
}

void Session::FinishAdapt(uint64_t adapter_uid, const std::optional<api::Adapter>& committed,
                          std::shared_ptr<KvReservation> memory,
                          std::optional<api::AdaptEvent::Effective> training) {
  REFOCUS_CHECK_EQ(state_, api::Context::ADAPTING);
  state_ = api::Context::READY;
  committing_.clear();
  if (!committed) return;
  Adapter& adapter = adapters_[committed->id()];
  REFOCUS_CHECK_EQ(committed->revision(), adapter.info.revision() + 1);
  adapter.uid = adapter_uid;
  adapter.info = *committed;
  adapter.memory = std::move(memory);
  adapter.training = std::move(training);
}

Session::Adapter* Session::FindAdapter(const std::string& id) {
  const auto found = adapters_.find(id);
  return found == adapters_.end() ? nullptr : &found->second;
}

void Session::StartAnswer() {
  REFOCUS_CHECK(has_cache());
  ++answers_;
}

void Session::EndAnswer() {
  REFOCUS_CHECK_GE(answers_, 1);
  --answers_;
}

api::Context Session::ToProto(double now, double unix_now) const {
  api::Context out;
  out.set_name(name());
  out.set_state(state_);
  out.set_token_count(token_count());
  out.set_prefilled_tokens(prefilled_);
  out.set_kv_bytes(extents_.empty() ? 0 : extents_.back().memory->bytes());
  out.set_shared_tokens(shared_tokens());
  SetTimestamp(created_unix_, out.mutable_create_time());
  SetTimestamp(unix_now + (last_used_ + setup_.ttl_seconds - now), out.mutable_expire_time());
  out.mutable_labels()->insert(setup_.labels.begin(), setup_.labels.end());
  for (const auto& [id, adapter] : adapters_) *out.add_adapters() = adapter.info;
  out.set_state_reason(state_reason_);
  out.set_chat_format(setup_.chat_format);
  return out;
}

}  // namespace refocus
