// Lines of a text file, unpacked while they are read; shared by the readers of .txt and .jsonl.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/file.h"         // fs
#include "text/byte_reader.h"  // ByteReader

namespace winnow {

inline constexpr std::string_view kByteOrderMark = "\xef\xbb\xbf";

// Lines of a file, each with its newline; the last one may have none.
class LineReader {
 public:
  explicit LineReader(const fs::path& path);
  // Appends the next line to `line`; false at the end of the file. Stops in the middle of a line
  // when `line` has reached `limit` bytes.
  bool Append(std::string& line, size_t limit);
  // Bytes handed out so far, counted in the unpacked text.
  uint64_t offset() const { return offset_; }

 private:
  std::unique_ptr<ByteReader> reader_;
  std::vector<char> buffer_;
  size_t begin_ = 0;
  size_t end_ = 0;
  uint64_t offset_ = 0;
};

// ModelError with the first wrong byte of `text`, which begins at byte `offset` of the file.
void RequireUtf8(const fs::path& path, std::string_view text, uint64_t offset);
// ModelError: `what`, which begins at byte `offset`, has reached `limit` bytes.
[[noreturn]] void ThrowTooLong(const fs::path& path, std::string_view what, size_t limit,
                               uint64_t offset, std::string_view hint);

}  // namespace winnow
