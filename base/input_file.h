// A regular file opened for reading by position. Never waits: a FIFO, a socket, a device or a folder is refused, not
// read.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "base/status.h"

namespace refocus {

class InputFile {
 public:
  // Any failure carries `reason` (CONFIG_INVALID, WEIGHTS_INVALID) and names the path.
  static StatusOr<InputFile> Open(const std::string& path, std::string_view reason);

  InputFile(InputFile&& other) noexcept;
  InputFile& operator=(InputFile&& other) noexcept;
  ~InputFile();

  int64_t size() const { return size_; }  // when it was opened
  const std::string& path() const { return path_; }

  // Fills out [bytes] from `offset`, or fails; a file that became shorter is an error too. Thread-safe.
  Status ReadAt(int64_t offset, void* out, int64_t bytes) const;

 private:
  InputFile() = default;

  std::string path_;
  std::string reason_;
  int fd_ = -1;
  int64_t size_ = 0;
};

// The whole file, at most max_bytes long.
StatusOr<std::string> ReadSmallFile(const std::string& path, std::string_view reason, int64_t max_bytes);

// Text from a file for a message: printable ASCII kept, the rest as \xNN, long text cut; in single quotes.
std::string Quoted(std::string_view text);

}  // namespace refocus
