// The process's two ports and everything behind them.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "coordinator/core/coordinator.h"

namespace refocus {

struct ServerOptions {
  CoordinatorOptions core;
  std::string listen = "127.0.0.1:7070";         // clients; port 0: any
  std::string worker_listen = "127.0.0.1:7071";  // ranks
  bool enable_reflection = false;
  double upload_stall_seconds = 120;
  double score_idle_seconds = 120;  // of a Score call: nothing read, nothing written
  double read_within_seconds = 30;  // an event that was sent, else SLOW_READER
  double delete_seconds = 60;       // for work to stop on a context that is deleted
  double handshake_seconds = 10;    // from accept to the caller's HTTP/2 settings, else the connection is closed
  // Which rows recall_rows may train on; tests hold it up.
  std::function<FoundRows(const RowSearch&, const std::function<bool()>& stop)> find_rows = FindRows;
};

class Server {
 public:
  // Listens on both ports, or CONFIG_INVALID naming the address. `tokenizer` may be null.
  static StatusOr<std::unique_ptr<Server>> Start(ServerOptions options, std::shared_ptr<const Tokenizer> tokenizer,
                                                 Environment environment);
  virtual ~Server() = default;

  virtual std::string public_address() const = 0;  // HOST:PORT with the chosen port
  virtual std::string worker_address() const = 0;

  // Health turns to NOT_SERVING and new RPCs are refused at once; running ones get `seconds`, or less when `hurry`
  // (asked many times a second) says so; then they fail, the ranks are told to leave, and both ports close. Once.
  virtual void Drain(double seconds, const std::function<bool()>& hurry) = 0;

  virtual class Hub& hub() = 0;
};

// Monotonic clock, wall clock, and the system's randomness.
Environment SystemEnvironment();

}  // namespace refocus
