// A fast hash for short keys in the tables of this folder; not for fingerprints (base/hash.h).
#pragma once

#include <cstdint>
#include <cstring>
#include <string_view>

namespace winnow::tok {

inline uint64_t MixHash(uint64_t value) {
  value *= 0x9E3779B97F4A7C15u;
  value ^= value >> 32;
  value *= 0xD6E8FEB86659FD93u;
  return value ^ value >> 29;
}

inline uint64_t HashBytes(std::string_view bytes) {
  const char* data = bytes.data();
  size_t left = bytes.size();
  uint64_t hash = left * 0xA0761D6478BD642Fu;
  for (; left > 8; left -= 8, data += 8) {
    uint64_t word;
    std::memcpy(&word, data, 8);
    hash = MixHash(hash ^ word);
  }
  uint64_t word = 0;
  if (left > 0) std::memcpy(&word, data, left);
  return MixHash(hash ^ word);
}

}  // namespace winnow::tok
