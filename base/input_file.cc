#include "base/input_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <utility>

namespace refocus {
namespace {

constexpr size_t kQuotedBytes = 120;

const char* KindOf(mode_t mode) {
  if (S_ISDIR(mode)) return "a folder";
  if (S_ISFIFO(mode)) return "a FIFO";
  if (S_ISSOCK(mode)) return "a socket";
  return "a device";
}

Status FileError(std::string_view reason, const std::string& path, const std::string& what) {
  return Error(StatusCode::kInvalidArgument, reason, path + ": " + what, {{"file", path}});
}

}  // namespace

StatusOr<InputFile> InputFile::Open(const std::string& path, std::string_view reason) {
  if (path.empty() || path.find('\0') != std::string::npos) {
    return FileError(reason, Quoted(path), "got an empty path or one with a NUL, allowed the path of a file");
  }
  InputFile file;
  file.path_ = path;
  file.reason_ = reason;
  // O_NONBLOCK: opening a FIFO without a writer would wait for ever.
  file.fd_ = open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC | O_NOCTTY);
  if (file.fd_ < 0) return FileError(reason, path, std::string("cannot be opened: ") + std::strerror(errno));
  struct stat info {};
  if (fstat(file.fd_, &info) != 0) return FileError(reason, path, std::string("fstat: ") + std::strerror(errno));
  if (!S_ISREG(info.st_mode)) {
    return FileError(reason, path, std::string("got ") + KindOf(info.st_mode) + ", allowed a regular file");
  }
  file.size_ = info.st_size;
  return file;
}

InputFile::InputFile(InputFile&& other) noexcept { *this = std::move(other); }

InputFile& InputFile::operator=(InputFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(reason_, other.reason_);
  std::swap(fd_, other.fd_);
  std::swap(size_, other.size_);
  return *this;
}

InputFile::~InputFile() {
  if (fd_ >= 0) close(fd_);
}

Status InputFile::ReadAt(int64_t offset, void* out, int64_t bytes) const {
  // One pread moves at most about 2 GiB on Linux; a signal may cut it short too.
  for (int64_t done = 0; done < bytes;) {
    const ssize_t got = pread(fd_, static_cast<char*>(out) + done, static_cast<size_t>(bytes - done), offset + done);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) {
      return FileError(reason_, path_,
                       "read of " + std::to_string(bytes) + " bytes at offset " + std::to_string(offset) +
                           " failed: " + std::strerror(errno));
    }
    if (got == 0) {
      return FileError(reason_, path_,
                       "file ends at byte " + std::to_string(offset + done) + ", needed " + std::to_string(bytes) +
                           " bytes at offset " + std::to_string(offset) + "; fetch it again");
    }
    done += got;
  }
  return absl::OkStatus();
}

StatusOr<std::string> ReadSmallFile(const std::string& path, std::string_view reason, int64_t max_bytes) {
  REFOCUS_ASSIGN_OR_RETURN(const InputFile file, InputFile::Open(path, reason));
  if (file.size() > max_bytes) {
    return FileError(reason, path,
                     "got " + std::to_string(file.size()) + " bytes, allowed at most " + std::to_string(max_bytes));
  }
  std::string text(static_cast<size_t>(file.size()), '\0');
  REFOCUS_RETURN_IF_ERROR(file.ReadAt(0, text.data(), file.size()));
  return text;
}

std::string Quoted(std::string_view text) {
  std::string out = "'";
  for (const unsigned char c : text.substr(0, std::min(text.size(), kQuotedBytes))) {
    if (c >= 0x20 && c < 0x7f) {
      out.push_back(static_cast<char>(c));
    } else {
      char code[8];
      std::snprintf(code, sizeof(code), "\\x%02x", c);
      out += code;
    }
  }
  if (text.size() > kQuotedBytes) out += "... (" + std::to_string(text.size()) + " bytes)";
  out.push_back('\'');
  return out;
}

}  // namespace refocus
