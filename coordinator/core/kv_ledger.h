// Who has reserved how many bytes on which rank, of K/V and adapters. Admission asks here before any command is sent.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/status.h"

namespace refocus {

// Bytes of one reservation; gives them back when destroyed. Harmless after the group it was made for is gone.
class KvReservation;

class KvLedger {
 public:
  // A new group: nothing is reserved. capacity_bytes has one entry a rank.
  void Reset(std::vector<int64_t> capacity_bytes, int64_t bytes_per_token);
  // No group: everything is refused by the caller, not here.
  void Clear() { Reset({}, 0); }

  // Bytes for the tokens [first_pos, first_pos + tokens), each on the rank that owns its position.
  // RESOURCE_EXHAUSTED KV_CAPACITY with need_bytes and free_bytes when some rank cannot hold its part.
  Status Check(int64_t first_pos, int64_t tokens) const;
  StatusOr<std::shared_ptr<KvReservation>> Reserve(int64_t first_pos, int64_t tokens);

  // The same bytes on every rank, for an adaptation. RESOURCE_EXHAUSTED ADAPT_OUT_OF_MEMORY, metadata as above.
  Status CheckEach(int64_t bytes) const;
  std::shared_ptr<KvReservation> TakeEach(int64_t bytes);  // after CheckEach

  int64_t capacity_bytes() const;  // all ranks
  int64_t used_bytes() const;
  int64_t least_free_bytes() const;  // on the rank that has least
  int64_t bytes_per_token() const;

 private:
  friend class KvReservation;
  struct Book {
    std::vector<int64_t> capacity;
    std::vector<int64_t> used;
    int64_t bytes_per_token = 0;
  };
  Status Fits(const std::vector<int64_t>& need, const char* reason, const std::string& what) const;
  std::vector<int64_t> Need(int64_t first_pos, int64_t tokens) const;

  std::shared_ptr<Book> book_ = std::make_shared<Book>();
};

class KvReservation {
 public:
  KvReservation(std::shared_ptr<KvLedger::Book> book, std::vector<int64_t> bytes);
  ~KvReservation();
  KvReservation(const KvReservation&) = delete;
  KvReservation& operator=(const KvReservation&) = delete;
  int64_t bytes() const;  // all ranks

 private:
  std::shared_ptr<KvLedger::Book> book_;
  std::vector<int64_t> bytes_;
};

}  // namespace refocus
