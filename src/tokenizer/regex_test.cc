// Oniguruma's patterns through PCRE2, against pieces cut by Oniguruma itself (regex.jsonl, made
// with tokenizers 0.23.3: Split, behavior Isolated).
#include "tokenizer/regex.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "base/error.h"
#include "base/file.h"
#include "base/json.h"
#include "tokenizer/matcher.h"
#include "tokenizer/oniguruma.h"

namespace winnow::tok {
namespace {

std::vector<std::string> Pieces(const std::string& text, const Matcher& matcher,
                                SplitBehavior behavior = SplitBehavior::kIsolated,
                                bool invert = false) {
  std::vector<std::string> pieces;
  RegexScratch scratch;
  Split(text, matcher, behavior, invert, scratch,
        [&](Span span) { pieces.push_back(text.substr(span.begin, span.end - span.begin)); });
  return pieces;
}

TEST(Regex, CutsAsOnigurumaDoes) {
  const std::string path = WINNOW_TEST_DATA "/tokenizers/regex.jsonl";
  const std::string content = ReadTextFile(path);
  std::vector<std::string> texts;
  for (size_t begin = 0; begin < content.size();) {
    const size_t end = content.find('\n', begin);
    const Json line = ParseJson(content.substr(begin, end - begin), path);
    begin = end + 1;
    if (texts.empty()) {
      texts = line["texts"].get<std::vector<std::string>>();
      continue;
    }
    SCOPED_TRACE(line["pattern"].dump());
    const Matcher matcher = Matcher::FromRegex(line["pattern"].get<std::string>(), "regex.jsonl");
    for (size_t i = 0; i < texts.size(); ++i) {
      EXPECT_EQ(Pieces(texts[i], matcher), line["pieces"][i].get<std::vector<std::string>>());
    }
  }
}

TEST(Regex, RefusesWhatItCannotMatchExactly) {
  for (const char* pattern : {"(a",
                              "a)",
                              "[a",
                              "a\\",
                              "*a",
                              "a|+",
                              "(?x)a",
                              "(?<=a+)b",
                              "[a&&b]",
                              "[a[bc]]",
                              "[]a]",
                              "[^]",
                              "\\1",
                              "(a)\\k<1>",
                              "\\R",
                              "\\X",
                              "\\K",
                              "\\N",
                              "\\y",
                              "\\xff",
                              "\\x{110000}",
                              "\\ud800",
                              "\\p{L",
                              "\\p{Nonsense}",
                              "\\p{C}",
                              "\\p{Cn}",
                              "[[:alpha:]]",
                              "[b-a]",
                              "[a-\\d]",
                              "a{3,2}",
                              "a{2}?",
                              "a{100000}",
                              "a{999999}",
                              "^*",
                              "(?=a)+",
                              "(?i:ss)",
                              "(?i:fi)",
                              "(?i:\u00e9)",
                              "(?i:[\u00e9])",
                              "(?i:[\\p{Lu}])",
                              "(?~a)",
                              "(?(1)a)",
                              "(?P<n>a)"}) {
    EXPECT_THROW(Regex(pattern, "w"), ModelError) << pattern;
  }
  EXPECT_THROW(Regex(std::string(kMaxPatternBytes + 1, 'a'), "w"), ModelError);
  EXPECT_THROW(Regex(std::string(1000, '(') + std::string(1000, ')'), "w"), ModelError);
  EXPECT_THROW(Regex("(((((a{500}){500}){500}){500}){500})", "w"), ModelError);
  try {
    Regex("x(unclosed[a-z", "file.json: pre_tokenizer");
    FAIL();
  } catch (const ModelError& error) {
    EXPECT_EQ(std::string(error.what()),
              "file.json: pre_tokenizer: pattern \"x(unclosed[a-z\": at byte 14: missing ]");
  }
}

TEST(Regex, ExplodingPatternsEndWithAnError) {
  RegexScratch scratch;
  Span match{};
  const std::string text = std::string(40, 'a') + "b";
  EXPECT_THROW(Regex("(?:a|a|aa)+$|(?:a+)+c", "w").Search(text, 0, scratch, &match), RuntimeError);
}

// The run of spaces is tried once, not from each of its characters: with a million that matters.
TEST(Regex, SpacesBeforeTheEndAreLinear) {
  const std::string spaces(1000000, ' ');
  const Matcher matcher = Matcher::FromRegex("\\s+$", "w");
  EXPECT_EQ(Pieces(spaces + "x", matcher), std::vector<std::string>{spaces + "x"});
  EXPECT_EQ(Pieces("x" + spaces, matcher), (std::vector<std::string>{"x", spaces}));
  EXPECT_EQ(Pieces("  a\n b \n\n", matcher), (std::vector<std::string>{"  a\n b", " \n\n"}));
}

// Deep backtracking leaves the compiled code's stack and goes on in the interpreter.
TEST(Regex, LongMatchesOfGroups) {
  std::string text;
  for (int i = 0; i < 300000; ++i) text += i % 3 == 0 ? "ab" : "cd";
  EXPECT_EQ(Pieces(text + "!", Matcher::FromRegex("(?:ab|cd|[\\S])+!", "w")),
            std::vector<std::string>{text + "!"});
}

TEST(Split, BehaviorsAreThoseOfTheLibrary) {
  const Matcher dash = Matcher::FromText("-");
  const std::string text = "the-final--countdown";
  using Strings = std::vector<std::string>;
  // The example in the library's documentation of SplitDelimiterBehavior.
  EXPECT_EQ(Pieces(text, dash, SplitBehavior::kRemoved), (Strings{"the", "final", "countdown"}));
  EXPECT_EQ(Pieces(text, dash, SplitBehavior::kIsolated),
            (Strings{"the", "-", "final", "-", "-", "countdown"}));
  EXPECT_EQ(Pieces(text, dash, SplitBehavior::kMergedWithPrevious),
            (Strings{"the-", "final-", "-", "countdown"}));
  EXPECT_EQ(Pieces(text, dash, SplitBehavior::kMergedWithNext),
            (Strings{"the", "-final", "-", "-countdown"}));
  EXPECT_EQ(Pieces(text, dash, SplitBehavior::kContiguous),
            (Strings{"the", "-", "final", "--", "countdown"}));
  EXPECT_EQ(Pieces(text, dash, SplitBehavior::kRemoved, true), (Strings{"-", "-", "-"}));
}

}  // namespace
}  // namespace winnow::tok
