#include "text/json_lines.h"

#include <fmt/format.h>

#include "base/error.h"
#include "text/line_reader.h"

namespace winnow {
namespace {

constexpr size_t kMaxJsonLineBytes = size_t{64} << 20;

}  // namespace

void ReadJsonObjects(const fs::path& path,
                     const std::function<bool(const std::string& where, Json object,
                                              std::string_view text)>& on_object) {
  LineReader lines(path);
  std::string line;
  for (uint64_t number = 1;; ++number) {
    const uint64_t offset = lines.offset();
    line.clear();
    if (!lines.Append(line, kMaxJsonLineBytes)) return;
    if (line.size() >= kMaxJsonLineBytes) {
      ThrowTooLong(path, "a line", kMaxJsonLineBytes, offset,
                   "a .jsonl file has one object a line");
    }
    RequireUtf8(path, line, offset);
    std::string_view text = line;
    if (number == 1 && text.starts_with(kByteOrderMark)) text.remove_prefix(kByteOrderMark.size());
    if (text.find_first_not_of(" \t\r\n") == std::string_view::npos) continue;
    const std::string where = fmt::format("{}: line {}", path.string(), number);
    Json object = ParseJson(text, where);
    if (!object.is_object()) {
      throw ModelError(fmt::format("{}: expected an object, got {}", where, object.type_name()),
                       "a .jsonl file has one object a line");
    }
    if (!on_object(where, std::move(object), text)) return;
  }
}

}  // namespace winnow
