#include "coordinator/core/group.h"

#include <algorithm>
#include <cstdio>

#include "base/limits.h"

namespace refocus {
namespace {

constexpr double kSilentSeconds = 3;  // several missed heartbeats; far from enough to give a rank up
constexpr int32_t kMaxRanks = 4096;
constexpr size_t kMaxKeyBytes = 4096;

std::string Seconds(double seconds) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.1f s", seconds);
  return text;
}

Status Mismatch(const char* reason, const char* what, const std::string& got, const std::string& allowed) {
  return Error(StatusCode::kFailedPrecondition, reason,
               std::string(what) + ": got " + got + ", allowed " + allowed +
                   "; start the ranks with the coordinator's build, model and group size",
               {{"got", got}, {"allowed", allowed}});
}

DeviceKind DeviceOf(const wire::Hello& hello) {  // "cpu", or "cuda" and the GPU's name
  return hello.device().starts_with("cuda") ? DeviceKind::kCuda : DeviceKind::kCpu;
}

}  // namespace

Status Group::CheckHello(const wire::Hello& hello) const {
  if (hello.version() != kProtocolVersion) {
    return Mismatch("VERSION_SKEW", "protocol version", hello.version(), kProtocolVersion);
  }
  if (hello.model_fingerprint() != options_.fingerprint) {
    return Mismatch("MODEL_MISMATCH", "model fingerprint", hello.model_fingerprint(), options_.fingerprint);
  }
  if (hello.size() < 1 || hello.size() > kMaxRanks) {
    return FieldError("size", std::to_string(hello.size()), "1 to " + std::to_string(kMaxRanks));
  }
  if (options_.size != 0 && hello.size() != options_.size) {
    return Mismatch("GROUP_SIZE", "ranks", std::to_string(hello.size()), std::to_string(options_.size));
  }
  if (!hello.wants_rank() && (hello.rank() < 0 || hello.rank() >= hello.size())) {
    return FieldError("rank", std::to_string(hello.rank()), "0 to " + std::to_string(hello.size() - 1));
  }
  if (hello.kv_dtype().size() > 16) return FieldError("kv_dtype", "longer", "at most 16 characters");
  if (hello.weights_hash().size() > 128) return FieldError("weights_hash", "longer", "at most 128 characters");
  if (hello.nonce().empty() || hello.nonce().size() > 128) return FieldError("nonce", "", "1 to 128 characters");
  if (hello.kv_capacity_bytes() < 0) {
    return FieldError("kv_capacity_bytes", std::to_string(hello.kv_capacity_bytes()), "0 or more");
  }
  if (hello.kv_bytes_per_token() < 1) {
    return FieldError("kv_bytes_per_token", std::to_string(hello.kv_bytes_per_token()), "1 or more");
  }
  return absl::OkStatus();
}

// What the ranks of one launch have in common. Ranks that are to be handed out have no name yet.
Status Group::CheckLike(const wire::Hello& hello, const wire::Hello& first) const {
  if (hello.nonce() != first.nonce()) {
    return Error(StatusCode::kUnavailable, "GROUP_TAKEN",
                 "another launch is in the group; stop it, or wait until its loss is noticed");
  }
  if (hello.size() != first.size()) {
    return Mismatch("GROUP_SIZE", "ranks", std::to_string(hello.size()), std::to_string(first.size()));
  }
  if (hello.wants_rank() != first.wants_rank()) {
    const auto text = [](bool wants) { return wants ? "a process without a rank" : "a process with a rank"; };
    return Mismatch("GROUP_SIZE", "launch", text(hello.wants_rank()), text(first.wants_rank()));
  }
  if (DeviceOf(hello) != DeviceOf(first)) {
    return Mismatch("GROUP_DEVICE", "device", hello.device(), first.device());
  }
  if (hello.kv_dtype() != first.kv_dtype()) {
    return Mismatch("GROUP_KV_DTYPE", "kv_dtype", hello.kv_dtype(), first.kv_dtype());
  }
  if (hello.kv_bytes_per_token() != first.kv_bytes_per_token()) {
    return Mismatch("MODEL_MISMATCH", "kv_bytes_per_token", std::to_string(hello.kv_bytes_per_token()),
                    std::to_string(first.kv_bytes_per_token()));
  }
  if (hello.weights_hash() != first.weights_hash()) {
    const std::string here = hello.wants_rank() ? "new" : std::to_string(hello.rank());
    const std::string there = std::to_string(ranks_.begin()->first);
    return Error(StatusCode::kFailedPrecondition, "MODEL_MISMATCH",
                 "weights: rank " + here + " has hash " + hello.weights_hash() + ", rank " + there + " has " +
                     first.weights_hash() + "; give all ranks the same file",
                 {{"rank", here}, {"got", hello.weights_hash()}, {"other_rank", there},
                  {"allowed", first.weights_hash()}});
  }
  return absl::OkStatus();
}

Status Group::Hello(uint64_t link, const wire::Hello& hello, double now, Events* events) {
  REFOCUS_RETURN_IF_ERROR(CheckHello(hello));
  if (!ranks_.empty()) REFOCUS_RETURN_IF_ERROR(CheckLike(hello, ranks_.begin()->second.hello));
  int32_t index = hello.rank();
  if (hello.wants_rank()) {  // the lowest that is free
    for (index = 0; ranks_.count(index) != 0;) ++index;
  }
  if (index >= hello.size() || ranks_.count(index) != 0) {
    return Error(StatusCode::kAlreadyExists, "RANK_TAKEN",
                 hello.wants_rank() ? "all " + std::to_string(hello.size()) + " ranks are there already"
                                    : "rank " + std::to_string(index) + " is there already");
  }
  if (ranks_.empty()) waiting_from_ = now;
  Rank& rank = ranks_[index];
  rank.link = link;
  rank.hello = hello;
  rank.last_heartbeat = rank.last_progress = now;
  if (static_cast<int32_t>(ranks_.size()) == hello.size()) {
    state_ = State::kForming;
    formed_from_ = now;
    key_sent_ = false;
    for (auto& [number, member] : ranks_) {
      member.last_heartbeat = now;  // they come from now on
      events->form.emplace_back(member.link, number);
    }
  }
  return absl::OkStatus();
}

void Group::Key(uint64_t link, const wire::GroupKey& key, double now, Events* events) {
  const auto index = RankOf(link);
  if (!index || key.epoch() != epoch_) return;
  Rank& rank = ranks_.at(*index);
  const bool in_place = state_ == State::kForming && rank.hello.wants_rank() && *index == 0 && !key_sent_;
  if (!in_place || key.key().empty() || key.key().size() > kMaxKeyBytes) {
    return Lose(Describe(*index) + " sent a key out of place", events);
  }
  key_sent_ = true;
  rank.last_heartbeat = now;
  events->key = key.key();
  for (const auto& [number, member] : ranks_) {
    if (number != 0) events->connect.push_back(member.link);
  }
}

void Group::Ready(uint64_t link, const wire::GroupReady& ready, double now, Events* events) {
  const auto index = RankOf(link);
  if (!index || state_ != State::kForming || ready.epoch() != epoch_) return;
  Rank& rank = ranks_.at(*index);
  rank.ready = true;
  rank.last_heartbeat = rank.last_progress = now;
  const bool all = std::all_of(ranks_.begin(), ranks_.end(), [](const auto& entry) { return entry.second.ready; });
  if (!all) return;
  state_ = State::kServing;
  events->formed = true;
}

void Group::Beat(uint64_t link, const wire::Heartbeat& heartbeat, double now) {
  const auto index = RankOf(link);
  if (!index) return;
  Rank& rank = ranks_.at(*index);
  if (heartbeat.progress() != rank.heartbeat.progress()) rank.last_progress = now;
  rank.heartbeat = heartbeat;
  rank.last_heartbeat = now;
}

void Group::Closed(uint64_t link, const std::string& why, Events* events) {
  const auto index = RankOf(link);
  if (!index) return;
  if (state_ == State::kWaiting) {  // not yet a group: the others may go on waiting for it
    ranks_.erase(*index);
    return;
  }
  Lose(Describe(*index) + " " + why, events);
}

void Group::Tick(double now, const std::vector<bool>& working, Events* events) {
  if (state_ == State::kWaiting) {  // a stream that ends is noticed; ranks with nothing to do may be silent
    if (!ranks_.empty() && now - waiting_from_ > options_.form_seconds) {
      Lose(Missing() + " did not dial in within " + Seconds(options_.form_seconds), events);
    }
    return;
  }
  std::string missing;
  // Ranks that wait for another one stand still as it does: of several, the silent one is to blame, else the first.
  std::optional<int32_t> stuck;
  for (auto& [index, rank] : ranks_) {
    const double silent = now - rank.last_heartbeat;
    if (silent > options_.dead_seconds)
      return Lose(Describe(index) + " sent no heartbeat for " + Seconds(silent), events);
    if (!rank.ready) missing += (missing.empty() ? "" : ", ") + Describe(index);
    const bool busy = static_cast<size_t>(index) < working.size() && working[index];
    if (!busy) rank.last_progress = now;
    const bool still = now - rank.last_progress > options_.stuck_seconds;
    if (still && (!stuck || silent > kSilentSeconds)) stuck = index;
  }
  if (stuck) {
    const Rank& rank = ranks_.at(*stuck);
    const bool alive = now - rank.last_heartbeat <= kSilentSeconds;
    return Lose(Describe(*stuck) + (alive ? " is alive but" : " is silent and") + " made no progress for " +
                    Seconds(now - rank.last_progress), events);
  }
  if (state_ == State::kForming && now - formed_from_ > options_.form_seconds) {
    Lose(missing + " did not join within " + Seconds(options_.form_seconds), events);
  }
}

void Group::Lose(const std::string& cause, Events* events) {
  if (ranks_.empty()) return;
  for (const auto& [index, rank] : ranks_) events->leave.push_back(rank.link);
  ranks_.clear();
  if (state_ != State::kWaiting) ++epoch_;
  state_ = State::kWaiting;
  last_incident_ = cause;
  events->lost = cause;
}

DeviceKind Group::device() const {
  return ranks_.empty() ? DeviceKind::kCpu : DeviceOf(ranks_.begin()->second.hello);
}

std::optional<int32_t> Group::RankOf(uint64_t link) const {
  for (const auto& [index, rank] : ranks_) {
    if (rank.link == link) return index;
  }
  return std::nullopt;
}

std::string Group::Missing() const {
  constexpr int kShown = 8;
  std::string out;
  int missing = 0;
  for (int32_t index = 0; index < size(); ++index) {
    if (ranks_.count(index) != 0 || ++missing > kShown) continue;
    out += (out.empty() ? "" : ", ") + Describe(index);
  }
  return missing > kShown ? out + " and " + std::to_string(missing - kShown) + " more" : out;
}

// For callers too: no host names, addresses or process ids.
std::string Group::Describe(int32_t rank) const { return "rank " + std::to_string(rank); }

}  // namespace refocus
