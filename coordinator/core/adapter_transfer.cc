#include "coordinator/core/adapter_transfer.h"

#include <algorithm>
#include <utility>

#include "base/limits.h"

namespace refocus {

ExportJob::ExportJob(uint64_t id, double now, std::shared_ptr<Session> session, uint64_t uid,
                     api::AdapterFileHeader header)
    : Job(id, now), session_(std::move(session)), uid_(uid), header_(std::move(header)) {}

std::string ExportJob::Take() {
  if (pieces_.empty()) return {};
  std::string piece = std::move(pieces_.front());
  pieces_.pop_front();
  return piece;
}

bool ExportJob::NextCommand(wire::Command* command, double) {
  const int64_t numbers = header_.data_bytes() / 4;
  if (asked_ == numbers || pieces_.size() + static_cast<size_t>(in_flight()) >= kMaxQueuedPieces) return false;
  wire::ReadDelta* read = command->mutable_read_delta();
  read->set_adapter(uid_);
  read->set_revision(header_.adapter().revision());
  read->set_offset(asked_);
  read->set_count(std::min(kDeltaPieceNumbers, numbers - asked_));
  asked_ += read->count();
  command->set_job(id());
  return true;
}

void ExportJob::OnResult(const wire::Command& command, const wire::Result& result, double now) {
  if (result.code() != 0 || result.cancelled() || stopping()) return;
  const int64_t count = command.read_delta().count();
  if (static_cast<int64_t>(result.data().size()) != 4 * count) {
    Stop(Error(StatusCode::kInternal, "RANK_DIVERGENCE",
               "rank 0 sent " + std::to_string(result.data().size()) + " bytes of a delta, expected " +
                   std::to_string(4 * count)),
         now);
    return;
  }
  pieces_.push_back(result.data());
  received_ += count;
  Changed();
  if (4 * received_ == header_.data_bytes()) Stop(absl::OkStatus(), now);
}

void ExportJob::OnEnd(double now) {
  session_->EndAnswer();
  session_->Touch(now);
}

ImportJob::ImportJob(uint64_t id, double now, std::shared_ptr<Session> session, ImportPlan plan, JobTools* tools)
    : Job(id, now), session_(std::move(session)), plan_(std::move(plan)), tools_(tools) {}

bool ImportJob::NextCommand(wire::Command* command, double) {
  switch (phase_) {
    case Phase::kBegin: {
      wire::BeginImport* begin = command->mutable_begin_import();
      begin->set_context(session_->cache_uid());
      begin->set_adapter(plan_.target.uid);
      begin->set_lora_rank(plan_.file.adapter().lora_rank());
      begin->set_lora_alpha(static_cast<float>(plan_.file.adapter().lora_alpha()));
      phase_ = Phase::kWrite;
      return true;
    }
    case Phase::kWrite:
      if (!pieces_.empty()) {
        wire::WriteDelta* write = command->mutable_write_delta();
        write->set_adapter(plan_.target.uid);
        write->set_offset(written_);
        write->set_data(std::move(pieces_.front()));
        pieces_.pop_front();
        written_ += static_cast<int64_t>(write->data().size() / 4);
        Changed();  // room for another
      } else if (all_there_) {
        command->mutable_probe_loss()->set_adapter(plan_.target.uid);  // brings the delta's hash
        phase_ = Phase::kCommit;
      } else {
        return false;
      }
      command->set_job(id());
      return true;
    case Phase::kCommit: {
      if (delta_hash_.empty()) return false;
      wire::EndAdapt* end = command->mutable_end_adapt();
      end->set_adapter(plan_.target.uid);
      end->set_commit(true);
      end->set_revision(plan_.target.kept_revision + 1);
      session_->StartCommit(plan_.target.id);
      phase_ = Phase::kAllSent;
      return true;
    }
    case Phase::kAllSent: return false;
  }
  return false;
}

void ImportJob::OnResult(const wire::Command& command, const wire::Result& result, double now) {
  const bool ok = result.code() == 0 && !result.cancelled();
  if (command.has_begin_import()) begun_ = ok;
  if (command.has_end_adapt()) session_->EndCommit();
  if (!ok) return;
  if (command.has_probe_loss()) delta_hash_ = Hex(result.agree());
  if (!command.has_end_adapt()) return;
  begun_ = false;
  if (!command.end_adapt().commit()) return;
  api::Adapter adapter = plan_.file.adapter();
  FillTarget(plan_.target, tools_->unix_now(), &adapter);
  adapter.set_delta_hash(delta_hash_);
  adapter.set_memory_bytes(plan_.adapter_bytes);
  adapter.clear_base_adapter();
  adapter.set_imported(true);
  committed_ = std::move(adapter);
  Stop(absl::OkStatus(), now);
}

void ImportJob::NextCleanup(wire::Command* command) {
  command->mutable_end_adapt()->set_adapter(plan_.target.uid);
  begun_ = false;
}

void ImportJob::OnEnd(double now) {
  std::optional<api::AdaptEvent::Effective> training;
  if (plan_.file.has_training()) training = plan_.file.training();
  session_->FinishAdapt(plan_.target.uid, committed_, std::move(plan_.memory), std::move(training));
  session_->Touch(now);
}

}  // namespace refocus
