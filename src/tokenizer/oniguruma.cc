#include "tokenizer/oniguruma.h"

#include <fmt/format.h>

#include <cctype>
#include <vector>

#include "base/error.h"
#include "tokenizer/char_set.h"
#include "tokenizer/utf8.h"

namespace winnow::tok {
namespace {

constexpr int kMaxGroupDepth = 50;

struct Options {
  bool ignore_case = false;
  bool dot_matches_newline = false;
};

class Translator {
 public:
  Translator(std::string_view pattern, const std::string& where) : text_(pattern), where_(where) {}

  std::string Run() {
    std::string out = Alternatives(Options{}, true);
    if (!AtEnd()) Fail("unmatched )");
    return out;
  }

 private:
  struct Atom {
    std::string pcre;
    bool one_character = false;  // a literal or a set: cheap to repeat
    bool repeatable = true;      // not an anchor
    char letter = 0;             // lower-case ASCII letter of a case-insensitive literal
  };
  struct Alternative {
    std::string pcre;
    // The leading `X+`, `X*` or `X{n,}` of one-character X, and whether anything follows it.
    std::string leading_run;
    bool more_follows = false;
  };

  bool AtEnd() const { return position_ == text_.size(); }
  char Peek(size_t ahead = 0) const {
    return position_ + ahead < text_.size() ? text_[position_ + ahead] : '\0';
  }
  bool Take(std::string_view expected) {
    if (!text_.substr(position_).starts_with(expected)) return false;
    position_ += expected.size();
    return true;
  }
  char32_t TakeCharacter() {
    if (AtEnd()) Fail("the pattern ends too early");
    const Char c = CharAt(text_, position_);
    position_ += c.bytes;
    return c.code;
  }
  [[noreturn]] void Fail(const std::string& problem) const {
    throw ModelError(
        fmt::format("{}: pattern \"{}\": at byte {}: {}", where_, text_.substr(0, 300), position_,
                    problem),
        "only the part of Oniguruma's syntax that can be matched exactly is supported");
  }

  std::string Alternatives(Options options, bool outermost) {
    if (++depth_ > kMaxGroupDepth) Fail("groups are nested too deeply");
    std::vector<Alternative> alternatives;
    do {
      alternatives.push_back(Sequence(options));
    } while (Take("|"));
    --depth_;
    std::string out;
    for (size_t i = 0; i < alternatives.size(); ++i) {
      if (i > 0) out += '|';
      if (outermost) out += Guard(alternatives, i);
      out += alternatives[i].pcre;
    }
    return out;
  }

  // `\s+$` on a long run of spaces that ends in a letter takes quadratic time: every start in the
  // run tries every end. If a run of X fails from one start, it fails from all later starts in the
  // same run, because the ends tried are a subset; so such an alternative is tried only at the
  // first character of a run or where the search begins. Needless where a later alternative takes
  // the run anyway.
  static std::string Guard(const std::vector<Alternative>& alternatives, size_t index) {
    const Alternative& alternative = alternatives[index];
    if (alternative.leading_run.empty() || !alternative.more_follows) return {};
    for (size_t i = index + 1; i < alternatives.size(); ++i) {
      if (alternatives[i].leading_run == alternative.leading_run && !alternatives[i].more_follows) {
        return {};
      }
    }
    return fmt::format("(?:\\G|(?<!{}))", alternative.leading_run);
  }

  Alternative Sequence(Options options) {
    Alternative result;
    char previous_letter = 0;
    bool first = true;
    while (!AtEnd() && Peek() != '|' && Peek() != ')') {
      // `(?i)` holds to the end of the group, over its later alternatives too.
      Options changed = options;
      if (IsolatedOptions(changed)) {
        result.pcre += Scoped(options, changed, Alternatives(changed, false));
        result.more_follows = true;
        break;
      }
      if (Take("(?#")) {
        while (TakeCharacter() != ')') {
        }
        continue;
      }
      const Atom atom = ParseAtom(options);
      bool unbounded = false;
      const std::string repeated = Repeat(atom, unbounded);
      const bool plain = repeated == atom.pcre;
      if (plain) RefuseMultiCharacterFold(previous_letter, atom.letter);
      previous_letter = plain ? atom.letter : '\0';
      if (first && unbounded && atom.one_character) {
        result.leading_run = atom.pcre;
      } else {
        result.more_follows = true;
      }
      first = false;
      result.pcre += repeated;
    }
    return result;
  }

  // Oniguruma matches (?i)ss with U+00DF and the like; PCRE2 does not.
  void RefuseMultiCharacterFold(char left, char right) const {
    if ((left == 'f' && (right == 'f' || right == 'i' || right == 'l')) ||
        (left == 's' && (right == 's' || right == 't'))) {
      Fail(fmt::format("case-insensitive \"{}{}\"", left, right));
    }
  }

  static std::string Scoped(Options outer, Options inner, const std::string& content) {
    if (outer.ignore_case == inner.ignore_case) return "(?:" + content + ")";
    return (inner.ignore_case ? "(?i:" : "(?-i:") + content + ")";
  }

  // Letters of (?im-im; returns whether there were any.
  bool OptionLetters(Options& options) {
    bool on = true;
    bool any = false;
    for (;; ++position_) {
      const char c = Peek();
      if (c == '-') {
        on = false;
      } else if (c == 'i') {
        options.ignore_case = on;
      } else if (c == 'm') {
        options.dot_matches_newline = on;
      } else {
        return any;
      }
      any = true;
    }
  }
  bool IsolatedOptions(Options& options) {
    const size_t start = position_;
    if (!Take("(?")) return false;
    if (OptionLetters(options) && Take(")")) return true;
    position_ = start;
    return false;
  }

  Atom Group(Options options) {
    const char* open = nullptr;
    bool is_assertion = false;
    if (Take("?:")) {
      open = "(?:";
    } else if (Take("?>")) {
      open = "(?>";
    } else if (Take("?=") || Take("?!")) {
      open = text_[position_ - 1] == '=' ? "(?=" : "(?!";
      is_assertion = true;
    } else if (Take("?<=") || Take("?<!")) {
      open = text_[position_ - 1] == '=' ? "(?<=" : "(?<!";
      is_assertion = true;
    } else if (Take("?<")) {
      // Nothing refers to groups (back references are refused), so a name has no meaning.
      while (Peek() != '>') {
        if (std::isalnum(static_cast<unsigned char>(Peek())) == 0 && Peek() != '_') {
          Fail("unsupported group");
        }
        ++position_;
      }
      ++position_;
      open = "(?:";
    } else if (Peek() == '?') {
      ++position_;
      Options inner = options;
      if (!OptionLetters(inner) || !Take(":")) Fail("unsupported group");
      Atom atom{Scoped(options, inner, Alternatives(inner, false))};
      if (!Take(")")) Fail("missing )");
      return atom;
    } else {
      open = "(?:";
    }
    Atom atom{open + Alternatives(options, false) + ")"};
    if (!Take(")")) Fail("missing )");
    atom.repeatable = !is_assertion;
    return atom;
  }

  Atom ParseAtom(Options options) {
    const auto anchor = [](const char* pcre) { return Atom{pcre, false, false}; };
    switch (Peek()) {
      case '(':
        ++position_;
        return Group(options);
      case '[':
        ++position_;
        return Bracket(options);
      case '.':
        ++position_;
        return Atom{options.dot_matches_newline ? "[\\x{0}-\\x{10ffff}]" : "[^\\n]", true};
      case '^':  // after any newline but the last of the text
        ++position_;
        return anchor("(?:\\A|(?<=\\n)(?!\\z))");
      case '$':
        ++position_;
        return anchor("(?=\\n|\\z)");
      case '*':
      case '+':
      case '?':
        Fail("nothing to repeat");
      case '\\':
        return Escape(options);
      default:
        return Literal(TakeCharacter(), options);
    }
  }

  Atom Literal(char32_t code, Options options) {
    Atom atom{PcreCode(code), true};
    if (options.ignore_case) {
      if (code >= 0x80) Fail("case-insensitive character beyond ASCII");
      const int c = static_cast<int>(code);
      if (std::isalpha(c) != 0) atom.letter = static_cast<char>(std::tolower(c));
    }
    return atom;
  }

  Atom Escape(Options options) {
    const auto anchor = [](const std::string& pcre) { return Atom{pcre, false, false}; };
    const std::string word = "[" + PcreShorthand('w', false) + "]";
    switch (Peek(1)) {
      case 'A':
        position_ += 2;
        return anchor("\\A");
      case 'z':
        position_ += 2;
        return anchor("\\z");
      case 'Z':
        position_ += 2;
        return anchor("(?=\\n?\\z)");
      case 'G':
        position_ += 2;
        return anchor("\\G");
      case 'b':
        position_ += 2;
        return anchor(fmt::format("(?:(?<={0})(?!{0})|(?<!{0})(?={0}))", word));
      case 'B':
        position_ += 2;
        return anchor(fmt::format("(?:(?<={0})(?={0})|(?<!{0})(?!{0}))", word));
      default:
        break;
    }
    bool negated = false;
    std::string set;
    if (SetEscape(set, negated, false)) return Atom{(negated ? "[^" : "[") + set + "]", true};
    ++position_;
    return Literal(CharacterEscape(), options);
  }

  // \s \S \d \D \w \W \h \H \p{..} \P{..} \p{^..}: the inside of a bracket.
  bool SetEscape(std::string& set, bool& negated, bool in_bracket) {
    const char letter = Peek(1);
    const char lower = static_cast<char>(std::tolower(static_cast<unsigned char>(letter)));
    if (lower == 's' || lower == 'd' || lower == 'w' || lower == 'h') {
      position_ += 2;
      negated = letter != lower;
      set = PcreShorthand(lower, in_bracket);
      return true;
    }
    if (lower != 'p') return false;
    position_ += 2;
    if (!Take("{")) Fail("\\p without {name}");
    negated = letter == 'P';
    if (Take("^")) negated = !negated;
    const size_t close = text_.find('}', position_);
    if (close == std::string_view::npos) Fail("missing }");
    property_ = text_.substr(position_, close - position_);
    const std::optional<std::string> body = PcreProperty(property_);
    if (!body) Fail(fmt::format("unsupported property \"{}\"", property_.substr(0, 60)));
    position_ = close + 1;
    set = *body;
    return true;
  }

  // After the backslash: an escape that stands for one character.
  char32_t CharacterEscape() {
    const char32_t code = TakeCharacter();
    switch (code) {
      case 't':
        return '\t';
      case 'n':
        return '\n';
      case 'r':
        return '\r';
      case 'f':
        return '\f';
      case 'v':
        return '\v';
      case 'a':
        return '\a';
      case 'e':
        return 0x1B;
      case 'u':
        return Hex(4, 4);
      case 'x': {
        if (Take("{")) {
          const char32_t value = Hex(1, 8);
          if (!Take("}")) Fail("missing }");
          return value;
        }
        const char32_t value = Hex(1, 2);
        if (value >= 0x80) Fail("\\x of a single byte beyond ASCII");
        return value;
      }
      default:
        if (code < 0x80 && std::isalnum(static_cast<int>(code)) != 0) {
          Fail(fmt::format("unsupported escape \\{}", static_cast<char>(code)));
        }
        return code;
    }
  }
  char32_t Hex(int min_digits, int max_digits) {
    uint64_t value = 0;
    int digits = 0;
    for (; digits < max_digits && std::isxdigit(static_cast<unsigned char>(Peek())) != 0;
         ++digits) {
      const char c = text_[position_++];
      value = value * 16 + static_cast<uint64_t>(c <= '9' ? c - '0' : (c | 0x20) - 'a' + 10);
    }
    if (digits < min_digits || value > 0x10FFFF || (value >= 0xD800 && value < 0xE000)) {
      Fail("not a code point");
    }
    return static_cast<char32_t>(value);
  }

  Atom Bracket(Options options) {
    const bool negated = Take("^");
    std::string body;
    std::vector<std::string> complements;  // sets of which everything else belongs to the bracket
    if (Peek() == ']') Fail("] at the start of a bracket");
    while (!Take("]")) {
      if (AtEnd()) Fail("missing ]");
      if (Peek() == '&' && Peek(1) == '&') Fail("&& in a bracket");
      bool complement = false;
      std::string set;
      if (Peek() == '[') {
        set = PosixClass(complement);
      } else if (Peek() == '\\' && SetEscape(set, complement, true)) {
        if (options.ignore_case) set += FoldedProperty();
      }
      if (set.empty()) {
        body += BracketRange(options);
      } else if (complement) {
        complements.push_back(set);
      } else {
        body += set;
      }
    }
    if (complements.empty()) return Atom{(negated ? "[^" : "[") + body + "]", true};
    if (body.empty() && complements.size() == 1) {
      return Atom{(negated ? "[" : "[^") + complements[0] + "]", true};
    }
    std::string any_of = body.empty() ? "" : "[" + body + "]|";
    for (const std::string& set : complements) any_of += "[^" + set + "]|";
    any_of.pop_back();
    if (negated) return Atom{"(?:(?!" + any_of + ")[\\x{0}-\\x{10ffff}])"};
    return Atom{"(?:" + any_of + ")"};
  }

  std::string PosixClass(bool& complement) {
    const size_t close = text_.find(":]", position_);
    if (Peek(1) != ':' || close == std::string_view::npos) Fail("[ inside a bracket");
    std::string_view name = text_.substr(position_ + 2, close - position_ - 2);
    complement = name.starts_with('^');
    if (complement) name.remove_prefix(1);
    const std::optional<std::string> set = PcrePosix(name);
    if (!set) Fail(fmt::format("unsupported class [:{}:]", name.substr(0, 40)));
    position_ = close + 2;
    return *set;
  }

  // In a case-insensitive bracket Oniguruma adds the case variants of a property's members.
  std::string FoldedProperty() {
    const std::string_view name = std::exchange(property_, {});
    if (name.empty() || name == "N" || name == "P" || name == "S" || name == "Z") return {};
    if (name == "L") return "\\x{345}";  // folds to U+03B9
    Fail(fmt::format("\\p{{{}}} in a case-insensitive bracket", name.substr(0, 40)));
  }

  char32_t BracketCharacter(Options options) {
    if (Peek() == '[') Fail("[ inside a bracket");
    if (Take("\\")) {
      if (Take("b")) return '\b';
      const char lower = static_cast<char>(std::tolower(static_cast<unsigned char>(Peek())));
      if (lower == 's' || lower == 'd' || lower == 'w' || lower == 'h' || lower == 'p') {
        Fail("a set at the end of a range");
      }
      return CharacterEscape();
    }
    const char32_t code = TakeCharacter();
    if (options.ignore_case && code >= 0x80) Fail("case-insensitive character beyond ASCII");
    return code;
  }
  std::string BracketRange(Options options) {
    const char32_t first = BracketCharacter(options);
    if (Peek() != '-' || Peek(1) == ']' || Peek(1) == '\0') return PcreCode(first);
    ++position_;
    const char32_t last = BracketCharacter(options);
    if (last < first) Fail("empty range in a bracket");
    std::string range = PcreRange(first, last);
    // `a-c-e`: the second hyphen stands for itself.
    if (Peek() == '-' && Peek(1) != ']') {
      ++position_;
      range += PcreCode('-');
    }
    return range;
  }

  // The atom with the quantifiers that follow it.
  std::string Repeat(const Atom& atom, bool& unbounded) {
    std::string out = atom.pcre;
    for (int stacked = 0;; ++stacked) {
      std::string quantifier;
      const char c = Peek();
      bool interval = false;
      if (c == '*' || c == '+' || c == '?') {
        quantifier = c;
        ++position_;
      } else if (!Interval(quantifier)) {
        return out;
      } else {
        interval = true;
      }
      if (!atom.repeatable) Fail("a repeated anchor");
      if (stacked > 8) Fail("too many quantifiers");
      unbounded = stacked == 0 && c != '?' && (!interval || quantifier.ends_with(",}"));
      // After an interval Ruby's `+` is one more quantifier, not a possessive mark.
      if (Peek() == '?') {
        if (interval && quantifier.find(',') == std::string::npos) Fail("{n}?");
        quantifier += '?';
        ++position_;
      } else if (Peek() == '+' && !interval) {
        quantifier += '+';
        ++position_;
      }
      if (stacked > 0) out = "(?:" + out + ")";
      out += quantifier;
    }
  }
  // {n} {n,} {n,m} {,m}; anything else is literal text.
  bool Interval(std::string& quantifier) {
    if (Peek() != '{') return false;
    size_t at = position_ + 1;
    const auto digits = [&] {
      const size_t start = at;
      while (at < text_.size() && std::isdigit(static_cast<unsigned char>(text_[at])) != 0) ++at;
      return text_.substr(start, at - start);
    };
    const std::string_view low = digits();
    const bool comma = at < text_.size() && text_[at] == ',';
    if (comma) ++at;
    const std::string_view high = comma ? digits() : std::string_view();
    if ((low.empty() && high.empty()) || at == text_.size() || text_[at] != '}') return false;
    if (low.size() > 5 || high.size() > 5) Fail("repeat count too large");
    if (!low.empty() && !high.empty() &&
        std::stoi(std::string(high)) < std::stoi(std::string(low))) {
      Fail("{n,m} with n greater than m");
    }
    position_ = at + 1;
    quantifier = fmt::format("{{{}{}{}}}", low.empty() ? "0" : low, comma ? "," : "", high);
    return true;
  }

  std::string_view text_;
  const std::string& where_;
  size_t position_ = 0;
  int depth_ = 0;
  std::string_view property_;  // name of the last \p{...}
};

}  // namespace

std::string OnigurumaToPcre2(std::string_view pattern, const std::string& where) {
  if (pattern.size() > kMaxPatternBytes) {
    throw ModelError(fmt::format("{}: pattern of {} bytes, more than {}", where, pattern.size(),
                                 kMaxPatternBytes));
  }
  return Translator(pattern, where).Run();
}

}  // namespace winnow::tok
