#include "tokenizer/normalizer.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "tokenizer/byte_level.h"
#include "tokenizer/json_fields.h"
#include "tokenizer/matcher.h"
#include "tokenizer/unicode_normalization.h"
#include "tokenizer/utf8.h"

namespace winnow::tok {
namespace {

constexpr size_t kMaxSteps = 64;

// NFKC makes at most 11 bytes of one; Replace and Prepend add a few.
size_t LargestSize(size_t bytes) {
  return (size_t{1} << 20) + 64 * bytes;
}

void RequireReasonable(size_t bytes, size_t limit) {
  if (bytes <= limit) return;
  throw ModelError(
      fmt::format("the tokenizer's normalizer makes more than {} bytes of a text", limit));
}

// For a transformation that treats characters one by one (`compose` joins the first with its
// marks): the origin is what its bytes become.
template <class F>
void Transform(Text& text, F transform) {
  std::string result = transform(std::string_view(text.bytes));
  if (text.origin_bytes > 0) {
    const size_t origin =
        transform(std::string_view(text.bytes).substr(0, text.origin_bytes)).size();
    text.origin_bytes = std::min(origin, result.size());
    while (text.origin_bytes < result.size() &&
           (static_cast<unsigned char>(result[text.origin_bytes]) & 0xC0) == 0x80) {
      ++text.origin_bytes;
    }
  }
  text.bytes = std::move(result);
}

void Prepend(Text& text, const std::string& prefix) {
  if (text.bytes.empty()) return;
  text.bytes.insert(0, prefix);
  if (text.origin_bytes > 0) text.origin_bytes += prefix.size();
}

void Replace(Text& text, const Matcher& matcher, const std::string& content,
             RegexScratch& scratch) {
  std::string result;
  size_t origin = 0;
  size_t previous = 0;
  const std::string_view bytes = text.bytes;
  const auto copy_until = [&](size_t end) {
    result.append(bytes.substr(previous, end - previous));
    origin += std::min(end, text.origin_bytes) - std::min(previous, text.origin_bytes);
  };
  // Without a match (the common case) nothing is copied.
  bool any = false;
  const size_t limit = LargestSize(bytes.size());
  matcher.ForEach(bytes, scratch, [&](Span match) {
    if (!any) result.reserve(bytes.size() + bytes.size() / 4 + 16);
    any = true;
    copy_until(match.begin);
    result.append(content);
    RequireReasonable(result.size(), limit);
    // New text belongs to the character before the end of what it replaces.
    if (text.origin_bytes > 0 && match.end <= text.origin_bytes) origin += content.size();
    previous = match.end;
  });
  if (!any) return;
  copy_until(bytes.size());
  text.bytes = std::move(result);
  text.origin_bytes = origin;
}

void Strip(Text& text, bool left, bool right) {
  const std::string_view bytes = text.bytes;
  size_t begin = 0;
  size_t end = bytes.size();
  while (left && begin < end) {
    const Char c = CharAt(bytes, begin);
    if (!IsSpace(c.code)) break;
    begin += c.bytes;
  }
  while (right && end > begin) {
    const Char c = CharBefore(bytes, end);
    if (!IsSpace(c.code)) break;
    end -= c.bytes;
  }
  text.origin_bytes -= std::min(text.origin_bytes, begin);
  text.bytes.erase(end);
  text.bytes.erase(0, begin);
}

std::string WithoutMarks(std::string_view text) {
  std::string result;
  result.reserve(text.size());
  for (size_t i = 0; i < text.size();) {
    const Char c = CharAt(text, i);
    if (!IsCombiningMark(c.code)) result.append(text.substr(i, c.bytes));
    i += c.bytes;
  }
  return result;
}

}  // namespace

Normalizer Normalizer::FromJson(const Json& json, const std::string& where) {
  Normalizer normalizer;
  normalizer.Add(json, where);
  return normalizer;
}

void Normalizer::Add(const Json& json, const std::string& where) {
  const Fields fields(json, where);
  const std::string type = fields.String("type");
  if (steps_.size() >= kMaxSteps) fields.Fail(fmt::format("more than {} steps", kMaxSteps));
  if (type == "Sequence") {
    int index = 0;
    for (const Json& step : fields.Array("normalizers")) {
      Add(step, fmt::format("{}.normalizers[{}]", where, index++));
    }
  } else if (type == "NFC" || type == "NFD" || type == "NFKC" || type == "NFKD") {
    const NormalizationForm form{type.back() == 'C', type.size() == 4};
    steps_.push_back([form](Text& text, RegexScratch&) {
      Transform(text, [form](std::string_view bytes) { return NormalizeUnicode(bytes, form); });
    });
  } else if (type == "Lowercase") {
    steps_.push_back([](Text& text, RegexScratch&) { Transform(text, LowercaseUnicode); });
  } else if (type == "StripAccents") {
    steps_.push_back([](Text& text, RegexScratch&) { Transform(text, WithoutMarks); });
  } else if (type == "ByteLevel") {
    steps_.push_back([](Text& text, RegexScratch&) {
      Transform(text, [](std::string_view bytes) {
        std::string mapped;
        AppendByteLevel(bytes, mapped);
        return mapped;
      });
    });
  } else if (type == "Prepend") {
    steps_.push_back(
        [prefix = fields.String("prepend")](Text& text, RegexScratch&) { Prepend(text, prefix); });
  } else if (type == "Replace") {
    steps_.push_back([matcher = Matcher::FromJson(fields.Get("pattern"), where + ".pattern"),
                      content = fields.String("content")](Text& text, RegexScratch& scratch) {
      Replace(text, matcher, content, scratch);
    });
  } else if (type == "Strip") {
    steps_.push_back([left = fields.Bool("strip_left"), right = fields.Bool("strip_right")](
                         Text& text, RegexScratch&) { Strip(text, left, right); });
  } else {
    fields.Fail(fmt::format("normalizer \"{}\" is not supported", type.substr(0, 60)));
  }
}

void Normalizer::Apply(Text& text, RegexScratch& scratch) const {
  const size_t limit = LargestSize(text.bytes.size());
  for (const Step& step : steps_) {
    step(text, scratch);
    RequireReasonable(text.bytes.size(), limit);
  }
}

}  // namespace winnow::tok
