// The rank's end of the stream to the coordinator (proto/refocus/internal/v1/group.proto): the only part of the worker
// that speaks gRPC. Received commands are checked and handed on as plain structs; results are queued and never block
// the caller.
//
// A command that breaks a rule gets a final Result with INVALID_ARGUMENT, one of another epoch FAILED_PRECONDITION
// STALE_EPOCH; the rank lives on. Every rank refuses alike, since the rules depend on the command alone.
//
// Threads of its own: reader, writer, heartbeat. Callbacks come from the reader unless said otherwise, and must return
// soon.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "base/status.h"
#include "worker/command.h"

namespace refocus {

// What this rank tells the coordinator first.
struct RankIdentity {
  std::string nonce;
  int32_t rank = 0;  // negative: the coordinator shall say, see LinkCallbacks::form
  int32_t size = 1;
  std::string model_fingerprint;
  std::string weights_hash;  // 16 hex digits
  std::string device = "cpu";
  int64_t vocab = 0;  // ids of commands are below it; not sent
  int64_t kv_capacity_bytes = 0;
  int64_t kv_bytes_per_token = 0;
  std::string kv_dtype = "fp32";  // "fp32", "bf16", "int8"
  int64_t weight_bytes = 0;
  int64_t parameters = 0;
};

struct LinkOptions {
  std::string coordinator;  // host:port
  double connect_seconds = 60.0;
  double heartbeat_seconds = 1.0;
};

// Rank 0's bytes, on all ranks; the others' argument is ignored. Waits without limit, as Join does: UNAVAILABLE when the
// group is lost meanwhile, CANCELLED when interrupted. Once.
using ShareBytes = std::function<StatusOr<std::string>(const std::string& own)>;

struct LinkCallbacks {
  // For a rank that came without one: it is `rank` and is to connect with the others, for which `share` helps. On the
  // thread of Join, with heartbeats running; no command comes before it returned. Its failure is that of Join.
  std::function<Status(int32_t rank, const ShareBytes& share)> form;
  std::function<void(Command)> submit;
  std::function<void(uint64_t job)> cancel;
  // The coordinator ends this launch as planned: no command follows, and every one that was submitted has its final
  // result, so that all ranks end at the same place. May come from inside the Send that brings the last result. Once.
  std::function<void(const std::string& reason)> shutdown;
  // The coordinator gave the group up (WORKER_LOST), or the stream is gone without a Shutdown (COORDINATOR_LOST). At
  // once, whatever was submitted. Once at most, never together with `shutdown`.
  std::function<void(const Status& cause)> lost;
  // From the heartbeat thread.
  std::function<int64_t()> progress;
  std::function<int64_t()> running_seq;
};

class Link {
 public:
  Link(const LinkOptions& options, const RankIdentity& identity, LinkCallbacks callbacks);
  ~Link();  // as Close(0)

  // Dials with back-off, says Hello and waits until the group is complete, without limit once the coordinator has taken
  // the Hello. UNAVAILABLE when it was not reached in time, went away or gave the group up; FAILED_PRECONDITION or
  // INVALID_ARGUMENT when it refused this rank. Callbacks may come before it returns. Once.
  Status Join();

  // Any thread; in order; never blocks. Ignored once the stream is gone.
  void Send(Result result);

  // Sends what is queued, for `flush_seconds` at most, and ends the stream. `lost` is not called for it. Not from a
  // callback.
  void Close(double flush_seconds);

  // Any thread: makes a running or later Join return CANCELLED.
  void Interrupt();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace refocus
