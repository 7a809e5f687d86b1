// Items of evaluation tasks: what is asked, among which answers, which one is right. A .jsonl file
// (also .xz, .zst, .gz behind it) has one item a line, with `task` and one of
//
//   query, choices, gold [, sep]   each choice scored behind query + sep (default one space)
//   context_options, continuation, gold [, sep]   the same text scored behind each context
//   context or query, target [, sep]              one text to be predicted, nothing to choose from
//
// Other keys are left alone. ModelError names file, line and key of anything else.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/file.h"  // fs

namespace winnow {

// A log-likelihood to be found: that of `continuation` after `context`.
struct TaskRequest {
  std::string context;  // may be empty
  std::string continuation;
};

struct TaskItem {
  std::string where;  // "FILE: line N"
  std::string task;
  std::vector<TaskRequest> requests;  // of each choice; a single one without choices
  // Lengths of the scored text without what joins it to the context, of each request.
  std::vector<int64_t> characters, bytes;
  int32_t gold = -1;  // which choice is right; -1: a target, nothing to choose from

  bool is_choice() const { return gold >= 0; }
};

// The first `limit` items of a file (0: all). UsageError if it has none.
std::vector<TaskItem> ReadTaskItems(const fs::path& path, int64_t limit);

}  // namespace winnow
