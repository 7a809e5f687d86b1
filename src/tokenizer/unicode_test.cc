// Normalization forms and UTF-8. Expected strings: tokenizers 0.23.3's NFC, NFD, NFKC, NFKD and
// Lowercase; UTF-8 cases: the Unicode standard, table 3-8.
#include <gtest/gtest.h>

#include <string>

#include "tokenizer/byte_level.h"
#include "tokenizer/unicode_normalization.h"
#include "tokenizer/utf8.h"

namespace winnow::tok {
namespace {

constexpr NormalizationForm kNfc{true, false};
constexpr NormalizationForm kNfd{false, false};
constexpr NormalizationForm kNfkc{true, true};
constexpr NormalizationForm kNfkd{false, true};

TEST(Unicode, NormalizationForms) {
  EXPECT_EQ(NormalizeUnicode("e\u0301 A\u030A\u0301x", kNfc), "\u00e9 \u01fax");
  EXPECT_EQ(NormalizeUnicode("\u00e9\ud55c", kNfd), "e\u0301\u1112\u1161\u11ab");
  EXPECT_EQ(NormalizeUnicode("\u1112\u1161\u11ab", kNfc), "\ud55c");
  EXPECT_EQ(NormalizeUnicode("a\u0315\u0300\u05ae\u0300", kNfc), "\u00e0\u05ae\u0300\u0315");
  EXPECT_EQ(NormalizeUnicode("\u212b\u0958\u2126", kNfc), "\u00c5\u0915\u093c\u03a9");
  EXPECT_EQ(NormalizeUnicode("\ufb01\u00b2\u3392\u00a0", kNfkc), "fi2MHz ");
  EXPECT_EQ(NormalizeUnicode("\u1e9b\u0323", kNfkd), "s\u0323\u0307");
  EXPECT_EQ(NormalizeUnicode("\u0301x", kNfc), "\u0301x");
}

// Assigned after the library's tables were made: they stay as they are.
TEST(Unicode, CharactersTheLibraryDoesNotKnow) {
  EXPECT_EQ(NormalizeUnicode("\U00011935\U00011930", kNfc), "\U00011935\U00011930");
  EXPECT_EQ(NormalizeUnicode("\u32ff\U0001e030", kNfkc), "\u32ff\U0001e030");
  EXPECT_EQ(NormalizeUnicode("a\u1ac0\u0334", kNfd), "a\u1ac0\u0334");
}

TEST(Unicode, ManyMarksAreOrderedInLinearTime) {
  std::string marks;
  std::string low;
  std::string high;
  for (int i = 0; i < 200000; ++i) {
    marks += "\u0301\u0334";  // classes 230 and 1
    high += "\u0301";
    low += "\u0334";
  }
  EXPECT_EQ(NormalizeUnicode("q" + marks, kNfc), "q" + low + high);
}

TEST(Unicode, LowercaseIsPerCharacter) {
  EXPECT_EQ(LowercaseUnicode("AZ\u0130\u03a3\u1e9e\u01c4\u1c89"),
            "azi\u0307\u03c3\u00df\u01c6\u1c8a");
}

TEST(Unicode, LossyUtf8) {
  const auto lossy = [](std::string_view bytes) {
    std::string text;
    AppendLossyUtf8(bytes, text);
    return text;
  };
  EXPECT_EQ(lossy("a\xF1\x80\x80\xE1\x80\xC2"
                  "b\x80"
                  "c\x80\xBF"
                  "d"),
            "a\uFFFD\uFFFD\uFFFD"
            "b\uFFFD"
            "c\uFFFD\uFFFD"
            "d");
  EXPECT_EQ(lossy("\xC0\xAF\xE0\x80\xBF"), "\uFFFD\uFFFD\uFFFD\uFFFD\uFFFD");
  EXPECT_EQ(lossy("\xE2\x82"), "\uFFFD");
  EXPECT_EQ(lossy("plain ASCII of more than eight bytes"), "plain ASCII of more than eight bytes");
}

TEST(ByteLevel, EveryByteHasACharacter) {
  EXPECT_EQ(ByteLevelCharacter(' '), 0x120u);
  EXPECT_EQ(ByteLevelCharacter('\n'), 0x10Au);
  EXPECT_EQ(ByteLevelCharacter(0xAD), 0x143u);
  for (int byte = 0; byte < 256; ++byte) {
    EXPECT_EQ(ByteLevelByte(ByteLevelCharacter(static_cast<uint8_t>(byte))), byte);
  }
  EXPECT_FALSE(ByteLevelByte(' ').has_value());
  EXPECT_FALSE(ByteLevelByte(0x144).has_value());
  std::string bytes;
  AppendByteLevelBytes("\u0120a", bytes);
  AppendByteLevelBytes("\u0120 ", bytes);  // a space is none of the alphabet: kept as it is
  EXPECT_EQ(bytes, " a\u0120 ");
}

}  // namespace
}  // namespace winnow::tok
