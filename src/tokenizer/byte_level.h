// The byte-level alphabet of GPT-2: every byte has a printable character, so that a vocabulary of
// strings can hold arbitrary bytes. 0x21-0x7E, 0xA1-0xAC, 0xAE-0xFF stand for themselves (as code
// points); the other 68, in order, are U+0100 .. U+0143.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace winnow::tok {

char32_t ByteLevelCharacter(uint8_t byte);
std::optional<uint8_t> ByteLevelByte(char32_t character);

// Appends the character of each byte.
void AppendByteLevel(std::string_view bytes, std::string& out);
// Appends the bytes `token` (valid UTF-8) stands for; its own UTF-8 if a character is none of the
// alphabet.
void AppendByteLevelBytes(std::string_view token, std::string& out);

// What ByteLevel splits with unless told not to.
inline constexpr std::string_view kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

}  // namespace winnow::tok
