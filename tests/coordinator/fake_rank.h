// Ranks without a model, for tests of the coordinator: they obey commands as strictly as real ones and keep the same
// books (contexts, adapters, sequences), but "compute" by simple rules that a test can predict.
//
//   next token = last token + 1 + revision of the adapter (base: 0), modulo 256; after 255 comes the end token 256;
//                or, `keyed`, a hash of all that it may depend on: see KeyedToken
//   loss of a step = 1 / step; probe loss = 2 before, and 2 - 0.01 * steps after
//   log-probability of token t after token l = -(t mod 7) - 0.5; most likely iff t is the next token as above
//   attention mass: FakeMass
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "base/model_config.h"
#include "coordinator/core/messages.h"
#include "coordinator/tokenizer.h"

namespace refocus {

inline constexpr int32_t kFakeEos = 256;
inline constexpr int32_t kFakeBos = 257;
inline constexpr int32_t kFakeSpecial = 258;  // "<|im_start|>", "<|im_end|>", "<think>", "</think>" from here on
inline constexpr int64_t kFakeVocab = 300;
inline constexpr int64_t kFakeKvBytesPerToken = 64;

// Of a row on a range of keys; exact in fp32.
float FakeMass(int32_t layer, int64_t position, int64_t begin, int64_t end, int32_t head, int64_t revision);

ModelConfig FakeModel(int64_t max_positions);
// What an adapter's numbers are after so many steps: finite floats.
std::string FakeNumbers(size_t bytes, int64_t steps);
// One token a byte; the special ones with allow_special. Byte 0xff is refused, 0xfe throws bad_alloc, 0xfd runtime_error.
// Puts a begin token first when `adds_bos`.
std::unique_ptr<Tokenizer> FakeTokenizer(bool adds_bos = false);

// What all ranks of one launch agree on; rank 0 decides. Not thread-safe.
struct FakeAgreement {
  struct Outcome {
    bool cancelled = false;
    std::map<uint64_t, int64_t> left_at;  // step of a decode command at which a sequence's job was cancelled
  };
  std::map<int64_t, Outcome> by_seq;
};

class FakeRank {
 public:
  FakeRank(int32_t rank, int32_t size, std::shared_ptr<FakeAgreement> agreement)
      : rank_(rank), size_(size), agreement_(std::move(agreement)) {}

  wire::Hello Hello(const std::string& nonce, const std::string& fingerprint) const;

  // Rank 0 may execute any command; others only those that rank 0 has executed.
  bool CanExecute(int64_t seq) const { return rank_ == 0 || agreement_->by_seq.count(seq) != 0; }
  // Partial results (rank 0) and the final one; with `emit`, partial ones go there as they come.
  std::vector<wire::Result> Execute(const wire::Command& command);
  // May be called while Execute runs on another thread.
  void Cancel(uint64_t job) {
    const std::lock_guard<std::mutex> lock(mutex_);
    cancelled_.insert(job);
  }
  std::function<void(const wire::Result&)> emit;

  // Books. Memory lives as long as one that holds it: contexts that share a prefix, forks and what they come from.
  struct Extent {
    Extent(int64_t first, int64_t count, std::shared_ptr<int64_t> held)
        : first_pos(first), tokens(count), total(std::move(held)) {
      *total += tokens;
    }
    ~Extent() { *total -= tokens; }
    Extent(const Extent&) = delete;
    Extent& operator=(const Extent&) = delete;
    const int64_t first_pos;
    const int64_t tokens;
    const std::shared_ptr<int64_t> total;
  };
  using Extents = std::vector<std::shared_ptr<Extent>>;
  int64_t held_tokens() const { return *held_; }  // of all extents: contexts and sequences

  struct Context {
    int64_t capacity = 0;
    std::vector<uint32_t> tokens;
    Extents extents;
  };
  struct Adapter {
    uint64_t context = 0;
    int64_t revision = 0;
    int64_t steps = 0;
    int64_t lora_rank = 0;
    std::string numbers;  // committed
    std::optional<int64_t> work;  // steps under adaptation
    int64_t begun = 0;            // steps that it began with
    double rate = 0;              // of the last step
    int64_t work_rank = 0;
    std::optional<int64_t> kept;  // steps behind what a probe kept
    double kept_loss = 0;
    std::optional<std::string> incoming;  // numbers of an import
  };
  struct Sequence {
    uint64_t context = 0;
    uint64_t adapter = 0;
    uint64_t seed = 0;
    std::vector<uint32_t> rows;  // behind the context, those shared with a parent included
    int64_t first = 0;           // position of its own tail
    Extents extents;
    int64_t revision = 0;
    int64_t capacity = 0;
    int64_t end = 0;  // position of the next token
    uint32_t last = 0;
    std::set<uint32_t> stops;
    bool pending = false;  // `last` was sampled: it has no row yet
    bool left = false;
    int32_t top = 0;
    uint64_t job = 0;
  };
  std::map<uint64_t, Context> contexts;
  std::map<uint64_t, Adapter> adapters;
  std::map<uint64_t, Sequence> sequences;
  std::vector<int64_t> executed;  // seqs

  // What `keyed` ranks draw after `rows`: mostly a byte, now and then the end token.
  static uint32_t KeyedToken(const std::vector<uint32_t>& context, int64_t revision, uint64_t seed,
                             const std::vector<uint32_t>& rows);
  bool keyed = false;

  std::string device = "fake";  // a CPU, unless it begins with "cuda"

  // Faults and pace.
  int64_t kv_capacity_bytes = int64_t{1} << 30;
  int64_t refuse_seq = 0;                                           // this command fails and changes nothing
  std::function<void(const wire::Command&, wire::Result&)> tamper;  // of final results
  std::function<double(int64_t steps, double rate)> probe_loss;  // else falls slowly
  std::function<double(int64_t start)> span_loss;                // of a probe with one span; else as any probe
  std::vector<wire::Span> trained;                               // of all steps
  std::function<bool(uint64_t sequence, int64_t position)>
      not_finite;                                                  // logits of a decode step; the same on all ranks
  std::function<void(const wire::Command&, int64_t token)> pause;  // before a command (token -1) and each decoded token
  double command_seconds = 1e-3;                                   // as reported

 private:
  void Do(const wire::Command& command, std::vector<wire::Result>* out);
  void DoSequence(const wire::Command& command, std::vector<wire::Result>* out);
  void DoDelta(const wire::Command& command, wire::Result* result);
  void DoAdapt(const wire::Command& command, wire::Result* result);
  void Extend(const wire::ExtendSequence& extend, wire::Result* result);
  void Probe(const wire::ProbeAttention& probe, std::vector<wire::Result>* out);
  void Decode(const wire::Command& command, std::vector<wire::Result>* out);
  wire::Token NextToken(Sequence& sequence);
  void OpenContext(const wire::OpenContext& open, wire::Result* result);
  void OpenSequence(const wire::OpenSequence& open, wire::Result* result);
  void TakeToken(uint64_t sequence, wire::Result* result);
  void End(uint64_t sequence, wire::SequenceEnd::Why why, wire::Result* result);
  bool IsCancelled(uint64_t job) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return job != 0 && cancelled_.count(job) != 0;
  }

  const std::shared_ptr<int64_t> held_ = std::make_shared<int64_t>(0);
  const int32_t rank_;
  const int32_t size_;
  const std::shared_ptr<FakeAgreement> agreement_;
  mutable std::mutex mutex_;
  std::set<uint64_t> cancelled_;
};

}  // namespace refocus
