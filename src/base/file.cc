#include "base/file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/units.h"

namespace winnow {
namespace {

[[noreturn]] void ThrowErrno(std::string_view action, const fs::path& path, int code) {
  const std::string hint = code == ENOSPC   ? "free some disk space and run again with --resume"
                           : code == EACCES ? "check the permissions of the path"
                           : code == ENOENT ? "check the path"
                                            : "";
  const std::string message =
      fmt::format("cannot {} {}: {}", action, path.string(), std::strerror(code));
  if (code == ENOSPC || code == EDQUOT) throw ResourceError(message, hint);
  throw RuntimeError(message, hint);
}

int OpenOrThrow(const fs::path& path, int flags, std::string_view action) {
  int descriptor = -1;
  do {
    descriptor = open(path.c_str(), flags | O_CLOEXEC, 0644);
  } while (descriptor < 0 && errno == EINTR);
  if (descriptor < 0) ThrowErrno(action, path, errno);
  return descriptor;
}

void SyncFolder(const fs::path& folder) {
  const int descriptor =
      open(folder.empty() ? "." : folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (descriptor < 0) return;  // the rename itself has happened; some file systems refuse this open
  fsync(descriptor);
  close(descriptor);
}

}  // namespace

File File::OpenRead(const fs::path& path) {
  const int descriptor = OpenOrThrow(path, O_RDONLY, "open");
  File file(descriptor, path);
  struct stat info {};
  if (fstat(descriptor, &info) != 0) ThrowErrno("inspect", path, errno);
  if (!S_ISREG(info.st_mode)) {
    throw RuntimeError(fmt::format("cannot read {}: it is not a regular file", path.string()));
  }
  return file;
}

File File::Create(const fs::path& path) {
  return File(OpenOrThrow(path, O_RDWR | O_CREAT | O_TRUNC, "create"), path);
}

File File::OpenWrite(const fs::path& path) {
  return File(OpenOrThrow(path, O_RDWR, "open for writing"), path);
}

File::File(File&& other) noexcept
    : descriptor_(std::exchange(other.descriptor_, -1)), path_(std::move(other.path_)) {}

File& File::operator=(File&& other) noexcept {
  std::swap(descriptor_, other.descriptor_);
  std::swap(path_, other.path_);
  return *this;
}

File::~File() {
  if (descriptor_ >= 0) close(descriptor_);
}

uint64_t File::size() const {
  struct stat info {};
  if (fstat(descriptor_, &info) != 0) ThrowErrno("inspect", path_, errno);
  return static_cast<uint64_t>(info.st_size);
}

void File::ReadAt(uint64_t offset, std::span<std::byte> out) const {
  while (!out.empty()) {
    const size_t want = std::min<size_t>(out.size(), size_t{1} << 30);
    const ssize_t got = pread(descriptor_, out.data(), want, static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) ThrowErrno("read", path_, errno);
    if (got == 0) {
      throw RuntimeError(fmt::format("{}: ended at byte {} while {} more were expected",
                                     path_.string(), offset, out.size()),
                         "the file was cut off or changed while it was being read");
    }
    offset += static_cast<uint64_t>(got);
    out = out.subspan(static_cast<size_t>(got));
  }
}

void File::WriteAt(uint64_t offset, std::span<const std::byte> data) const {
  while (!data.empty()) {
    const size_t want = std::min<size_t>(data.size(), size_t{1} << 30);
    const ssize_t put = pwrite(descriptor_, data.data(), want, static_cast<off_t>(offset));
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) ThrowErrno("write", path_, errno);
    offset += static_cast<uint64_t>(put);
    data = data.subspan(static_cast<size_t>(put));
  }
}

void File::CopyFrom(const File& source, uint64_t source_offset, uint64_t offset,
                    uint64_t bytes) const {
  off_t from = static_cast<off_t>(source_offset);
  off_t to = static_cast<off_t>(offset);
  while (bytes > 0) {
    const size_t want = static_cast<size_t>(std::min<uint64_t>(bytes, uint64_t{1} << 30));
    const ssize_t done = copy_file_range(source.descriptor_, &from, descriptor_, &to, want, 0);
    if (done < 0 && errno == EINTR) continue;
    if (done <= 0) break;
    bytes -= static_cast<uint64_t>(done);
  }
  // Across file systems, on old kernels and on special files the call above may do nothing.
  std::vector<std::byte> buffer(static_cast<size_t>(std::min<uint64_t>(bytes, uint64_t{8} << 20)));
  while (bytes > 0) {
    const std::span<std::byte> part =
        std::span(buffer).first(static_cast<size_t>(std::min<uint64_t>(bytes, buffer.size())));
    source.ReadAt(static_cast<uint64_t>(from), part);
    WriteAt(static_cast<uint64_t>(to), part);
    from += static_cast<off_t>(part.size());
    to += static_cast<off_t>(part.size());
    bytes -= part.size();
  }
}

void File::Truncate(uint64_t bytes) const {
  if (ftruncate(descriptor_, static_cast<off_t>(bytes)) != 0) ThrowErrno("resize", path_, errno);
}

void File::Sync() const {
  if (fsync(descriptor_) != 0) ThrowErrno("flush", path_, errno);
}

std::string ReadTextFile(const fs::path& path, uint64_t limit_bytes) {
  const File file = File::OpenRead(path);
  const uint64_t bytes = file.size();
  if (bytes > limit_bytes) {
    throw ModelError(fmt::format("{}: {} is more than the {} this kind of file may have",
                                 path.string(), FormatBytes(bytes), FormatBytes(limit_bytes)));
  }
  std::string text(static_cast<size_t>(bytes), '\0');
  file.ReadAt(0, std::as_writable_bytes(std::span(text)));
  return text;
}

void WriteFileAtomically(const fs::path& path, std::string_view content) {
  const fs::path temporary = path.string() + ".tmp";
  {
    const File file = File::Create(temporary);
    file.WriteAt(0, std::as_bytes(std::span(content)));
    file.Sync();
  }
  RenameDurably(temporary, path);
}

void RenameDurably(const fs::path& from, const fs::path& to) {
  if (std::rename(from.c_str(), to.c_str()) != 0) ThrowErrno("rename to", to, errno);
  SyncFolder(to.parent_path());
}

uint64_t FreeDiskBytes(const fs::path& path) {
  fs::path existing = fs::absolute(path);
  while (!fs::exists(existing) && existing.has_parent_path() &&
         existing != existing.parent_path()) {
    existing = existing.parent_path();
  }
  struct statvfs info {};
  if (statvfs(existing.c_str(), &info) != 0) ThrowErrno("inspect the disk of", existing, errno);
  return static_cast<uint64_t>(info.f_bavail) * info.f_frsize;
}

void RequireDiskSpace(const fs::path& path, uint64_t needed_bytes, std::string_view what) {
  const uint64_t free_bytes = FreeDiskBytes(path);
  const uint64_t reserve = uint64_t{16} << 20;
  if (needed_bytes + reserve > free_bytes) {
    throw ResourceError(
        fmt::format("{} needs {} on the disk of {}, {} are free", what,
                    FormatBytes(needed_bytes + reserve), path.string(), FormatBytes(free_bytes)),
        "free some space or choose another folder with -o");
  }
}

}  // namespace winnow
