#include "tokenizer/unicode_normalization.h"

#include <utf8proc.h>

#include <algorithm>
#include <span>
#include <vector>

#include "base/error.h"
#include "tokenizer/utf8.h"

namespace winnow::tok {
namespace {

struct Range {
  char32_t first;
  char32_t last;
};

// Characters that utf8proc 2.8 (Unicode 15) reorders, composes or decomposes and the library's
// normalizer (Unicode 9) does not know: found by comparing the two over all code points.
constexpr Range kUnknownMarks[] = {
    {0x7FD, 0x7FD},     {0x898, 0x89F},     {0x8CA, 0x8D3},     {0x9FE, 0x9FE},
    {0xC3C, 0xC3C},     {0xD3B, 0xD3C},     {0xEBA, 0xEBA},     {0x1715, 0x1715},
    {0x1ABF, 0x1ACE},   {0x1DF6, 0x1DFA},   {0xA82C, 0xA82C},   {0x10D24, 0x10D27},
    {0x10EAB, 0x10EAC}, {0x10EFD, 0x10EFF}, {0x10F46, 0x10F50}, {0x10F82, 0x10F85},
    {0x11070, 0x11070}, {0x1133B, 0x1133B}, {0x1145E, 0x1145E}, {0x11839, 0x1183A},
    {0x11930, 0x11930}, {0x11938, 0x11938}, {0x1193D, 0x1193E}, {0x11943, 0x11943},
    {0x119E0, 0x119E0}, {0x11A34, 0x11A34}, {0x11A47, 0x11A47}, {0x11A99, 0x11A99},
    {0x11D42, 0x11D42}, {0x11D44, 0x11D45}, {0x11D97, 0x11D97}, {0x11F41, 0x11F42},
    {0x16FF0, 0x16FF1}, {0x1E08F, 0x1E08F}, {0x1E130, 0x1E136}, {0x1E2AE, 0x1E2AE},
    {0x1E2EC, 0x1E2EF}, {0x1E4EC, 0x1E4EF},
};
constexpr Range kUnknownCompatibility[] = {
    {0x32FF, 0x32FF},   {0xA7F2, 0xA7F4},   {0xAB69, 0xAB69},
    {0x10781, 0x10785}, {0x10787, 0x107B0}, {0x107B2, 0x107BA},
    {0x1E030, 0x1E06D}, {0x1F16C, 0x1F16C}, {0x1FBF0, 0x1FBF9},
};

bool Contains(std::span<const Range> ranges, char32_t code) {
  const auto after =
      std::upper_bound(ranges.begin(), ranges.end(), code,
                       [](char32_t c, const Range& range) { return c < range.first; });
  return after != ranges.begin() && code <= std::prev(after)->last;
}

int CombiningClass(utf8proc_int32_t code) {
  return utf8proc_get_property(code)->combining_class;
}

// Decomposed characters since the last border, put in order and composed at the next one. We do
// not call utf8proc_map: its reordering takes quadratic time in a long run of marks.
class Block {
 public:
  explicit Block(NormalizationForm form) : form_(form) {}

  void Add(char32_t code, std::string& out) {
    if (Contains(kUnknownMarks, code) ||
        (form_.compatibility && Contains(kUnknownCompatibility, code))) {
      Flush(out);
      AppendUtf8(code, out);
      return;
    }
    utf8proc_int32_t parts[32];
    const int options =
        UTF8PROC_STABLE | UTF8PROC_DECOMPOSE | (form_.compatibility ? UTF8PROC_COMPAT : 0);
    int boundclass = 0;
    const utf8proc_ssize_t count =
        utf8proc_decompose_char(static_cast<utf8proc_int32_t>(code), parts, 32,
                                static_cast<utf8proc_option_t>(options), &boundclass);
    if (count < 0 || count > 32) throw RuntimeError("a character cannot be decomposed");
    codes_.insert(codes_.end(), parts, parts + count);
  }

  void Flush(std::string& out) {
    for (auto start = codes_.begin(); start != codes_.end();) {
      if (CombiningClass(*start) == 0) {
        ++start;
        continue;
      }
      const auto end = std::find_if(start, codes_.end(),
                                    [](utf8proc_int32_t c) { return CombiningClass(c) == 0; });
      std::stable_sort(start, end, [](utf8proc_int32_t a, utf8proc_int32_t b) {
        return CombiningClass(a) < CombiningClass(b);
      });
      start = end;
    }
    auto count = static_cast<utf8proc_ssize_t>(codes_.size());
    if (form_.compose && count > 1) {
      count = utf8proc_normalize_utf32(
          codes_.data(), count, static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
    }
    for (utf8proc_ssize_t i = 0; i < count; ++i) {
      AppendUtf8(static_cast<char32_t>(codes_[static_cast<size_t>(i)]), out);
    }
    codes_.clear();
  }

 private:
  NormalizationForm form_;
  std::vector<utf8proc_int32_t> codes_;
};

bool IsAscii(char c) {
  return static_cast<unsigned char>(c) < 0x80;
}

char32_t LowercaseCharacter(char32_t code) {
  // Cased since Unicode 15.
  if (code == 0x1C89 || code == 0xA7CC || code == 0xA7CE || code == 0xA7D2 || code == 0xA7D4 ||
      code == 0xA7DA) {
    return code + 1;
  }
  if (code == 0xA7CB) return 0x264;
  if (code == 0xA7DC) return 0x19B;
  if (code >= 0x10D50 && code <= 0x10D65) return code + 0x20;
  if (code >= 0x16EA0 && code <= 0x16EB8) return code + 0x1B;
  return static_cast<char32_t>(utf8proc_tolower(static_cast<utf8proc_int32_t>(code)));
}

}  // namespace

std::string NormalizeUnicode(std::string_view text, NormalizationForm form) {
  std::string out;
  out.reserve(text.size());
  Block block(form);
  size_t position = 0;
  while (position < text.size()) {
    // ASCII characters are unchanged, except that the last one may combine with what follows.
    size_t ascii_end = position;
    while (ascii_end < text.size() && IsAscii(text[ascii_end])) ++ascii_end;
    if (ascii_end == text.size()) {
      out.append(text.substr(position));
      break;
    }
    if (ascii_end > position) {
      out.append(text.substr(position, ascii_end - 1 - position));
      position = ascii_end - 1;
    }
    do {
      const Char c = CharAt(text, position);
      block.Add(c.code, out);
      position += c.bytes;
    } while (position < text.size() && !IsAscii(text[position]));
    block.Flush(out);
  }
  return out;
}

std::string LowercaseUnicode(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (size_t i = 0; i < text.size();) {
    const Char c = CharAt(text, i);
    i += c.bytes;
    if (c.code < 0x80) {
      const auto byte = static_cast<char>(c.code);
      out.push_back(byte >= 'A' && byte <= 'Z' ? static_cast<char>(byte + ('a' - 'A')) : byte);
    } else if (c.code == 0x130) {
      out += "i\xCC\x87";  // i and a dot above
    } else {
      AppendUtf8(LowercaseCharacter(c.code), out);
    }
  }
  return out;
}

}  // namespace winnow::tok
