#include "text/line_reader.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "base/error.h"
#include "base/units.h"
#include "tokenizer/utf8.h"

namespace winnow {
namespace {

constexpr size_t kBufferBytes = size_t{1} << 20;

}  // namespace

LineReader::LineReader(const fs::path& path)
    : reader_(OpenByteReader(path)), buffer_(kBufferBytes) {}

bool LineReader::Append(std::string& line, size_t limit) {
  bool appended = false;
  while (line.size() < limit) {
    if (begin_ == end_) {
      begin_ = 0;
      end_ = reader_->Read(buffer_);
      if (end_ == 0) return appended;
    }
    const char* start = buffer_.data() + begin_;
    const size_t available = std::min(end_ - begin_, limit - line.size());
    const void* newline = std::memchr(start, '\n', available);
    const size_t bytes = newline == nullptr
                             ? available
                             : static_cast<size_t>(static_cast<const char*>(newline) - start) + 1;
    line.append(start, bytes);
    begin_ += bytes;
    offset_ += bytes;
    appended = true;
    if (newline != nullptr) break;
  }
  return appended;
}

void RequireUtf8(const fs::path& path, std::string_view text, uint64_t offset) {
  const size_t valid = tok::ValidUtf8Prefix(text);
  if (valid == text.size()) return;
  throw ModelError(fmt::format("{}: not UTF-8: byte 0x{:02x} at byte {} of the text", path.string(),
                               static_cast<unsigned char>(text[valid]), offset + valid),
                   "convert the text to UTF-8, for example with iconv -f WINDOWS-1252 -t UTF-8");
}

void ThrowTooLong(const fs::path& path, std::string_view what, size_t limit, uint64_t offset,
                  std::string_view hint) {
  throw ModelError(fmt::format("{}: {} that begins at byte {} of the text is larger than {}",
                               path.string(), what, offset, FormatBytes(limit)),
                   std::string(hint));
}

}  // namespace winnow
