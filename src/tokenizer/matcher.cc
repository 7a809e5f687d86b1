#include "tokenizer/matcher.h"

#include <fmt/format.h>
#include <string.h>

#include <optional>
#include <utility>

#include "base/error.h"
#include "tokenizer/json_fields.h"
#include "tokenizer/utf8.h"

namespace winnow::tok {
namespace {

int WordClass(char32_t code) {
  return IsSpace(code) ? 0 : IsWordCharacter(code) ? 1 : 2;
}

struct Item {
  Span span;
  bool is_match;
};

}  // namespace

Matcher Matcher::FromRegex(std::string_view oniguruma_pattern, const std::string& where) {
  Matcher matcher;
  matcher.kind_ = Kind::kRegex;
  matcher.regex_ = std::make_shared<const Regex>(oniguruma_pattern, where);
  return matcher;
}

Matcher Matcher::FromText(std::string text) {
  if (text.empty()) return FromRegex("", "empty pattern");
  Matcher matcher;
  matcher.kind_ = Kind::kText;
  matcher.text_ = std::move(text);
  return matcher;
}

Matcher Matcher::FromSet(Predicate contains) {
  Matcher matcher;
  matcher.kind_ = Kind::kSet;
  matcher.contains_ = contains;
  return matcher;
}

Matcher Matcher::WordRuns() {
  Matcher matcher;
  matcher.kind_ = Kind::kWordRuns;
  return matcher;
}

Matcher Matcher::FromJson(const Json& pattern, const std::string& where) {
  const Fields fields(pattern, where);
  if (pattern.size() == 1 && fields.Find("String") != nullptr) {
    return FromText(fields.String("String"));
  }
  if (pattern.size() == 1 && fields.Find("Regex") != nullptr) {
    return FromRegex(fields.String("Regex"), where);
  }
  fields.Fail("a pattern must be {\"String\": ...} or {\"Regex\": ...}");
}

void Matcher::ForEach(std::string_view text, RegexScratch& scratch,
                      FunctionRef<void(Span)> found) const {
  if (text.empty()) return;
  size_t position = 0;
  switch (kind_) {
    case Kind::kRegex: {
      std::optional<size_t> last_end;
      Span match{};
      while (position <= text.size() && regex_->Search(text, position, scratch, &match)) {
        if (match.begin == match.end && last_end == match.end) {
          position += position < text.size() ? CharBytes(text[position]) : 1;
          continue;
        }
        position = match.end;
        last_end = match.end;
        found(match);
      }
      return;
    }
    case Kind::kText:
      while (position < text.size()) {
        // memmem is linear in the worst case, std::string_view::find is not.
        const void* at =
            memmem(text.data() + position, text.size() - position, text_.data(), text_.size());
        if (at == nullptr) return;
        const auto begin = static_cast<size_t>(static_cast<const char*>(at) - text.data());
        position = begin + text_.size();
        found({begin, position});
      }
      return;
    case Kind::kSet:
      while (position < text.size()) {
        const Char c = CharAt(text, position);
        if (contains_(c.code)) found({position, position + c.bytes});
        position += c.bytes;
      }
      return;
    case Kind::kWordRuns:
      while (position < text.size()) {
        const size_t begin = position;
        const int run = WordClass(CharAt(text, position).code);
        while (position < text.size()) {
          const Char c = CharAt(text, position);
          if (WordClass(c.code) != run) break;
          position += c.bytes;
        }
        if (run != 0) found({begin, position});
      }
      return;
  }
}

SplitBehavior ParseSplitBehavior(const std::string& name, const std::string& where) {
  if (name == "Isolated") return SplitBehavior::kIsolated;
  if (name == "Removed") return SplitBehavior::kRemoved;
  if (name == "MergedWithPrevious") return SplitBehavior::kMergedWithPrevious;
  if (name == "MergedWithNext") return SplitBehavior::kMergedWithNext;
  if (name == "Contiguous") return SplitBehavior::kContiguous;
  throw ModelError(fmt::format("{}: unknown split behavior \"{}\"", where, name.substr(0, 60)));
}

void Split(std::string_view text, const Matcher& matcher, SplitBehavior behavior, bool invert,
           RegexScratch& scratch, FunctionRef<void(Span)> piece) {
  const auto emit = [&](Span span) {
    if (span.begin != span.end) piece(span);
  };
  // The piece that may still grow, and the kind of the last item.
  std::optional<Span> pending;
  bool pending_is_match = false;
  const auto flush = [&] {
    if (pending) emit(*std::exchange(pending, std::nullopt));
  };
  const auto take = [&](Item item) {
    const bool is_match = item.is_match != invert;
    bool joins = false;
    switch (behavior) {
      case SplitBehavior::kIsolated:
        emit(item.span);
        return;
      case SplitBehavior::kRemoved:
        if (!is_match) emit(item.span);
        return;
      case SplitBehavior::kMergedWithPrevious:
        joins = is_match && !pending_is_match;
        break;
      case SplitBehavior::kMergedWithNext:
        joins = !is_match && pending_is_match;
        break;
      case SplitBehavior::kContiguous:
        joins = is_match == pending_is_match;
        break;
    }
    if (joins && pending) {
      pending->end = item.span.end;
    } else {
      flush();
      pending = item.span;
    }
    pending_is_match = is_match;
  };

  size_t previous = 0;
  matcher.ForEach(text, scratch, [&](Span match) {
    if (match.begin != previous) take({{previous, match.begin}, false});
    take({match, true});
    previous = match.end;
  });
  if (previous != text.size()) take({{previous, text.size()}, false});
  flush();
}

}  // namespace winnow::tok
