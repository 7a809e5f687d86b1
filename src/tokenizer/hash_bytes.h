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

// Up to eight bytes as a number, the missing ones zero. Without a byte loop and without reading
// beyond the end: the two reads of a middle size overlap in bytes that are equal.
inline uint64_t LoadUpTo8(const char* data, size_t bytes) {
  const auto load = [](const char* from, auto value) {
    std::memcpy(&value, from, sizeof value);
    return static_cast<uint64_t>(value);
  };
  if (bytes >= 8) return load(data, uint64_t{});
  if (bytes >= 4) {
    return load(data, uint32_t{}) | load(data + bytes - 4, uint32_t{}) << 8 * (bytes - 4);
  }
  if (bytes >= 2) {
    return load(data, uint16_t{}) | load(data + bytes - 2, uint16_t{}) << 8 * (bytes - 2);
  }
  return bytes == 0 ? 0 : load(data, uint8_t{});
}

inline uint64_t HashBytes(std::string_view bytes) {
  const char* data = bytes.data();
  size_t left = bytes.size();
  uint64_t hash = left * 0xA0761D6478BD642Fu;
  for (; left > 8; left -= 8, data += 8) hash = MixHash(hash ^ LoadUpTo8(data, 8));
  return MixHash(hash ^ LoadUpTo8(data, left));
}

}  // namespace winnow::tok
