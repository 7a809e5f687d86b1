// The bytes of a text file, unpacked while they are read: .xz, .zst, .gz (also several archives one
// after the other, as the tools write when appending), anything else as it is. Memory is bounded
// whatever the archive asks for. Throws ModelError for damaged or cut archives.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string_view>

#include "base/file.h"  // fs

namespace winnow {

class ByteReader {
 public:
  virtual ~ByteReader() = default;
  // Fills at least one byte of `out` (not empty) and returns how many, 0 at the end.
  virtual size_t Read(std::span<char> out) = 0;
};

// ".xz", ".zst", ".gz", or empty.
std::string_view CompressionSuffix(std::string_view file_name);

// Chooses by the file's suffix.
std::unique_ptr<ByteReader> OpenByteReader(const fs::path& path);

}  // namespace winnow
