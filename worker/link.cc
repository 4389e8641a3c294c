#include "worker/link.h"

#include <grpcpp/grpcpp.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <random>
#include <thread>
#include <utility>

#include "base/limits.h"
#include "base/log.h"
#include "refocus/internal/v1/group.grpc.pb.h"
#include "worker/host.h"
#include "worker/link_messages.h"

namespace refocus {
namespace {

namespace pb = internal::v1;
using Clock = std::chrono::steady_clock;

constexpr int kKeepaliveMs = 10'000;
constexpr int kKeepaliveTimeoutMs = 5'000;
constexpr int kFirstBackoffMs = 100;
constexpr int kLastBackoffMs = 2'000;

Clock::duration Seconds(double seconds) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

std::shared_ptr<grpc::Channel> Dial(const std::string& address) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(kWorkerMessageBytes);
  arguments.SetMaxSendMessageSize(kWorkerMessageBytes);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveMs);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, kFirstBackoffMs);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, kLastBackoffMs);  // also the limit of one attempt
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, kLastBackoffMs);
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  return grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments);
}

pb::WorkerMessage HelloOf(const RankIdentity& identity) {
  pb::WorkerMessage message;
  pb::Hello* hello = message.mutable_hello();
  hello->set_nonce(identity.nonce);
  hello->set_wants_rank(identity.rank < 0);
  hello->set_rank(std::max(identity.rank, 0));
  hello->set_size(identity.size);
  hello->set_host(HostName());
  hello->set_pid(getpid());
  hello->set_version(kProtocolVersion);
  hello->set_model_fingerprint(identity.model_fingerprint);
  hello->set_weights_hash(identity.weights_hash);
  hello->set_device(identity.device);
  hello->set_kv_capacity_bytes(identity.kv_capacity_bytes);
  hello->set_kv_bytes_per_token(identity.kv_bytes_per_token);
  hello->set_kv_dtype(identity.kv_dtype);
  hello->set_weight_bytes(identity.weight_bytes);
  hello->set_parameters(identity.parameters);
  return message;
}

Status GivenUp(const pb::Shutdown& message) {
  return Error(StatusCode::kUnavailable, "WORKER_LOST", "the coordinator gave this group up: " + message.reason());
}

Status Interrupted() {
  return Error(StatusCode::kCancelled, "INTERRUPTED", "interrupted before the group was formed");
}

// Holds a command's place in the engine's order while changing nothing: no context has uid 0.
Command Placeholder(const pb::Command& message) {
  Command command;
  command.epoch = message.epoch();
  command.seq = message.seq();
  command.body = CloseContext{0};
  return command;
}

}  // namespace

class Link::Impl {
 public:
  Impl(const LinkOptions& options, const RankIdentity& identity, LinkCallbacks callbacks)
      : options_(options), identity_(identity), callbacks_(std::move(callbacks)) {}
  ~Impl() { Close(0.0); }

  Status Join();
  void Send(Result result);
  void Close(double flush_seconds);
  void Interrupt();

 private:
  using Stream = grpc::ClientReaderWriter<pb::WorkerMessage, pb::CoordinatorMessage>;

  Status TryOnce(pb::CoordinatorMessage* first);
  Status Form(const pb::CoordinatorMessage& first);
  Status CheckForm(const pb::FormGroup& group) const;
  Status Connect(int32_t rank);
  StatusOr<std::string> Share(int32_t rank, const std::string& own);
  void StartThreads();
  Status Unreachable(const std::string& what, const std::string& message) const;
  bool WaitUnlessInterrupted(Clock::duration time);
  void ReadLoop();
  void WriteLoop();
  void HeartbeatLoop();
  void Handle(const pb::CoordinatorMessage& message);
  void HandleKey(const pb::GroupKey& message);
  void HandleCommand(const pb::Command& message);
  void HandleShutdown(const pb::Shutdown& message);
  void Push(pb::WorkerMessage message);  // mutex_ held
  void LoseStream(const Status& cause);
  void Lose(const Status& cause);

  const LinkOptions options_;
  const RankIdentity identity_;
  const LinkCallbacks callbacks_;
  std::unique_ptr<pb::GroupService::Stub> stub_;
  std::unique_ptr<Stream> stream_;
  std::thread reader_;
  std::thread writer_;
  std::thread heart_;
  int64_t epoch_ = 0;  // set before the threads start

  std::mutex mutex_;
  std::condition_variable wake_;
  std::unique_ptr<grpc::ClientContext> context_;
  std::deque<pb::WorkerMessage> queue_;
  std::map<int64_t, Status> refused_;  // by number; the engine holds a placeholder
  int64_t outstanding_ = 0;            // submitted, no final result yet
  bool heartbeat_queued_ = false;
  std::string key_;            // rank 0's, as it came
  bool interrupted_ = false;
  bool joined_ = false;        // the threads run
  bool connecting_ = false;    // in callbacks_.form
  bool closing_ = false;
  bool ended_ = false;         // the stream: nothing can be sent any more
  bool writer_done_ = false;
  bool reader_done_ = false;
  bool shutdown_ = false;      // a planned one was received
  bool told_ = false;          // shutdown or lost was called
  std::string shutdown_reason_;
};

Status Link::Impl::Unreachable(const std::string& what, const std::string& message) const {
  return Error(StatusCode::kUnavailable, "COORDINATOR_LOST", "coordinator " + options_.coordinator + ": " + what +
               (message.empty() ? "" : ": " + message), {{"coordinator", options_.coordinator}});
}

bool Link::Impl::WaitUnlessInterrupted(Clock::duration time) {
  std::unique_lock<std::mutex> lock(mutex_);
  return !wake_.wait_for(lock, time, [&] { return interrupted_; });
}

Status Link::Impl::Join() {
  const Clock::time_point deadline = Clock::now() + Seconds(options_.connect_seconds);
  const std::shared_ptr<grpc::Channel> channel = Dial(options_.coordinator);
  stub_ = pb::GroupService::NewStub(channel);
  std::minstd_rand jitter(static_cast<unsigned>(getpid()));
  int backoff_ms = kFirstBackoffMs;
  std::string last = "no connection";
  while (WaitUnlessInterrupted(Clock::duration::zero())) {
    if (Clock::now() >= deadline) {
      return Unreachable("not reached before --connect-seconds had passed", last);
    }
    const auto patience = std::min(std::chrono::milliseconds(250),
                                   std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()));
    if (!channel->WaitForConnected(std::chrono::system_clock::now() + patience)) continue;
    pb::CoordinatorMessage first;
    const Status status = TryOnce(&first);
    if (status.ok()) {
      const Status formed = Form(first);
      if (!formed.ok() && !joined_) {
        context_->TryCancel();
        stream_->Finish();
      }
      return formed;
    }
    if (status.code() != StatusCode::kUnavailable) return status;
    last = std::string(status.message());
    LogDebug(last + "; trying again");
    // Half to all of the time, so that the ranks of a large group do not come back in step.
    const int wait_ms = backoff_ms / 2 + static_cast<int>(jitter() % static_cast<unsigned>(backoff_ms / 2 + 1));
    WaitUnlessInterrupted(std::chrono::milliseconds(wait_ms));
    backoff_ms = std::min(2 * backoff_ms, kLastBackoffMs);
  }
  return Interrupted();
}

// Says Hello and waits for the first answer.
Status Link::Impl::TryOnce(pb::CoordinatorMessage* first) {
  grpc::ClientContext* context = nullptr;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stream_.reset();
    context_ = std::make_unique<grpc::ClientContext>();
    context = context_.get();
    if (interrupted_) context->TryCancel();
  }
  stream_ = stub_->Join(context);
  if (stream_->Write(HelloOf(identity_)) && stream_->Read(first)) return {};
  const grpc::Status end = stream_->Finish();
  const bool refused = end.error_code() == grpc::StatusCode::FAILED_PRECONDITION ||
                       end.error_code() == grpc::StatusCode::INVALID_ARGUMENT;
  if (!refused) return Unreachable("ended the stream before the group was formed", end.error_message());
  return Error(static_cast<StatusCode>(end.error_code()), "GROUP_REFUSED",
               "coordinator " + options_.coordinator + " refused this rank: " + end.error_message());
}

Status Link::Impl::CheckForm(const pb::FormGroup& group) const {
  const bool placed = identity_.rank >= 0 || (group.rank() >= 0 && group.rank() < group.size());
  if (group.size() == identity_.size && group.epoch() >= 1 && placed) return {};
  return Error(StatusCode::kFailedPrecondition, "GROUP_REFUSED",
               "FormGroup: got epoch " + std::to_string(group.epoch()) + ", rank " + std::to_string(group.rank()) +
                   " of " + std::to_string(group.size()) + " ranks, allowed an epoch above 0 and a rank below " +
                   std::to_string(identity_.size) + " of as many");
}

Status Link::Impl::Form(const pb::CoordinatorMessage& first) {
  if (first.has_shutdown()) {
    if (!first.shutdown().planned()) return GivenUp(first.shutdown());
    StartThreads();
    HandleShutdown(first.shutdown());
    return {};
  }
  if (!first.has_form_group()) {
    return Error(StatusCode::kFailedPrecondition, "GROUP_REFUSED",
                 "first message of coordinator " + options_.coordinator + ": got no FormGroup; run equal versions");
  }
  REFOCUS_RETURN_IF_ERROR(CheckForm(first.form_group()));
  epoch_ = first.form_group().epoch();
  pb::WorkerMessage ready;
  ready.mutable_ready()->set_epoch(epoch_);
  if (identity_.rank >= 0) {
    if (!stream_->Write(ready)) return Unreachable("went away while the group was formed", "");
    StartThreads();
    return {};
  }
  StartThreads();
  REFOCUS_RETURN_IF_ERROR(Connect(first.form_group().rank()));
  const std::lock_guard<std::mutex> lock(mutex_);
  Push(std::move(ready));
  return {};
}

void Link::Impl::StartThreads() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    joined_ = true;
    connecting_ = epoch_ > 0 && identity_.rank < 0;
  }
  writer_ = std::thread([this] { WriteLoop(); });
  heart_ = std::thread([this] { HeartbeatLoop(); });
  reader_ = std::thread([this] { ReadLoop(); });
}

Status Link::Impl::Connect(int32_t rank) {
  const Status status =
      callbacks_.form(rank, [this, rank](const std::string& own) { return Share(rank, own); });
  const std::lock_guard<std::mutex> lock(mutex_);
  connecting_ = false;
  if (interrupted_) return Interrupted();
  return status;
}

StatusOr<std::string> Link::Impl::Share(int32_t rank, const std::string& own) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (rank == 0) {
    pb::WorkerMessage message;
    message.mutable_key()->set_epoch(epoch_);
    message.mutable_key()->set_key(own);
    Push(std::move(message));
    return own;
  }
  wake_.wait(lock, [&] { return !key_.empty() || ended_ || shutdown_ || told_ || interrupted_; });
  if (!key_.empty()) return key_;
  if (interrupted_) return Interrupted();
  return Unreachable("went away, or gave the group up, while the ranks connected", "");
}

void Link::Impl::Push(pb::WorkerMessage message) {
  if (ended_) return;
  queue_.push_back(std::move(message));
  wake_.notify_all();
}

void Link::Impl::Send(Result result) {
  std::string reason;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (result.final) {
      --outstanding_;
      const auto refused = refused_.find(result.seq);
      if (result.epoch == epoch_ && refused != refused_.end()) {
        result.status = std::move(refused->second);
        refused_.erase(refused);
      }
    }
    pb::WorkerMessage message;
    *message.mutable_result() = WriteResult(result);
    Push(std::move(message));
    if (!shutdown_ || told_ || outstanding_ > 0) return;
    told_ = true;
    reason = shutdown_reason_;
  }
  callbacks_.shutdown(reason);
}

void Link::Impl::WriteLoop() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    wake_.wait(lock, [&] { return ended_ || closing_ || !queue_.empty(); });
    if (ended_ || queue_.empty()) break;
    const pb::WorkerMessage message = std::move(queue_.front());
    queue_.pop_front();
    if (message.has_heartbeat()) heartbeat_queued_ = false;
    lock.unlock();
    const bool written = stream_->Write(message);
    lock.lock();
    if (!written) break;  // the reader learns why
  }
  if (!ended_ && queue_.empty()) {
    lock.unlock();
    stream_->WritesDone();
    lock.lock();
  }
  writer_done_ = true;
  wake_.notify_all();
}

// One at a time in the queue: a coordinator that does not read must not fill our memory.
void Link::Impl::HeartbeatLoop() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!ended_ && !closing_) {
    if (!heartbeat_queued_) {
      pb::WorkerMessage message;
      pb::Heartbeat* beat = message.mutable_heartbeat();
      beat->set_epoch(epoch_);
      beat->set_progress(callbacks_.progress());
      beat->set_running_seq(callbacks_.running_seq());
      beat->set_resident_bytes(ResidentBytes());
      heartbeat_queued_ = true;
      Push(std::move(message));
    }
    wake_.wait_for(lock, Seconds(options_.heartbeat_seconds), [&] { return ended_ || closing_; });
  }
}

void Link::Impl::ReadLoop() {
  pb::CoordinatorMessage message;
  while (stream_->Read(&message)) Handle(message);
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ended_ = true;
    queue_.clear();
    wake_.notify_all();
  }
  writer_.join();  // the status is asked for only when nobody writes any more
  const grpc::Status end = stream_->Finish();
  LoseStream(Unreachable("the stream ended", end.error_message()));
  const std::lock_guard<std::mutex> lock(mutex_);
  reader_done_ = true;
  wake_.notify_all();
}

// No loss after a planned Shutdown: it is the stream's last message.
void Link::Impl::LoseStream(const Status& cause) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (shutdown_ || interrupted_) return;
  }
  Lose(cause);
}

void Link::Impl::Lose(const Status& cause) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (told_ || closing_) return;
    told_ = true;
    wake_.notify_all();
  }
  callbacks_.lost(cause);
}

void Link::Impl::Handle(const pb::CoordinatorMessage& message) {
  switch (message.message_case()) {
    case pb::CoordinatorMessage::kCommand: return HandleCommand(message.command());
    case pb::CoordinatorMessage::kCancel:
      if (message.cancel().epoch() == epoch_) callbacks_.cancel(message.cancel().job());
      return;
    case pb::CoordinatorMessage::kShutdown: return HandleShutdown(message.shutdown());
    case pb::CoordinatorMessage::kFormGroup:
      return Lose(Error(StatusCode::kFailedPrecondition, "STALE_EPOCH",
                        "FormGroup: got a second one, allowed one a stream"));
    case pb::CoordinatorMessage::kKey: return HandleKey(message.key());
    case pb::CoordinatorMessage::MESSAGE_NOT_SET:
      LogWarning("message from the coordinator ignored: this version does not know it");
  }
}

void Link::Impl::HandleKey(const pb::GroupKey& message) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (message.epoch() != epoch_ || !connecting_ || !key_.empty()) return;
  key_ = message.key();
  wake_.notify_all();
}

void Link::Impl::HandleCommand(const pb::Command& message) {
  Result refusal;
  refusal.epoch = message.epoch();
  refusal.seq = message.seq();
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++outstanding_;  // also a refused one: its Result goes the same way
    if (shutdown_) refusal.status = Error(StatusCode::kUnavailable, "DRAINING", "no command follows a Shutdown");
  }
  if (message.epoch() != epoch_) {
    const std::string got = std::to_string(message.epoch());
    const std::string allowed = std::to_string(epoch_);
    refusal.status = Error(StatusCode::kFailedPrecondition, "STALE_EPOCH", "epoch: got " + got + ", allowed " + allowed,
                           {{"got", got}, {"allowed", allowed}});
  }
  if (!refusal.status.ok()) return Send(std::move(refusal));

  StatusOr<Command> command = ReadCommand(message, identity_.vocab);
  if (!command.ok()) {
    LogWarning("command " + std::to_string(message.seq()) + " refused: " + std::string(command.status().message()));
    const std::lock_guard<std::mutex> lock(mutex_);
    refused_[message.seq()] = command.status();
    command = Placeholder(message);
  }
  callbacks_.submit(std::move(command).value());
}

void Link::Impl::HandleShutdown(const pb::Shutdown& message) {
  if (!message.planned()) return Lose(GivenUp(message));
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (shutdown_ || told_) return;
    shutdown_ = true;
    wake_.notify_all();
    shutdown_reason_ = message.reason();
    if (outstanding_ > 0) return;  // Send goes on
    told_ = true;
  }
  callbacks_.shutdown(message.reason());
}

void Link::Impl::Close(double flush_seconds) {
  const Clock::time_point deadline = Clock::now() + Seconds(flush_seconds);
  {
    std::unique_lock<std::mutex> lock(mutex_);
    closing_ = true;
    wake_.notify_all();
    if (!joined_) return;
    // Half-closed, the coordinator ends the stream when it has read everything.
    wake_.wait_until(lock, deadline, [&] { return writer_done_ && reader_done_; });
    if (!reader_done_) context_->TryCancel();
  }
  if (reader_.joinable()) reader_.join();
  if (heart_.joinable()) heart_.join();
}

void Link::Impl::Interrupt() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (joined_ && !connecting_) return;
  interrupted_ = true;
  if (context_ != nullptr) context_->TryCancel();
  wake_.notify_all();
}

Link::Link(const LinkOptions& options, const RankIdentity& identity, LinkCallbacks callbacks)
    : impl_(std::make_unique<Impl>(options, identity, std::move(callbacks))) {}
Link::~Link() = default;
Status Link::Join() { return impl_->Join(); }
void Link::Send(Result result) { impl_->Send(std::move(result)); }
void Link::Close(double flush_seconds) { impl_->Close(flush_seconds); }
void Link::Interrupt() { impl_->Interrupt(); }

}  // namespace refocus
