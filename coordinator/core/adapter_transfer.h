// Export: the committed numbers of an adapter, piece by piece, only as fast as the caller takes them. Import: the other
// way round into a delta under way, which is committed when the caller says that the file was whole, and dropped
// otherwise.
#pragma once

#include <deque>
#include <memory>
#include <optional>
#include <string>

#include "coordinator/core/adapt.h"
#include "coordinator/core/job.h"
#include "coordinator/core/prefill.h"
#include "coordinator/core/session.h"

namespace refocus {

// Of kDeltaPieceNumbers each, that wait for a caller or for the ranks.
inline constexpr size_t kMaxQueuedPieces = 4;

class ExportJob : public Job {
 public:
  // StartAnswer was called on `session`.
  ExportJob(uint64_t id, double now, std::shared_ptr<Session> session, uint64_t uid, api::AdapterFileHeader header);

  const api::AdapterFileHeader& header() const { return header_; }
  const char* kind() const override { return "export"; }
  std::string adapter_id() const override { return header_.adapter().id(); }
  // The next numbers, as bytes; empty: none now.
  std::string Take();

 protected:
  bool NextCommand(wire::Command* command, double now) override;
  void OnResult(const wire::Command& command, const wire::Result& result, double now) override;
  void OnEnd(double now) override;

 private:
  const std::shared_ptr<Session> session_;
  const uint64_t uid_;
  const api::AdapterFileHeader header_;
  int64_t asked_ = 0, received_ = 0;  // numbers
  std::deque<std::string> pieces_;
};

struct ImportPlan {
  AdapterTarget target;
  api::AdapterFileHeader file;  // checked
  int64_t adapter_bytes = 0;    // on each rank
  std::shared_ptr<KvReservation> memory;
};

class ImportJob : public Job {
 public:
  // `session` was just moved to ADAPTING.
  ImportJob(uint64_t id, double now, std::shared_ptr<Session> session, ImportPlan plan, JobTools* tools);

  bool answered() const override { return ended(); }
  const char* kind() const override { return "import"; }
  bool full() const { return pieces_.size() >= kMaxQueuedPieces; }
  void Push(std::string piece) { pieces_.push_back(std::move(piece)); }
  void AllThere() { all_there_ = true; }
  const std::optional<api::Adapter>& committed() const { return committed_; }

 protected:
  bool NextCommand(wire::Command* command, double now) override;
  bool HasCleanup() const override { return begun_; }
  void NextCleanup(wire::Command* command) override;
  void OnResult(const wire::Command& command, const wire::Result& result, double now) override;
  void OnEnd(double now) override;

 private:
  enum class Phase { kBegin, kWrite, kCommit, kAllSent };

  const std::shared_ptr<Session> session_;
  ImportPlan plan_;
  JobTools* const tools_;
  Phase phase_ = Phase::kBegin;
  bool begun_ = false;  // the ranks hold a delta under way
  bool all_there_ = false;
  int64_t written_ = 0;  // numbers
  std::deque<std::string> pieces_;
  std::string delta_hash_;
  std::optional<api::Adapter> committed_;
};

}  // namespace refocus
