#include "coordinator/hub.h"

#include <algorithm>
#include <chrono>
#include <utility>

namespace refocus {
namespace {

constexpr auto kTick = std::chrono::milliseconds(100);
constexpr int kMaxCalls = 512;
constexpr int kMaxLinks = 4096;

int64_t LongestToken(const Tokenizer* tokenizer) {
  size_t longest = 0;
  const int64_t ids = tokenizer == nullptr ? 0 : tokenizer->vocab_size();
  for (int64_t id = 0; id < ids; ++id) {
    longest = std::max(longest, tokenizer->TokenBytes(static_cast<int32_t>(id), /*keep_special=*/true).size());
  }
  return static_cast<int64_t>(longest);
}

}  // namespace

Hub::Hub(CoordinatorOptions options, std::shared_ptr<const Tokenizer> tokenizer, Environment environment,
         double read_within_seconds)
    : tokenizer_(tokenizer),
      model_(options.model),
      chat_(options.chat),
      longest_token_(LongestToken(tokenizer.get())),
      core_(std::move(options), std::move(tokenizer), std::move(environment)),
      calls_(kMaxCalls, read_within_seconds),
      links_(kMaxLinks) {
  ticker_ = std::thread([this] { TickLoop(); });
}

Hub::~Hub() {
  calls_.WaitUntilEmpty();
  links_.WaitUntilEmpty();
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  tick_.notify_all();
  ticker_.join();
}

void Hub::TickLoop() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!stop_) {
    core_.Tick();
    Deliver();
    tick_.wait_for(lock, kTick);
  }
}

void Hub::Deliver() {
  for (const Coordinator::Outgoing& outgoing : core_.TakeOutgoing()) {
    const auto link = open_.find(outgoing.link);
    if (link == open_.end()) continue;
    link->second.messages.push_back(outgoing.message);
    link->second.wakeup->Notify();
  }
  for (const uint64_t job : core_.TakeChanged()) {
    const auto [first, last] = watchers_.equal_range(job);
    for (auto it = first; it != last; ++it) it->second->Notify();
  }
  if (core_.serving() == was_serving_) return;
  was_serving_ = core_.serving();
  if (on_serving_) on_serving_(was_serving_);
}

uint64_t Hub::OpenLink(std::shared_ptr<Wakeup> wakeup) {
  const std::lock_guard<std::mutex> lock(mutex_);
  open_[next_link_].wakeup = std::move(wakeup);
  return next_link_++;
}

std::deque<std::shared_ptr<const wire::CoordinatorMessage>> Hub::TakeMessages(uint64_t link) {
  const std::lock_guard<std::mutex> lock(mutex_);
  return std::exchange(open_.at(link).messages, {});
}

void Hub::CloseLink(uint64_t link) {
  const std::lock_guard<std::mutex> lock(mutex_);
  open_.erase(link);
}

void Hub::Watch(uint64_t job, std::shared_ptr<Wakeup> wakeup) {
  const std::lock_guard<std::mutex> lock(mutex_);
  watchers_.emplace(job, std::move(wakeup));
}

void Hub::Unwatch(uint64_t job, const std::shared_ptr<Wakeup>& wakeup) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto [first, last] = watchers_.equal_range(job);
  for (auto it = first; it != last; ++it) {
    if (it->second != wakeup) continue;
    watchers_.erase(it);
    return;
  }
}

void Hub::OnServing(std::function<void(bool serving)> callback) {
  const std::lock_guard<std::mutex> lock(mutex_);
  on_serving_ = std::move(callback);
  if (on_serving_) on_serving_(was_serving_);
}

}  // namespace refocus
