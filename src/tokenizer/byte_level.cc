#include "tokenizer/byte_level.h"

#include <array>

#include "tokenizer/utf8.h"

namespace winnow::tok {
namespace {

constexpr char32_t kFirstShifted = 0x100;

struct Alphabet {
  std::array<char32_t, 256> character{};
  std::array<int16_t, 0x144> byte{};  // -1: not in the alphabet
};

constexpr bool IsPrintable(uint32_t byte) {
  return (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte != 0xAD);
}

constexpr Alphabet MakeAlphabet() {
  Alphabet alphabet;
  for (int16_t& byte : alphabet.byte) byte = -1;
  char32_t next = kFirstShifted;
  for (uint32_t byte = 0; byte < 256; ++byte) {
    const char32_t character = IsPrintable(byte) ? byte : next++;
    alphabet.character[byte] = character;
    alphabet.byte[character] = static_cast<int16_t>(byte);
  }
  return alphabet;
}

constexpr Alphabet kAlphabet = MakeAlphabet();

}  // namespace

char32_t ByteLevelCharacter(uint8_t byte) {
  return kAlphabet.character[byte];
}

std::optional<uint8_t> ByteLevelByte(char32_t character) {
  if (character >= kAlphabet.byte.size() || kAlphabet.byte[character] < 0) return std::nullopt;
  return static_cast<uint8_t>(kAlphabet.byte[character]);
}

void AppendByteLevel(std::string_view bytes, std::string& out) {
  for (const char byte : bytes) AppendUtf8(ByteLevelCharacter(static_cast<uint8_t>(byte)), out);
}

void AppendByteLevelBytes(std::string_view token, std::string& out) {
  const size_t start = out.size();
  for (size_t i = 0; i < token.size();) {
    const Char c = CharAt(token, i);
    const std::optional<uint8_t> byte = ByteLevelByte(c.code);
    if (!byte) {
      out.resize(start);
      out.append(token);
      return;
    }
    out.push_back(static_cast<char>(*byte));
    i += c.bytes;
  }
}

}  // namespace winnow::tok
