#include "text/text_source.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <charconv>
#include <cmath>
#include <vector>

#include "base/error.h"
#include "base/json.h"
#include "text/byte_reader.h"
#include "text/json_lines.h"
#include "text/line_reader.h"

namespace winnow {
namespace {

constexpr std::string_view kSeparator = "<|endoftext|>";
// A document is held whole; without separators a text is one document.
constexpr size_t kMaxDocumentBytes = size_t{256} << 20;

enum class TextKind { kText, kJsonLines, kTokenIds, kUnknown };

struct FileKind {
  TextKind kind = TextKind::kUnknown;
  std::string stem;  // without folder and suffixes
};

FileKind KindOf(const fs::path& path) {
  std::string name = path.filename().string();
  const std::string_view compression = CompressionSuffix(name);
  const bool is_packed = !compression.empty();
  name.resize(name.size() - compression.size());
  const auto is = [&](std::string_view suffix) {
    return name.ends_with(suffix) && name.size() > suffix.size();
  };
  FileKind result;
  size_t suffix_bytes = 0;
  if (is(".txt")) {
    result.kind = TextKind::kText;
    suffix_bytes = 4;
  } else if (is(".jsonl")) {
    result.kind = TextKind::kJsonLines;
    suffix_bytes = 6;
  } else if (is(".safetensors") && !is_packed) {
    result.kind = TextKind::kTokenIds;
    suffix_bytes = 12;
  }
  result.stem = name.substr(0, name.size() - suffix_bytes);
  return result;
}

void ReadText(const fs::path& path, const std::function<bool(Document)>& on_document) {
  LineReader lines(path);
  std::string document;
  uint64_t document_offset = 0;
  bool more = true;
  while (more) {
    const size_t line_start = document.size();
    more = lines.Append(document, kMaxDocumentBytes);
    if (document.size() >= kMaxDocumentBytes) {
      ThrowTooLong(path, "a document", kMaxDocumentBytes, document_offset,
                   "put a line <|endoftext|> between documents");
    }
    if (line_start == 0 && document_offset == 0 && document.starts_with(kByteOrderMark)) {
      document.erase(0, kByteOrderMark.size());
      document_offset = kByteOrderMark.size();
    }
    std::string_view line = std::string_view(document).substr(line_start);
    if (line.ends_with('\n')) line.remove_suffix(1);
    const bool is_separator = line == kSeparator;
    if (more && !is_separator) continue;
    if (is_separator) document.resize(line_start);
    if (document.ends_with('\n')) document.pop_back();
    RequireUtf8(path, document, document_offset);
    if (!document.empty() && !on_document({std::move(document)})) return;
    document.clear();
    document_offset = lines.offset();
  }
}

// "no key "content", the line has "text", "meta"" and, if one key is likely meant, a hint.
[[noreturn]] void ThrowMissingField(const std::string& where, const std::string& field,
                                    const Json& line) {
  std::vector<std::string> keys;
  std::string likely;
  size_t num_strings = 0;
  for (const auto& [key, value] : line.items()) {
    const std::string quoted = DumpJson(Json(key.substr(0, 60)));
    if (keys.size() < 10) keys.push_back(quoted);
    if (!value.is_string()) continue;
    ++num_strings;
    if (num_strings == 1 || key == "text" || key == "content") likely = quoted;
  }
  const bool is_clear = num_strings == 1 || likely == "\"text\"" || likely == "\"content\"";
  throw ModelError(fmt::format("{}: no key {}, the line has {}", where, DumpJson(Json(field)),
                               keys.empty() ? "none" : fmt::format("{}", fmt::join(keys, ", "))),
                   is_clear ? fmt::format("did you mean the key {}?", likely)
                            : "name the key that holds the text");
}

// Whether the line is an answer to a prompt.
bool IsPrompted(const Json& line) {
  return line.contains("prompt") && line["prompt"].is_string() && line.contains("completion") &&
         line["completion"].is_string();
}

bool IsConversation(const Json& line) {
  return line.contains("messages") && line["messages"].is_array();
}

void ReadJsonLines(const fs::path& path, const std::string& field, bool prompted,
                   const std::function<bool(Document)>& on_document) {
  ReadJsonObjects(path, [&](const std::string& where, Json object, std::string_view text) {
    // Not if another key than the usual one was asked for.
    const bool may_count_in_part = prompted && field == "text" && !object.contains(field);
    if (may_count_in_part && IsPrompted(object)) {
      const auto prompt = object["prompt"].get<std::string>();
      const auto completion = object["completion"].get<std::string>();
      return completion.empty() || on_document({prompt + completion, prompt.size()});
    }
    if (may_count_in_part && IsConversation(object)) {
      // The line as it is: templates see the order of keys.
      return on_document({.text = std::string(text), .is_conversation = true, .where = where});
    }
    const auto found = object.find(field);
    if (found == object.end()) ThrowMissingField(where, field, object);
    if (!found->is_string()) {
      throw ModelError(fmt::format("{}: key {} is {}, expected a string", where,
                                   DumpJson(Json(field)), found->type_name()));
    }
    std::string& document = found->get_ref<std::string&>();
    return document.empty() || on_document({std::move(document)});
  });
}

}  // namespace

TextSource ParseTextSource(const std::string& argument) {
  TextSource source;
  source.path = argument;
  std::error_code ignored;
  const size_t colon = argument.rfind(':');
  const bool has_share = colon != std::string::npos &&
                         argument.find('/', colon) == std::string::npos &&
                         !fs::exists(source.path, ignored);
  if (has_share) {
    const char* begin = argument.data() + colon + 1;
    const char* end = argument.data() + argument.size();
    const auto [last, error] = std::from_chars(begin, end, source.share);
    if (error != std::errc() || last != end || !std::isfinite(source.share) || source.share <= 0) {
      throw UsageError(
          fmt::format("{}: the share after the colon is \"{}\", expected a positive number",
                      argument, argument.substr(colon + 1)),
          "for example prose.txt.xz:2");
    }
    source.path = argument.substr(0, colon);
  }
  const FileKind kind = KindOf(source.path);
  if (kind.kind == TextKind::kUnknown) {
    throw UsageError(
        fmt::format("{}: unknown kind of text", source.path.string()),
        "expected .txt or .jsonl (also with .xz, .zst or .gz behind it), or .safetensors "
        "with token ids");
  }
  source.name = kind.stem;
  source.is_token_ids = kind.kind == TextKind::kTokenIds;
  return source;
}

namespace {

void Read(const TextSource& source, const std::string& field, bool prompted,
          const std::function<bool(Document)>& on_document) {
  switch (KindOf(source.path).kind) {
    case TextKind::kText:
      return ReadText(source.path, on_document);
    case TextKind::kJsonLines:
      return ReadJsonLines(source.path, field, prompted, on_document);
    default:
      throw UsageError(fmt::format("{}: not a file of documents", source.path.string()),
                       "expected .txt or .jsonl, also with .xz, .zst or .gz behind it");
  }
}

}  // namespace

void ReadDocuments(const TextSource& source, const std::string& field,
                   const std::function<bool(std::string document)>& on_document) {
  Read(source, field, false,
       [&](Document document) { return on_document(std::move(document.text)); });
}

void ReadPromptedDocuments(const TextSource& source, const std::string& field,
                           const std::function<bool(Document document)>& on_document) {
  Read(source, field, true, on_document);
}

CountedIds EncodeDocument(const Document& document, const EncodeFunction& encode,
                          const ConversationEncoder& conversation) {
  if (document.is_conversation) {
    if (conversation) return conversation(document.text, document.where);
    throw UsageError(document.where + ": conversations (`messages`) cannot be used here",
                     "give text, or `prompt` and `completion`");
  }
  if (document.prompt_bytes == 0) return {encode(document.text, true)};
  const std::string_view text = document.text;
  CountedIds result{encode(text.substr(0, document.prompt_bytes), true)};
  result.weights.assign(result.ids.size(), 0.0f);
  const std::vector<int32_t> answer = encode(text.substr(document.prompt_bytes), false);
  result.ids.insert(result.ids.end(), answer.begin(), answer.end());
  result.weights.resize(result.ids.size(), 1.0f);
  return result;
}

}  // namespace winnow
