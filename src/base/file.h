// Files by explicit positional reads and atomic writes. Nothing here maps memory: a mapping's pages
// would count as resident and break --max-memory. All functions throw RuntimeError naming the path
// and the system's reason.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

namespace winnow {

namespace fs = std::filesystem;

// An open file descriptor; move-only. Reads are thread-safe (pread).
class File {
 public:
  static File OpenRead(const fs::path& path);
  // Creates or truncates.
  static File Create(const fs::path& path);
  // Opens an existing file for reading and writing, to continue it.
  static File OpenWrite(const fs::path& path);
  File(File&& other) noexcept;
  File& operator=(File&& other) noexcept;
  ~File();

  uint64_t size() const;
  const fs::path& path() const { return path_; }
  int descriptor() const { return descriptor_; }
  // Fills the whole span or throws.
  void ReadAt(uint64_t offset, std::span<std::byte> out) const;
  void WriteAt(uint64_t offset, std::span<const std::byte> data) const;
  // Copies inside the kernel where the file system can (copy_file_range), else through a buffer.
  void CopyFrom(const File& source, uint64_t source_offset, uint64_t offset, uint64_t bytes) const;
  void Truncate(uint64_t bytes) const;
  void Sync() const;

 private:
  File(int descriptor, fs::path path) : descriptor_(descriptor), path_(std::move(path)) {}
  int descriptor_ = -1;
  fs::path path_;
};

// Reads a whole small file; ModelError if it is larger than `limit_bytes`.
std::string ReadTextFile(const fs::path& path, uint64_t limit_bytes = uint64_t{256} << 20);
// Writes beside the target, syncs, renames over it.
void WriteFileAtomically(const fs::path& path, std::string_view content);
// rename(2) plus a sync of the parent folder.
void RenameDurably(const fs::path& from, const fs::path& to);
// Bytes free for this user on the file system that holds `path` (or its nearest existing parent).
uint64_t FreeDiskBytes(const fs::path& path);
// ResourceError if `needed_bytes` plus a small reserve do not fit where `path` will be.
void RequireDiskSpace(const fs::path& path, uint64_t needed_bytes, std::string_view what);

}  // namespace winnow
