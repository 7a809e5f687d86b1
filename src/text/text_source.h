// Calibration and evaluation text: where it comes from and how it becomes documents.
//
//   prose.txt, prose.txt.xz, .zst, .gz   a line `<|endoftext|>` ends a document and is not text
//   code.jsonl (same suffixes)           one JSON object a line; the text is in `field`, or in
//                                        `prompt` and `completion`, the latter's tokens alone
//                                        counting, or in `messages`, the assistant's tokens alone
//                                        counting (both for calibration and training only)
//   ids.safetensors                      `input_ids` I32/I64 [n, T], or [N] with `offsets` [n+1];
//                                        `mask` of the same shape: what each token counts for
//
// A source may carry a share of the blocks behind a colon: `prose.txt.xz:2` (default 1).
// Reads in a stream: a 10 GB file costs a buffer. Throws UsageError (unknown kind, bad share),
// RuntimeError (cannot read), ModelError (damaged: bad JSON line, no UTF-8, bad archive).
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/file.h"  // fs

namespace winnow {

struct TextSource {
  fs::path path;
  double share = 1.0;
  // The file's name without folder and suffixes ("prose"): names the source in reports.
  std::string name;
  bool is_token_ids = false;
};

// "a.txt.xz:2" -> path a.txt.xz, share 2. A path that exists with the colon in it wins.
TextSource ParseTextSource(const std::string& argument);

// Calls on_document for each document in order until it returns false. `field` names the JSON key.
// A document is the text between separators without the final newline before the separator.
void ReadDocuments(const TextSource& source, const std::string& field,
                   const std::function<bool(std::string document)>& on_document);

// The same for calibration and training, with what of it counts: a .jsonl line without `text`, if
// that is the field, may have `prompt` and `completion` instead; its document is both, one after
// the other. Or it has `messages`: its document is the whole line, for the model's chat template.
struct Document {
  std::string text;
  size_t prompt_bytes = 0;  // 0: all of it counts
  bool is_conversation = false;
  std::string where = {};  // of a conversation: file and line, for messages
};
void ReadPromptedDocuments(const TextSource& source, const std::string& field,
                           const std::function<bool(Document document)>& on_document);

// Tokens of a document and what each counts for; no weights: every token counts.
struct CountedIds {
  std::vector<int32_t> ids;
  std::vector<float> weights = {};
};
// `with_special`: with the tokens that begin a text.
using EncodeFunction =
    std::function<std::vector<int32_t>(std::string_view text, bool with_special)>;
// From a line with `messages`; messages of errors start with `where`.
using ConversationEncoder =
    std::function<CountedIds(std::string_view json, const std::string& where)>;
// A conversation, or an answer with its prompt: each part is encoded apart, so that a token belongs
// to one of them. UsageError for a conversation if `conversation` is empty.
CountedIds EncodeDocument(const Document& document, const EncodeFunction& encode,
                          const ConversationEncoder& conversation);

// Token sequences read from an id file. Rows of different length are possible ([N] + offsets).
struct TokenSequences {
  std::vector<int32_t> ids;         // all rows joined
  std::vector<int64_t> offsets;     // [n + 1]
  std::vector<float> weights = {};  // of each token, from `mask`; empty: every token counts alike
  int64_t size() const { return static_cast<int64_t>(offsets.size()) - 1; }
};
// ModelError if ids are negative or do not fit 32 bits, offsets do not rise from 0 to N, or a
// `mask` [as input_ids] (BOOL, U8, I32, I64 or F32: what each token counts for) is negative or not
// finite.
TokenSequences ReadTokenIds(const fs::path& path);

}  // namespace winnow
