// Files of one JSON object a line (.jsonl, also .xz, .zst, .gz behind it), read in a stream: what
// documents and evaluation items come from.
#pragma once

#include <functional>
#include <string>
#include <string_view>

#include "base/file.h"  // fs
#include "base/json.h"  // Json

namespace winnow {

// Calls on_object for each line in order until it returns false; `where` is "FILE: line N", for
// messages; `text` the line as it is. Empty lines are skipped, a byte order mark is no part of the
// first line. ModelError for a line that is no object, no JSON, no UTF-8 or larger than 64 MiB;
// RuntimeError if the file cannot be read.
void ReadJsonObjects(const fs::path& path,
                     const std::function<bool(const std::string& where, Json object,
                                              std::string_view text)>& on_object);

}  // namespace winnow
